"""Training: the step, and the loop that repeats it.

    prepare → build, or resume → for each step: batch → train_step → metrics; now and then evaluate, sample, save

Everything a step needs is a function of its number (data order, schedule) or part of the checkpoint (weights, moments,
random state), so a run that is stopped after any step goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pretrain.config import Config, differences
from pretrain.device import Precision, choose_device, choose_precision, free_memory, keep_freed_memory
from pretrain.errors import (
    CheckpointError,
    DataError,
    DeviceMemoryError,
    Interrupted,
    PeerError,
    PretrainError,
    TrainingError,
    UsageError,
)
from pretrain.evaluation import CoreResult, GPTScorer, evaluate_core, evaluate_loss, open_bundle, read_tasks
from pretrain.generation import sample_text
from pretrain.io import append_jsonl, keep_steps, read_jsonl
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.optim import build_optimizers, find_optimizer, learning_rate_factor
from pretrain.runs.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoints,
    newest,
    not_finite,
    remove,
    retire,
    run_tensors,
)
from pretrain.runs.environment import write_environment
from pretrain.runs.metrics import Metrics
from pretrain.runs.run import Run, lock_run
from pretrain.sizing import resolve, rows_that_fit, rows_up_to
from pretrain.tokens import (
    Batches,
    LiveBatches,
    TokenStream,
    TrainingBatches,
    ahead,
    find_text,
    is_tokens,
    merge_states,
    open_corpus,
    prepare,
    prepare_stream,
    training_order,
    validation_batches,
)
from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.guard import Guard, LossScale
from pretrain.training.heartbeat import SAVING, Watch
from pretrain.training.init_from import load_initial, resolve_init
from pretrain.training.loggers import CLOSE_SECONDS, Loggers
from pretrain.training.parallel import Parameters, build_model, choose_kind, fill_model, synchronise, training_forward
from pretrain.training.signals import Stopped, StopRequest
from pretrain.training.world import SILENT_SECONDS, World, join_world

T = TypeVar("T")

NOT_FINITE, SPIKE = 1, 2
"""Why a step was skipped, in ``train/skipped``."""

LOGGERS_SECONDS = 3.0
"""How long loggers may take to finish after a signal."""

BEFORE_TIMEOUT = 0.7
"""After this part of ``parallel.timeout_seconds`` of silence it is told who is behind; at its end NCCL ends the process
without a word to Python."""

EVALUATION_TOKENS = 8192
"""Tokens in a validation batch at least: without a backward pass it may be larger than a micro-batch."""


def train(
    config: Config,
    out: str | Path,
    console: Console | None = None,
    started: float | None = None,
    resume_from: int = 0,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train as ``config`` says into the run directory ``out``, or go on with the run that is there, to its end.

    Args:
        config: from :func:`pretrain.load_config`.
        out: the run directory; made if it does not exist.
        console: where progress is shown; nowhere by default.
        started: ``time.monotonic()`` when the whole job began, from which its seconds are counted.
        resume_from: go back to the checkpoint of this step first; 0: go on from the newest.
        callbacks: code of your own, told of steps, validations and checkpoints.

    Raises:
        UsageError: the configuration cannot run here, or differs from that of the run in ``out``.
        DataError: the text cannot be used.
        CheckpointError: no checkpoint can be used, or another process is training in ``out``.
        Interrupted: a signal asked to stop; everything is saved.
        TrainingError: the gradients are not finite any more.
    """
    started = time.monotonic() if started is None else started
    console = console or Console(quiet=True)
    out = Path(out)
    with join_world(config.train.device, config.parallel) as world:  # an impossible device is said before any work
        if world.device.type == "cpu":
            keep_freed_memory()
        if not world.first:
            console = Console(quiet=True)
        with contextlib.ExitStack() as until_the_end:

            def open_first() -> Run:
                find_optimizer(config.optim)  # refuses a name that there is not, before any work
                if not Run.exists(out):
                    Run.check_new(out)
                until_the_end.enter_context(lock_run(out))
                try:
                    run = open_run(config, out, console)
                    if resume_from:
                        go_back(run, resume_from, console.say)
                except KeyboardInterrupt:
                    raise Interrupted(f"stopped before the first step; go on with: {console.command}") from None
                return run

            run = world.first_does(open_first)
            if run.summary is None:
                Trainer(run, console, started, world, resume_from, callbacks).fit()
            else:
                console.say(f"{run.folder} is finished: {run.summary['steps']} steps; nothing left to train")
    return run


