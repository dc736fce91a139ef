"""Jobs: the work of making token shards, cut so that any process can do any part of it, and do it again.

    pieces ──plan_jobs──> Job, Job, ... ──survey_job──> Survey    (only where the split or the tokenizer needs it)
                                        └─tokenize_job──> shards, and after each a commit record

Which jobs there are and what each writes depends on the text and the plan alone: never on the number of processes, on
their order, or on what was interrupted. A job is done again from its last commit: the text before that is read, not
tokenized. A commit record is written when its shards are safe on the disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from pretrain.io import write_atomically
from pretrain.text import Document
from pretrain.text.pieces import Piece, read_piece
from pretrain.text.split import TRAIN, Part, Survey, Tail, all_to, side_by_hash, split_hash, split_tail, survey
from pretrain.tokenizer import Tokenizer
from pretrain.tokens.shards import Shard, ShardWriter, utf8_bytes
from pretrain.tokens.workers import Report

Read = Callable[[Piece, str, Counter[str]], Iterator[Document]]

WORK = "unfinished"
"""The folder of commit records, inside that of the shards; it goes when the manifest is there."""
JOB_BYTES = 8 * 2**20
"""Text of a job at least, unless the shards are smaller."""
JOBS = 32
"""Jobs that the text is cut into, if each is then at least of JOB_BYTES and at most of a shard."""
BYTES_PER_TOKEN = 4
"""About, to make a job's text fill one shard."""


@dataclass(frozen=True)
class Job:
    """Consecutive pieces of the text, how they are split, and what is known of the text before them."""

    number: int
    pieces: tuple[Piece, ...]
    split: str  # train, val, tail or hash: one side for all of it, or how each document's is found
    field: str = "text"  # that holds the text, in JSON lines and Parquet
    val_fraction: float = 0.0  # (split hash)
    before: Piece | None = None  # the first piece of the file that the job's first piece is a later part of
    tail: Tail | None = None  # where validation begins (split tail, as the two that follow)
    position: int = 0  # characters before the job
    opened: int = 0  # where the document began that the job may go on with

    @property
    def size(self) -> int:
        """About how many bytes of text it has."""
        return sum(piece.size for piece in self.pieces)

    def parts(self, problems: Counter[str], read: Read = read_piece) -> Iterator[Part]:
        """Its documents, each on its side of the split."""
        if self.split != "tail":
            return read_parts(self.pieces, self.field, self.split, problems, self.val_fraction, self.before, read)
        assert self.tail is not None
        documents = chain.from_iterable(read(piece, self.field, problems) for piece in self.pieces)
        return split_tail(documents, self.tail, self.position, self.opened)


@dataclass(frozen=True)
class Commit:
    """A stretch of a job that is finished: its shards are on the disk."""

    shards: tuple[Shard, ...]
    parts: int  # of the job that are done, with those of earlier commits
    last: bool
    problems: dict[str, int]  # of the whole job; in its last commit only


