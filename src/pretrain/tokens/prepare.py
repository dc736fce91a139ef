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
from pathlib import Path
from typing import Any

from pretrain.config import Config, DataConfig, TokenizerConfig
from pretrain.errors import DataError, Interrupted, PretrainError, UsageError
from pretrain.io import write_atomically
from pretrain.text import Document, embedded_name
from pretrain.text.pieces import EMBEDDED, Piece, find_pieces, read_piece
from pretrain.text.split import TRAIN, VAL, Survey, find_tail, join_surveys
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.datasets import prepared_dataset
from pretrain.tokens.jobs import (
    JOB_BYTES,
    WORK,
    Job,
    Read,
    plan_jobs,
    read_commits,
    read_survey,
    survey_job,
    tokenize_job,
    training_texts,
)
from pretrain.tokens.on_ray import run_on_ray
from pretrain.tokens.progress import Progress
from pretrain.tokens.shards import MANIFEST, PLAN, Manifest, utf8_bytes
from pretrain.tokens.workers import Function, Report, run_in_processes

PLAN_FORMAT = 2
TOKENIZER = "tokenizer.json"

SHARD_TOKENS = 100_000_000
LEARN_BYTES = 200_000_000
"""Text that a bpe is trained on at most, taken evenly from all of it: more changes few merges, and costs memory."""

