"""From text to token shards, whatever its size: the plan, its jobs, and the manifest that ends them.

    find_sides → plan_jobs → (survey → tail) → tokenizer → tokenize → shards, commits → manifest.json
                             run here, in worker processes, or on a Ray cluster

The folder says how far the work is, so that a process killed at any moment goes on when the same is asked for again:

    plan.json        the text, its split and the tokenizer; another plan is refused
    tokenizer.json   once it is built
    unfinished/      surveys and commit records (jobs.py), and a lock
    *.bin            shards
    manifest.json    last of all: the folder is finished
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pretrain.config import Config, DataConfig, TokenizerConfig
from pretrain.errors import DataError, Interrupted, PretrainError, UsageError
from pretrain.io import cores, write_atomically
from pretrain.text import ReadStats, refuse_broken
from pretrain.text.pieces import EMBEDDED, Piece, read_piece
from pretrain.text.problems import Cuts
from pretrain.text.split import SIDES, TEST, TRAIN, VAL, Shares, Survey, find_tail, join_surveys, side_by_hash
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokenizer.boundary import BOS_NAMES
from pretrain.tokenizer.build import TOO_MANY_WORDS
from pretrain.tokens.datasets import check_length, open_corpus
from pretrain.tokens.jobs import (
    WORK,
    Job,
    finished_commits,
    load_tokenizer,
    plan_jobs,
    read_commits,
    read_survey,
    survey_job,
    tokenize_job,
)
from pretrain.tokens.on_ray import run_on_ray
from pretrain.tokens.progress import Progress
from pretrain.tokens.shards import MANIFEST, PLAN, Manifest, utf8_bytes
from pretrain.tokens.source import (
    HASH,
    NO_TEST,
    NO_TEXT,
    NO_VALIDATION,
    TAIL,
    Report,
    describe,
    find_sides,
    learning_texts,
)
from pretrain.tokens.workers import run_in_processes

PLAN_FORMAT = 2
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 100_000_000
LEARN_BYTES = 200_000_000  # of text that a bpe is trained on, at most: more changes few merges, and costs memory
SMALL_BYTES, SMALL_JOBS = 16 * 2**20, 3  # up to this it is done in this process: others would hardly have started


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def prepare(config: Config, folder: Path, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Make token shards in ``folder`` of the text that ``config.data`` names, for runs of ``config``.

    ``say`` is called with each line to show. Raises what :func:`prepare_text` does; a DataError also if the text is too
    short for one context.
    """
    chosen = config.fit.fields  # what is chosen follows from the text: the vocabulary here, the context afterwards
    prepared = prepare_text(
        config.data,
        config.tokenizer,
        folder,
        progress=Progress(say),
        length=1 if "model.context_length" in chosen else config.model.context_length,
        masked=config.model.document_mask,
        fewer="tokenizer.vocab_size" in chosen,
    )
    for line in prepared.manifest.problem_lines():
        say(line)
    return prepared


def open_prepared(folder: Path) -> Prepared:
    """A folder that :func:`prepare` finished earlier."""
    manifest = Manifest.load(folder)
    return Prepared(folder, manifest, Tokenizer.load(folder / TOKENIZER).with_bos(manifest.boundary is not None))


