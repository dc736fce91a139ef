"""A new run that begins in the middle of another: with all of its state at a step, and from there on other settings.

the parent, which is only read  →  OUT.tmp: tokens, configuration, lines up to the step, the checkpoint  →  renamed OUT
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pretrain.config import HORIZONS, Config, differences
from pretrain.device import Precision
from pretrain.errors import UsageError
from pretrain.fitting import Text
from pretrain.io import append_jsonl, read_jsonl, sync_file, sync_folder, write_atomically
from pretrain.model import GPT
from pretrain.optim import build_optimizers
from pretrain.optim.schedule import learning_rate_factor
from pretrain.runs import Run
from pretrain.runs.checkpoint import Checkpoint, copy_checkpoint
from pretrain.runs.run import FORK, clear_run, lock_run, weights_id
from pretrain.sizing import resolve
from pretrain.tokens import ORIGIN, training_order
from pretrain.training.average import WeightAverage
from pretrain.training.console import Console
from pretrain.training.guard import Guard, LossScale
from pretrain.training.parallel import Parameters
from pretrain.training.start import Draft, make_run, open_run, with_absolute_paths
from pretrain.training.state import Progress, TrainState
from pretrain.training.world import World

_TEXT = "paths field separator bos split val_fraction test_fraction val_paths stream dtype"
TEXT = {f"data.{name}" for name in _TEXT.split()}
"""Fields that decide which tokens there are; the others of ``data`` decide their order."""
OF_TEXT = ("val/loss", "val/bpb", "val/part_", "val/last_loss", "val/average_loss", "test/", "train/eval_loss")
"""How metrics begin that do not compare with those on other held-out text."""


def fork(
    parent: Path,
    out: Path,
    config: Config,
    step: int = 0,
    anneal: float = 0.0,
    given: Collection[str] = (),
    console: Console | None = None,
) -> Run:
    """Make the run ``out`` from a checkpoint of the run ``parent``, ready to be trained; or find it made so.

    A kill leaves no ``out``. The parent may be training. ``step`` 0 is its newest; ``config`` its configuration, or
    that of ``out`` where it is made, with what is to change, of which ``given`` are the fields given by hand; for
    ``anneal`` see :class:`pretrain.cli.fork.Fork`. ``console`` says what differs.

    Raises UsageError if that does not go with the state of the parent, or ``out`` is another run; CheckpointError and
    DataError where checkpoint or text cannot be used.
    """
    if "checkpoint.copy_to" not in given:  # the place of the parent
        config = replace(config, checkpoint=replace(config.checkpoint, copy_to=""))
    if Run.exists(out):
        run = Run.open(out)
        if not (known := run.fork) or Path(known["parent"]) != parent.resolve() or step not in (0, known["step"]):
            begins = f"begins with step {known['step']} of {known['parent']}" if known else "is no fork"
            raise UsageError(f"{out} is a run already and {begins}; choose another --out")
        config = with_absolute_paths(_annealed(config, known["step"], anneal, given))
        windows = training_order(run.corpus(), config).windows if config.train.epochs else 0
        if changed := differences(run.config, resolve(config, run.tokenizer().vocab_size, windows)[0]):
            raise UsageError(f"{out} was forked with other settings ({'; '.join(changed)}); choose another --out")
        return run
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} has files but is not a run; choose another folder with --out")
    source = Run.open(parent)
    checkpoint = source.checkpoint(step) if step else source.newest_checkpoint()
    config = with_absolute_paths(_annealed(config, checkpoint.step, anneal, given))
    unfinished = out.absolute().with_name(f"{out.name}.tmp")
    with lock_run(unfinished, whatever=(unfinished / FORK).is_file()):
        try:
            clear_run(unfinished)
            _make(source, checkpoint, config, unfinished, out, console or Console(quiet=True))
        except BaseException:
            clear_run(unfinished)
            raise
    unfinished.rename(out)
    sync_folder(unfinished.parent)
    return Run.open(out)


def _annealed(config: Config, step: int, share: float, given: Collection[str]) -> Config:
    """With a linear decay to zero over the last ``share`` of the steps, which begins at ``step`` if none are given."""
    if not share:
        return config
    if clash := sorted({"schedule.kind", "schedule.decay_fraction", "schedule.final"}.intersection(given)):
        raise UsageError(f"--anneal {share:g} and --{clash[0]} both set the decay; give one of them")
    schedule, train = replace(config.schedule, kind="linear", decay_fraction=share, final=0.0), config.train
    if not {f"train.{name}" for name in HORIZONS}.intersection(given):
        train = replace(train, steps=round(step / (1 - share)), epochs=0.0, minutes=0.0)
    return replace(config, schedule=schedule, train=train)


def _make(parent: Run, checkpoint: Checkpoint, config: Config, folder: Path, out: Path, console: Console) -> None:
    """Fill ``folder`` with all that the run ``out`` needs before it is trained."""
    say, step, place, before = console.say, checkpoint.step, parent.folder, parent.config
    vocabulary = parent.tokenizer()
    changed = differences(before, config)
    names = {line.partition(" ")[0] for line in changed}
    if fixed := sorted(name for name in names if name.startswith("tokenizer.") or name == "train.init_from"):
        raise UsageError(f"a fork keeps tokenizer and weights of {place}; leave --{fixed[0]} out")
    if config.train.timed:
        raise UsageError("the length of a fork is given in steps, those before it included; give --train.steps")
    _check_state(checkpoint, config, vocabulary.vocab_size, changed, place)
    write_atomically(folder / FORK, json.dumps({"parent": str(place.resolve()), "step": step}) + "\n")

    # The tokens: the same, or other text by the same tokenizer.
    config = replace(config, train=replace(config.train, init_from=""))
    if other := bool(names & TEXT):
        kind = replace(config.tokenizer, kind=str(place.resolve() / "tokenizer.json"), bos="")
        draft = open_run(replace(config, tokenizer=kind), folder, console)
        assert isinstance(draft, Draft)
    else:
        for file in ("tokenizer.json", ORIGIN):
            with suppress(FileNotFoundError):  # earlier versions wrote no origin.json
                shutil.copyfile(place / file, folder / file)
                sync_file(folder / file)
        if parent.own_tokens:  # links if the file system has them: shards are never written to again
            try:
                shutil.copytree(parent.data, folder / "data", copy_function=os.link)
            except OSError:
                shutil.rmtree(folder / "data")
                shutil.copytree(parent.data, folder / "data")
        draft = Draft(folder, config, Text(0, vocab_size=vocabulary.vocab_size))
    run = make_run(draft, draft.config, say)
    if step >= run.config.train.steps:
        has = f"train.steps is {run.config.train.steps} and step {step} of {place} the last"
        raise UsageError(f"{has}; give more --train.steps, or --anneal")

    # What differs.
    as_before = replace(before, tokenizer=run.config.tokenizer, train=replace(before.train, init_from=""))
    changed = differences(as_before, run.config)
    state, data = _state(checkpoint, before, run, {line.partition(" ")[0] for line in changed})
    say(f"fork      step {step:,} of {place} → {out}")
    for line in changed:
        say(f"differs   {line}")
    if data:
        say(f"data      {data}")
    last, first = _rate(before, step - 1), _rate(run.config, step)
    say(f"rate      {last:.3g} at step {step:,} of {place}, {first:.3g} at step {step + 1:,} here")

    # Its lines and its checkpoint, and where they are from.
    compares = not other or (config.data.val_paths and config.data.val_paths == before.data.val_paths)
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        lines = [line for line in read_jsonl(place / name) if line["step"] <= step]
        if not compares:
            lines = [{key: value for key, value in line.items() if not key.startswith(OF_TEXT)} for line in lines]
        append_jsonl(folder / name, *lines)
        sync_file(folder / name)
    copy_checkpoint(checkpoint, run.checkpoints, state)
    above = parent.fork
    known = {
        "parent": str(place.resolve()),
        "relative": os.path.relpath(place.resolve(), out.resolve()),
        "step": step,
        "weights": weights_id(checkpoint),
        "differences": changed,
        "ancestors": [{**above, "ancestors": []}, *above["ancestors"]] if above else [],
    }
    write_atomically(folder / FORK, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


def _rate(config: Config, step: int) -> float:
    return config.optim.lr * learning_rate_factor(config.schedule, step, config.train.steps)


def _check_state(checkpoint: Checkpoint, config: Config, vocab_size: int, changed: list[str], place: Path) -> None:
    """Raise UsageError if a checkpoint has not all tensors, of the same shapes, that training with ``config`` needs."""
    from torch._subclasses import FakeTensorMode

    world = World(torch.device("cpu"))
    with FakeTensorMode():  # shapes alone, without memory
        model = GPT(config.model, vocab_size)
        parameters, optimizers = Parameters(model, "none", world), build_optimizers(model, config.optim)
        average = WeightAverage(config.optim.ema, parameters) if config.optim.ema else None
        scale, guard = LossScale(Precision(config.train.precision, world.device)), Guard(config.guard, world.device)
        batches: Any = None
        state = TrainState(
            config, world, model, model, parameters, optimizers, scale, guard, batches, Progress(), average
        )
        state.make_moments()
    needed = {name: tensor for name, tensor in state.tensors().items() if not name.startswith("random.")}
    pieces = checkpoint.index()
    for name, tensor in needed.items():
        shape = tuple(map(max, zip(*(piece.end for piece in pieces[name]), strict=True))) if name in pieces else None
        if shape != tuple(tensor.shape):
            of = [line for line in changed if line.startswith(("model.", "optim.", "guard.", "train.precision"))]
            what = f"it has no {name}" if shape is None else f"{name} is {shape} and would be {tuple(tensor.shape)}"
            raise UsageError(f"the state of {place} does not go with {'; '.join(of)}: {what}; leave that out")


def _state(checkpoint: Checkpoint, before: Config, run: Run, changed: set[str]) -> tuple[dict[str, Any], str]:
    """The plain values of a checkpoint, for a run that goes on otherwise; and how its data does, if not as before."""
    progress, step, data = Progress.of(checkpoint), checkpoint.step, ""
    tokens, now = before.train.batch_tokens, run.config.train.batch_tokens
    of_data = {name for name in changed if name.startswith("data.") or name in ("train.seed", "model.context_length")}
    staged = run.config.data.stages  # at batches of their own numbers
    batch = step + progress.skipped_batches  # the next
    if (of_data & TEXT and not staged) or (run.config.data.stream and (of_data or tokens != now)):
        batch, progress.batches, data = 0, {}, "begins anew, at the beginning of its text"
    else:
        if tokens != now and not staged:
            batch = -(-batch * tokens // now)
            data = f"goes on after what was read, in batches of {now:,} tokens"
        if of_data or (tokens != now and staged):
            data = f"in another order from step {step + 1:,} on: of this epoch some text comes again, and some later"
        elif staged and "train.steps" in changed:
            data = "data.stages begin at other steps, as shares of the new train.steps"
    if tokens != now or "model.context_length" in changed:
        progress.micro_rows = 0  # chosen anew
    if "train.precision" in changed:
        progress.precision = ""
    progress.more_tokens += step * (tokens - now)
    progress.skipped_batches, progress.went_back_to, progress.data = batch - step, 0, run.corpus().fingerprint
    return asdict(progress), data
