"""Callbacks: everything that observes training, the project's own and the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.io import append_jsonl, keep_steps, read_jsonl, sync_file
from pretrain.runs import Run
from pretrain.runs.metrics import OVERFIT, SMOOTHED_LOSS, comparable_loss
from pretrain.text import ReadStats

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

VALIDATIONS = 2
"""How many of them in a row must be above the lowest by OVERFIT before a run is said to overfit."""


class Callback:
    """Base class: override what you need and pass it to ``train(..., callbacks=[...])``.

    On several processes only rank 0 calls. What a callback raises ends training.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a new or resumed run."""

    def on_phase(self, step: int, phase: str, seconds: float | None = None) -> None:
        """A sign of progress: ``step`` steps are done and ``phase`` begins or continues; the step took ``seconds``."""

    def on_step(self, record: dict[str, Any]) -> None:
        """After a step, with its line of metrics.jsonl; on a GPU some steps later, when the numbers are fetched.

        The line of step 0 (``eval.at_start``) has only what was measured before the first step, none of ``train/loss``.
        """

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """After a validation, with the step's line of metrics.jsonl."""

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """After ``step`` steps the model continued ``prompt``; ``text`` begins with it. Called for each prompt."""

    def on_event(self, event: dict[str, Any]) -> None:
        """An event such as a skipped step: ``event`` has ``step``, ``event`` (its kind) and ``text``.

        A hang is reported from the thread of the heartbeat, and what becomes of copies from theirs.
        """

    def on_save(self, step: int) -> None:
        """Before a checkpoint is written, and at the end; an OSError raised here counts as one of writing it."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint was committed; called from the thread that wrote it."""

    def on_rollback(self, step: int) -> None:
        """The steps after ``step`` were taken back and will come again."""

    def on_end(self, interrupted: bool) -> None:
        """At the end of the run or when it is interrupted, also by an error; ``interrupted`` says by a signal."""


class RunFiles(Callback):
    """``metrics.jsonl``, ``samples.jsonl`` and ``events.jsonl``: no step twice and none missing after a resume.

    A line that cannot be written (a full disk) waits for the next time; a checkpoint is saved only after all lines.
    """

    def __init__(self, run: Run, finished: int, say: Callable[[str], None]):
        """``finished`` steps are done with all their lines; later ones are dropped. -1: the run begins."""
        self.run, self.say = run, say
        self._waiting: dict[Path, list[dict[str, Any]]] = {run.metrics: [], run.samples: []}
        self.on_rollback(finished)
        keep_steps(run.events, max(0, finished))

    def on_step(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._write(self.run.metrics, record)

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """A line of samples.jsonl."""
        self._write(self.run.samples, {"step": step, "prompt": prompt, "text": text})

    def on_event(self, event: dict[str, Any]) -> None:
        """A line of events.jsonl."""
        with suppress(OSError):  # a full disk is reported by what matters more
            append_jsonl(self.run.events, event)

    def on_save(self, step: int) -> None:
        """First the lines, safe on the disk, so that no step of a checkpoint is ever missing from them."""
        self._flush()
        for file in self._waiting:
            if file.exists():
                sync_file(file)

    def on_rollback(self, step: int) -> None:
        """Drop the lines of steps that will come again."""
        for file, records in self._waiting.items():
            records[:] = [record for record in records if record["step"] <= step]
            keep_steps(file, step)

    def _write(self, file: Path, record: dict[str, Any]) -> None:
        self._waiting[file].append(record)
        try:
            self._flush()
        except OSError as error:  # the next save tries again, and fails with it
            self.say(f"the log of step {record['step']} is not written yet ({error.strerror or error})")

    def _flush(self) -> None:
        for file, records in self._waiting.items():
            if records:
                append_jsonl(file, *records)
                records.clear()


class Warnings(Callback):
    """Says in words, once each, that a model overfits, and that it predicts worse than knowing nothing would."""

    def __init__(self, run: Run, records: list[dict[str, Any]]):
        """``records``, of metrics.jsonl, are those of the steps done so far."""
        self.validations: list[Validation] = []
        self.said = {event.get("event") for event in read_jsonl(run.events)}
        for record in records:
            self._add(record)

    def on_start(self, trainer: Trainer) -> None:
        """See :class:`Callback`."""
        self.trainer = trainer

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """See :class:`Callback`."""
        self._add(record)
        if not self.validations or self.validations[-1].step != record["step"]:
            return
        config, vocab_size = self.trainer.config, self.trainer.corpus.tokenizer.vocab_size
        if text := overfitting(self.validations):
            keeps = "checkpoint.keep_best keeps" if config.checkpoint.keep_best else "--checkpoint.keep_best would keep"
            self._say("overfitting", f"{text}; {keeps} the weights of the lowest")
        loss, nothing = record["val/loss"], math.log(vocab_size)
        if loss > nothing and record["step"] > config.schedule.warmup_steps:  # initial weights may be a little above it
            self._say(
                "knows_nothing",
                f"the validation loss, {loss:.3f}, is above {nothing:.3f}, that of knowing nothing: a guess among all"
                f" {vocab_size:,} tokens",
            )

    def on_rollback(self, step: int) -> None:
        """See :class:`Callback`."""
        self.validations = [each for each in self.validations if each.step <= step]

    def _add(self, record: dict[str, Any]) -> None:
        loss, train = comparable_loss(record), record.get(SMOOTHED_LOSS)
        if loss is not None and math.isfinite(loss):
            self.validations.append(Validation(record["step"], loss, math.inf if train is None else train))

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            self.trainer.event(kind, text)


@dataclass(frozen=True)
class Validation:
    """The held-out loss after a step, over text that compares, and the smoothed training loss, infinite at step 0."""

    step: int
    loss: float
    train: float


def overfitting(validations: Sequence[Validation]) -> str:
    """In words, that the newest validations are clearly above the lowest while the training loss fell; else empty."""
    best, now = min(validations, key=lambda each: each.loss), validations[-1]
    risen = [each.loss > best.loss + OVERFIT for each in validations if each.step > best.step]
    if len(risen) < VALIDATIONS or not all(risen[-VALIDATIONS:]) or not now.train < best.train:
        return ""
    return (
        f"overfitting: the validation loss was lowest, {best.loss:.3f}, after step {best.step:,} and has risen to"
        f" {now.loss:.3f}, while the training loss fell; fewer steps, more text or dropout help"
    )


class TextProblems(Callback):
    """Says what is wrong with the text of a stream that was read: what is new at validations, all at the end."""

    def __init__(self, read: ReadStats, say: Callable[[str], None]):
        self.read, self.say = read, say
        self.said: dict[str, int] = {}

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """See :class:`Callback`."""
        if self.read.problems.keys() - self.said.keys():
            self.on_end(interrupted=False)

    def on_end(self, interrupted: bool) -> None:
        """See :class:`Callback`."""
        if self.read.problems != self.said:
            self.said = dict(self.read.problems)
            for line in self.read.lines():
                self.say(f"{line}, so far")
