"""What a person sees of training: a live panel on a terminal, a few plain lines when piped, nothing when quiet.

    describe  →  progress: [step, evaluated, saved, say] ...

A step only leaves its numbers here; the panel is drawn from them by a thread of its own, twice a second.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
import torch.distributed as dist
from rich.live import Live
from rich.text import Text

from pretrain.device import Precision, peak_flops, process_memory, total_memory
from pretrain.model import GPT
from pretrain.runs.run import Run
from pretrain.sizing import flops_per_token
from pretrain.tokens import Batches, Corpus

SMOOTHING = 0.95
"""What the smoothed loss keeps of itself at each step: about twenty steps weigh."""
DRAWS_PER_SECOND = 2
BAR = 30
"""Characters of the bar."""


class Console:
    """Shows the course of a run.

    Args:
        quiet: show nothing.
        command: the command that goes on with this run, for messages.
    """

    def __init__(self, quiet: bool = False, command: list[str] | None = None):
        self.command = shlex.join(command or ["pretrain", "train"])
        self._console = rich.console.Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._panel: Panel | None = None
        self._live = False
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
        if self._console.is_terminal and not self._console.quiet:
            processes = dist.get_world_size() if dist.is_initialized() else 1
            peak = peak_flops(precision.device, precision.dtype) * processes
            self._panel = Panel(precision, flops_per_token(run.config.model, vocabulary) / peak, done)

    @contextmanager
    def progress(self, done: int, steps: int) -> Iterator[None]:
        """Show progress while entered."""
        self._every = max(1, steps // 20)
        if self._panel is None:
            yield
            return
        self._panel.begin(done, steps)
        with Live(
            get_renderable=self._panel.draw,
            console=self._console,
            transient=True,
            refresh_per_second=DRAWS_PER_SECOND,
        ):
            self._live = True
            try:
                yield
            finally:
                self._live = False

    def step(self, record: dict[str, Any], done: int) -> None:
        """After each step, with the newest numbers that have been fetched."""
        if not record:
            return
        if self._live and self._panel is not None:
            self._panel.step(record, done)
        elif done % self._every == 0 and "val/loss" not in record:
            self.say(_numbers(record))

    def evaluated(self, record: dict[str, Any], text: str | None) -> None:
        """After a validation, with a sample if one was made."""
        if self._panel is not None:
            self._panel.evaluated(record)
        self.say(_numbers(record))
        if text:
            self.say(f"      “{' '.join(text.split())}”")

    def saved(self, step: int) -> None:
        """A checkpoint of ``step`` exists; may be called from the thread that wrote it."""
        if self._panel is not None:
            self._panel.saved = step
            self.say(f"step {step:5d}   saved")


class Panel:
    """The newest numbers of a run, and how they look on a terminal.

    Args:
        precision: of the run, and its device.
        share: of the hardware's peak that one token a second takes.
        saved: the step of the checkpoint that there is; 0 for none.
    """

    def __init__(self, precision: Precision, share: float, saved: int):
        self.precision, self.share, self.saved = precision, share, saved
        self.memory = total_memory(precision.device)
        self.record: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.done = self.steps = 0
        self._loss = self._weight = 0.0
        self._begun = (0.0, 0)  # seconds and steps when the first step was done, which may have compiled

    def begin(self, done: int, steps: int) -> None:
        """Steps done before, and in all."""
        self.done, self.steps = done, steps

    def step(self, record: dict[str, Any], done: int) -> None:
        """Take the newest numbers, which may be those of some steps ago."""
        self.done = done
        if not self._begun[1]:
            self._begun = (time.monotonic(), done)
        if record.get("step") == self.record.get("step"):
            return
        self.record = record
        loss = record["train/loss"]
        if loss is not None and math.isfinite(loss):
            self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Take the numbers of a validation."""
        if record.get("val/loss") is not None:
            self.validation = record

    @property
    def smoothed(self) -> float:
        """The mean loss of the last steps, of which newer ones weigh more."""
        return self._loss / self._weight if self._weight else math.nan

    @property
    def seconds_left(self) -> float:
        """At the mean pace so far, validations and saves included; NaN before the second step."""
        since, first = self._begun
        if self.done <= first or not first:
            return math.nan
        return (time.monotonic() - since) / (self.done - first) * (self.steps - self.done)

    def draw(self) -> Text:
        """A line with a bar, and two of numbers; plain text, which is quick to draw."""
        share = self.done / max(1, self.steps)
        full, left = round(share * BAR), self.seconds_left
        text = Text(f"step {self.done:,}/{self.steps:,}  ", style="bold")
        text.append("━" * full, style="cyan").append("─" * (BAR - full), style="dim")
        text.append(f"  {share:.0%}" + ("" if math.isnan(left) else f"   {clock(left)} left"), style="not bold")
        for line in self.lines():
            text.append("\n" + "   ".join(line), style="not bold")
        return text

    def lines(self) -> list[list[str]]:
        """The numbers, as they are shown."""
        record = self.record
        if not record:
            return [["first step"]]
        learning = [f"loss {self.smoothed:.3f} (last {_number(record['train/loss'], '.3f')})"]
        if self.validation:
            bpb, loss = self.validation.get("val/bpb"), self.validation["val/loss"]
            shown = f"{bpb:.3f} bits per byte" if bpb is not None else f"loss {loss:.3f}"
            learning.append(f"validation {shown} at step {self.validation['step']:,}")
        learning.append(f"lr {_number(record.get('train/lr'), '.2e')}")
        learning.append(f"gradient norm {_number(record.get('train/grad_norm'), '.3g')}")
        rate = record["train/tokens_per_second"]
        used = process_memory(self.precision.device)
        machine = [
            f"{rate:,.0f} tokens/s",
            f"{rate * self.share:.0%} of peak {self.precision.name}",
            f"{used / 1e9:.1f} of {self.memory / 1e9:.0f} GB",
            f"checkpoint of step {self.saved:,}" if self.saved else "no checkpoint yet",
        ]
        return [learning, machine]


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _numbers(record: dict[str, Any]) -> str:
    line = f"step {record['step']:5d}   train loss {_number(record['train/loss'], '.3f')}"
    if "val/loss" in record:
        line += f"   val loss {_number(record['val/loss'], '.3f')}"
        if record["val/bpb"] is not None:
            line += f"   {record['val/bpb']:.3f} bits per byte"
    return line + f"   {record['train/tokens_per_second']:,.0f} tokens/s   {record['time']:.0f} s"
