"""Callbacks: everything that observes training, the project's own and the user's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.io import append_jsonl, keep_steps, sync_file
from pretrain.runs import Run
from pretrain.text import ReadStats

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer


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

        A hang is reported from the thread of the heartbeat.
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
