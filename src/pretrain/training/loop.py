"""The training loop: steps, logging, checkpoints; stopping, rolling back, failing.

Everything a step needs is a function of its number (data order, schedules) or part of the checkpoint, so a run that is
stopped after any step resumes exactly as if it had not been.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pretrain.errors import CheckpointError, Interrupted, PeerError, PretrainError, TrainingError
from pretrain.io import LONGEST_GRACE, read_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import LAST, CheckpointWriter, lowest, newest, not_finite, prune
from pretrain.runs.metrics import SMOOTHED_LOSS, Smoothed, comparable_loss, fetch
from pretrain.sizing import ENLARGING_FLOPS, flops_per_token
from pretrain.tokens import Corpus
from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.evaluator import Evaluator, total
from pretrain.training.guard import SPIKE
from pretrain.training.heartbeat import SAVING
from pretrain.training.signals import Stopped, StopRequest
from pretrain.training.state import TrainState
from pretrain.training.step import UPDATE, measured_step, train_step_with_oom_retry
from pretrain.training.world import Later

if TYPE_CHECKING:
    from pretrain.training.copier import Copier

SPEED = "train/tokens_per_second"
LEAVING = 4.0  # seconds of the grace period that are kept for all that follows a copy
FETCH_EVERY = 10  # steps between fetches of metrics on a GPU, so that no step waits for the device


@dataclass
class Trainer:
    """The training loop of one run: its state and all that happens around its steps. ``setup.set_up`` makes it."""

    run: Run
    corpus: Corpus
    state: TrainState
    evaluator: Evaluator
    writer: CheckpointWriter
    callbacks: Sequence[Callback]
    console: Console
    clock_start: float
    """``time.monotonic()`` when the job began (preparation included), minus the seconds of earlier jobs of this run."""
    val_losses: dict[int, float]
    """Validation losses by step, in every process, so that all decide alike when to save."""
    bytes_per_token: float
    smoothed: Smoothed
    """The training loss of the steps so far, smoothed; only that of rank 0 counts earlier jobs."""
    copier: Copier | None = None
    """What copies checkpoints (``checkpoint.copy_to``), on rank 0."""
    stop: StopRequest = field(init=False)
    begin: int = field(init=False)
    """The step after which the run begins: 0, or that of a fork."""
    first: int = field(init=False)
    """The next step after this one compiles: that where the job began, or where the micro-batch was enlarged."""
    saved: int = field(init=False)
    """The step of the newest checkpoint; 0 for none."""
    asked: deque[Later] = field(init=False)
    """How many processes were asked to stop, by the last steps."""
    skips: int = 0
    """Steps skipped in a row."""
    waiting: list[dict[str, Any]] = field(default_factory=list)
    """Metrics whose tensors are not fetched yet."""
    begun: float | None = None
    """``time.monotonic()`` when the first step since :meth:`settle` began."""
    last: dict[str, Any] = field(default_factory=dict)
    """The newest metrics fetched."""

    def __post_init__(self):
        self.config, self.world = self.state.config, self.state.world
        self.stop = StopRequest(self.grace_seconds)
        self.first = self.saved = self.step
        self.begin = self.run.begin
        waits = self.world.device.type == "cpu"
        self.fetch_every = 1 if waits else FETCH_EVERY
        self.asked = deque(maxlen=1 if waits else 2)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.progress.step

    def grace_seconds(self) -> float:
        """Time to save after a signal: ``guard.grace_seconds``, or twice what saving is known to take, if longer."""
        return max(self.config.guard.grace_seconds, min(LONGEST_GRACE, round(2 * self.writer.seconds, 1)))

    def fit(self) -> None:
        """Train to the last step, and write ``summary.json``."""
        with self.stop:
            try:
                self.notify("on_start", self)
                if record := self.state.progress.pending:  # a signal came between a step and its measurements
                    self.finish_step(record)
                if self.config.eval.at_start and not self.step:
                    self.validate_at_start()
                while self.step < self.config.train.steps:
                    record = self.one_step()
                    if self.config.guard.spike_action == "roll_back" and record["train/skipped"] == SPIKE:
                        self.roll_back()
                    else:
                        self.finish_step(record)
                self.wait_for_save(must=True)
                if failure := self.write_lines():
                    self.save_failed(failure, must=True)
                best = self.best_model()
            except Stopped:
                raise self.leave() from None
            except Exception as error:
                if self.world.size == 1 or isinstance(error, PretrainError):
                    with suppress(OSError):  # a save under way is finished all the same
                        self.writer.wait()
                    if self.copier:
                        self.copier.finish(self.config.guard.grace_seconds)
                        while self.copier.busy(0.1):
                            pass
                        if left := self.copier.close():
                            self.console.say(left)
                elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
                    raise self.world.connection_lost(error) from error
                raise
            finally:
                self.notify("on_end", self.stop.requested)
            if self.world.is_rank0:
                self.run.write_summary(
                    time.monotonic() - self.clock_start,
                    parameters=sum(p.numel() for p in self.state.model.parameters()),
                    vocab_size=self.corpus.tokenizer.vocab_size,
                    bytes_per_token=self.bytes_per_token,
                    **best,
                )
            if left := self.finish_copy():
                if not self.world.is_rank0:
                    raise PeerError(CheckpointError.exit_code)
                raise CheckpointError(f"the run is finished, but {left}; try again with: {self.console.command}")

    def best_model(self) -> dict[str, Any]:
        """With ``checkpoint.keep_best``, what summary.json says of a checkpoint that is better than the last one.

        It is looked for among validations that compare, and must then be better over all held-out text too. The model
        has its weights from now on. Empty, where the last one is the best.
        """
        if not self.config.checkpoint.keep_best:
            return {}
        found = lowest(self.run.checkpoints, self.val_losses, self.world)
        if found is None or self.val_losses[found.step] >= self.val_losses.get(self.step, math.inf):
            return {}
        last, weights, temperature = self.world.run_on_rank0(
            lambda: (read_jsonl(self.run.metrics)[-1].get("val/loss"), *self.run.model_of(found.step))
        )
        self.state.load_weights(found, weights)
        self.evaluator.weights, self.evaluator.temperature = LAST, temperature  # those of the model itself now
        check, rows = functools.partial(self.phase, "validating", may_stop=True), self.state.progress.micro_rows
        with self.evaluator.better_weights():
            best = total(self.evaluator.held_out(found.step, 0, self.evaluator.rows(rows), check))
        if last is not None and best.loss >= last:
            return {}
        test = {name.replace("/", "_"): value for name, value in self.evaluator.test(rows, check).items()}
        left = f"best at step {found.step:,} (val loss {best.loss:.3f}), which sample, eval and export use"
        self.console.say(f"{left}; the last, of step {self.step:,}, has {math.nan if last is None else last:.3f}")
        best_numbers = {"val_loss": best.loss, "val_bpb": best.bits_per_byte}
        return {**best_numbers, **test, "model_step": found.step, "model_weights": weights} | (
            {"model_temperature": temperature} if self.config.eval.calibrate else {}
        )

    def validate_at_start(self) -> None:
        """Measure the model before its first step: a record of step 0, without the numbers of a step."""
        check = functools.partial(self.phase, "validating", may_stop=True)
        numbers = self.evaluator.validate(0, self.state.progress.micro_rows, check)
        if numbers:
            seconds = round(time.monotonic() - self.clock_start, 3)
            self.waiting.append({"step": 0, "tokens": 0, "time": seconds, **numbers})
            self.log()
            self.notify("on_evaluation", self.last)
            self.is_lowest(self.last)

    def one_step(self) -> dict[str, Any]:
        """A training step; returns its metrics, some still on the device."""
        self.phase("waiting for data")
        begin = time.monotonic()
        if self.begun is None:
            self.begun = begin

        def on_phase(name: str) -> None:  # a step may be cut short until it changes something, by one process alone
            self.phase(name, may_stop=self.world.size == 1 and name != UPDATE)

        on_retry = functools.partial(self.event, "out_of_memory")
        train_step = measured_step if self.measures_memory() else train_step_with_oom_retry
        numbers = train_step(self.state, on_phase, on_retry, lambda: self.stop.requested)
        self.asked.append(Later(numbers.pop("stop")))
        seconds = time.monotonic() - begin
        if self.step == self.first + 1:  # only such a step may compile for minutes
            self.world.set_timeout(self.config.parallel.timeout_seconds, self.state.parameters.groups)
        if (rows := numbers.pop("micro_rows", 0)) > self.state.progress.micro_rows:
            self.enlarge(rows)
        known = self.fetch_every == 1  # a GPU is still computing
        self.phase("between steps", seconds=seconds if known else None)
        skipped = self.state.progress.skipped_batches
        return {
            "step": self.step,
            **({"batch": self.step - 1 + skipped} if skipped else {}),
            "tokens": self.step * self.config.train.batch_tokens + self.state.progress.more_tokens,
            "time": round(time.monotonic() - self.clock_start, 3),
            **numbers,
            **({SPEED: round(self.config.train.batch_tokens / seconds)} if known else {}),
        }

    def measures_memory(self) -> bool:
        """Whether the next step measures how many rows fit: the second of a run, by its number, as a resume repeats it.

        The first also holds what compiling takes; and what few steps save would not repay that they are compiled anew.
        """
        train = self.config.train
        if train.micro_batch or self.step != self.begin + 1:
            return False
        tokens = (train.steps - self.step) * train.batch_tokens / self.world.size
        return tokens * flops_per_token(self.config.model, self.corpus.tokenizer.vocab_size) > ENLARGING_FLOPS

    def enlarge(self, rows: int) -> None:
        """Take micro-batches of ``rows`` from the next step on, which compiles for them."""
        before, self.state.progress.micro_rows, self.first = self.state.progress.micro_rows, rows, self.step
        self.world.set_timeout(self.config.parallel.start_seconds, self.state.parameters.groups)
        text = f"memory allows micro-batches of {rows} rows instead of {before}; the global batch is unchanged"
        self.event("micro_batch", text)

    def finish_step(self, record: dict[str, Any]) -> None:
        """What follows a step: measure, log, save. A signal may cut it short; then it is done again on resume."""
        config, progress, evaluator, step = self.config, self.state.progress, self.evaluator, self.step
        last = step == config.train.steps
        progress.pending = record
        evaluate = last or _due(step, config.eval.every, config.eval.offset)
        measure_core = bool(evaluator.core_tasks) and (last or _due(step, config.eval.core_every))
        sample = evaluate if not config.sample.every else last or _due(step, config.sample.every)
        due = step in config.checkpoint.at or _due(step, config.checkpoint.every)
        first = step in (self.first, self.first + 1)
        if first or evaluate or measure_core or sample or due:
            self.settle()  # what follows takes time that is not the steps', or is a step that compiles; so was the last
        measures = self.world.size > 1 and (evaluate or measure_core or sample)
        if measures:  # of which some do more than others, or one alone
            self.world.set_timeout(config.parallel.start_seconds, self.state.parameters.groups)
        if last and self.saved != step:  # the weights first: what is measured then may fail, or take long
            self.save(must=True)
        if evaluate:
            check = functools.partial(self.phase, "validating", may_stop=True)
            record |= evaluator.validate(step, progress.micro_rows, check)
            if last:  # of the model that is left, when nothing is to be chosen any more
                record |= evaluator.test(progress.micro_rows, check)
        if measure_core:
            check = functools.partial(self.phase, "measuring CORE", may_stop=evaluator.together)
            core = evaluator.core(check)
            record |= core.metrics()
            self.console.say(f"step {step:5d}   {core.name} {core.core:.4f}")
            self.console.say(f"      {', '.join(f'{task.label} {task.accuracy:.3f}' for task in core.tasks)}")
        samples: dict[str, str] = {}
        if sample:
            check = functools.partial(self.phase, "sampling", may_stop=evaluator.together)
            samples = evaluator.sample(check) if config.sample.max_tokens else {}
        if measures:
            self.world.any(False)  # all are done
            if step > self.first:  # and the first step, which may compile for minutes, is over
                self.world.set_timeout(config.parallel.timeout_seconds, self.state.parameters.groups)
        progress.pending = None

        self.waiting.append(record)
        if first or evaluate or measure_core or sample or len(self.waiting) >= self.fetch_every:
            self.log()
        if evaluate:
            self.notify("on_evaluation", self.last)
        for prompt, text in samples.items():
            self.notify("on_sample", step, prompt, text)
        best = self.is_lowest(record) and config.checkpoint.keep_best
        if (due or best) and not last and self.saved != step:
            self.save(must=False)
        if not last and self.asked_to_stop():
            raise Stopped

    def is_lowest(self, record: dict[str, Any]) -> bool:
        """Note the held-out loss of a record, if it has one; whether it is the lowest so far."""
        loss = comparable_loss(record)
        if loss is None or not math.isfinite(loss):
            return False
        lowest = min(self.val_losses.values(), default=math.inf)
        self.val_losses[record["step"]] = loss
        return loss < lowest

    def settle(self) -> None:
        """Fetch the metrics of the steps so far, and of those on a GPU what is only known then: how fast they were.

        Each is given its share of the wall time since the first of them began.
        """
        pending = self.state.progress.pending
        records = self.waiting if pending is None else [*self.waiting, pending]
        for record, numbers in zip(records, fetch(records), strict=True):
            record |= numbers
        steps = [record for record in records if "train/loss" in record and SPEED not in record]
        if steps and self.begun is not None:
            seconds = (time.monotonic() - self.begun) / len(steps)
            for record in steps:
                record[SPEED] = round(self.config.train.batch_tokens / seconds)
            self.phase("between steps", seconds=seconds)
        self.begun = None

    def log(self) -> None:
        """Fetch the metrics that wait and hand them on; steps that were skipped are reported and counted."""
        self.settle()
        records, self.waiting = self.waiting, []
        for record in records:
            if "train/loss" in record:
                record[SMOOTHED_LOSS] = self.smoothed.add(record)
            self.last = record
            self.notify("on_step", record)
            if not record.get("train/skipped"):
                self.skips = 0
                continue
            why = "a spike" if record["train/skipped"] == SPIKE else "not finite"
            step, batch = record["step"], record.get("batch", record["step"] - 1)
            numbers = f"loss {record['train/loss']:.4g}, gradient norm {record['train/grad_norm']:.4g}"
            self.event("skipped", f"skipped step {step}, batch {batch}: {why} ({numbers})", step=step, batch=batch)
            self.count_skip(step, why)

    def count_skip(self, step: int, why: str) -> None:
        """Count a skipped step. Raises TrainingError after ``guard.max_skips`` in a row."""
        self.skips += 1
        if self.skips >= self.config.guard.max_skips:
            self.wait_for_save()
            raise TrainingError(
                f"{self.skips} steps in a row were skipped up to step {step} (the last: {why}); nothing of them is in"
                f" the weights, and the last checkpoint is of step {self.saved}; start a new run (another --out)"
                f" with a lower --optim.lr, or --train.precision fp32"
            )

    def roll_back(self) -> None:
        """Go back to the last checkpoint; the batches since then are skipped from now on."""
        self.settle()
        self.wait_for_save()
        spike = self.step
        checkpoint = newest(self.run.checkpoints, self.console.say, self.world)
        if checkpoint is None:
            raise TrainingError(
                f"a spike at step {spike}, and no checkpoint to roll back to; start a new run (another --out) with"
                f" a smaller --checkpoint.every, or with --guard.spike_action skip"
            )
        self.count_skip(spike, "a spike")
        before, self.saved = self.state.progress, checkpoint.step
        self.state.load_state_dict(checkpoint, batches=False)
        self.state.progress.skipped_batches = before.skipped_batches + spike - checkpoint.step
        self.state.progress.went_back_to, self.state.progress.pending = before.went_back_to, None
        self.waiting = [record for record in self.waiting if record["step"] <= self.step]
        self.val_losses = {step: loss for step, loss in self.val_losses.items() if step <= self.step}
        evaluator = self.evaluator
        evaluator.weights, evaluator.temperature = self.world.run_on_rank0(lambda: self.run.model_of(self.step))
        self.notify("on_rollback", self.step)
        if self.world.is_rank0:
            self.smoothed = Smoothed(read_jsonl(self.run.metrics))
        batch = spike - 1 + before.skipped_batches
        text = f"a spike at step {spike}, batch {batch}: back to step {self.step}, skipping the batches since then"
        self.event("roll_back", text, batch=batch)

    def save(self, must: bool) -> None:
        """Begin to commit a checkpoint of this step; once it is committed, those no longer wanted are pruned.

        Raises:
            TrainingError: a weight or moment is not finite; such a checkpoint would help nobody.
            CheckpointError: it cannot be written, and it ``must`` be, or ``checkpoint.on_error`` says to stop.
        """
        self.wait_for_save()
        step = self.step
        self.state.progress.seconds = time.monotonic() - self.clock_start
        tensors, values = self.state.state_dict()
        if name := next(filter(None, self.world.gather(not_finite(tensors))), ""):
            raise TrainingError(
                f"{name} is not finite after step {step}; it is not saved, and the last checkpoint is of step"
                f" {self.saved}; start a new run (another --out) with a lower --optim.lr"
            )

        def committed() -> None:
            self.saved = step
            self.notify("on_checkpoint", self.run.checkpoints / f"step-{step:08d}")
            held = (self.copier.copy.held,) if self.copier else ()
            prune(self.run.checkpoints, self.config.checkpoint, self.val_losses, held)

        if failure := self.write_lines():  # no step of a checkpoint may be missing from them
            self.save_failed(failure, must)
        else:
            self.writer.save(step, tensors, values, committed)

    def write_lines(self) -> OSError | None:
        """Let the callbacks write all lines up to this step; all processes get the error of rank 0, which writes."""
        self.log()
        failure: OSError | None = None
        try:
            self.notify("on_save", self.step)
        except OSError as error:
            failure = error
        return self.world.broadcast(failure)

    def wait_for_save(self, must: bool = False) -> None:
        """Wait for the save under way, and handle its failure. All processes call it, and learn what rank 0 knows."""
        self.phase(SAVING)
        failure: OSError | None = None
        while self.world.any(self.writer.busy(0.1)):
            pass
        try:
            self.writer.wait()
        except OSError as error:
            failure = error
        failure, self.saved, self.writer.took = self.world.broadcast((failure, self.saved, self.writer.took))
        if failure is not None:
            self.save_failed(failure, must)

    def save_failed(self, error: OSError, must: bool) -> None:
        """Go on to the next save, or raise a CheckpointError."""
        last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        what = f"saving to {self.run.folder} failed ({error.strerror or error}); {last}"
        if must or self.config.checkpoint.on_error == "stop":
            raise CheckpointError(f"{what}; free some space, then resume with: {self.console.command}") from None
        self.event("save_failed", f"{what}; training continues to the next save")

    def leave(self) -> Interrupted | PeerError:
        """Save what is done so far; returns the exception to end with."""
        self.settle()
        self.wait_for_save()
        if self.step != self.saved:
            self.save(must=True)
        self.wait_for_save(must=True)
        left = self.finish_copy()
        if not self.world.is_rank0:
            return PeerError(Interrupted.exit_code)
        where = f"after step {self.step} of {self.config.train.steps}"
        return Interrupted(
            f"stopped {where}, all saved{left and f' here, but {left}'}; resume with: {self.console.command}"
        )

    def finish_copy(self) -> str:
        """Wait for the copy, after a signal within the grace period; gives what is not copied. All call it."""
        left = ""
        if self.config.checkpoint.copy_to:
            if self.copier:
                self.copier.finish()
            while self.world.any(self.copier is not None and self.copier.busy(0.1)):
                if self.world.any(self.stop.left() < LEAVING):  # a signal may have come to one process alone
                    break
            if self.copier:
                left = self.copier.close()
                prune(self.run.checkpoints, self.config.checkpoint, self.val_losses)
            left = self.world.broadcast(left)
        return left

    def notify(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def event(self, kind: str, text: str, **facts: Any) -> None:
        """Report an event, such as a skipped step."""
        self.notify("on_event", {"step": self.step, "event": kind, "text": text, **facts})

    def phase(self, name: str, may_stop: bool = False, seconds: float | None = None) -> None:
        """A phase begins or continues; where it ``may_stop``, all processes must come here equally often."""
        self.notify("on_phase", self.step, name, seconds)
        if may_stop:
            self.check_stop()

    def asked_to_stop(self) -> bool:
        """Whether a process was asked to stop, the same answer in all: by what came with the loss of a step.

        On a GPU that of the step before, so that the host does not wait for this one.
        """
        if self.world.size == 1:
            return self.stop.requested
        return len(self.asked) == self.asked.maxlen and self.asked[0].read() > 0

    def check_stop(self) -> None:
        """Raise Stopped, in all processes at once, if one of them was asked to stop."""
        if self.world.any(self.stop.requested):
            raise Stopped


def _due(step: int, every: int, offset: int = 0) -> bool:
    return every > 0 and step >= offset and (step - offset) % every == 0
