"""From text to token shards, whatever its size: the plan, its jobs, and the manifest that ends them.

    find_pieces → jobs → (survey → tail) → tokenizer → jobs → shards, commits → manifest.json
                         run here, in worker processes, or on a Ray cluster

The folder says how far the work is, so that a process killed at any moment goes on when the same is asked for again:

    plan.json        what is made of which text; another plan is refused
    tokenizer.json   once it is built
    unfinished/      what was counted and committed (jobs.py)
    *.bin            shards
    manifest.json    last of all: the folder is finished
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.config import Config, DataConfig, TokenizerConfig
from pretrain.errors import DataError, Interrupted, PretrainError, UsageError
from pretrain.io import write_atomically
from pretrain.text import Document, embedded_name
from pretrain.text.pieces import EMBEDDED, Piece, find_pieces, read_piece
from pretrain.text.split import TRAIN, VAL, find_tail, join_surveys
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.datasets import prepared_dataset
from pretrain.tokens.jobs import (
    JOB_BYTES,
    WORK,
    Commit,
    Job,
    Read,
    Report,
    Work,
    job_parts,
    plan_jobs,
    read_commits,
    read_survey,
    survey_job,
    tokenize_job,
    training_texts,
)
from pretrain.tokens.on_ray import run_on_ray
from pretrain.tokens.progress import Progress
from pretrain.tokens.shards import MANIFEST, PLAN, Manifest, Shard, utf8_bytes
from pretrain.tokens.workers import Function, run_here, run_in_processes

PLAN_FORMAT = 2
TOKENIZER = "tokenizer.json"

SHARD_TOKENS = 100_000_000
LEARN_BYTES = 200_000_000
"""Text that a bpe is trained on at most, taken evenly from all of it: more changes few merges, and costs memory."""

HERE_BYTES = 16 * 2**20
"""A text up to this is done in this process: others would hardly have started."""
HELD_CHARACTERS = 4 * HERE_BYTES
"""Of a text that is done in this process."""


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def prepare(config: Config, folder: Path, say: Callable[[str], None] = lambda _: None, live: Any = None) -> Prepared:
    """Make token shards in ``folder`` of the text that ``config.data`` names, for runs of ``config``.

    Args:
        config: what to train.
        folder: as for :func:`prepare_text`.
        say: where lines for a person go.
        live: a rich.console.Console to show progress on, if it is a terminal.

    Raises what :func:`prepare_text` does; a DataError also if the text is too short for one context.
    """
    needed = config.model.context_length + 1
    return prepare_text(config.data, config.tokenizer, folder, progress=Progress(say, live), needed=needed)


def open_prepared(folder: Path) -> Prepared:
    """A folder that :func:`prepare` finished earlier."""
    return Prepared(folder, Manifest.load(folder), Tokenizer.load(folder / TOKENIZER))


def prepare_text(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    *,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    engine: str = "local",
    progress: Progress | None = None,
    needed: int = 1,
) -> Prepared:
    """Make token shards in ``folder``, or go on with those that are unfinished there; the same bytes in any case.

    Args:
        data: the text and its split.
        tokenizer: which one.
        folder: absent, empty, or one that this function began.
        workers: processes; 0 for as many as there are cores. A text of seconds is done in this one.
        shard_tokens: tokens at which a shard is closed.
        engine: ``local`` or ``ray``.
        progress: where to show it.
        needed: tokens that each side of the split must have.

    Raises:
        DataError: the text is missing, unreadable or too short; the vocabulary does not fit it.
        UsageError: the folder holds something else.
        Interrupted: a signal asked to stop; what is committed stays.
    """
    preparation = _Preparation(data, tokenizer, folder, workers, shard_tokens, engine, progress or Progress(), needed)
    return preparation.finished() if (folder / MANIFEST).is_file() else preparation.run()


class _Preparation:
    """One call of :func:`prepare_text`; its methods are in the order of the work."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        folder: Path,
        workers: int,
        shard_tokens: int,
        engine: str,
        progress: Progress,
        needed: int,
    ):
        self.data, self.folder = data, folder
        self.kind, self.vocab_size, self.pattern = tokenizer.kind, tokenizer.vocab_size, tokenizer.pattern
        self.workers, self.engine = workers or os.cpu_count() or 1, engine
        self.progress, self.needed = progress, needed
        made_of_text = tokenizer.kind in ("bpe", "char")
        self.tokenizer = None if made_of_text else build_tokenizer(tokenizer.kind, tokenizer.vocab_size, [])
        pieces = find_pieces(data.paths, data.field, data.separator)
        held_out = find_pieces(data.val_paths, data.field, data.separator) if data.val_paths else []
        self.jobs = _jobs(data, pieces, held_out, shard_tokens)
        self.size = _size(self.jobs)
        self.work = Work(str(folder), data.field, data.val_fraction, shard_tokens)
        few = len(self.jobs) <= HERE_BYTES // JOB_BYTES + bool(held_out)
        self.here = engine == "local" and self.size <= HERE_BYTES and few
        self.read = _holding(read_piece) if self.here else read_piece
        made = (self.kind, self.vocab_size, self.pattern)
        self.plan = {
            "format": PLAN_FORMAT,
            "text": _sources(pieces),
            "validation text": _sources(held_out),
            "pieces": hashlib.sha256(repr([*pieces, *held_out]).encode()).hexdigest(),
            "field": data.field,
            "separator": data.separator,
            "split": data.split,
            "val_fraction": data.val_fraction,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else " ".join(map(str, made)),
            "shard_tokens": shard_tokens,
        }

    def finished(self) -> Prepared:
        """The folder as it is, checked cheaply."""
        _check_plan(self.folder, self.plan)
        dataset, prepared = prepared_dataset(self.folder), open_prepared(self.folder)
        if dataset.tokenizer != prepared.tokenizer.fingerprint:
            raise DataError(f"{self.folder / TOKENIZER} is not that of the shards; delete {self.folder} to begin anew")
        self.check_length(prepared.manifest)
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        self.progress.say(f"{self.folder} is complete; nothing left to prepare")
        return prepared

    def run(self) -> Prepared:
        """All that is left to do."""
        made = _make(self.folder)
        with _locked(self.folder):
            _take_up(self.folder, self.plan)
            _sweep(self.folder)
            try:
                with _terminable():
                    self.say_text()
                    self.survey()
                    self.build_tokenizer()
                    return self.finish(self.tokenize())
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped while preparing {self.folder}; what is done so far stays: give the same command again"
                ) from None
            except Exception as error:
                if self.here or not _recorded(self.folder):  # a mistake in a fresh run leaves nothing behind
                    _clear(self.folder, made)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise PretrainError(f"{self.folder}: {_full(error)}") from None
                raise
            finally:
                _sweep(self.folder)

    def say_text(self) -> None:
        """Which text it is; and an early end for one that can fill no context."""
        paths = [*self.data.paths[:3], *(["..."] if len(self.data.paths) > 3 else [])]
        name = ", ".join(paths) or embedded_name()
        if not self.here:
            self.progress.say(f"text      {name}: about {self.size / 1e6:,.0f} MB")
            return
        size = count = 0
        for piece in (piece for job in self.jobs for piece in job.pieces):
            for document in self.read(piece, self.data.field, Counter()):
                size += utf8_bytes(document.text)
                count += not document.continues
        if size + count < self.needed:  # a token stands for at least one byte in every tokenizer
            raise DataError(self.too_short("training", size + count, "bytes"))
        self.progress.say(f"text      {name}: {size / 1e6:.1f} MB in {count:,} document{'s' * (count != 1)}")

    def survey(self) -> None:
        """Count the characters before each job, where the split needs it; the distinct ones for a char tokenizer."""
        alphabet = self.kind == "char"
        jobs = [job for job in self.jobs if alphabet or job.split == "tail"]
        if not jobs:
            return
        there = {job.number: read_survey(self.work, job) for job in jobs}
        left = [job for job in jobs if there[job.number] is None]
        new = self.perform("counting", survey_job, [(self.work, job, alphabet) for job in left], _size(left))
        there.update(zip((job.number for job in left), new, strict=True))
        found = [each for each in there.values() if each is not None]
        if alphabet:
            whole = join_surveys(found)
            # The vocabulary depends on the distinct characters and on whether there is more than one document.
            self.tokenizer = build_tokenizer("char", 0, [whole.alphabet] * min(2, whole.documents))
        split = [(job, each) for job, each in zip(jobs, found, strict=True) if job.split == "tail"]
        if split:
            self.work = replace(
                self.work, tail=find_tail(join_surveys([each for _, each in split]), self.data.val_fraction)
            )
        position = opened = 0
        for job, each in split:
            self.jobs[job.number] = replace(job, position=position, opened=opened)
            opened = opened if each.last is None else position + each.last
            position += each.characters

    def build_tokenizer(self) -> None:
        """Take the tokenizer that an earlier call made, or make it and keep it."""
        if self.here:
            self.check_bytes()
        file = self.folder / TOKENIZER
        if file.is_file():
            self.tokenizer = Tokenizer.load(file)
            return
        if self.tokenizer is not None:
            _save(self.tokenizer, self.folder)
            return
        jobs = tuple(job for job in self.jobs if job.split != VAL)
        size = _size(jobs)
        if size > LEARN_BYTES:
            taken = f"{LEARN_BYTES / 1e6:,.0f} MB, taken evenly from all of the text"
            self.progress.say(f"tokenizer trained on {taken}")
        arguments = (self.work, jobs, self.vocab_size, self.pattern)
        # In a process of its own, whose memory is free afterwards; on this machine also for Ray.
        self.perform("learning", learn_bpe, [arguments], min(size, LEARN_BYTES), workers=1)
        self.tokenizer = Tokenizer.load(file)

    def check_bytes(self) -> None:
        """Of a small text, see before the tokenizer is made whether each side of the split can fill a context."""
        sizes = Counter[str]()
        for job in self.jobs:
            for part in job_parts(self.work, job, Counter(), self.read):
                sizes[part.split] += utf8_bytes(part.text) + part.begins
        for split, name in ((TRAIN, "training"), (VAL, "validation")):
            if sizes[split] < self.needed and (sizes[split] or split == TRAIN):
                raise DataError(self.too_short(name, sizes[split], "bytes"))

    def tokenize(self) -> list[list[Commit]]:
        """The commits of all jobs."""
        commits = [read_commits(self.folder, job.number) for job in self.jobs]
        left = [job for job, there in zip(self.jobs, commits, strict=True) if not (there and there[-1].last)]
        tokenizer = self.tokenizer if self.here else str(self.folder / TOKENIZER)
        processes = min(self.workers, len(left)) if self.engine == "local" else 1
        threads = 0 if self.here else max(1, (os.cpu_count() or 1) // max(1, processes))
        arguments = [(self.work, job, tokenizer, threads) for job in left]
        done = self.perform("tokenizing", tokenize_job, arguments, _size(left))
        for job, there in zip(left, done, strict=True):
            commits[job.number] = there
        return commits

    def finish(self, commits: list[list[Commit]]) -> Prepared:
        """Check what came out, and write the manifest."""
        assert self.tokenizer is not None
        shards: list[Shard] = [shard for job in commits for commit in job for shard in commit.shards]
        problems: Counter[str] = sum((Counter(job[-1].problems) for job in commits), Counter())
        manifest = Manifest(
            self.tokenizer.dtype.name,
            self.tokenizer.vocab_size,
            self.tokenizer.fingerprint,
            tuple(sorted(shards, key=lambda shard: shard.split)),  # training first; else as they are
            self.tokenizer.bos_id,
            dict(sorted(problems.items())),
        )
        self.check_length(manifest)
        manifest.save(self.folder)
        shutil.rmtree(self.folder / WORK)
        return Prepared(self.folder, manifest, self.tokenizer)

    def check_length(self, manifest: Manifest) -> None:
        """A DataError if a side of the split is too short."""
        splits = {job.split for job in self.jobs}
        if manifest.documents("train") == 0:
            raise DataError("there is no text to train on; give files that hold some, or hold less of it out")
        if manifest.documents("val") == 0 and splits != {TRAIN}:
            raise DataError(
                f"no text is left for validation (of {manifest.documents('train'):,} documents, data.split "
                f"{self.data.split}, data.val_fraction {self.data.val_fraction}); give more text or another split"
            )
        for split, name in ((TRAIN, "training"), (VAL, "validation")):
            tokens = manifest.tokens(split)
            if tokens < self.needed and (manifest.documents(split) or split == TRAIN):
                raise DataError(self.too_short(name, tokens, "tokens"))

    def too_short(self, name: str, size: int, unit: str) -> str:
        """The message for a split that does not fill one context."""
        mend = f"give more text, or --model.context_length {max(1, size // 2)}"
        if name == "validation":
            mend += ", or a larger --data.val_fraction (0 trains on everything)"
        length = self.needed - 1
        return f"the {name} text has {size} {unit}, shorter than one context of {length} tokens and its target; {mend}"

    def perform(
        self, name: str, function: Function, arguments: Sequence[tuple], size: int, workers: int = 0
    ) -> list[Any]:
        """Call ``function`` with each of ``arguments``, about ``size`` bytes of text, wherever the work is done."""
        if not arguments:
            return []
        with self.progress.stage(name, size):
            if self.here:
                return run_here(partial(function, read=self.read), arguments, self.progress.add)
            if self.engine == "ray" and not workers:
                return run_on_ray(function, arguments, self.progress.add, self.folder / PLAN, self.workers)
            return run_in_processes(function, arguments, self.progress.add, workers or self.workers)


def learn_bpe(
    work: Work, jobs: Sequence[Job], vocab_size: int, pattern: str, report: Report, read: Read = read_piece
) -> None:
    """Train a bpe on the training text of the jobs, or on LEARN_BYTES of it, and save it in the folder."""
    size = _size(jobs)

    def limit(job: Job) -> float:
        return math.inf if size <= LEARN_BYTES else job.size * LEARN_BYTES // size

    texts = training_texts(((job_parts(work, job, Counter(), read), limit(job)) for job in jobs), report)
    _save(build_tokenizer("bpe", vocab_size, texts, pattern), Path(work.folder))


def _jobs(data: DataConfig, pieces: Sequence[Piece], held_out: Sequence[Piece], shard_tokens: int) -> list[Job]:
    """The jobs of all text, in order; their numbers are their places."""
    if held_out:
        jobs = plan_jobs(pieces, TRAIN, shard_tokens)
        return jobs + plan_jobs(held_out, VAL, shard_tokens, first=len(jobs))
    if data.split == "last_file":
        last = pieces[-1].file
        before = [piece for piece in pieces if piece.file != last]
        if not before:
            raise DataError(f"data.split last_file needs two files or more, and there is only {last}; use split tail")
        jobs = plan_jobs(before, TRAIN, shard_tokens)
        after = [piece for piece in pieces if piece.file == last]
        return jobs + plan_jobs(after, VAL, shard_tokens, first=len(jobs))
    return plan_jobs(pieces, data.split if data.val_fraction else TRAIN, shard_tokens)


def _size(jobs: Sequence[Job]) -> int:
    return sum(job.size for job in jobs)


def _holding(read: Read) -> Read:
    """Read each piece once and hold its documents: for small text, which several stages go through.

    What comes out of a compressed file may be far more than was expected, and is then read each time.
    """
    held: dict[Piece, tuple[list[Document], Counter[str]]] = {}

    def read_held(piece: Piece, field: str, problems: Counter[str]) -> Iterator[Document]:
        if piece in held:
            problems.update(held[piece][1])
            yield from held[piece][0]
            return
        documents, characters, found = [], 0, Counter[str]()
        for document in read(piece, field, found):
            characters += len(document.text)
            if characters <= HELD_CHARACTERS:
                documents.append(document)
            else:
                documents.clear()
            yield document
        problems.update(found)
        if characters <= HELD_CHARACTERS:
            held[piece] = documents, found

    return read_held


def _sources(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Name, size and time of change of each file, as a plan keeps them."""
    sources = []
    for file in dict.fromkeys(piece.file for piece in pieces):
        if file == EMBEDDED or "://" in file:
            sources.append([file, sum(piece.size for piece in pieces if piece.file == file), 0])
        else:
            status = os.stat(os.path.expanduser(file))
            sources.append([file, status.st_size, status.st_mtime_ns])
    return sources


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """A UsageError unless what is in the folder was made by the same plan."""
    if changed := _changes(folder, plan):
        raise UsageError(
            f"{folder} holds token shards of another plan ({'; '.join(changed)}); choose another folder, "
            f"or delete this one to begin anew"
        )


def _changes(folder: Path, plan: dict[str, Any]) -> list[str]:
    """How a plan differs from that of the folder."""
    try:
        old = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        changes = []
        for key, value in plan.items():
            if old.get(key) == value:
                continue
            if key in ("text", "validation text"):
                before, now = ({each[0]: each for each in each_plan[key]} for each_plan in (old, plan))
                file = next(file for file in {**before, **now} if before.get(file) != now.get(file))
                how = "was changed" if file in before and file in now else "is new" if file in now else "was part of it"
                changes.append(f"{file} {how}")
            elif key not in ("pieces", "tokenizer"):
                changes.append(f"{key} {old.get(key)} → {value}")
            elif key == "tokenizer" or not changes:
                changes.append(f"another {key}")
        return changes
    except FileNotFoundError:
        return [f"it has no {PLAN}"]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return [f"its {PLAN} is damaged"]


def _make(folder: Path) -> list[Path]:
    """Make the folder, or see that nothing is in it but our own; gives the folders that were made, inner ones first."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / PLAN).is_file()
        if not ours and any(path.name != WORK and path.suffix != ".tmp" for path in folder.iterdir()):
            raise UsageError(f"{folder} has files, but none of unfinished token shards; choose another folder")
        (folder / WORK).mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    return made


def _take_up(folder: Path, plan: dict[str, Any]) -> None:
    """See that what is in the folder was begun by the same plan; with nothing committed, begin anew by this one."""
    if (folder / PLAN).is_file():
        if any(read_commits(folder, job) for job in _begun(folder)):
            _check_plan(folder, plan)
        elif _changes(folder, plan):
            _clear(folder, [])
    (folder / WORK).mkdir(exist_ok=True)
    if not (folder / PLAN).is_file():
        write_atomically(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _begun(folder: Path) -> list[int]:
    """The jobs of which something is committed."""
    return [int(file.name.partition("-")[0]) for file in (folder / WORK).glob("[0-9]*-000.json")]


def _recorded(folder: Path) -> bool:
    return any(file.suffix == ".json" for file in (folder / WORK).iterdir())


def _sweep(folder: Path) -> None:
    """Remove unfinished files of processes that were killed."""
    for stray in folder.glob("*.tmp"):
        stray.unlink(missing_ok=True)


def _clear(folder: Path, made: Sequence[Path]) -> None:
    """Remove what preparing put into a folder, and the folders that were made for it."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    _sweep(folder)
    for ours in (PLAN, TOKENIZER, "train-*.bin", "val-*.bin"):
        for file in folder.glob(ours):
            file.unlink(missing_ok=True)
    for place in made:
        with suppress(OSError):  # something else was put there meanwhile
            place.rmdir()


def _full(error: OSError) -> str:
    return f"{(error.strerror or 'no space left').lower()}; make room and give the same command again"


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    temporary = folder / f"{TOKENIZER}.{os.getpid()}.tmp"
    tokenizer.save(temporary)
    os.replace(temporary, folder / TOKENIZER)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process from the same work, where the system has such locks; it goes when this process ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"another process is preparing {folder} just now; wait for it, or choose another") from None
    except OSError:  # a file system without such locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM does what Ctrl-C does, unless the program around has its own way with it."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
