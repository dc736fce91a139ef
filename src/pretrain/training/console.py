"""What a person sees of training: a live panel on a terminal, a few plain lines when piped, nothing when quiet.

A step only leaves its numbers here; the panel is drawn from them by a thread of its own, twice a second.
"""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.live import Live
from rich.text import Text

from pretrain.device import Precision, peak_flops, process_memory, total_memory
from pretrain.runs.metrics import Smoothed
from pretrain.sizing import flops_per_token
from pretrain.training.callbacks import Callback

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

DRAWS_PER_SECOND = 2
BAR = 30
"""Characters of the bar."""


class Console(Callback):
    """Shows the course of a run.

    Args:
        quiet: show nothing.
        command: the command that resumes this run, for messages.
    """

    def __init__(self, quiet: bool = False, command: list[str] | None = None):
        self.command = shlex.join(command or ["pretrain", "train"])
        self._console = rich.console.Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._panel: Panel | None = None
        self._live: Live | None = None
        self._every = 1

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def on_start(self, trainer: Trainer) -> None:
        """Describe what will be trained on what, and where; begin the panel on a terminal."""
        config, corpus, state, world = trainer.config, trainer.corpus, trainer.state, trainer.world
        train, device, precision = config.train, world.device, state.progress.precision
        tokens = f"{corpus.tokens('train'):,} to train on" if corpus.tokens("train") else "made while training"
        vocabulary = corpus.tokenizer.vocab_size
        self.say(f"tokens    {tokens}, {corpus.tokens('val'):,} held out, vocabulary {vocabulary:,}")
        parameters = sum(p.numel() for p in state.model.parameters())
        self.say(f"model     {parameters:,} parameters, context {config.model.context_length}")
        epochs = f"{state.batches.epoch(train.steps):.1f} epochs"
        self.say(
            f"training  {train.steps:,} steps of {train.batch_tokens:,} tokens = {epochs}"
            f" ({device.type}, {precision}) → {trainer.run.folder}"
        )
        if trainer.step:
            self.say(f"resuming  after step {trainer.step:,}")
        if world.size > 1:
            rows = world.rows_per_rank(config.batch_rows)
            self.say(f"processes {world.size} ({state.parameters.kind}), {rows} rows of the batch each")
        self._every = max(1, train.steps // 20)
        if self._console.is_terminal and not self._console.quiet:
            where = Precision(precision, device)
            peak = peak_flops(device, where.dtype) * world.size
            share = flops_per_token(config.model, vocabulary) / peak
            self._panel = Panel(where, share, trainer.step, trainer.step, train.steps)
            self._live = Live(
                get_renderable=self._panel.draw,
                console=self._console,
                transient=True,
                refresh_per_second=DRAWS_PER_SECOND,
            )
            self._live.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Update the panel, or print some twenty lines in all."""
        if self._panel is not None:
            self._panel.step(record)
        elif record["step"] % self._every == 0 and "val/loss" not in record:
            self.say(_numbers(record))

    def on_evaluation(self, record: dict[str, Any], sample: str | None) -> None:
        """Print the numbers of a validation, and the sample."""
        if self._panel is not None and record.get("val/loss") is not None:
            self._panel.validation = record
        self.say(_numbers(record))
        if sample:
            self.say(f"      “{' '.join(sample.split())}”")

    def on_event(self, event: dict[str, Any]) -> None:
        """Print it."""
        self.say(event["text"])

    def on_checkpoint(self, path: Path) -> None:
        """Show on the panel which checkpoint there is."""
        if self._panel is not None:
            self._panel.saved = int(path.name.removeprefix("step-"))
            self.say(f"step {self._panel.saved:5d}   saved")

    def on_end(self, interrupted: bool) -> None:
        """Take the panel away."""
        if self._live is not None:
            self._live.stop()


class Panel:
    """The newest numbers of a run, and how they look on a terminal.

    Args:
        precision: of the run, and its device.
        share: of the hardware's peak that one token a second takes.
        saved: the step of the newest checkpoint; 0 for none.
        done: steps done before.
        steps: steps in all.
    """

    def __init__(self, precision: Precision, share: float, saved: int, done: int, steps: int):
        self.precision, self.share, self.saved = precision, share, saved
        self.done, self.steps = done, steps
        self.memory = total_memory(precision.device)
        self.record: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.smoothed = math.nan
        self._mean = Smoothed()
        self._begun = (0.0, 0)  # seconds and steps when the first step was done, which may have compiled

    def step(self, record: dict[str, Any]) -> None:
        """Take the numbers of a step."""
        self.record, self.done = record, record["step"]
        self.smoothed = self._mean.add(record["train/loss"])
        if not self._begun[1]:
            self._begun = (time.monotonic(), self.done)

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