def plan_jobs(
    pieces: Sequence[Piece],
    split: str,
    shard_tokens: int,
    *,
    first: int = 0,
    field: str = "text",
    val_fraction: float = 0.0,
) -> list[Job]:
    """Put consecutive pieces together to jobs, numbered from ``first``."""
    total = sum(piece.size for piece in pieces)
    most = min(max(total // JOBS, JOB_BYTES), shard_tokens * BYTES_PER_TOKEN)
    groups: list[list[Piece]] = []
    size = 0
    first_of_file: dict[str, Piece] = {}
    for piece in pieces:
        first_of_file.setdefault(piece.file, piece)
        if not groups or size + piece.size > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    jobs = []
    for number, group in enumerate(groups, first):
        before = first_of_file[group[0].file]
        jobs.append(
            Job(number, tuple(group), split, field, val_fraction, before=None if before == group[0] else before)
        )
    return jobs


def read_parts(
    pieces: Sequence[Piece],
    field: str,
    split: str,
    problems: Counter[str],
    val_fraction: float = 0.0,
    before: Piece | None = None,
    read: Read = read_piece,
) -> Iterator[Part]:
    """The documents of consecutive pieces, each on its side of the split: train, val, or hash (as for :class:`Job`)."""
    documents = chain.from_iterable(read(piece, field, problems) for piece in pieces)
    if split != "hash":
        yield from all_to(split, documents)
    elif first := next(documents, None):
        side = TRAIN
        if first.continues and before is not None:  # only a plain text goes on over pieces, and it is one document
            for document in islice(read(before, field, Counter()), 1):
                side = side_by_hash(document.text, val_fraction)
        yield from split_hash(chain([first], documents), val_fraction, side)


def training_texts(
    sources: Iterable[tuple[Iterable[Part], float]], report: Report = lambda _size, _tokens: None
) -> Iterator[str]:
    """The training texts that a tokenizer is trained on: of each source, about so many bytes from its beginning."""
    for parts, limit in sources:
        taken = 0
        for part in parts:
            if part.split == TRAIN:
                yield part.text
            size = utf8_bytes(part.text)
            report(size, 0)
            taken += size
            if taken >= limit:
                break


def survey_job(folder: Path, job: Job, alphabet: bool, report: Report, read: Read = read_piece) -> Survey:
    """Count what a job's text holds, and keep it for :func:`read_survey`."""

    def documents() -> Iterator[Document]:
        for piece in job.pieces:
            for document in read(piece, job.field, Counter()):
                report(utf8_bytes(document.text), 0)
                yield document

    found = survey(documents(), alphabet)
    write_atomically(_survey_file(folder, job), json.dumps(asdict(found)))
    return found


def read_survey(folder: Path, job: Job) -> Survey | None:
    """What was counted of a job before; None if it was not."""
    file = _survey_file(folder, job)
    return Survey(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _survey_file(folder: Path, job: Job) -> Path:
    return folder / WORK / f"survey-{job.number:05d}.json"


def tokenize_job(
    folder: Path,
    job: Job,
    shard_tokens: int,
    tokenizer: Path | Tokenizer,
    threads: int,
    report: Report,
    read: Read = read_piece,
) -> list[Commit]:
    """Write the shards of a job that are not written yet; gives all its commits.

    A shard is closed after the first document with which its tokens are ``shard_tokens`` or more; a document too large
    to be held at once may go on in the next shard. Training and validation shards are closed together. ``threads`` 0 is
    one for each core.
    """
    commits = read_commits(folder, job.number)
    if commits and commits[-1].last:
        return commits
    if isinstance(tokenizer, Path):
        tokenizer = _load_tokenizer(tokenizer, tokenizer.stat().st_mtime_ns)
    problems: Counter[str] = Counter()
    done = commits[-1].parts if commits else 0
    writers: dict[str, ShardWriter] = {}

    def commit(last: bool) -> None:
        shards = tuple(writers[split].close() for split in sorted(writers))
        writers.clear()
        commits.append(Commit(shards, done, last, dict(sorted(problems.items())) if last else {}))
        write_atomically(_record(folder, job.number, len(commits) - 1), json.dumps(asdict(commits[-1])))

    try:
        tokens = 0
        parts = ((part, part.text) for part in islice(job.parts(problems, read), done, None))
        for part, ids in tokenizer.encode_documents(parts, threads, expected=job.size):
            size = utf8_bytes(part.text)
            if part.split not in writers:
                file = f"{part.split}-{job.number:05d}-{len(commits):03d}.bin"
                writers[part.split] = ShardWriter(folder, file, part.split, tokenizer)
            added = writers[part.split].write(ids, size, part.begins)
            report(size, added)
            tokens += added
            done += 1
            if tokens >= shard_tokens:
                commit(last=False)
                tokens = 0
        commit(last=True)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    return commits


@lru_cache(maxsize=1)
def _load_tokenizer(file: Path, _time: int) -> Tokenizer:
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
        commits.append(Commit(shards=shards, **tree))
    return commits


def _record(folder: Path, job: int, number: int) -> Path:
    return folder / WORK / f"{job:05d}-{number:03d}.json"
