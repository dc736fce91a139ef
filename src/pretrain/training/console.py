"""What a person sees of training: a live line on a terminal, a few plain lines when piped, nothing when quiet."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pretrain.device import Precision
from pretrain.model import GPT
from pretrain.tokens import Batches, Corpus
from pretrain.training.run import Run


class Console:
    """Shows the course of a run.

    Args:
        quiet: show nothing.
        command: the command that goes on with this run, for messages.
    """

    def __init__(self, quiet: bool = False, command: list[str] | None = None):
        self.command = shlex.join(command or ["pretrain", "train"])
        self._console = rich.console.Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._every = 1

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def describe(self, run: Run, corpus: Corpus, model: GPT, batches: Batches, precision: Precision, done: int) -> None:
        """Before the first step: what will be trained on what, and where."""
        train = run.config.train
        tokens = f"{corpus.tokens('train'):,} to train on" if corpus.tokens("train") else "made while training"
        held_out, vocabulary = corpus.tokens("val"), corpus.tokenizer.vocab_size
        self.say(f"tokens    {tokens}, {held_out:,} held out, vocabulary {vocabulary:,}")
        parameters = sum(p.numel() for p in model.parameters())
        self.say(f"model     {parameters:,} parameters, context {run.config.model.context_length}")
        epochs = f"{batches.epoch(train.steps):.1f} epochs"
        self.say(
            f"training  {train.steps:,} steps of {train.batch_tokens:,} tokens = {epochs}"
            f" ({precision.device.type}, {precision.name}) → {run.folder}"
        )
        if done:
            self.say(f"resuming  after step {done:,}")

    @contextmanager
    def progress(self, done: int, steps: int) -> Iterator[None]:
        """Show progress while entered."""
        self._every = max(1, steps // 20)
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, refresh_per_second=4) as self._progress:
            self._task = self._progress.add_task("", total=steps, completed=done, numbers="")
            yield
        self._progress = None

    def step(self, record: dict[str, Any], done: int) -> None:
        """After each step, with the newest numbers that have been fetched."""
        if not record:
            return
        if self._progress is not None and self._task is not None:
            numbers = (
                f"loss {record['train/loss']:.3f}  lr {record['train/lr']:.2e}"
                f"  {record['train/tokens_per_second']:,.0f} tokens/s"
            )
            self._progress.update(self._task, completed=done, numbers=numbers)
        elif done % self._every == 0 and "val/loss" not in record:
            self.say(_numbers(record))

    def evaluated(self, record: dict[str, Any], text: str | None) -> None:
        """After a validation, with a sample if one was made."""
        self.say(_numbers(record))
        if text:
            self.say(f"      “{' '.join(text.split())}”")


def _numbers(record: dict[str, Any]) -> str:
    line = f"step {record['step']:5d}   train loss {record['train/loss'] or float('nan'):.3f}"
    if "val/loss" in record:
        line += f"   val loss {record['val/loss'] or float('nan'):.3f}"
        if record["val/bpb"] is not None:
            line += f"   {record['val/bpb']:.3f} bits per byte"
    return line + f"   {record['train/tokens_per_second']:,.0f} tokens/s   {record['time']:.0f} s"
