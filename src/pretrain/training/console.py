"""What a person sees of training: a live panel on a terminal, a few plain lines when piped, nothing when quiet.

A step only leaves its numbers here; the panel is drawn from them by a thread of its own, twice a second.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.device import Precision, peak_flops, process_memory, total_memory
from pretrain.io import Output
from pretrain.runs.checkpoint import AVERAGE
from pretrain.runs.metrics import SMOOTHED_LOSS
from pretrain.sizing import flops_per_token
from pretrain.training.callbacks import Callback

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

MEASURED = {"val/loss", "train/eval_loss", "test/loss"}  # of a validation, with which the line of its step is printed


class Console(Callback):
    """Shows the course of a run.

    Args:
        quiet: show nothing.
        command: the command that resumes this run, for messages.
    """

    def __init__(self, quiet: bool = False, command: list[str] | None = None):
        self.command = shlex.join(command or ["pretrain", "train"])
        output: Any = Output()  # whatever becomes of the terminal, the run goes on
        self._console = rich.console.Console(file=output, quiet=quiet, highlight=False, soft_wrap=True)
        self._panel: Panel | None = None
        self._every = 1
        self._shown = 0

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def on_start(self, trainer: Trainer) -> None:
        """Describe what will be trained on what, and where; begin the panel on a terminal."""
        config, corpus, state, world = trainer.config, trainer.corpus, trainer.state, trainer.world
        train, device, vocabulary = config.train, world.device, corpus.tokenizer.vocab_size
        precision = Precision(state.progress.precision, device)
        tokens = f"{corpus.tokens('train'):,} to train on" if corpus.tokens("train") else "made while training"
        test = f", {corpus.tokens('test'):,} for the test" if corpus.tokens("test") else ""
        self.say(f"tokens    {tokens}, {corpus.tokens('val'):,} held out{test}, vocabulary {vocabulary:,}")
        parameters = sum(p.numel() for p in state.model.parameters())
        self.say(f"model     {parameters:,} parameters, context {config.model.context_length}")
        epochs = state.batches.epoch(train.steps + state.progress.skipped_batches)
        self.say(
            f"training  {train.steps:,} steps of {train.batch_tokens:,} tokens = {epochs:.1f} epochs"
            f" ({device.type}, {precision.name}) → {trainer.run.folder}"
        )
        if config.schedule.warmup_steps >= train.steps > 1:
            warmup = f"the warmup lasts {config.schedule.warmup_steps:,} steps, so the rate only rises"
            self.say(f"warning   {warmup}; try --schedule.warmup_steps {train.steps // 10}")
        if trainer.step:
            self.say(f"resuming  after step {trainer.step:,}")
        if world.size > 1:
            rows = world.rows_per_rank(config.batch_rows)
            self.say(f"processes {world.size} ({state.parameters.parallelism}), {rows} rows of the batch each")
        self._every = config.log.every or max(1, train.steps // 20)
        if self._console.is_terminal and not self._console.quiet:
            share = flops_per_token(config.model, vocabulary) / (peak_flops(device, precision.dtype) * world.size)
            self._panel = Panel(self._console, precision, share, trainer.step, train.steps)
            self._panel.live.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Update the panel, or print a line where it is due."""
        if "train/loss" not in record:  # before the first step
            return
        if self._panel is not None:
            self._panel.record = record
        elif record["step"] % self._every == 0 and not MEASURED & record.keys():
            self._show(record)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """Print the numbers of a validation; where nothing was held out, the line of its step, once."""
        if not MEASURED & record.keys() and self._shown == record["step"]:
            return
        if self._panel is not None and record.get("val/loss") is not None:
            self._panel.validation = record
        self._show(record)

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Print it, below the line of its step."""
        if step != self._shown:
            self.say(f"step {step:5d}   sampled")
            self._shown = step
        if text:
            self.say(f"      “{' '.join(text.split())}”")

    def on_event(self, event: dict[str, Any]) -> None:
        """Print it."""
        self.say(event["text"])

    def on_checkpoint(self, path: Path) -> None:
        """Show on the panel which checkpoint there is."""
        if self._panel is not None:
            self._panel.saved = int(path.name.removeprefix("step-"))
            self.say(f"step {self._panel.saved:5d}   saved")

    def _show(self, record: dict[str, Any]) -> None:
        self.say(_numbers(record))
        self._shown = record["step"]

    def on_end(self, interrupted: bool) -> None:
        """Remove the panel."""
        if self._panel is not None:
            self._panel.live.stop()


class Panel:
    """The newest numbers of a run; ``share`` of the hardware's peak is what one token a second takes."""

    def __init__(self, console: rich.console.Console, precision: Precision, share: float, done: int, steps: int):
        self.precision, self.share, self.saved = precision, share, done
        self.memory = total_memory(precision.device)
        self.record: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        steps_done = TextColumn("step {task.completed:,}/{task.total:,}", style="bold")
        columns = (steps_done, BarColumn(30), "{task.percentage:.0f}%", TimeRemainingColumn(compact=True), "left")
        self.bar = Progress(*columns, console=console, speed_estimate_period=3600)
        self._task = self.bar.add_task("", total=steps, completed=done)
        self.live = Live(get_renderable=self.draw, console=console, transient=True, refresh_per_second=2)

    def draw(self) -> Group:
        """A line with a bar, and two of numbers."""
        record = self.record
        if not record:
            return Group(self.bar, "first step")
        self.bar.update(self._task, completed=record["step"])
        learning = [f"loss {record[SMOOTHED_LOSS]:.3f} (last {_number(record['train/loss'], '.3f')})"]
        if self.validation:
            bpb, loss = self.validation.get("val/bpb"), self.validation["val/loss"]
            shown = f"{bpb:.3f} bits per byte" if bpb is not None else f"loss {loss:.3f}"
            learning.append(f"validation {shown} at step {self.validation['step']:,}")
        learning.append(f"lr {_number(record.get('train/lr'), '.2e')}")
        learning.append(f"gradient norm {_number(record.get('train/grad_norm'), '.3g')}")
        rate, used = record["train/tokens_per_second"], process_memory(self.precision.device)
        machine = [
            f"{rate:,.0f} tokens/s",
            f"{rate * self.share:.0%} of peak {self.precision.name}",
            f"{used / 1e9:.1f} of {self.memory / 1e9:.0f} GB",
            f"checkpoint of step {self.saved:,}" if self.saved else "no checkpoint yet",
        ]
        return Group(self.bar, "   ".join(learning), "   ".join(machine))


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _numbers(record: dict[str, Any]) -> str:
    parts = [f"step {record['step']:5d}"]
    if "train/loss" in record:
        parts.append(f"train loss {record[SMOOTHED_LOSS]:.3f}")
    if "train/eval_loss" in record:
        parts.append(f"train eval loss {_number(record['train/eval_loss'], '.3f')}")
    if "val/loss" in record:
        mark = " (average)" if record.get("val/weights") == AVERAGE else ""
        parts.append(f"val loss {_number(record['val/loss'], '.3f')}{mark}")
        if record["val/bpb"] is not None:
            parts.append(f"{record['val/bpb']:.3f} bits per byte")
    if "val/part_loss" in record:
        part, bpb = (_number(record[name], ".3f") for name in ("val/part_loss", "val/part_bpb"))
        parts.append(f"(all held-out text; eval.tokens of it, as before: {part}, {bpb} bits per byte)")
    if "test/loss" in record:
        loss, bpb = (_number(record[name], ".3f") for name in ("test/loss", "test/bpb"))
        parts.append(f"test loss {loss}   {bpb} bits per byte")
    if "train/tokens_per_second" in record:
        parts.append(f"{record['train/tokens_per_second']:,.0f} tokens/s")
    return "   ".join([*parts, f"{record['time']:.0f} s"])
