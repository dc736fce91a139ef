"""How fast a step is: measured here in a few seconds with the real model on random tokens, or assumed from a peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from pretrain.config import Config, ModelConfig
from pretrain.device import Precision, keep_freed_memory, synchronize
from pretrain.optim import build_optimizers
from pretrain.sizing import meta_model
from pretrain.training.parallel import parallelize
from pretrain.training.state import update
from pretrain.training.world import World

SECONDS = 5.0
"""How long a measurement takes."""
MINIMUM = 4
"""Measurements that are taken all the same: single ones may be twice the usual."""

EVALUATION_SHARE = 1 / 3
"""The forward pass's part of the compute of a training step."""


@dataclass(frozen=True)
class Speed:
    """Seconds of the parts of a step on one device."""

    micro_step: float
    """Of a forward and backward pass of the planned micro-batch."""
    update: float
    """Of clipping and the optimizers, once a step."""
    evaluation: float
    """Of each token in validation."""

    def step(self, micro_steps: int) -> float:
        """Seconds of an optimizer step."""
        return micro_steps * self.micro_step + self.update


def assumed_utilisation(model: ModelConfig, gpu: bool) -> float:
    """The share of a peak that training may be expected to reach where it was not measured (docs/plan.md).

    On data-center GPUs compiled models 768 channels wide and more reach 35 to 50 %; narrow ones keep the matrix units
    waiting for memory.
    """
    if not gpu:
        return 0.35
    return 0.4 if model.width >= 768 else 0.25 if model.width >= 384 else 0.1


def assume_speed(config: Config, token_seconds: float, rows: int) -> Speed:
    """The speed of a micro-batch where a token takes ``token_seconds`` to train on; nothing for the update."""
    again = 1 + EVALUATION_SHARE if config.train.activation_checkpointing else 1  # the forward pass a second time
    return Speed(rows * config.model.context_length * token_seconds * again, 0.0, token_seconds * EVALUATION_SHARE)


def measure_speed(config: Config, vocab_size: int, rows: int, precision: Precision, seconds: float = SECONDS) -> Speed:
    """Time a few real micro-batches of ``rows``, and updates, on random tokens.

    Fewer rows are measured where that would take long, and their time multiplied. ``seconds`` is how long it may take,
    besides making the model; three times as long for ``MINIMUM`` measurements.
    """
    device, length = precision.device, config.model.context_length
    if device.type == "cpu":
        keep_freed_memory()

    def timed(work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begin

    with torch.random.fork_rng(enabled=device.type == "cpu"):  # dropout draws from it
        model = meta_model(config.model, vocab_size, bos_id=0)
        model.activation_dtype = precision.dtype
        parallelize(model, "none", config, World(device), precision, say=lambda _: None)
        optimizers = build_optimizers(model, config.optim)
        model.init_weights(torch.Generator(device).manual_seed(0))
        tokens = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)

        def micro_step(rows: int) -> None:
            (model(tokens[:rows], tokens[:rows]) / (rows * length)).backward()

        def optimizer_step() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update(optimizers, 0, config, skip=torch.zeros((), device=device))
            model.zero_grad(set_to_none=True)

        begin = time.perf_counter()
        first, measured = timed(lambda: micro_step(1)), rows
        while measured > 1 and first * measured > seconds:  # at the latest one row is measured
            measured = -(-measured // 2)
        micro_step(measured)  # once unmeasured: memory is fetched and programs are compiled
        optimizer_step()
        micro, updates, evaluation = [], [], []
        while not micro or time.perf_counter() - begin < (seconds if len(micro) >= MINIMUM else 3 * seconds):
            micro.append(timed(lambda: micro_step(measured)))
            updates.append(timed(optimizer_step))
            with torch.no_grad():
                evaluation.append(timed(lambda: model(tokens[:measured], tokens[:measured])))
    return Speed(median(micro) * rows / measured, median(updates), median(evaluation) / (measured * length))