SMALL_BYTES = 16 * 2**20
"""A text up to this is done in this process: others would hardly have started."""
CACHED_CHARACTERS = 4 * SMALL_BYTES
"""Of a text that is done in this process."""


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def prepare(config: Config, folder: Path, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Make token shards in ``folder`` of the text that ``config.data`` names, for runs of ``config``.

    ``say`` is where lines for a person go.
    Raises what :func:`prepare_text` does; a DataError also if the text is too short for one context.
    """
    needed = config.model.context_length + 1
    return prepare_text(config.data, config.tokenizer, folder, progress=Progress(say), needed=needed)


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
    progress = progress or Progress()
    cores = os.cpu_count() or 1
    workers = workers or cores
    kind = tokenizer.kind
    built = None if kind in ("bpe", "char") else build_tokenizer(kind, tokenizer.vocab_size, [])
    pieces = find_pieces(data.paths, data.field, data.separator)
    val_pieces = find_pieces(data.val_paths, data.field, data.separator) if data.val_paths else []
    jobs = _jobs(data, pieces, val_pieces, shard_tokens)
    plan = {
        "format": PLAN_FORMAT,
        "text": _sources(pieces),
        "validation text": _sources(val_pieces),
        "pieces": hashlib.sha256(repr([*pieces, *val_pieces]).encode()).hexdigest(),
        "field": data.field,
        "separator": data.separator,
        "split": data.split,
        "val_fraction": data.val_fraction,
        "tokenizer": built.fingerprint if built else f"{kind} {tokenizer.vocab_size} {tokenizer.pattern}",
        "shard_tokens": shard_tokens,
    }
    if (folder / MANIFEST).is_file():
        _check_plan(folder, plan)
        dataset, prepared = prepared_dataset(folder), open_prepared(folder)  # checked cheaply
        if dataset.tokenizer != prepared.tokenizer.fingerprint:
            raise DataError(f"{folder / TOKENIZER} is not that of the shards; delete {folder} to begin anew")
        _check_length(prepared.manifest, data, jobs, needed)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        progress.say(f"{folder} is complete; nothing left to prepare")
        return prepared

    few = len(jobs) <= SMALL_BYTES // JOB_BYTES + bool(val_pieces)
    small = engine == "local" and _size(jobs) <= SMALL_BYTES and few
    read = _cached(read_piece) if small else read_piece

    def run(stage: str, function: Function, arguments: Sequence[tuple], size: int, engine: str = engine) -> list[Any]:
        """The results of calls of ``function``, about ``size`` bytes of text, wherever the work is done."""
        if not arguments:
            return []
        with progress.stage(stage, size):
            if small:
                return [function(*each, progress.add, read) for each in arguments]
            if engine == "ray":
                return run_on_ray(function, arguments, progress.add, folder / PLAN, workers)
            return run_in_processes(function, arguments, progress.add, workers)

    with _working_in(folder, plan, small):
        progress.say(_describe(data, jobs, read if small else None))

        # Count the characters before each job where the split needs them, the distinct ones for char.
        counted = [job for job in jobs if kind == "char" or job.split == "tail"]
        surveys = {job: found for job in counted if (found := read_survey(folder, job))}
        left = [job for job in counted if job not in surveys]
        new = run("counting", survey_job, [(folder, job, kind == "char") for job in left], _size(left))
        surveys |= zip(left, new, strict=True)
        if kind == "char":
            whole = join_surveys([surveys[job] for job in jobs])
            # The vocabulary is of the distinct characters, and of whether there is more than one document.
            built = build_tokenizer("char", 0, [whole.alphabet] * min(2, whole.documents))
        if jobs[0].split == "tail":
            jobs = _place_tail(jobs, [surveys[job] for job in jobs], data.val_fraction)
        if small:
            _check_bytes(jobs, read, needed)

        # The tokenizer that an earlier call made, or a new one.
        file = folder / TOKENIZER
        if not file.is_file() and built:
            write_atomically(file, built.to_json())
        elif not file.is_file():
            training = [job for job in jobs if job.split != VAL]
            size = _size(training)
            if size > LEARN_BYTES:
                amount = f"{LEARN_BYTES / 1e6:,.0f} MB, taken evenly from all of the text"
                progress.say(f"tokenizer trained on {amount}")
            # In a process of its own, whose memory is free afterwards; on this machine also for Ray.
            arguments = (folder, training, tokenizer.vocab_size, tokenizer.pattern)
            run("learning", learn_bpe, [arguments], min(size, LEARN_BYTES), engine="local")
        built = Tokenizer.load(file)

        commits = {job.number: read_commits(folder, job.number) for job in jobs}
        left = [job for job in jobs if not (commits[job.number] and commits[job.number][-1].last)]
        processes = min(workers, len(left)) if engine == "local" else cores
        threads = 0 if small else max(1, cores // max(1, processes))
        arguments = [(folder, job, shard_tokens, built if small else file, threads) for job in left]
        new = run("tokenizing", tokenize_job, arguments, _size(left))
        commits |= zip([job.number for job in left], new, strict=True)

        shards = [shard for job in jobs for commit in commits[job.number] for shard in commit.shards]
        problems: Counter[str] = sum((Counter(commits[job.number][-1].problems) for job in jobs), Counter())
        training_first = sorted(shards, key=lambda shard: shard.split)
        manifest = Manifest.of(built, training_first, problems)
        _check_length(manifest, data, jobs, needed)
        manifest.save(folder)
        shutil.rmtree(folder / WORK)
        return Prepared(folder, manifest, built)


# The stages ---------------------------------------------------------------------------------------------------------


def _jobs(data: DataConfig, pieces: list[Piece], val_pieces: list[Piece], shard_tokens: int) -> list[Job]:
    """The jobs of all text, in order; their numbers are their places."""
    if not pieces:  # a folder of Parquet files without rows
        raise DataError("there is no text to train on; give files that hold some")
    split = data.split if data.val_fraction else TRAIN
    if val_pieces:
        split = TRAIN
    elif data.split == "last_file":
        split, last = TRAIN, pieces[-1].file
        pieces, val_pieces = [p for p in pieces if p.file != last], [p for p in pieces if p.file == last]
        if not pieces:
            raise DataError(f"data.split last_file needs two files or more, and there is only {last}; use split tail")
    jobs = plan_jobs(pieces, split, shard_tokens, field=data.field, val_fraction=data.val_fraction)
    return jobs + plan_jobs(val_pieces, VAL, shard_tokens, first=len(jobs), field=data.field)


def _size(jobs: Sequence[Job]) -> int:
    return sum(job.size for job in jobs)


def _describe(data: DataConfig, jobs: Sequence[Job], read: Read | None) -> str:
    """Which text it is; its exact size where it is small and ``read`` may go through it."""
    paths = [*data.paths[:3], *(["..."] if len(data.paths) > 3 else [])]
    name = ", ".join(paths) or embedded_name()
    if read is None:
        return f"text      {name}: about {_size(jobs) / 1e6:,.0f} MB"
    size = count = 0
    for piece in (piece for job in jobs for piece in job.pieces):
        for document in read(piece, data.field, Counter()):
            size += utf8_bytes(document.text)
            count += not document.continues
    return f"text      {name}: {size / 1e6:.1f} MB in {count:,} document{'s' * (count != 1)}"


def _place_tail(jobs: Sequence[Job], surveys: Sequence[Survey], val_fraction: float) -> list[Job]:
    """The jobs with where the tail of the whole text begins, and what comes before each."""
    tail = find_tail(join_surveys(surveys), val_fraction)
    placed = []
    position = opened = 0
    for job, survey in zip(jobs, surveys, strict=True):
        placed.append(replace(job, tail=tail, position=position, opened=opened))
        opened = opened if survey.last is None else position + survey.last
        position += survey.characters
    return placed


def _check_bytes(jobs: Sequence[Job], read: Read, needed: int) -> None:
    """A DataError, before the tokenizer is made, if a side of a small text is too short to fill a context."""
    sizes = Counter[str]()
    for job in jobs:
        for part in job.parts(Counter(), read):  # a token stands for at least one byte in every tokenizer
            sizes[part.split] += utf8_bytes(part.text) + part.begins
    _check_sizes(sizes[TRAIN], sizes[VAL], "bytes", needed)


def learn_bpe(
    folder: Path, jobs: Sequence[Job], vocab_size: int, pattern: str, report: Report, read: Read = read_piece
) -> None:
    """Train a bpe on the training text of the jobs, or on LEARN_BYTES of it, and save it in the folder."""
    size = _size(jobs)

    def limit(job: Job) -> float:
        return math.inf if size <= LEARN_BYTES else job.size * LEARN_BYTES // size

    texts = training_texts(((job.parts(Counter(), read), limit(job)) for job in jobs), report)
    write_atomically(folder / TOKENIZER, build_tokenizer("bpe", vocab_size, texts, pattern).to_json())


def _check_length(manifest: Manifest, data: DataConfig, jobs: Sequence[Job], needed: int) -> None:
    """A DataError if a side of the split is too short."""
    if manifest.documents(TRAIN) == 0:
        raise DataError("there is no text to train on; give files that hold some, or hold less of it out")
    if manifest.documents(VAL) == 0 and any(job.split != TRAIN for job in jobs):
        raise DataError(
            f"no text is left for validation (of {manifest.documents(TRAIN):,} documents, data.split "
            f"{data.split}, data.val_fraction {data.val_fraction}); give more text or another split"
        )
    _check_sizes(manifest.tokens(TRAIN), manifest.tokens(VAL), "tokens", needed)


def _check_sizes(training: int, validation: int, unit: str, needed: int) -> None:
    """A DataError if a side does not fill one context; validation may be empty."""
    for name, size, more in (
        ("training", training, ""),
        ("validation", validation, ", or a larger --data.val_fraction (0 trains on everything)"),
    ):
        if size < needed and (size or name == "training"):
            raise DataError(
                f"the {name} text has {size} {unit}, shorter than one context of {needed - 1} tokens and its target; "
                f"give more text, or --model.context_length {max(1, size // 2)}{more}"
            )


def _cached(read: Read) -> Read:
    """Read each piece once and keep its documents: for small text, which several stages go through.

    What comes out of a compressed file may be far more than was expected, and is then read each time.
    """
    cache: dict[Piece, tuple[list[Document], Counter[str]]] = {}

    def read_cached(piece: Piece, field: str, problems: Counter[str]) -> Iterator[Document]:
        if piece in cache:
            problems.update(cache[piece][1])
            yield from cache[piece][0]
            return
        documents, characters, found = [], 0, Counter[str]()
        for document in read(piece, field, found):
            characters += len(document.text)
            if characters <= CACHED_CHARACTERS:
                documents.append(document)
            else:
                documents.clear()
            yield document
        problems.update(found)
        if characters <= CACHED_CHARACTERS:
            cache[piece] = documents, found

    return read_cached


# The folder and its plan --------------------------------------------------------------------------------------------


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


@contextmanager
def _working_in(folder: Path, plan: dict[str, Any], small: bool) -> Iterator[None]:
    """While entered, the folder is ours alone; what goes wrong leaves only what helps to go on."""
    made = _make(folder)
    with _locked(folder):
        _resume(folder, plan)
        _remove_temporary_files(folder)
        try:
            with _terminable():
                yield
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped while preparing {folder}; what is done so far stays: give the same command again"
            ) from None
        except Exception as error:
            if small or not any((folder / WORK).glob("*.json")):  # a mistake in a fresh run leaves nothing behind
                _clear(folder, made)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = (error.strerror or "no space left").lower()
                raise PretrainError(f"{folder}: {reason}; make room and give the same command again") from None
            raise
        finally:
            _remove_temporary_files(folder)


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


def _resume(folder: Path, plan: dict[str, Any]) -> None:
    """See that what is in the folder was begun by the same plan; with nothing committed, begin anew by this one."""
    if (folder / PLAN).is_file():
        begun = [int(file.name.partition("-")[0]) for file in (folder / WORK).glob("[0-9]*-000.json")]
        if any(read_commits(folder, job) for job in begun):
            _check_plan(folder, plan)
        elif _changes(folder, plan):
            _clear(folder, [])
    (folder / WORK).mkdir(exist_ok=True)
    if not (folder / PLAN).is_file():
        write_atomically(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _clear(folder: Path, made: Sequence[Path]) -> None:
    """Remove what preparing put into a folder, and the folders that were made for it."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for ours in ("*.tmp", PLAN, TOKENIZER, "train-*.bin", "val-*.bin"):
        for file in folder.glob(ours):
            file.unlink(missing_ok=True)
    for place in made:
        with suppress(OSError):  # something else was put there meanwhile
            place.rmdir()


def _remove_temporary_files(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed."""
    for stray in folder.glob("*.tmp"):
        stray.unlink(missing_ok=True)


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
        with suppress(OSError):  # a file system without such locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process is preparing {folder} just now; wait for it, or choose another"
                raise UsageError(message) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM does what Ctrl-C does, unless the program around handles it itself."""

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
