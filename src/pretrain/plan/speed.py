"""How fast a step is: measured here in a few seconds with the real model on random tokens, or assumed from a peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.config import Config, ModelConfig
from pretrain.device import Precision, free_memory, keep_freed_memory
from pretrain.model import GPT
from pretrain.optim import build_optimizers
from pretrain.training.parallel import recompute_blocks

SECONDS = 5.0
"""How long a measurement takes."""
LEAST = 4
"""Measurements before that counts: single ones may be twice the usual."""

EVALUATION_SHARE = 1 / 3
"""The forward pass's part of the arithmetic of a training step."""


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


def assume_speed(flops_per_token: int, tokens: int, flops_per_second: float, recomputed: bool = False) -> Speed:
    """The speed of a micro-batch of ``tokens`` at so many operations a second, with nothing for the update.

    ``recomputed`` says that the backward pass computes the forward pass again.
    """
    seconds = flops_per_token / flops_per_second
    again = 1 + EVALUATION_SHARE if recomputed else 1
    return Speed(tokens * seconds * again, 0.0, seconds * EVALUATION_SHARE)


def measure_speed(
    config: Config, vocab_size: int, rows: int, precision: Precision, needed: int, seconds: float = SECONDS
) -> Speed | str:
    """Time a few real micro-batches and updates on random tokens; or why that is not possible here, in words.

    Args:
        config: with its derived fields filled in.
        vocab_size: V.
        rows: of the planned micro-batch; fewer are measured where that would take long, and their time multiplied.
        precision: of activations, and the device.
        needed: bytes of memory that the planned micro-batch is expected to take.
        seconds: how long it may take, besides making the model; three times as long for ``LEAST`` measurements.
    """
    device, length = precision.device, config.model.context_length
    if needed > free_memory(device):
        return "the model does not fit in this device's memory"
    if device.type == "cpu":
        keep_freed_memory()
    with torch.random.fork_rng(enabled=device.type == "cpu"):
        with torch.device("meta"):
            model = GPT(config.model, vocab_size, 0)
        model = model.to_empty(device=device)
        model.tie_head()
        model.init_weights(torch.Generator(device).manual_seed(0))
        model.activation_dtype = precision.dtype
        if config.train.activation_checkpointing:
            recompute_blocks(model)
        if config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda"):
            model.compile(dynamic=False)
        optimizers = build_optimizers(model, config.optim)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (rows, length), generator=generator).to(device)

        def micro_step(rows: int) -> None:
            (model(tokens[:rows], tokens[:rows]) / (rows * length)).backward()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.found_inf = torch.zeros((), device=device)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        begin = time.perf_counter()
        first = _seconds(lambda: micro_step(1), device)
        while rows > 1 and first * rows > seconds:  # at the latest one row is measured
            rows = -(-rows // 2)
        micro_step(rows)  # as often as it is measured first, memory is fetched and programs are compiled
        update()
        micro, updates, evaluation = [], [], []
        while not micro or time.perf_counter() - begin < (seconds if len(micro) >= LEAST else 3 * seconds):
            micro.append(_seconds(lambda: micro_step(rows), device))
            updates.append(_seconds(update, device))
            with torch.no_grad():
                evaluation.append(_seconds(lambda: model(tokens[:rows], tokens[:rows]), device))
    scale = tokens.shape[0] / rows
    seconds_of = statistics.median
    return Speed(seconds_of(micro) * scale, seconds_of(updates), seconds_of(evaluation) / (rows * length))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - begin
