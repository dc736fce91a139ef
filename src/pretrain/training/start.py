"""Where a training begins: the run directory opened or made, its text prepared, and trained on to the last step.

train → open_run, go_back, choose → set_up (setup.py) → Trainer.fit (loop.py) → train_step (step.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import Config, TokenizerConfig, as_chosen, differences
from pretrain.device import Precision, choose_precision, keep_freed_memory
from pretrain.errors import DataError, Interrupted, PretrainError, UsageError
from pretrain.fitting import Text, fit_model, fit_steps, fit_text, look_at_text, settled, with_steps
from pretrain.io import append_jsonl, expand, read_jsonl, without_secrets
from pretrain.model import meta_model
from pretrain.optim import build_optimizers, find_optimizer
from pretrain.runs import Run, checkpoints
from pretrain.runs.checkpoint import remove
from pretrain.runs.run import clear_run, lock_run
from pretrain.sizing import resolve
from pretrain.text.opening import is_url
from pretrain.text.split import SIDES
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.build import KINDS
from pretrain.tokens import (
    Corpus,
    Origin,
    check_boundary,
    check_marked,
    check_undivided,
    difference,
    find_text,
    introduce,
    is_tokens,
    open_corpus,
    prepare,
    prepare_stream,
    text_now,
    training_order,
    with_hashes,
)
from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.init_from import resolve_init
from pretrain.training.setup import set_up
from pretrain.training.speed import measure_machine, measure_training
from pretrain.training.world import World, join_world

if TYPE_CHECKING:
    from pretrain.runs.copy import RunCopy


def train(
    config: Config,
    out: str | Path,
    console: Console | None = None,
    started: float | None = None,
    resume_from: int = 0,
    callbacks: Sequence[Callback] = (),
    named: bool = True,
) -> Run:
    """Train as ``config`` says into the run directory ``out``, or resume the run in it, to its end.

    Args:
        config: from :func:`pretrain.load_config`.
        out: the run directory; made if it does not exist.
        console: where progress is shown; nowhere by default.
        started: ``time.monotonic()`` when the whole job began, from which its seconds are counted; now by default.
        resume_from: go back to the checkpoint of this step first; 0: resume from the newest.
        callbacks: code of your own, see :class:`pretrain.Callback`.
        named: whether ``config.data`` names the text anew. False: it is what the run in ``out`` says, so that text that
            changed since is no error if the run has tokens made of it before; it goes on with them, and says so.

    Raises:
        UsageError: the configuration cannot run here, or differs from that of the run in ``out``.
        DataError: the text cannot be used, or is not what the run was trained on.
        CheckpointError: no checkpoint can be used or written, or another process is training in ``out``.
        Interrupted: a signal asked to stop; everything is saved.
        PretrainError: training cannot go on, for another reason that its text gives.
    """
    started = time.monotonic() if started is None else started
    if is_url(str(out)):
        raise UsageError(f"{out}: a run directory needs a disk; give a folder as --out, and --checkpoint.copy_to {out}")
    out, console = Path(out), console or Console(quiet=True)
    with join_world(config.train.device, config.parallel) as world, contextlib.ExitStack() as until_the_end:
        if world.device.type == "cpu":
            keep_freed_memory()
        if not world.is_rank0:
            console = Console(quiet=True)

        copy: RunCopy | None = None  # on rank 0, if there is to be one

        def open_and_lock() -> Run | Draft:
            nonlocal copy
            find_optimizer(config.optim)  # refuses an unknown name before any work
            until_the_end.enter_context(lock_run(out))
            try:
                if config.checkpoint.copy_to:
                    from pretrain.runs.copy import RunCopy  # not above: most runs have no copy

                    copy = RunCopy(config.checkpoint.copy_to)
                run = open_fetched(config, out, console, named, copy) if copy else open_run(config, out, console, named)
                if resume_from:
                    go_back(Run(out, run.config), resume_from, console.say)
                    if copy:
                        copy.drop_after(checkpoints(Run(out, run.config).checkpoints)[-1].step)
            except KeyboardInterrupt:
                raise Interrupted(f"stopped before the first step; resume with: {console.command}") from None
            return run

        def claim_copy(run: Run) -> None:
            if copy:
                copy.claim(run)
                console.say(f"copy      checkpoints and the run's files go to {copy.shown}")
                if run.summary is not None:
                    copy.send(run)

        run = world.run_on_rank0(open_and_lock)
        if isinstance(run, Draft):
            draft, config = run, choose(run, world, console, started)
            run = world.run_on_rank0(lambda: make_run(draft, config, console.say))
        world.run_on_rank0(functools.partial(claim_copy, run))
        if run.summary is None:
            set_up(run, world, console, started, resume_from, callbacks, copy).fit()
        else:
            console.say(f"{run.folder} is finished: {run.summary['steps']} steps; nothing left to train")
    return run


@dataclass(frozen=True)
class Draft:
    """A run whose text is prepared, before what is left to choose is chosen."""

    folder: Path
    config: Config
    """With its tokenizer."""
    text: Text
    """With its tokens."""


def open_run(config: Config, folder: Path, console: Console, named: bool = True) -> Run | Draft:
    """The run in ``folder``, or a new one with its text prepared; nothing is left behind when that fails."""
    config = with_absolute_paths(config)
    if Run.exists(folder):
        run = Run.open(folder)
        config = as_chosen(config, run.config)
        run = same_data(run, config, named, console.say)
        if named:
            same_tokenizer(run, config.tokenizer)
        return Run.create(folder, same_configuration(run, config, console.say))
    config, text = resolve_init(config), Text(0)
    data, origin = config.data, Origin()
    if is_tokens(data.paths):
        if data.stream:
            raise UsageError(f"{data.paths[0]} holds tokens already, which need no data.stream; use --data.no-stream")
        check_undivided(data)
        kind, boundary = config.tokenizer.kind, config.tokenizer.bos
        corpus = open_corpus(data.paths, kind, data.bos, boundary=boundary, dtype=data.dtype)
        tokenizer, fingerprint = corpus.tokenizer, corpus.fingerprint
        check_boundary(tokenizer, config.model.document_mask)
        if config.model.document_mask:
            check_marked(corpus)
        introduce(tokenizer, data.bos, console.say)
    else:
        files = text_now(data)
        if config.fit.fields:
            text = look_at_text(data)
            config, said = fit_text(config, text)
            data = config.data
            for line in said:
                console.say(f"fitted    {line}")
        if data.stream:
            live = find_text(data, console.say)
            prepared = prepare_stream(config, live, folder / "data", console.say)
            origin = Origin(stream=live.fingerprint, whole=True)
        else:
            prepared = prepare(config, folder / "data", console.say)
        tokenizer, fingerprint = prepared.tokenizer, prepared.manifest.fingerprint
        corpus = open_corpus([str(folder / "data")])
        files = with_hashes(files, data.stream)
        origin = dataclasses.replace(origin, text=files.text, validation=files.validation)
    if not (data.stream or "model.context_length" in config.fit.fields):
        training_order(corpus, config)  # refuses what is too short, before the run exists
    tokenizer.save(folder / "tokenizer.json")
    dataclasses.replace(origin, tokens=fingerprint).save(folder)
    if config.tokenizer.kind == "bpe" and "tokenizer.vocab_size" in config.fit.fields:  # perhaps fewer than wanted
        config = dataclasses.replace(
            config, tokenizer=dataclasses.replace(config.tokenizer, vocab_size=tokenizer.vocab_size)
        )
    return Draft(folder, config, with_tokens(text, corpus, tokenizer.vocab_size))


def open_fetched(config: Config, folder: Path, console: Console, named: bool, copy: RunCopy) -> Run | Draft:
    """As :func:`open_run`, once what ``copy`` has newer is fetched; text that is not here is then not missed."""
    fresh = not Run.exists(folder)
    fetched = copy.fetch(folder, console.say)
    here = [path for path in config.data.paths if is_url(path) or glob.glob(str(expand(path)))]
    try:
        return open_run(config, folder, console, named and (bool(here) or not config.data.paths))
    except UsageError as error:
        if not (fresh and fetched):
            raise
        clear_run(folder)
        why = str(error).replace(f"{folder} was made", f"{copy.shown} was made")
        raise UsageError(why.replace("choose another --out", "choose another --checkpoint.copy_to")) from None


def with_tokens(text: Text, corpus: Corpus, vocab_size: int) -> Text:
    """The text with its tokens; of token shards also their bytes, about where they do not tell."""
    tokens = {f"{side}_tokens": corpus.tokens(side) for side in SIDES}
    size = text.bytes or round((corpus.bytes_per_token or 4) * sum(tokens.values()))
    return dataclasses.replace(text, bytes=size, vocab_size=vocab_size, **tokens)


def choose(draft: Draft, world: World, console: Console, started: float) -> Config:
    """Choose what is left to choose of a new run, by the speed and the memory of this machine. All processes call it.

    Raises UsageError if what is chosen does not go with what was given, or ``train.minutes`` are too few.
    """
    config, text, said = draft.config, draft.text, list[str]()
    timed = config.train.timed
    if not (config.fit.fields or timed):
        return config
    precision = Precision(world.broadcast(choose_precision(config.train.precision, world.device).name), world.device)
    precision.set_products()
    if config.fit.fields:
        left = world.broadcast(seconds_left(config, started)) if timed else 0.0
        machine = measure_machine(config, text.vocab_size, precision, left, world)
        config, said = fit_model(config, text, machine)
    if timed:
        shaped, _ = resolve(with_steps(config, 1), text.vocab_size)  # as the dial makes it
        speed, micro_steps = measure_training(shaped, text.vocab_size, precision, world)
        left = world.broadcast(seconds_left(config, started))
        steps, more = fit_steps(shaped, text, speed, micro_steps, left, world.size)
        config, said = with_steps(config, steps), [*said, *more]
    for line in said:
        console.say(f"fitted    {line}")
    return config


def seconds_left(config: Config, started: float) -> float:
    """Seconds left of ``train.minutes`` for a job that began at ``started``."""
    return 60 * config.train.minutes - (time.monotonic() - started)


def make_run(draft: Draft, config: Config, say: Callable[[str], None]) -> Run:
    """The run of a draft, with its configuration as it was chosen. Raises UsageError if that contradicts itself."""
    corpus, vocab_size = Run(draft.folder, config).corpus(), draft.text.vocab_size
    windows = 0 if config.data.stream else training_order(corpus, config).windows
    config, derived = resolve(config, vocab_size, windows)
    for line in derived:
        say(f"derived   {line}")
    if config.data.stages:
        training_order(corpus, config)  # refuses stages that are too short, now that the steps are known
    build_optimizers(meta_model(config.model, vocab_size), config.optim)  # refuses groups of no parameter
    return Run.create(draft.folder, settled(config, draft.text))


def same_data(run: Run, config: Config, named: bool, say: Callable[[str], None]) -> Run:
    """The run with its data at the place that ``config`` names, if what is there is what the run was made with.

    Other data at another place leaves the run as it is, which :func:`same_configuration` then refuses. Data that has
    changed is a DataError; where it is neither ``named`` nor needed, a line says it. No URL is asked.
    """
    data, ours = config.data, run.config.data
    places = {"paths": data.paths, "val_paths": data.val_paths}
    if data.weights != ours.weights or any(_urls(places[name]) != _urls(getattr(ours, name)) for name in places):
        return run
    there = dataclasses.replace(run.config, data=dataclasses.replace(ours, **places))
    moved, there = there.data != ours, Run(run.folder, there)
    before = Origin.load(run.folder)
    if moved and not before.tokens:  # a run made before this was recorded
        return run
    try:
        problem, now = what_changed(there, before, moved, say)
    except PretrainError as error:  # it is not found, or the tokens are others
        problem, now = str(error), before
    if not problem:
        if now != before and before.tokens:
            now.save(run.folder)
        if moved:
            say(f"moved     the data is as it was, now at {', '.join(without_secrets(path) for path in data.paths)}")
        return there
    if moved:
        return run
    reads_it = ours.stream or not run.own_tokens
    goes_on = run.summary is None or config.train.steps != run.config.train.steps
    if not named and not (reads_it and goes_on):
        say(f"changed   {problem}" + "; the run keeps the tokens that it has" * (not reads_it))
        return run
    if not run.own_tokens:
        raise DataError(problem)
    if reads_it:
        raise DataError(f"{problem}; restore it, or choose another --out")
    alone = f"go on with the tokens that the run has: pretrain train --out {run.folder}"
    raise DataError(f"{problem}; restore it, choose another --out, or {alone}")


def what_changed(run: Run, before: Origin, moved: bool, say: Callable[[str], None]) -> tuple[str, Origin]:
    """What of a run's data is not as it was ``before``, at the place that its configuration names; empty: nothing.

    Also gives what to record of it now. Raises PretrainError if it is not found, or tokens are others.
    """
    data = run.config.data
    if not run.own_tokens:
        run.corpus()
        return "", before
    problem, unknown, now = difference(before, text_now(data), data.stream)
    for file in unknown:
        say(f"text      {file} has another time than when it was prepared; whether it changed is not known")
    if not problem and moved and data.stream and find_text(data).fingerprint != before.stream:
        problem = f"the text at {', '.join(data.paths)} is in other pieces"
    return problem and f"{problem} since {run.folder} was made", now


def same_tokenizer(run: Run, config: TokenizerConfig) -> None:
    """A DataError if ``config`` names a file that is not the tokenizer of the run, which has its own copy, any more."""
    if config != run.config.tokenizer or config.kind in KINDS or not Path(config.kind).is_file():
        return
    as_read = Tokenizer.load(config.kind), Tokenizer.adopt(config.kind, config.bos)  # older runs have the former
    if run.tokenizer().fingerprint not in {tokenizer.fingerprint for tokenizer in as_read}:
        raise DataError(
            f"{config.kind} is another tokenizer than when {run.folder} was made; restore it, choose another --out, or"
            f" go on with the one that the run has: pretrain train --out {run.folder}"
        )


def _urls(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if "://" in path]


def same_configuration(run: Run, config: Config, say: Callable[[str], None]) -> Config:
    """The configuration to resume ``run`` with. A UsageError if it would learn something else than a longer run."""
    vocab_size, before = run.tokenizer().vocab_size, run.config
    if config.fit.fields:
        name = config.fit.fields[0]
        section, field = name.split(".")
        was = f"{name} {getattr(getattr(before, section), field)!r}"
        raise UsageError(
            f"{run.folder} was made with another configuration ({was}, which was given); give it again, or choose"
            f" another --out"
        )
    given, windows = config, training_order(run.corpus(), config).windows if config.train.epochs else 0
    if config.train.timed:  # other minutes than those of the run, which are refused
        given = with_steps(config, before.train.steps)
    config, _ = resolve(given, vocab_size, windows)
    if differences(before, config) and config.train.init_from:  # perhaps as it was given at first
        config, _ = resolve(resolve_init(given), vocab_size, windows)
    changed = differences(before, config)
    longer = [f"train.steps {before.train.steps} → {config.train.steps}"]
    if config.train.steps > before.train.steps and changed == longer:
        if before.data.stages:
            raise UsageError(
                f"{longer[0]} would begin the stages of data.stages, shares of the steps, at other steps than those"
                f" trained so far; choose another --out, or go on from a step of it: pretrain fork {run.folder}"
            )
        say(f"longer    {config.train.steps:,} steps instead of {before.train.steps:,}, with the longer schedule")
        run.reopen()
    elif changed:
        different = "; ".join(changed)
        raise UsageError(f"{run.folder} was made with another configuration ({different}); choose another --out")
    return config


def with_absolute_paths(config: Config) -> Config:
    """The configuration with its paths as they are from any folder, since the run may be resumed from another."""

    def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in paths)

    paths = {name: absolute(getattr(config.data, name)) for name in ("paths", "val_paths")}
    copy_to = absolute((config.checkpoint.copy_to,))[0] if config.checkpoint.copy_to else ""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **paths),
        checkpoint=dataclasses.replace(config.checkpoint, copy_to=copy_to),
    )


def go_back(run: Run, step: int, say: Callable[[str], None]) -> None:
    """Make ``step`` the newest checkpoint; later ones and their metrics are moved to ``set-aside``.

    A run that already went back to that step continues from where it is now, so that the same command can be repeated.
    Raises CheckpointError when there is no intact checkpoint of that step.
    """
    saved = checkpoints(run.checkpoints)
    if saved and saved[-1].state.get("went_back_to") == step:
        return
    run.checkpoint(step)
    if later := [checkpoint for checkpoint in saved if checkpoint.step > step]:
        aside = run.folder / "set-aside"
        aside.mkdir(exist_ok=True)
        append_jsonl(aside / "metrics.jsonl", *(r for r in read_jsonl(run.metrics) if r["step"] > step))
        for checkpoint in reversed(later):  # newest first: cut short, this can simply be done again
            remove(aside / checkpoint.folder.name)
            checkpoint.folder.rename(aside / checkpoint.folder.name)
        say(f"set aside {len(later)} later checkpoints and their metrics in {aside}")
    run.reopen()
