"""Jobs: the work of making token shards, cut so that any process can do any part of it, and do it again.

    pieces ──plan_jobs──> Job, Job, ... ──survey_job──> Survey    (only where the split or the tokenizer needs it)
                                        └─tokenize_job──> shards, and after each a commit record

Which jobs there are and what each writes depends on the text and the plan alone: never on the number of processes, on
their order, or on what was interrupted. A job that was interrupted resumes from its last commit: the text before that
is read, not tokenized. A commit record is written when its shards are safe on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from pretrain.io import write_atomically
from pretrain.text import Document, ReadStats
from pretrain.text.pieces import Piece, join_ranges, read_piece
from pretrain.text.problems import Cuts
from pretrain.text.split import NOTHING, Part, Shares, Survey, Tail, join_parts, split_tail, survey
from pretrain.tokenizer import Tokenizer
from pretrain.tokens.shards import Shard, ShardWriter, utf8_bytes
from pretrain.tokens.source import Report, read_parts

WORK = "unfinished"  # the folder of commit records inside that of the shards, until the manifest is there
JOB_BYTES = 8 * 2**20  # text of a job at least, unless the shards are smaller
JOBS = 32  # that the text is cut into, if each is then at least of JOB_BYTES and at most of a shard
BYTES_PER_TOKEN = 4  # about, so that a job's text fills one shard


@dataclass(frozen=True)
class Job:
    """Consecutive pieces of the text, how they are split, and what is known of the text before them."""

    number: int
    pieces: tuple[Piece, ...]
    split: str  # train, val or test: one side for all of it; hash or tail: how each document's side is found
    field: str = "text"  # that holds the text, in JSON lines and Parquet
    shares: Shares = NOTHING  # (split hash)
    tail: Tail | None = None  # where what is held out begins (split tail, as the two that follow)
    position: int = 0  # characters before the job
    opened: int = 0  # where the document began that may continue in the job
    cuts: Cuts = "none"  # those of its tokenizer, by which it reads its text, also before there is one
    whole: bool = True  # as ReadStats.whole

    @property
    def size(self) -> int:
        """About how many bytes of text it has."""
        return sum(piece.size for piece in self.pieces)

    def stats(self) -> ReadStats:
        """With which its text is always read, the same for each pass; nothing is counted yet."""
        return ReadStats(cuts=self.cuts, whole=self.whole)

    def documents(self, stats: ReadStats) -> Iterator[Document]:
        """Its documents, in order."""
        for piece in self.pieces:
            yield from read_piece(piece, self.field, stats)

    def parts(self, stats: ReadStats) -> Iterator[Part]:
        """Its documents, each on its side of the split."""
        if self.tail:
            return join_parts(split_tail(self.documents(stats), self.tail, self.position, self.opened))
        return read_parts(self.pieces, self.field, self.split, self.shares, stats)


@dataclass(frozen=True)
class Commit:
    """A stretch of a job that is finished: its shards are on the disk."""

    shards: tuple[Shard, ...]
    parts: int  # of the job that are done, with those of earlier commits
    last: bool
    read: ReadStats  # for the whole job; in its last commit only


def plan_jobs(
    pieces: Sequence[Piece],
    split: str,
    shard_tokens: int,
    *,
    first: int = 0,
    field: str = "text",
    shares: Shares = NOTHING,
    cuts: Cuts = "none",
    whole: bool = True,
) -> list[Job]:
    """Group consecutive pieces into jobs, numbered from ``first``; ``cuts`` and ``whole`` are those of ReadStats."""
    pieces = join_ranges(pieces, cuts if whole else "none")
    total = sum(piece.size for piece in pieces)
    most = min(max(total // JOBS, JOB_BYTES), shard_tokens * BYTES_PER_TOKEN)
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return [
        Job(number, tuple(group), split, field, shares, cuts=cuts, whole=whole)
        for number, group in enumerate(groups, first)
    ]


def survey_job(folder: Path, job: Job, alphabet: bool, report: Report) -> Survey:
    """Count what a job's text holds, and keep it for :func:`read_survey`."""
    stats = job.stats()

    def documents() -> Iterator[Document]:
        for document in job.documents(stats):
            report(utf8_bytes(document.text), 0)
            yield document

    found = replace(survey(documents(), alphabet), read=stats)
    write_atomically(_survey_file(folder, job), json.dumps(asdict(found)))
    return found


def read_survey(folder: Path, job: Job) -> Survey | None:
    """The survey of a job that an earlier process made, if one did."""
    file = _survey_file(folder, job)
    if not file.is_file():
        return None
    tree = json.loads(file.read_text(encoding="utf-8"))
    return Survey(read=ReadStats(**tree.pop("read", {})), **tree)


def _survey_file(folder: Path, job: Job) -> Path:
    return folder / WORK / f"survey-{job.number:05d}.json"


def tokenize_job(
    folder: Path, job: Job, shard_tokens: int, tokenizer: Path, bos: bool, threads: int, report: Report
) -> list[Commit]:
    """Write the shards of a job that are not written yet; gives all its commits.

    A shard is closed after the first document with which its tokens are ``shard_tokens`` or more; a document too large
    to be held at once may go on in the next shard. Shards of all sides are closed together. ``bos`` is
    ``data.bos``; ``threads`` 0 is one for each core.
    """
    commits = read_commits(folder, job.number)
    encoder = load_tokenizer(tokenizer, tokenizer.stat().st_mtime_ns).with_bos(bos)
    stats = job.stats()
    done = commits[-1].parts if commits else 0
    writers: dict[str, ShardWriter] = {}

    def commit(last: bool) -> None:
        shards = tuple(writers[split].close() for split in sorted(writers))
        writers.clear()
        commits.append(Commit(shards, done, last, stats if last else ReadStats()))
        write_atomically(_record(folder, job.number, len(commits) - 1), json.dumps(asdict(commits[-1])))

    with ExitStack() as unfinished:
        tokens = 0
        parts = ((part, part.text) for part in islice(job.parts(stats), done, None))
        for part, ids in encoder.encode_documents(parts, threads, expected=job.size):
            if part.split not in writers:
                file = f"{part.split}-{job.number:05d}-{len(commits):03d}.bin"
                writers[part.split] = unfinished.enter_context(ShardWriter(folder, file, part.split, encoder))
            size = utf8_bytes(part.text)
            added = writers[part.split].write(ids, size, part.begins)
            report(size, added)
            tokens += added
            done += 1
            if tokens >= shard_tokens:
                commit(last=False)
                tokens = 0
        commit(last=True)
    return commits


@lru_cache(maxsize=1)
def load_tokenizer(file: Path, _time: int) -> Tokenizer:
    """The tokenizer of all jobs of a process: loading a large vocabulary takes as long as a small job."""
    return Tokenizer.load(file)


def read_commits(folder: Path, job: int) -> list[Commit]:
    """The commits of a job so far; those from the first on whose shards are not there any more do not count."""
    commits: list[Commit] = []
    while (file := _record(folder, job, len(commits))).is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
        if not all((folder / shard.file).is_file() for shard in shards):
            break
        read = ReadStats(**tree.pop("read", {"problems": tree.pop("problems", {})}))  # (problems: earlier versions)
        commits.append(Commit(shards=shards, read=read, **tree))
    return commits


def finished_commits(folder: Path, job: Job) -> list[Commit] | None:
    """The commits of a job that an earlier process finished, if one did."""
    commits = read_commits(folder, job.number)
    return commits if commits and commits[-1].last else None


def _record(folder: Path, job: int, number: int) -> Path:
    return folder / WORK / f"{job:05d}-{number:03d}.json"
