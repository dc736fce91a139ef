"""The training loop: steps, logging, checkpoints; stopping, rolling back, failing.

Everything a step needs is a function of its number (data order, schedules) or part of the checkpoint, so a run that is
stopped after any step resumes exactly as if it had not been.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain.errors import CheckpointError, Interrupted, PeerError, PretrainError, TrainingError
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import Checkpoint, CheckpointWriter, checkpoints, newest, not_finite, prune
from pretrain.runs.metrics import fetch
from pretrain.tokens import Corpus
from pretrain.training.callbacks import Callback
from pretrain.training.evaluator import Evaluator
from pretrain.training.guard import SPIKE
from pretrain.training.heartbeat import SAVING, Heartbeat
from pretrain.training.signals import Stopped, StopRequest
from pretrain.training.state import TrainState
from pretrain.training.step import UPDATE, train_step_with_oom_retry
from pretrain.training.world import STRAGGLER_SECONDS, World

WARNED_AFTER = 0.7
"""Stragglers are named after this fraction of ``parallel.timeout_seconds``: at its end NCCL aborts the process before
Python can."""


@dataclass
class Trainer:
    """A run in progress: its state and all that happens around its steps. ``setup.set_up`` makes it."""

    run: Run
    corpus: Corpus
    state: TrainState
    evaluator: Evaluator
    writer: CheckpointWriter
    heartbeat: Heartbeat
    callbacks: Sequence[Callback]
    say: Callable[[str], None]
    command: str
    """The command that resumes this run."""
    clock_start: float
    """``time.monotonic()`` when the first step would have begun, had the run never been stopped."""
    val_losses: dict[int, float]
    """By step, in every process, for all to save at the same steps."""
    bytes_per_token: float
    kind: str
    """How the processes share the model: none, ddp, fsdp or hsdp."""
    stop: StopRequest = field(init=False)
    saved: int = field(init=False)
    """The step of the newest checkpoint; 0 for none."""
    skips: int = 0
    """Steps skipped in a row."""
    first_step_done: bool = False
    """The first step, which may compile."""
    waiting: list[dict[str, Any]] = field(default_factory=list)
    """Metrics whose tensors are not fetched yet: some steps of them at a time, so that no step waits for the device."""
    last: dict[str, Any] = field(default_factory=dict)
    """The newest metrics fetched."""

    def __post_init__(self):
        self.config, self.world = self.state.config, self.state.world
        self.stop = StopRequest(self.config.guard.grace_seconds)
        self.saved = self.step
        self.fetch_every = 1 if self.world.device.type == "cpu" else 10

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.progress.step

    def fit(self) -> None:
        """Train to the last step, and write ``summary.json``."""
        progress = self.state.progress
        with self.stop:
            try:
                self.notify("on_start", self)
                if progress.pending:  # a signal came between the last step and its measurements
                    self.finish_step(progress.pending)
                while self.step < self.config.train.steps:
                    record = self.one_step()
                    if self.config.guard.spike_action == "roll_back" and record["train/skipped"] == SPIKE:
                        self.roll_back()
                    else:
                        self.finish_step(record)
                self.wait_for_save(must=True)
            except Stopped:
                raise self.leave() from None
            except (dist.DistError, RuntimeError) as error:
                if self.world.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                    raise
                raise self.connection_lost(error) from error
            finally:
                self.notify("on_end", self.stop.requested)
        if self.world.is_rank0:
            self.write_summary()

    def one_step(self) -> dict[str, Any]:
        """A training step and what must surround it; gives its metrics, some still on the device."""
        self.phase("waiting for data")
        begin = time.monotonic()
        numbers = train_step_with_oom_retry(self.state, self.step_phase, lambda text: self.event("out_of_memory", text))
        if not self.first_step_done:
            self.first_step_done = True
            timeout = self.config.parallel.timeout_seconds
            self.world.shorten_timeout(timeout, self.state.parameters.groups)
            if self.world.size > 1:
                self.heartbeat.longest_silence = WARNED_AFTER * timeout
        seconds = time.monotonic() - begin
        self.phase("between steps", seconds)
        return {
            "step": self.step,
            "tokens": self.step * self.config.train.batch_tokens,
            "time": round(time.monotonic() - self.clock_start, 3),
            **numbers,
            "train/tokens_per_second": round(self.config.train.batch_tokens / seconds),
        }

    def finish_step(self, record: dict[str, Any]) -> None:
        """What follows a step: measure, log, save. A signal may cut it short; then it is done again on resume."""
        config, progress, step = self.config, self.state.progress, self.step
        last = step == config.train.steps
        progress.pending = record
        sample = None
        evaluate = last or _due(step, config.eval.every)
        if evaluate:
            check = self.checked_phase("validating")
            record |= self.evaluator.validate(last, progress.micro_rows, check)
        if self.evaluator.core_tasks and (last or _due(step, config.eval.core_every)):
            core = self.evaluator.core(self.checked_phase("measuring CORE", together=False))
            record["val/core"] = core.core
            self.say(f"step {step:5d}   {core.name} {core.core:.4f}")
        if evaluate and config.sample.max_tokens:
            sample = self.evaluator.sample(self.checked_phase("sampling"))
        progress.pending = None

        self.waiting.append(record)
        if evaluate or len(self.waiting) >= self.fetch_every:
            self.log()
        if evaluate:
            self.notify("on_evaluation", self.last, sample)
        loss = record.get("val/loss", math.inf)
        best = config.checkpoint.keep_best and loss < min(self.val_losses.values(), default=math.inf)
        if math.isfinite(loss):
            self.val_losses[step] = loss
        due = last or best or step in config.checkpoint.at or _due(step, config.checkpoint.every)
        if due and self.saved != step:
            self.save()
        # Asking the others waits for the device; on a GPU it is done as often as the numbers are fetched.
        if not last and step % self.fetch_every == 0:
            self.check_stop()

    def log(self) -> None:
        """Fetch the metrics that wait and hand them on; steps that were skipped are reported and counted."""
        records, self.waiting = fetch(self.waiting), []
        for record in records:
            self.last = record
            self.notify("on_step", record)
            if not record["train/skipped"]:
                self.skips = 0
                continue
            why = "a spike" if record["train/skipped"] == SPIKE else "not finite"
            step, batch = record["step"], record["step"] - 1 + self.state.progress.skipped_batches
            numbers = f"loss {record['train/loss']:.4g}, gradient norm {record['train/grad_norm']:.4g}"
            self.event("skipped", f"skipped step {step}, batch {batch}: {why} ({numbers})", step=step, batch=batch)
            self.count_skip(step, why)

    def count_skip(self, step: int, why: str) -> None:
        """Count a skipped step. A TrainingError after ``guard.max_skips`` in a row."""
        self.skips += 1
        if self.skips >= self.config.guard.max_skips:
            self.wait_for_save()
            raise TrainingError(
                f"{self.skips} steps in a row were skipped up to step {step} (the last: {why}); nothing of them is in"
                f" the weights, and the last checkpoint is of step {self.saved}; try a lower --optim.lr, or"
                f" --train.precision fp32"
            )

    def roll_back(self) -> None:
        """Take back all steps since the last checkpoint, and leave their batches out from now on."""
        self.wait_for_save()
        checkpoint = newest_checkpoint(self.run, self.world, self.say)
        if checkpoint is None:
            raise TrainingError(
                f"a spike at step {self.step}, and no checkpoint to roll back to; save earlier with"
                f" --checkpoint.every, or use --guard.spike_action skip"
            )
        self.count_skip(self.step, "a spike")
        spike, skipped = self.step, self.state.progress.skipped_batches + self.step - checkpoint.step
        self.state.load_state_dict(checkpoint, batches=False)
        self.state.progress.skipped_batches = skipped
        self.waiting = [record for record in self.waiting if record["step"] <= self.step]
        self.notify("on_rollback", self.step)
        self.event("roll_back", f"a spike at step {spike}: back to step {self.step}, skipping the batches since then")

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, must: bool = False) -> None:
        """Begin to commit a checkpoint of this step; once it is committed, those no longer wanted are pruned.

        Raises:
            TrainingError: a weight or moment is not finite; such a checkpoint would help nobody.
            CheckpointError: it cannot be written, and it must be, or ``checkpoint.on_error`` says to stop.
        """
        self.wait_for_save()
        step = self.step
        self.state.progress.seconds = time.monotonic() - self.clock_start
        tensors, values = self.state.state_dict()
        if name := next(filter(None, self.world.gather(not_finite(tensors))), ""):
            raise TrainingError(
                f"{name} is not finite after step {step}; it is not saved, and the last checkpoint is of step"
                f" {self.saved}; try a lower --optim.lr"
            )

        def committed() -> None:
            self.saved = step
            self.notify("on_checkpoint", self.run.checkpoints / f"step-{step:08d}")
            if self.world.is_rank0:
                prune(self.run.checkpoints, self.config.checkpoint, self.val_losses)

        try:
            self.log()
            self.notify("on_save", step)
            self.writer.save(step, tensors, values, committed)
        except OSError as error:
            self.save_failed(error, must or step == self.config.train.steps)

    def wait_for_save(self, must: bool = False) -> None:
        """Wait for the save under way, and deal with its failure."""
        self.phase(SAVING)
        try:
            self.writer.wait()
        except OSError as error:
            self.save_failed(error, must)

    def save_failed(self, error: OSError, must: bool) -> None:
        """Go on to the next save, or raise a CheckpointError."""
        last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        what = f"saving to {self.run.folder} failed ({error.strerror or error}); {last}"
        if must or self.config.checkpoint.on_error == "stop":
            raise CheckpointError(f"{what}; make room, then resume with: {self.command}") from None
        self.event("save_failed", f"{what}; training continues to the next save")

    # Being stopped ---------------------------------------------------------------------------------------------------

    def check_stop(self) -> None:
        """Raise Stopped, in all processes at once, if one of them was asked to stop."""
        if self.world.any(self.stop.requested):
            raise Stopped

    def leave(self) -> Interrupted | PeerError:
        """Save what is done so far; gives the message to leave with."""
        progress = self.state.progress
        if progress.pending:  # its numbers may still be on the device
            progress.pending = {k: v.item() if isinstance(v, Tensor) else v for k, v in progress.pending.items()}
        if self.step != self.saved or progress.pending:
            self.save(must=True)
        self.wait_for_save(must=True)
        if not self.world.is_rank0:
            return PeerError(Interrupted.exit_code)
        where = f"after step {self.step} of {self.config.train.steps}"
        return Interrupted(f"stopped {where}, all saved; resume with: {self.command}")

    def connection_lost(self, error: Exception) -> PretrainError:
        """What to leave with when other processes did not answer: their names, from one process only."""
        deadline = time.monotonic() + STRAGGLER_SECONDS + 2
        while not (stragglers := self.world.stragglers()) and time.monotonic() < deadline:
            time.sleep(0.5)  # one that has just died is missed only after a while
        if not self.world.is_reporter(stragglers):
            return PeerError(1)
        names = "; ".join(stragglers.values()) or "it is not known which"
        reason = str(error).splitlines()[0][:200]
        return TrainingError(f"waiting for other processes failed: {names} ({reason})")

    def hang(self, text: str) -> None:
        """Report that nothing moves any more, and the stragglers: from a process that is none."""
        stragglers = self.world.stragglers()
        text = "; ".join([text, *stragglers.values()])
        if self.world.is_rank0:
            self.event("hang", text)
        elif self.world.is_reporter(stragglers):
            print(f"pretrain: rank {self.world.rank}: {text}", file=sys.stderr, flush=True)

    # The callbacks ---------------------------------------------------------------------------------------------------

    def notify(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def event(self, kind: str, text: str, **facts: Any) -> None:
        """Report an event, such as a skipped step."""
        self.notify("on_event", {"step": self.step, "event": kind, "text": text, **facts})

    def phase(self, name: str, seconds: float | None = None) -> None:
        """A phase begins or continues."""
        self.notify("on_phase", self.step, name, seconds)

    def step_phase(self, name: str) -> None:
        """A phase within a step, which may be cut short until it changes something."""
        if name != UPDATE and self.world.size == 1:  # several processes ask each other only between steps
            self.stop.check()
        self.phase(name)

    def checked_phase(self, name: str, together: bool = True) -> Callable[[], None]:
        """Begin a phase; the returned function reports progress and raises Stopped if asked to stop.

        ``together``: all processes call it equally often.
        """

        def check() -> None:
            self.phase(name)
            if together:
                self.check_stop()
            elif self.world.size == 1:
                self.stop.check()

        self.phase(name)
        return check

    def write_summary(self) -> None:
        """Write ``summary.json``: the run's final numbers."""
        records = read_jsonl(self.run.metrics)  # also of a run that ended between its last checkpoint and here
        recent = [record["train/loss"] for record in records[-20:]]
        seconds = time.monotonic() - self.clock_start
        tokens = self.step * self.config.train.batch_tokens
        summary = {
            "val_loss": records[-1].get("val/loss"),
            "val_bpb": records[-1].get("val/bpb"),
            "train_loss": sum(recent) / len(recent) if None not in recent else None,
            "steps": self.step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds),
            "parameters": sum(p.numel() for p in self.state.parameters.whole.values()),
            "vocab_size": self.corpus.tokenizer.vocab_size,
            "bytes_per_token": self.bytes_per_token,
        }
        self.run.write_summary(summary)


def newest_checkpoint(run: Run, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, as rank 0 sees it; None for a new run. A CheckpointError if all are damaged."""

    def choose() -> Checkpoint | None:
        checkpoint = newest(run.checkpoints, say)
        if checkpoint is None and checkpoints(run.checkpoints):
            raise CheckpointError(f"every checkpoint in {run.checkpoints} is damaged; start again with another --out")
        return checkpoint

    return world.run_on_rank0(choose)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