def prepare_text(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    *,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    engine: str = "local",
    progress: Progress | None = None,
    length: int = 0,
    masked: bool = False,
    fewer: bool = False,
) -> Prepared:
    """Make token shards in ``folder``, or resume unfinished ones there; the same bytes in any case.

    Args:
        data: the text and its split.
        tokenizer: which one.
        folder: absent, empty, or one that this function began.
        workers: processes; 0 for as many as there are cores. A text of seconds is done in this one.
        shard_tokens: tokens at which a shard is closed.
        engine: ``local`` or ``ray``.
        progress: where to show it.
        length: context length for which each side of the split must suffice.
        masked: whether runs have ``model.document_mask``, which needs a BOS token.
        fewer: whether a bpe has fewer tokens where the text does not support so many.

    Raises:
        DataError: the text is missing, unreadable or too short; the vocabulary does not fit it.
        UsageError: the folder holds something else, or ``masked`` and there is no BOS token.
        Interrupted: Ctrl-C or a signal asked to stop; what is committed stays.
    """
    progress = progress or Progress()
    kind = tokenizer.kind
    workers = workers or cores()
    given = None if kind in ("bpe", "char") else build_tokenizer(kind, tokenizer.vocab_size, [], bos=tokenizer.bos)
    if given:
        check_boundary(given, masked)
    sides = find_sides(data, progress.say)
    cuts: Cuts = given.cuts if given else "none" if kind == "char" else "inside words"
    whole = _keeps_whole(folder)
    plan_side = partial(plan_jobs, shard_tokens=shard_tokens, field=data.field, cuts=cuts, whole=whole)
    jobs = plan_side(sides.train, sides.split, shares=sides.shares)
    for held_out, side in ((sides.val, VAL), (sides.test, TEST)):
        jobs += plan_side(held_out, side, first=len(jobs))
    wanted = {VAL: sides.val or sides.shares.val, TEST: sides.test or sides.shares.test}
    pieces = [*sides.train, *([] if data.val_paths else sides.val), *sides.test]  # of data.paths
    validation = sides.val if data.val_paths else []
    named = f"{kind} {tokenizer.vocab_size} {tokenizer.pattern}" + " or fewer" * (fewer and kind == "bpe")
    plan = {
        "format": PLAN_FORMAT,
        "text": _sources(pieces),
        "validation text": _sources(validation),
        "pieces": hashlib.sha256(repr([*pieces, *validation]).encode()).hexdigest(),
        "field": data.field,
        "separator": data.separator,
        "bos": data.bos,
        "whole": whole,
        "split": data.split,
        "val_fraction": data.val_fraction,
        "test_fraction": data.test_fraction,
        "tokenizer": given.fingerprint if given else named,
        "shard_tokens": shard_tokens,
    }
    if (folder / MANIFEST).is_file():
        _check_plan(folder, plan)
        open_corpus([str(folder)])  # a quick check of the files
        prepared = open_prepared(folder)
        _check_sides(prepared.manifest, wanted, length)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        progress.say(f"{folder} is complete; nothing left to prepare")
        return prepared

    small = engine == "local" and _size(jobs) <= SMALL_BYTES and len(jobs) <= SMALL_JOBS

    def run(stage: str, function: Callable, tasks: Sequence[tuple], size: int, engine: str = engine) -> list[Any]:
        """The results of ``function`` for each task, about ``size`` bytes of text, wherever the work is done."""
        tasks = [(folder, *task) for task in tasks]
        if not tasks:
            return []
        with progress.stage(stage, size):
            if small:
                return [function(*task, progress.add) for task in tasks]
            if engine == "ray":
                return run_on_ray(function, tasks, progress.add, folder / PLAN, workers)
            return run_in_processes(function, tasks, progress.add, workers)

    def run_jobs(stage: str, function: Callable, earlier: Callable, jobs: Sequence[Job], *more: Any) -> list[Any]:
        """The results of ``function`` for each job, or what an ``earlier`` process left of it."""
        results = {job: earlier(folder, job) for job in jobs}
        left = [job for job in jobs if results[job] is None]
        results |= zip(left, run(stage, function, [(job, *more) for job in left], _size(left)), strict=True)
        return list(results.values())

    with _working_in(folder, plan, small):
        progress.say(describe(data, _size(jobs)))
        if given:
            introduce(given, data.bos, progress.say)

        # Where the tail begins, and the characters of a char vocabulary, are found in a first pass over the text.
        counted = jobs if kind == "char" else [job for job in jobs if job.split == TAIL]
        surveys = run_jobs("counting", survey_job, read_survey, counted, kind == "char")
        refuse_broken(_all_read(survey.read for survey in surveys), data.allow_broken)
        if sides.split == TAIL:
            jobs = _place_tail(jobs, surveys, sides.shares)

        # The tokenizer that an earlier call made, or a new one.
        file = folder / TOKENIZER
        if kind == "char":
            whole = join_surveys(surveys)
            # The vocabulary depends on the distinct characters, and has a BOS token for more than one document.
            given = build_tokenizer("char", 0, [whole.alphabet] * min(2 if data.bos else 1, whole.documents))
            check_boundary(given, masked)
        if not file.is_file() and given:
            write_atomically(file, given.to_json())
        elif not file.is_file():
            training = [job for job in jobs if job.split not in wanted]
            size = min(_size(training), LEARN_BYTES)
            if size == LEARN_BYTES:
                progress.say(f"tokenizer trained on {size / 1e6:,.0f} MB, taken evenly from all of the text")
            # In a process of its own, whose memory is free afterwards; on this machine also for Ray.
            task = (training, tokenizer.vocab_size, tokenizer.pattern, fewer)
            for read in filter(None, run("tokenizer", learn_bpe, [task], size, engine="local")):
                progress.say(f"tokenizer trained on {read / 1e6:,.1f} MB, taken evenly: {TOO_MANY_WORDS}")

        side_by_side = cores() if engine == "ray" else min(workers, len(jobs))
        threads = 0 if small else max(1, cores() // side_by_side)
        done = run_jobs("tokenizing", tokenize_job, finished_commits, jobs, shard_tokens, file, data.bos, threads)
        shards = [shard for commits in done for commit in commits for shard in commit.shards]
        read = _all_read(commits[-1].read for commits in done)
        refuse_broken(read, data.allow_broken)
        built = load_tokenizer(file, file.stat().st_mtime_ns).with_bos(data.bos)
        manifest = Manifest.of(built, sorted(shards, key=lambda shard: SIDES.index(shard.split)), read)
        _check_sides(manifest, wanted, length)
        manifest.save(folder)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return Prepared(folder, manifest, built)


def find_records(shard: Path, documents: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Where the text is that training documents of a shard of ours, numbered from 1 on, were made of.

    ``file``, ``record`` and ``after`` of each (see :mod:`pretrain.runs.batch`); nothing of what is not found exactly.
    """
    folder, (side, job_number, *_) = shard.parent, (*shard.stem.split("-"), "", "")
    try:
        manifest, plan = Manifest.load(folder), json.loads((folder / PLAN).read_text(encoding="utf-8"))
        names = ("field", "separator", "split", "val_fraction", "test_fraction")
        paths, val_paths = (
            tuple(name for name, *_ in plan[each] if name != EMBEDDED) for each in ("text", "validation text")
        )
        sides = find_sides(DataConfig(paths=paths, val_paths=val_paths, **{name: plan[name] for name in names}))
        text = [*sides.train, *([] if val_paths else sides.val), *sides.test]
        cuts = Tokenizer.load(folder / TOKENIZER).cuts
        shape = {"field": plan["field"], "shares": sides.shares, "cuts": cuts, "whole": plan["whole"]}
        job = plan_jobs(sides.train, sides.split, plan["shard_tokens"], **shape)[int(job_number)]
        unmarked = manifest.boundary is None and manifest.documents(TRAIN) > 1  # nothing tells where they begin
        if side != TRAIN or unmarked or _sources(text) != plan["text"]:
            return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, PretrainError):
        return {}
    of_job = [each for each in manifest.shards if each.file.startswith(f"{side}-{job_number}-")]
    earlier = [each.documents for each in of_job if each.file < shard.name]
    first = {"file": job.pieces[0].file, "after": job.pieces[0].begin}
    number, found = -sum(earlier), {} if earlier else {0: first}  # 0: what goes on from before the job
    for piece in job.pieces if max(documents) else ():
        stats = job.stats()
        for document in read_piece(piece, job.field, stats):
            if document.continues or (job.split == HASH and side_by_hash(document.text, job.shares) != TRAIN):
                continue
            number += 1
            if number in documents:
                found[number] = {"file": piece.file, "record": stats.records, "after": piece.begin}
            if number >= max(documents):
                return found
    return found


def check_boundary(tokenizer: Tokenizer, masked: bool) -> None:
    """A UsageError if documents are to be masked (``model.document_mask``) but do not begin with a BOS token."""
    if masked and tokenizer.bos_id is None:
        raise UsageError(
            "model.document_mask finds documents by the token that begins them, and this tokenizer has none; name one"
            " of its tokens with --tokenizer.bos, or leave out model.document_mask"
        )


def introduce(tokenizer: Tokenizer, bos: bool, say: Callable[[str], None]) -> None:
    """Say what is unusual about a tokenizer: the token that begins a document, with ``data.bos``, and its cautions."""
    if bos and tokenizer.bos_id is not None and tokenizer.bos not in BOS_NAMES:
        say(f"boundary  each document begins with {tokenizer.bos}")
    for caution in tokenizer.cautions(bos):
        say(f"warning   {caution}")


def learn_bpe(folder: Path, jobs: Sequence[Job], vocab_size: int, pattern: str, fewer: bool, report: Report) -> int:
    """Train a bpe on the training text of the jobs, or on LEARN_BYTES of it, and save it in the folder.

    Gives from how many bytes it learned, if their different words were too many to learn from the others; else 0.
    """
    read, ended = 0, False

    def texts() -> Iterator[str]:
        nonlocal read, ended
        sources = [(partial(job.parts, job.stats()), job.size) for job in jobs]
        for text in learning_texts(sources, LEARN_BYTES, report):
            read += utf8_bytes(text)
            yield text
        ended = True

    tokenizer = build_tokenizer("bpe", vocab_size, texts(), pattern, fewer=fewer)
    write_atomically(folder / TOKENIZER, tokenizer.to_json())
    return 0 if ended else read


def _all_read(parts: Iterable[ReadStats]) -> ReadStats:
    whole = ReadStats()
    for part in parts:
        whole.add(part)
    return whole


def _size(jobs: Sequence[Job]) -> int:
    return sum(job.size for job in jobs)


def _place_tail(jobs: Sequence[Job], surveys: Sequence[Survey], shares: Shares) -> list[Job]:
    """The jobs; those of the text that is split, which come first, know where its tail begins and what is before."""
    count = sum(job.split == TAIL for job in jobs)
    tail = find_tail(join_surveys(surveys[:count]), shares)
    placed = []
    position = opened = 0
    for job, survey in zip(jobs[:count], surveys[:count], strict=True):
        placed.append(replace(job, tail=tail, position=position, opened=opened))
        opened = opened if survey.last is None else position + survey.last
        position += survey.characters
    return [*placed, *jobs[count:]]


def _check_sides(manifest: Manifest, wanted: Mapping[str, Any], length: int) -> None:
    """A DataError if a side of the split that is ``wanted`` is empty, or one does not fill one context."""
    if manifest.documents(TRAIN) == 0:
        raise DataError(NO_TEXT)
    for side, message in ((VAL, NO_VALIDATION), (TEST, NO_TEST)):
        if manifest.tokens(side) == 0 and wanted[side]:
            raise DataError(message)
    check_length("the text", "training", manifest.tokens(TRAIN), length)
    if manifest.tokens(VAL):
        more = ", or a larger --data.val_fraction (0 trains on everything)"
        check_length("the text", "validation", manifest.tokens(VAL), length, more)
    if manifest.tokens(TEST):
        check_length("the text", "test", manifest.tokens(TEST), length, ", or a larger --data.test_fraction")


# The folder and its plan --------------------------------------------------------------------------------------------


def _sources(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Name, size and time of change of each file, as a plan keeps them."""
    sources = []
    for file in dict.fromkeys(piece.file for piece in pieces):
        if file == EMBEDDED or "://" in file:
            sources.append([file, sum(piece.size for piece in pieces if piece.file == file), 0])
        else:
            status = os.stat(file)
            sources.append([file, status.st_size, status.st_mtime_ns])
    return sources


def _keeps_whole(folder: Path) -> bool:
    """As ReadStats.whole: what an earlier version began is finished as it was begun, with the cuts of that."""
    begun = (folder / MANIFEST).is_file() or any((folder / WORK).glob("[0-9]*.json"))
    try:
        return not begun or json.loads((folder / PLAN).read_text(encoding="utf-8")).get("whole", False)
    except (OSError, ValueError, AttributeError):
        return True


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """A UsageError unless what is in the folder was made by the same plan."""
    if changes := _changes(folder, plan):
        raise UsageError(f"{folder} has token shards of another plan ({changes}); choose another folder, or delete it")


def _changes(folder: Path, plan: dict[str, Any]) -> str:
    """What differs between a plan and that of the folder; empty: nothing."""
    try:
        old = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        old = {"bos": True, "test_fraction": 0.0, "whole": False, **old}  # plans had no others before
        return ", ".join(f"another {key}" for key in plan if old.get(key) != plan[key])
    except (OSError, ValueError, AttributeError):
        return f"its {PLAN} is missing or damaged"


@contextmanager
def _working_in(folder: Path, plan: dict[str, Any], small: bool) -> Iterator[None]:
    """While entered, the folder is ours alone; when something fails, only what helps to resume stays."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / PLAN).is_file()
        if not ours and any(path.name != WORK and path.suffix != ".tmp" for path in folder.iterdir()):
            raise UsageError(f"{folder} has files, but none of unfinished token shards; choose another folder")
        (folder / WORK).mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    lock = FileLock(folder / WORK / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another process is preparing {folder} just now; wait for it, or choose another") from None
    except OSError:
        pass  # a file system without locks
    try:
        begun = [int(record.name.partition("-")[0]) for record in (folder / WORK).glob("[0-9]*-000.json")]
        finished = (folder / MANIFEST).is_file()  # by another process, just now
        if ours and (finished or any(read_commits(folder, job) for job in begun)):
            _check_plan(folder, plan)
        elif ours and _changes(folder, plan):
            _clear(folder)
        if not (folder / PLAN).is_file():
            write_atomically(folder / PLAN, json.dumps(plan, indent=1) + "\n")
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"stopped while preparing {folder}; to resume, give the same command again") from None
        except Exception as error:
            if small or not any((folder / WORK).glob("*.json")):  # a mistake in a fresh run leaves nothing behind
                _clear(folder)
                shutil.rmtree(folder / WORK, ignore_errors=True)
                with suppress(OSError):  # something else was put there meanwhile
                    for place in made:
                        place.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = (error.strerror or "no space left").lower()
                raise PretrainError(f"{folder}: {reason}; free some space and give the same command again") from None
            raise
        finally:
            _remove(folder, "*.tmp")
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    """Remove what preparing put into a folder, but for the lock."""
    _remove(folder / WORK, "*.json")
    _remove(folder, "*.tmp", PLAN, TOKENIZER, *(f"{side}-*.bin" for side in SIDES))


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
