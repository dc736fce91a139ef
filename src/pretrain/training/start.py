"""Where a training begins: the run directory opened or made, its text prepared, and trained on to the last step.

train → open_run, go_back → set_up (setup.py) → Trainer.fit (loop.py) → train_step (step.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.config import Config, differences
from pretrain.device import keep_freed_memory
from pretrain.errors import Interrupted, UsageError
from pretrain.io import append_jsonl, read_jsonl
from pretrain.model import meta_model
from pretrain.optim import build_optimizers, find_optimizer
from pretrain.runs import Run, checkpoints
from pretrain.runs.checkpoint import remove
from pretrain.runs.run import lock_run
from pretrain.sizing import resolve
from pretrain.tokens import (
    check_boundary,
    find_text,
    introduce,
    is_tokens,
    open_corpus,
    prepare,
    prepare_stream,
    training_order,
)
from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.init_from import resolve_init
from pretrain.training.setup import set_up
from pretrain.training.world import join_world


def train(
    config: Config,
    out: str | Path,
    console: Console | None = None,
    started: float | None = None,
    resume_from: int = 0,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train as ``config`` says into the run directory ``out``, or resume the run in it, to its end.

    Args:
        config: from :func:`pretrain.load_config`.
        out: the run directory; made if it does not exist.
        console: where progress is shown; nowhere by default.
        started: ``time.monotonic()`` when the whole job began, from which its seconds are counted; now by default.
        resume_from: go back to the checkpoint of this step first; 0: resume from the newest.
        callbacks: code of your own, see :class:`pretrain.Callback`.

    Raises:
        UsageError: the configuration cannot run here, or differs from that of the run in ``out``.
        DataError: the text cannot be used, or is not what the run was trained on.
        CheckpointError: no checkpoint can be used or written, or another process is training in ``out``.
        Interrupted: a signal asked to stop; everything is saved.
        PretrainError: training cannot go on, for another reason that its text gives.
    """
    started = time.monotonic() if started is None else started
    out, console = Path(out), console or Console(quiet=True)
    with join_world(config.train.device, config.parallel) as world, contextlib.ExitStack() as until_the_end:
        if world.device.type == "cpu":
            keep_freed_memory()
        if not world.is_rank0:
            console = Console(quiet=True)

        def open_and_lock() -> Run:
            find_optimizer(config.optim)  # refuses an unknown name before any work
            until_the_end.enter_context(lock_run(out))
            try:
                run = open_run(config, out, console)
                if resume_from:
                    go_back(run, resume_from, console.say)
            except KeyboardInterrupt:
                raise Interrupted(f"stopped before the first step; resume with: {console.command}") from None
            return run

        run = world.run_on_rank0(open_and_lock)
        if run.summary is None:
            set_up(run, world, console, started, resume_from, callbacks).fit()
        else:
            console.say(f"{run.folder} is finished: {run.summary['steps']} steps; nothing left to train")
    return run


def open_run(config: Config, folder: Path, console: Console) -> Run:
    """The run in ``folder``, or a new one with its text prepared; nothing is left behind when that fails."""
    config = with_absolute_paths(config)
    if Run.exists(folder):
        return Run.create(folder, same_configuration(Run.open(folder), config, console.say))
    config = resolve_init(config)
    if config.data.stream:
        text = find_text(config.data, console.say)
        tokenizer, windows = prepare_stream(config, text, folder / "data", console.say).tokenizer, 0
    elif is_tokens(config.data.paths):
        data, vocabulary = config.data, config.tokenizer
        corpus = open_corpus(data.paths, vocabulary.kind, data.bos, boundary=vocabulary.bos, dtype=data.dtype)
        windows = training_order(corpus, config).windows  # refuses what is too short, before the run exists
        tokenizer = corpus.tokenizer
        check_boundary(tokenizer, config.model.document_mask)
        introduce(tokenizer, data.bos, console.say)
    else:
        tokenizer = prepare(config, folder / "data", console.say).tokenizer
        windows = training_order(open_corpus([str(folder / "data")]), config).windows
    tokenizer.save(folder / "tokenizer.json")
    config, derived = resolve(config, tokenizer.vocab_size, windows)
    for line in derived:
        console.say(f"derived   {line}")
    build_optimizers(meta_model(config.model, tokenizer.vocab_size), config.optim)  # refuses groups of no parameter
    return Run.create(folder, config)


def same_configuration(run: Run, config: Config, say: Callable[[str], None]) -> Config:
    """The configuration to resume ``run`` with. A UsageError if it would learn something else than a longer run."""
    vocab_size, before = run.tokenizer().vocab_size, run.config
    given, windows = config, training_order(run.corpus(), config).windows if config.train.epochs else 0
    config, _ = resolve(given, vocab_size, windows)
    if differences(before, config) and config.train.init_from:  # perhaps as it was given at first
        config, _ = resolve(resolve_init(given), vocab_size, windows)
    changed = differences(before, config)
    longer = [f"train.steps {before.train.steps} → {config.train.steps}"]
    if config.train.steps > before.train.steps and changed == longer:
        say(f"longer    {config.train.steps:,} steps instead of {before.train.steps:,}, with the longer schedule")
        run.reopen()
    elif changed:
        different = "; ".join(changed)
        raise UsageError(f"{run.folder} was made with another configuration ({different}); choose another --out")
    return config


def with_absolute_paths(config: Config) -> Config:
    """The configuration with ``data.paths`` as they are from any folder, since the run may be resumed from another."""

    def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in paths)

    paths = {name: absolute(getattr(config.data, name)) for name in ("paths", "val_paths")}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))


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
