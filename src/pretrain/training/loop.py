"""Training: the step, and the loop that repeats it.

    prepare → build, or resume → for each step: batch → train_step → metrics; now and then evaluate, sample, save

Everything a step needs is a function of its number (data order, schedule) or part of the checkpoint (weights, moments,
random state), so a run that is stopped after any step goes on exactly as if it had not been.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Config, differences
from pretrain.device import choose_device, choose_precision, free_memory, keep_freed_memory
from pretrain.errors import CheckpointError, DataError, DeviceMemoryError, Interrupted, UsageError
from pretrain.evaluation import GPTScorer, evaluate_core, evaluate_loss, open_bundle, read_tasks
from pretrain.generation import sample_text
from pretrain.optim import build_optimizers, learning_rate_factor, muon_momentum, weight_decay_factor
from pretrain.plan import resolve, rows_that_fit, rows_up_to
from pretrain.tokens import (
    DataOrder,
    Prepared,
    TokenStream,
    TrainingBatches,
    open_prepared,
    prepare,
    validation_batches,
)
from pretrain.training.checkpoint import checkpoints, newest, retire, run_tensors, save_checkpoint
from pretrain.training.console import Console
from pretrain.training.init_from import load_initial, resolve_init
from pretrain.training.loss_scale import LossScale
from pretrain.training.metrics import Metrics, append_jsonl, keep_steps, read_jsonl
from pretrain.training.parallel import prepare_model
from pretrain.training.run import Run, empty_model
from pretrain.training.signals import StopRequest

EVALUATION_TOKENS = 8192
"""Tokens in a validation batch at least: without a backward pass it may be larger than a micro-batch."""


def train(config: Config, out: str | Path, console: Console | None = None, started: float | None = None) -> Run:
    """Train as ``config`` says into the run directory ``out``, or go on with the run that is there, to its end.

    Args:
        config: from :func:`pretrain.load_config`.
        out: the run directory; made if it does not exist.
        console: where progress is shown; nowhere by default.
        started: ``time.monotonic()`` when the whole job began, from which its seconds are counted.

    Raises:
        UsageError: the configuration cannot run here, or differs from that of the run in ``out``.
        DataError: the text cannot be used.
        Interrupted: a signal asked to stop; everything is saved.
    """
    started = time.monotonic() if started is None else started
    console = console or Console(quiet=True)
    if choose_device(config.train.device).type == "cpu":  # an impossible device is said before any work
        keep_freed_memory()
    run, prepared = open_run(config, Path(out), console)
    if run.summary is None:
        Trainer(run, prepared, console, started).fit()
    else:
        console.say(f"{run.folder} is finished: {run.summary['steps']} steps; nothing left to train")
    return run


def open_run(config: Config, folder: Path, console: Console) -> tuple[Run, Prepared]:
    """The run in ``folder``, or a new one with its text prepared; nothing is left behind when that fails."""
    if (folder / "config.toml").is_file():
        run = Run.open(folder)
        prepared = open_prepared(run.data)
        config, _ = resolve(config, prepared.tokenizer.vocab_size)
        changed = differences(run.config, config)
        if changed and config.train.init_from:  # it may be as it was given at first, before it was resolved
            config, _ = resolve(resolve_init(config), prepared.tokenizer.vocab_size)
            changed = differences(run.config, config)
        if changed:
            raise UsageError(
                f"{folder} was made with another configuration ({'; '.join(changed)}); choose another --out"
            )
        return Run.create(folder, config), prepared
    Run.check_new(folder)
    config = resolve_init(config)
    shutil.rmtree(folder / "data", ignore_errors=True)  # of an attempt that was stopped before it became a run
    prepared = prepare(config, folder / "data", console.say)
    prepared.tokenizer.save(folder / "tokenizer.json")
    config, derived = resolve(config, prepared.tokenizer.vocab_size)
    for line in derived:
        console.say(f"derived   {line}")
    return Run.create(folder, config), prepared


class Trainer:
    """A run in progress: its model, optimizers, data and how far it is.

    Args:
        run: the run directory; its newest whole checkpoint is where training goes on.
        prepared: the tokens to train on.
        console: where progress is shown.
        started: ``time.monotonic()`` when this job began.
    """

    def __init__(self, run: Run, prepared: Prepared, console: Console, started: float):
        config = run.config
        self.run, self.config, self.console = run, config, console
        self.data_fingerprint = prepared.manifest.fingerprint
        self.bytes_per_token = prepared.manifest.bytes_per_token
        self.tokenizer = prepared.tokenizer
        self.token_bytes = prepared.tokenizer.token_bytes()
        self.val_stream = TokenStream(prepared.folder, "val")
        train_stream = TokenStream(prepared.folder, "train")
        order = DataOrder(
            len(train_stream), config.model.context_length, config.data.order, config.data.stride, config.train.seed
        )
        self.batches = TrainingBatches(train_stream, order, config.batch_rows)
        self.core_tasks = read_tasks(open_bundle(config.eval.core_bundle)) if config.eval.core_every else []

        self.device = choose_device(config.train.device)
        torch.manual_seed(config.train.seed)
        self.model = empty_model(config, self.tokenizer, self.device)
        self.model.init_weights(torch.Generator(self.device).manual_seed(config.train.seed))

        checkpoint = newest(run.checkpoints, console.say)
        if checkpoint is None and checkpoints(run.checkpoints):
            raise CheckpointError(f"every checkpoint in {run.checkpoints} is damaged; start anew with another --out")
        if checkpoint is None and config.train.init_from:
            load_initial(self.model, config, self.tokenizer)
            console.say(f"weights   of {config.train.init_from}")
        state: dict[str, Any] = checkpoint.state if checkpoint else {}
        if state.get("data", self.data_fingerprint) != self.data_fingerprint:
            raise DataError(f"{run.data} is not what this run was trained on; restore it, or start anew with --out")
        self.precision = choose_precision(state.get("precision", config.train.precision), self.device)
        value_bytes = self.precision.dtype.itemsize
        fit = state.get("micro_rows") or rows_that_fit(config, value_bytes, free_memory(self.device))
        self.micro_rows = config.train.micro_batch or fit  # as before a resume, for the same rounding
        self.model.activation_dtype = self.precision.dtype
        muon_dtype = torch.bfloat16 if self.precision.name == "bf16" else torch.float32
        self.optimizers = build_optimizers(self.model, config.optim, muon_dtype)
        self.loss_scale = LossScale(self.precision)
        self.done: int = state.get("step", 0)
        self._make_optimizer_state()
        if checkpoint:
            tensors = self.tensors()
            checkpoint.load(tensors)
            self.set_random_state(tensors)
        self.clock_start = started - state.get("seconds", 0.0)
        keep_steps(run.samples, self.done)
        self.metrics = Metrics(run.metrics, self.done, every=1 if self.device.type == "cpu" else 10)
        prepare_model(self.model, config.train, self.device, console.say)
        console.describe(run, prepared, self.model, self.batches, self.precision, self.done)

    def fit(self) -> None:
        """Train to the last step, and write ``summary.json``."""
        config, steps = self.config, self.config.train.steps
        with StopRequest() as stop, self.console.progress(self.done, steps):
            while self.done < steps:
                begin = time.monotonic()
                loss, norm, rate = self.step_that_fits()
                self.done += 1
                end = time.monotonic()
                record: dict[str, Any] = {
                    "step": self.done,
                    "tokens": self.done * config.train.batch_tokens,
                    "time": round(end - self.clock_start, 3),
                    "train/loss": loss,
                    "train/lr": rate,
                    "train/grad_norm": norm,
                    "train/tokens_per_second": round(config.train.batch_tokens / (end - begin)),
                }
                last = self.done == steps
                evaluate = last or _due(self.done, config.eval.every)
                if evaluate:
                    record |= self.evaluate(all_tokens=last)
                if self.core_tasks and (last or _due(self.done, config.eval.core_every)):
                    record["val/core"] = self.evaluate_core()
                self.metrics.add(record)
                if evaluate:
                    self.metrics.write()
                    self.console.evaluated(self.metrics.last, self.sample())
                if (
                    last
                    or stop.requested
                    or self.done in config.checkpoint.at
                    or _due(self.done, config.checkpoint.every)
                ):
                    self.metrics.write()
                    self.save()
                self.console.step(self.metrics.last, self.done)
                if stop.requested and not last:
                    where = f"after step {self.done} of {steps}"
                    raise Interrupted(f"stopped {where}, all saved; go on with: {self.console.command}")
        self.summarize()

    def train_step(self) -> tuple[Tensor, Tensor, float]:
        """One optimizer step on one global batch, in micro-batches.

        Gives the mean loss and the gradient norm before clipping, as tensors still on the device, and the learning
        rate. A step is all or nothing: when any gradient is not finite, parameters and moments keep every bit.
        """
        config, model = self.config, self.model
        inputs, targets = self.batches.batch(self.done)
        loss = torch.zeros((), device=self.device)
        for x, y in zip(inputs.split(self.micro_rows), targets.split(self.micro_rows), strict=True):
            part = model(x.to(self.device), y.to(self.device)) / targets.numel()
            self.loss_scale.scaled(part).backward()
            loss += part.detach()

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.loss_scale.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.train.grad_clip and self.done >= config.train.grad_clip_from:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.train.grad_clip, norm)

        factor = learning_rate_factor(config.schedule, self.done, config.train.steps)
        found_inf = (~torch.isfinite(norm)).float()
        self._step_optimizers(factor, found_inf)
        self.loss_scale.update(found_inf)
        return loss, norm, config.optim.lr * factor

    def step_that_fits(self) -> tuple[Tensor, Tensor, float]:
        """:meth:`train_step`; out of memory, again with half the rows at once, as often as that can help.

        The batch is a function of the step and nothing was updated yet, so only dropout's random state is set back.
        """
        while True:
            random_state = self.random_state() if self.config.model.dropout else {}
            try:
                return self.train_step()
            except torch.OutOfMemoryError:
                if self.micro_rows == 1:
                    raise DeviceMemoryError(
                        f"one row of {self.config.model.context_length} tokens does not fit in this device's memory;"
                        f" try --train.activation_checkpointing, or a smaller model or context"
                    ) from None
            # Outside the handler, whose traceback would keep the tensors of the failed pass alive.
            self.model.zero_grad(set_to_none=True)
            self.set_random_state(random_state)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_rows = rows_up_to(self.config, self.micro_rows // 2)
            self.console.say(f"out of memory: going on with {self.micro_rows} rows at once, the same global batch")

    def _step_optimizers(self, factor: float, found_inf: Tensor) -> None:
        """Step at ``factor`` of the peak rates, or change nothing where ``found_inf`` is 1; no wait for the device."""
        config, steps = self.config, self.config.train.steps
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
                if "momentum" in group:
                    group["momentum"] = muon_momentum(config.optim, config.schedule, self.done, steps)
                    group["weight_decay"] = group["peak_decay"] * weight_decay_factor(config.optim, self.done, steps)
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # Muon and torch's fused AdamW read it
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate(self, all_tokens: bool) -> dict[str, float]:
        """Validation loss and bits per byte; nothing when no text is held out."""
        if not len(self.val_stream):
            return {}
        result = evaluate_loss(self.model, self.validation(all_tokens), self.token_bytes)
        return {"val/loss": result.loss, "val/bpb": result.bits_per_byte}

    def evaluate_core(self) -> float:
        """CORE, or the mean over as many of its tasks as the bundle has."""
        scorer = GPTScorer(self.model, self.tokenizer)
        result = evaluate_core(scorer, self.core_tasks, self.config.eval.core_max_per_task)
        self.console.say(f"step {self.done:5d}   {result.name} {result.core:.4f}")
        return result.core

    def sample(self) -> str | None:
        """Continue the prompt of ``config.sample``, and append the text to ``samples.jsonl``."""
        settings = self.config.sample
        if not settings.max_tokens:
            return None
        pieces = sample_text(
            self.model,
            self.tokenizer,
            settings.prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=self.config.train.seed,
        )
        text = settings.prompt + "".join(pieces)
        append_jsonl(self.run.samples, {"step": self.done, "prompt": settings.prompt, "text": text})
        return text

    def _make_optimizer_state(self) -> None:
        """Give every parameter its moments, for a checkpoint to be loaded into: by a step that changes nothing."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._step_optimizers(factor=0.0, found_inf=torch.ones((), device=self.device))

    def random_state(self) -> dict[str, Tensor]:
        """The random states that training draws from (dropout)."""
        state = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Set back what :meth:`random_state` gave."""
        if "random.cpu" in state:
            torch.set_rng_state(state["random.cpu"])
        if "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name."""
        return run_tensors(self.model, self.optimizers, self.loss_scale.tensors | self.random_state())

    def save(self) -> None:
        """Commit a checkpoint of this step, then retire those no longer wanted."""
        state = {
            "seconds": time.monotonic() - self.clock_start,
            "precision": self.precision.name,
            "micro_rows": self.micro_rows,
            "data": self.data_fingerprint,
        }
        save_checkpoint(self.run.checkpoints, self.done, self.tensors(), state)
        retire(self.run.checkpoints, self.config.checkpoint.keep_last, self.config.checkpoint.at)

    def validation(self, all_tokens: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the held-out tokens: all of them, or as many as ``eval.tokens``."""
        length = self.config.model.context_length
        rows = max(self.micro_rows, EVALUATION_TOKENS // length)
        limit = 0 if all_tokens else self.config.eval.tokens
        return validation_batches(self.val_stream, length, rows, limit)

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
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_size": self.tokenizer.vocab_size,
            "bytes_per_token": self.bytes_per_token,
        }
        self.run.write_summary(summary)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