def open_run(config: Config, folder: Path, console: Console) -> Run:
    """The run in ``folder``, or a new one with its text prepared; nothing is left behind when that fails."""
    config = with_absolute_paths(config)
    if Run.exists(folder):
        run = Run.open(folder)
        vocab_size = run.tokenizer().vocab_size
        config, _ = resolve(config, vocab_size)
        changed = differences(run.config, config)
        if changed and config.train.init_from:  # it may be as it was given at first, before it was resolved
            config, _ = resolve(resolve_init(config), vocab_size)
            changed = differences(run.config, config)
        before, after = run.config.train.steps, config.train.steps
        if run.summary and after > before and len(changed) == 1 and changed[0].startswith("train.steps "):
            console.say(f"longer    {before:,} steps are done; going on to {after:,}, on the schedule of so many")
            run.reopen()
        elif changed:
            raise UsageError(
                f"{folder} was made with another configuration ({'; '.join(changed)}); choose another --out"
            )
        return Run.create(folder, config)
    Run.check_new(folder)
    config = resolve_init(config)
    if is_tokens(config.data.paths):
        corpus = open_corpus(config.data.paths, config.tokenizer.kind)
        training_order(corpus, config)  # refuses what is too short, before the run exists
        tokenizer = corpus.tokenizer
    elif config.data.stream:
        tokenizer = prepare_stream(config, find_text(config.data), folder / "data", console.say).tokenizer
    else:
        tokenizer = prepare(config, folder / "data", console.say).tokenizer
    tokenizer.save(folder / "tokenizer.json")
    config, derived = resolve(config, tokenizer.vocab_size)
    for line in derived:
        console.say(f"derived   {line}")
    return Run.create(folder, config)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with ``data.paths`` as they are from any folder, since the run may go on from another."""

    def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in paths)

    data = dataclasses.replace(
        config.data, paths=absolute(config.data.paths), val_paths=absolute(config.data.val_paths)
    )
    return dataclasses.replace(config, data=data)


def go_back(run: Run, step: int, say: Callable[[str], None]) -> None:
    """Make ``step`` the newest checkpoint; later ones and their metrics are moved to ``set-aside``.

    A run that went back to that step before goes on from where it came to since, so that the same command can be given
    again. Raises CheckpointError when there is no whole checkpoint of that step.
    """
    there = checkpoints(run.checkpoints)
    if there and there[-1].state.get("went_back_to") == step:
        return
    run.checkpoint(step)
    aside = run.folder / "set-aside"
    later = [checkpoint for checkpoint in there if checkpoint.step > step]
    if later:
        aside.mkdir(exist_ok=True)
        records = [record for record in read_jsonl(run.metrics) if record["step"] > step]
        append_jsonl(aside / "metrics.jsonl", *records)
        for checkpoint in reversed(later):  # newest first: cut short, this can simply be done again
            remove(aside / checkpoint.folder.name)
            checkpoint.folder.rename(aside / checkpoint.folder.name)
        say(f"set aside {len(later)} later checkpoints and their metrics in {aside}")
    run.reopen()


class Trainer:
    """A run in progress: its model, optimizers, data and how far it is.

    Args:
        run: the run directory; its newest whole checkpoint is where training goes on.
        console: where progress is shown.
        started: ``time.monotonic()`` when this job began.
        world: the processes that train together; this one alone by default.
        went_back_to: the step to which :func:`go_back` brought the run before, if it did.
        callbacks: of :func:`train`.
    """

    def __init__(
        self,
        run: Run,
        console: Console,
        started: float,
        world: World | None = None,
        went_back_to: int = 0,
        callbacks: Sequence[Callback] = (),
    ):
        config = run.config
        self.world = world = world or World(choose_device(config.train.device))
        self.run, self.config, self.console, self.device = run, config, console, world.device
        self.open_data()
        self.core_tasks = read_tasks(open_bundle(config.eval.core_bundle)) if config.eval.core_every else []

        checkpoint = self.choose_checkpoint()
        state: dict[str, Any] = checkpoint.state if checkpoint else {}
        if state.get("data", self.data_fingerprint) != self.data_fingerprint:
            place = ", ".join(dataset.name for dataset in self.corpus.datasets)
            raise DataError(f"{place} is not what this run was trained on; restore it, or start anew with --out")
        name = world.share(choose_precision(state.get("precision", config.train.precision), self.device).name)
        self.precision = Precision(name, self.device)
        world.must_agree(
            {
                "the configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:12],
                "the data": self.data_fingerprint[:12],
                "the version of pretrain": version("pretrain"),
                "the version of torch": torch.__version__,
            }
        )

        torch.manual_seed(config.train.seed + world.rank)  # of dropout; all else has generators of its own
        kind = choose_kind(config, self.tokenizer.vocab_size, world)
        with torch.device("meta"):
            self.model = GPT(config.model, self.tokenizer.vocab_size, self.tokenizer.bos_id)
        self.model.activation_dtype = self.precision.dtype
        build_model(self.model, kind, config, world, self.precision, console.say)
        if checkpoint is None:
            fill_model(self.model, world, self.initial_values)
        self.parameters = Parameters(self.model, kind, world)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.parameters.spread(self.optimizers)
        self.done: int = state.get("step", 0)
        self.loss_scale = LossScale(self.precision)
        self.guard = Guard(config.guard, self.device)
        self._make_optimizer_state()
        self.writer = CheckpointWriter(run.checkpoints, self.parameters.saved_form, world.size > 1)
        if checkpoint:
            self.load(checkpoint)
        self.forward = training_forward(self.model, kind, world)
        self.batches.restore(state.get("batches", {}))

        value_bytes = self.precision.dtype.itemsize
        fit = state.get("micro_rows") or rows_that_fit(config, value_bytes, free_memory(self.device))
        # As before a resume, for the same rounding; and never more than there are for this process.
        self.micro_rows = min(config.train.micro_batch or world.share(fit), world.rows(config.batch_rows))
        self.left_out: int = state.get("left_out", 0)
        self.went_back_to: int = went_back_to or state.get("went_back_to", 0)
        self.pending: dict[str, Any] | None = state.get("pending")
        finished = self.done - bool(self.pending)
        if world.first:
            for file in (run.samples, run.events):
                keep_steps(file, finished)
        every = 1 if self.device.type == "cpu" else 10
        self.metrics = Metrics(run.metrics if world.first else None, finished, every)
        losses = {r["step"]: r["val/loss"] for r in read_jsonl(run.metrics) if r.get("val/loss") is not None}
        self.val_losses: dict[int, float] = world.share(losses)  # for all to save at the same steps
        self.clock_start = started - state.get("seconds", 0.0)
        self.saved = self.done if checkpoint else 0
        self.skips = 0
        self.settled_in = False  # the first step, which may compile, is done
        self.stop = StopRequest(config.guard.grace_seconds)
        self.watch = Watch(run.folder if world.first else None, config.guard, self.hang, world.sign_of_life)
        self.callbacks = callbacks if world.first else ()
        self.loggers: Loggers | None = None
        if world.first:
            self.loggers = Loggers(run.folder, config, finished, console.say)
            facts = {"step": self.done, "precision": self.precision.name, "processes": world.size}
            write_environment(run.folder, self.device, **facts)
        console.describe(run, self.corpus, self.model, self.batches, self.precision, self.done)
        if world.size > 1:
            console.say(f"processes {world.size} ({kind}), {world.rows(config.batch_rows)} rows of the batch each")

    def open_data(self) -> None:
        """Open what to train and validate on."""
        config, world = self.config, self.world
        self.corpus = corpus = self.run.corpus()
        self.tokenizer, self.data_fingerprint = corpus.tokenizer, corpus.fingerprint
        self.bytes_per_token = corpus.bytes_per_token
        self.token_bytes = corpus.tokenizer.token_bytes()
        self.val_streams = {each.name: each.stream("val") for each in corpus.datasets if each.tokens("val")}
        rows, length, seed = config.batch_rows, config.model.context_length, config.train.seed
        if config.data.stream:
            text = find_text(config.data)
            batches = LiveBatches(
                text,
                corpus.tokenizer,
                config.data,
                rows=rows,
                length=length,
                seed=seed,
                rank=world.rank,
                world=world.size,
            )
            self.bytes_per_token = batches.bytes_per_token
        else:
            order = training_order(corpus, config)
            batches = TrainingBatches(corpus.stream("train"), order, rows, world.rank, world.size)
        self.batches: Batches = ahead(batches, self.device)

    def choose_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, as rank 0 sees it."""
        folder = self.run.checkpoints

        def choose() -> Checkpoint | None:
            checkpoint = newest(folder, self.console.say)
            if checkpoint is None and checkpoints(folder):
                raise CheckpointError(f"every checkpoint in {folder} is damaged; start anew with another --out")
            return checkpoint

        return self.world.first_does(choose)

    def initial_values(self, model: GPT) -> None:
        """Fill a model with random weights, or those of ``train.init_from``."""
        config = self.config
        device = next(model.parameters()).device
        model.init_weights(torch.Generator(device).manual_seed(config.train.seed))
        if config.train.init_from:
            load_initial(model, config, self.tokenizer)
            self.console.say(f"weights   of {config.train.init_from}")

    def fit(self) -> None:
        """Train to the last step, and write ``summary.json``."""
        steps = self.config.train.steps
        with self.stop, self.watch, self.console.progress(self.done, steps):
            try:
                if self.pending:  # a signal came between the last step and its measurements
                    self.finish_step(self.pending)
                while self.done < steps:
                    record = self.step()
                    if self.config.guard.spike_action == "roll_back" and record["train/skipped"] == SPIKE:
                        self.roll_back()
                    else:
                        self.finish_step(record)
                self.settle(must=True)
            except Stopped:
                raise self.leave() from None
            except (dist.DistError, RuntimeError) as error:
                if self.world.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                    raise
                raise self.lost(error) from error
            finally:
                if self.loggers is not None:
                    self.loggers.close(LOGGERS_SECONDS if self.stop.requested else CLOSE_SECONDS)
        if self.world.first:
            self.summarize()

    def step(self) -> dict[str, Any]:
        """One optimizer step; gives its numbers, some still on the device."""
        self.watch.beat(self.done, "waiting for data")
        begin = time.monotonic()
        numbers = self.step_that_fits()
        self.done += 1
        if not self.settled_in:
            self.settled_in = True
            self.world.shorten_timeout(self.config.parallel.timeout_seconds, self.parameters.groups)
            if self.world.size > 1:
                self.watch.patience = BEFORE_TIMEOUT * self.config.parallel.timeout_seconds
        seconds = time.monotonic() - begin
        self.watch.beat(self.done, "between steps", seconds)
        tokens = self.config.train.batch_tokens
        return {
            "step": self.done,
            "tokens": self.done * tokens,
            "time": round(time.monotonic() - self.clock_start, 3),
            **numbers,
            "train/tokens_per_second": round(tokens / seconds),
        }

    def finish_step(self, record: dict[str, Any]) -> None:
        """What follows a step: measure, log, save. A signal may cut it short; then it is done again on resume."""
        config, last = self.config, self.done == self.config.train.steps
        self.pending = record
        text = None
        evaluate = last or _due(self.done, config.eval.every)
        if evaluate:
            self.watch.beat(self.done, "validating")
            record |= self.evaluate(all_tokens=last)
        if self.core_tasks and (last or _due(self.done, config.eval.core_every)):
            self.watch.beat(self.done, "measuring CORE")
            record["val/core"] = self.evaluate_core()
        if evaluate and config.sample.max_tokens:
            self.watch.beat(self.done, "sampling")
            text = self.sample() if self.world.first or self.sampled_by_all else None
        self.pending = None
        self.metrics.add(record)
        try:
            if text is not None and self.world.first:
                append_jsonl(self.run.samples, {"step": self.done, "prompt": config.sample.prompt, "text": text})
            if evaluate or self.metrics.due:
                self.write_metrics()
        except OSError as error:  # the numbers wait; the next save stops or goes on, as configured
            self.console.say(f"the log of step {self.done} is not written yet ({error.strerror or error})")
        if evaluate:
            self.console.evaluated(self.metrics.last, text)
            for callback in self.callbacks:
                callback.on_evaluation(self.metrics.last, text)
            if self.loggers is not None and text is not None:
                self.loggers.text(self.done, text)
        loss = record.get("val/loss", math.inf)
        best = config.checkpoint.keep_best and loss < min(self.val_losses.values(), default=math.inf)
        if math.isfinite(loss):
            self.val_losses[self.done] = loss
        due = last or best or self.done in config.checkpoint.at or _due(self.done, config.checkpoint.every)
        if due and self.saved != self.done:
            self.save()
        self.console.step(self.metrics.last, self.done)
        # Asking the others waits for the device; on a GPU it is done as often as the numbers are fetched.
        if not last and (self.device.type == "cpu" or self.done % self.metrics.every == 0):
            self.check_stop()

    def lost(self, error: Exception) -> PretrainError:
        """What to leave with when other processes did not answer: which they are, said by one process."""
        deadline = time.monotonic() + SILENT_SECONDS + 2
        while not (behind := self.world.behind()) and time.monotonic() < deadline:
            time.sleep(0.5)  # one that has just died is missed only after a while
        if not self.world.speaks(behind):
            return PeerError(1)
        names = "; ".join(behind.values()) or "it is not known which"
        reason = str(error).splitlines()[0][:200]
        return TrainingError(f"waiting for other processes failed: {names} ({reason})")

    def check_stop(self) -> None:
        """Raise Stopped, in all processes at once, if one of them was asked to stop."""
        if self.world.any(self.stop.requested):
            raise Stopped

    def hang(self, text: str) -> None:
        """Tell that nothing moves any more, and which processes are behind: from one that is not."""
        behind = self.world.behind()
        text = "; ".join([text, *behind.values()])
        if self.world.first:
            self.tell("hang", text)
        elif self.world.speaks(behind):
            print(f"pretrain: rank {self.world.rank}: {text}", file=sys.stderr, flush=True)

    def leave(self) -> Interrupted | PeerError:
        """Save what is done so far; gives the message to leave with."""
        if self.pending:  # its numbers may still be on the device
            self.pending = {k: v.item() if isinstance(v, Tensor) else v for k, v in self.pending.items()}
        if self.done != self.saved or self.pending:
            self.save(must=True)
        self.settle(must=True)
        if not self.world.first:
            return PeerError(Interrupted.exit_code)
        where = f"after step {self.done} of {self.config.train.steps}"
        return Interrupted(f"stopped {where}, all saved; go on with: {self.console.command}")

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on one global batch, in micro-batches.

        Gives the mean loss, the gradient norm before clipping, the learning rate, and whether the step was skipped (1:
        not finite, 2: a spike); tensors are still on the device. A step is all or nothing: skipped, parameters and
        moments keep every bit.
        """
        config, world = self.config, self.world
        inputs, targets = self.batches.batch(self.done + self.left_out)
        if missing := world.rows(config.batch_rows) - len(inputs):  # all processes compute equally many rows
            inputs = F.pad(inputs, (0, 0, 0, missing))
            targets = F.pad(targets, (0, 0, 0, missing), value=IGNORE)
        loss = torch.zeros((), device=self.device)
        parts = list(zip(inputs.split(self.micro_rows), targets.split(self.micro_rows), strict=True))
        for number, (x, y) in enumerate(parts, start=1):
            if world.size == 1:
                self.stop.check()
            synchronise(self.forward, last=number == len(parts), reshard=config.parallel.reshard)
            self.watch.beat(self.done, "in a forward pass")
            part = self.forward(x.to(self.device), y.to(self.device)) / config.train.batch_tokens
            self.watch.beat(self.done, "in a backward pass")
            # DDP and FSDP average over the processes what is to be added up.
            self.loss_scale.scaled(part * world.size).backward()
            loss += part.detach()
        self.watch.beat(self.done, "updating")
        world.sum(loss)

        gradients = self.parameters.gradients()
        self.loss_scale.unscale(gradients)
        norm = self.parameters.norm(gradients)
        if config.train.grad_clip and self.done >= config.train.grad_clip_from:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.local.values(), config.train.grad_clip, norm)

        not_finite, spike = self.guard.judge(loss, norm)
        factor = learning_rate_factor(config.schedule, self.done, config.train.steps)
        self._step_optimizers((not_finite | spike).float())
        self.loss_scale.update(not_finite.float())
        return {
            "train/loss": loss,
            "train/lr": config.optim.lr * factor,
            "train/grad_norm": norm,
            "train/skipped": NOT_FINITE * not_finite + SPIKE * spike,
        }

    def step_that_fits(self) -> dict[str, Any]:
        """:meth:`train_step`; out of memory, again with half the rows at once, as often as that can help.

        The batch is a function of the step and nothing was updated yet, so only dropout's random state is set back; so
        it is when a signal cuts the step short.
        """
        while True:
            random_state = self.random_state() if self.config.model.dropout else {}
            try:
                return self.train_step()
            except Stopped:
                self.set_random_state(random_state)
                raise
            except torch.OutOfMemoryError:
                if self.world.size > 1:  # the others are already waiting for this process's gradients
                    raise DeviceMemoryError(
                        f"rank {self.world.rank} is out of memory with {self.micro_rows} rows at once; go on with"
                        f" --train.micro_batch {max(1, self.micro_rows // 2)}, or --train.activation_checkpointing"
                    ) from None
                if self.micro_rows == 1:
                    raise DeviceMemoryError(
                        f"one row of {self.config.model.context_length} tokens does not fit in this device's memory;"
                        f" try --train.activation_checkpointing, or a smaller model or context"
                    ) from None
            # Outside the handler, whose traceback would keep the tensors of the failed pass alive.
            self.parameters.forget_gradients()
            self.set_random_state(random_state)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_rows = rows_up_to(self.config, self.micro_rows // 2)
            self.tell(
                "out_of_memory", f"out of memory: {self.micro_rows} rows at once from here, the same global batch"
            )

    def _step_optimizers(self, found_inf: Tensor) -> None:
        """Step, or change nothing where ``found_inf`` is 1; no wait for the device."""
        for optimizer in self.optimizers:
            optimizer.set_step(self.done, self.config)
            optimizer.found_inf = found_inf
            optimizer.step()
        self.parameters.forget_gradients()

    def evaluate(self, all_tokens: bool) -> dict[str, float]:
        """Validation loss and bits per byte; nothing when no text is held out."""
        if not self.val_streams:
            return {}
        results = {}
        for name, stream in self.val_streams.items():
            batches = self.unless_stopped(self.validation(stream, all_tokens))
            results[name] = evaluate_loss(self.model, batches, self.token_bytes, self.world.sum_on_cpu)
        whole = functools.reduce(operator.add, results.values())
        numbers = {"val/loss": whole.loss, "val/bpb": whole.bits_per_byte}
        if len(results) > 1:
            numbers |= {f"val/loss/{name}": result.loss for name, result in results.items()}
            numbers |= {f"val/bpb/{name}": result.bits_per_byte for name, result in results.items()}
        return numbers

    def evaluate_core(self) -> float:
        """CORE, or the mean over as many of its tasks as the bundle has; the tasks are dealt to the processes."""
        scorer = GPTScorer(self.model, self.tokenizer)
        score = scorer.score

        def score_unless_stopped(*args: Any, **kwargs: Any) -> Any:
            self.watch.alive()
            if self.world.size == 1:
                self.stop.check()
            return score(*args, **kwargs)

        scorer.score = score_unless_stopped
        # A model spread over the processes needs them all for every question.
        shares = 1 if self.parameters.sharded else self.world.size
        tasks = self.core_tasks[self.world.rank % shares :: shares]
        results = evaluate_core(scorer, tasks, self.config.eval.core_max_per_task).tasks
        result = CoreResult(tuple(each for some in self.world.gather(results)[:shares] for each in some))
        self.console.say(f"step {self.done:5d}   {result.name} {result.core:.4f}")
        return result.core

    def sample(self) -> str:
        """Continue the prompt of ``config.sample``."""
        settings = self.config.sample
        pieces = sample_text(
            self.model,
            self.tokenizer,
            settings.prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=self.config.train.seed,
        )
        return settings.prompt + "".join(self.unless_stopped(pieces) if self.sampled_by_all else pieces)

    @property
    def sampled_by_all(self) -> bool:
        """Whether all processes sample the same text together: a model spread over them needs all for every token."""
        return self.world.size == 1 or self.parameters.sharded

    def unless_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, until a signal asks to stop."""
        for item in items:
            self.check_stop()
            self.watch.alive()
            yield item

    def roll_back(self) -> None:
        """Take back all steps since the last checkpoint, and leave their batches out from now on."""
        self.settle()
        checkpoint = self.choose_checkpoint()
        if checkpoint is None:
            raise TrainingError(
                f"a spike at step {self.done}, and no checkpoint to roll back to; save earlier with"
                f" --checkpoint.every, or use --guard.spike_action skip"
            )
        self._count_skip(self.done, "a spike")
        self.left_out += self.done - checkpoint.step
        spike, self.done = self.done, checkpoint.step
        self.load(checkpoint)
        self.metrics.drop(self.done)
        if self.world.first:
            keep_steps(self.run.samples, self.done)
        self.tell("roll_back", f"a spike at step {spike}: back to step {self.done}, leaving out the batches since then")

    def write_metrics(self) -> None:
        """Write what is waiting; steps that were skipped are told, and counted."""
        records = self.metrics.write()
        if self.loggers is not None:
            self.loggers.log(records)
        for record in records:
            for callback in self.callbacks:
                callback.on_step(record)
            if not record["train/skipped"]:
                self.skips = 0
                continue
            why = "a spike" if record["train/skipped"] == SPIKE else "not finite"
            step, batch = record["step"], record["step"] - 1 + self.left_out
            numbers = f"loss {record['train/loss']:.4g}, gradient norm {record['train/grad_norm']:.4g}"
            self.tell("skipped", f"skipped step {step}, batch {batch}: {why} ({numbers})", step=step, batch=batch)
            self._count_skip(step, why)

    def _count_skip(self, step: int, why: str) -> None:
        self.skips += 1
        if self.skips >= self.config.guard.max_skips:
            self.settle()
            raise TrainingError(
                f"{self.skips} steps in a row were skipped up to step {step} (the last: {why}); nothing of them is in"
                f" the weights, and the last checkpoint is of step {self.saved}; try a lower --optim.lr, or"
                f" --train.precision fp32"
            )

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Say something that happened, and log it in ``events.jsonl``."""
        self.console.say(text)
        if not self.world.first:
            return
        with contextlib.suppress(OSError):  # a full disk is told by what matters more
            append_jsonl(self.run.events, {"step": self.done, "event": event, "text": text, **facts})

    def _make_optimizer_state(self) -> None:
        """Give every parameter its moments, for a checkpoint to be loaded into: by a step that changes nothing."""
        for parameter in self.parameters.local.values():
            parameter.grad = torch.zeros_like(parameter)
        self._step_optimizers(found_inf=torch.ones((), device=self.device))

    def random_state(self) -> dict[str, Tensor]:
        """The random states that training draws from (dropout)."""
        state = {f"random.cpu.{self.world.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            state[f"random.cuda.{self.world.rank}"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Set back what :meth:`random_state` gave."""
        if f"random.cpu.{self.world.rank}" in state:
            torch.set_rng_state(state[f"random.cpu.{self.world.rank}"])
        if f"random.cuda.{self.world.rank}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{self.world.rank}"], self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name."""
        extra = self.loss_scale.tensors | self.guard.tensors | self.random_state()
        return run_tensors(self.parameters.local, self.optimizers, extra)

    def load(self, checkpoint: Checkpoint) -> None:
        """Bring weights, moments and random states back to those of a checkpoint of any number of processes."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # after an evaluation it still has the weights of then, gathered
        tensors, state = self.tensors(), checkpoint.state
        if self.world.rank >= state["world"]:  # a process that was not there has no random state to go on with
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
            torch.manual_seed(self.config.train.seed + self.world.rank + 1_000_003 * checkpoint.step)
        self.writer.load(checkpoint, tensors)
        self.set_random_state(tensors)

    def save(self, must: bool = False) -> None:
        """Begin to commit a checkpoint of this step; when it is committed, those no longer wanted are retired.

        Raises:
            TrainingError: a weight or moment is not finite; such a checkpoint would help nobody.
            CheckpointError: it cannot be written, and it must be, or ``checkpoint.on_error`` says to stop.
        """
        self.settle()
        tensors, step = self.tensors(), self.done
        if name := next(filter(None, self.world.gather(not_finite(tensors))), ""):
            raise TrainingError(
                f"{name} is not finite after step {step}; it is not saved, and the last checkpoint is of step"
                f" {self.saved}; try a lower --optim.lr"
            )
        state = {
            "seconds": time.monotonic() - self.clock_start,
            "precision": self.precision.name,
            "micro_rows": self.micro_rows,
            "data": self.data_fingerprint,
            "batches": merge_states(self.world.gather(self.batches.state(step + self.left_out))),
            "left_out": self.left_out,
            "went_back_to": self.went_back_to,
            "pending": self.pending,
            "world": self.world.size,
        }

        def committed() -> None:
            self.saved = step
            self.console.saved(step)
            for callback in self.callbacks:
                callback.on_checkpoint(self.run.checkpoints / f"step-{step:08d}")
            if self.world.first:
                retire(self.run.checkpoints, self.config.checkpoint, self.val_losses)

        try:
            self.write_metrics()  # first, so that no step of a checkpoint is ever missing from them
            self.writer.save(step, tensors, state, committed)
        except OSError as error:
            self._save_failed(error, must or step == self.config.train.steps)

    def settle(self, must: bool = False) -> None:
        """Wait for the save under way, and deal with its failure."""
        self.watch.beat(self.done, SAVING)
        try:
            self.writer.wait()
        except OSError as error:
            self._save_failed(error, must)

    def _save_failed(self, error: OSError, must: bool) -> None:
        last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        what = f"saving to {self.run.folder} failed ({error.strerror or error}); {last}"
        if must or self.config.checkpoint.on_error == "stop":
            raise CheckpointError(f"{what}; make room, then go on with: {self.console.command}") from None
        self.tell("save_failed", f"{what}; training goes on to the next save")

    def validation(self, stream: TokenStream, all_tokens: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of held-out tokens: all of them, or of all streams together as many as ``eval.tokens``."""
        length = self.config.model.context_length
        rows = max(self.micro_rows, EVALUATION_TOKENS // length)
        limit = 0 if all_tokens else -(-self.config.eval.tokens // len(self.val_streams))
        return validation_batches(stream, length, rows, limit, self.world.rank, self.world.size)

    def summarize(self) -> None:
        """Write ``summary.json``: what the run came to."""
        records = read_jsonl(self.run.metrics)  # also of a run that ended between its last checkpoint and here
        recent = [record["train/loss"] for record in records[-20:]]
        seconds = time.monotonic() - self.clock_start
        tokens = self.done * self.config.train.batch_tokens
        summary = {
            "val_loss": records[-1].get("val/loss"),
            "val_bpb": records[-1].get("val/bpb"),
            "train_loss": sum(recent) / len(recent) if None not in recent else None,
            "steps": self.done,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds),
            "parameters": sum(p.numel() for p in self.parameters.whole.values()),
            "vocab_size": self.tokenizer.vocab_size,
            "bytes_per_token": self.bytes_per_token,
        }
        self.run.write_summary(summary)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
