"""The line where the optimizer is chosen, and the optimizers of a model. How to add one: docs/design.md."""

from __future__ import annotations

from typing import Protocol

import torch

from pretrain.config import Config, OptimConfig
from pretrain.errors import UsageError, did_you_mean
from pretrain.model import GPT
from pretrain.optim import adamw, muon
from pretrain.optim.optimizer import Optimizer


class OptimizerModule(Protocol):
    """What the file of an optimizer defines. ``counts`` are those of :func:`pretrain.sizing.count_parameters`."""

    def build(self, model: GPT, config: OptimConfig) -> list[Optimizer]:
        """The optimizers of a model, which together claim each of its parameters once."""
        ...

    def settings(self, step: int, config: Config) -> dict[str, float]:
        """What follows the schedule at ``step``, besides the learning rates."""
        ...

    def state_bytes(self, counts: dict[str, int]) -> int:
        """Bytes of the state of all parameters."""
        ...

    def exchanged_bytes(self, counts: dict[str, int], dtype: torch.dtype) -> int:
        """Bytes of the updates that go through ``Optimizer.share`` in a step; ``dtype`` is that of the activations."""
        ...

    def usual_rates(self, config: OptimConfig, parameters: int) -> tuple[float, float, float]:
        """Peak learning rates for a model without its embedding: the lowest that is common, the usual, the highest."""
        ...


OPTIMIZERS: dict[str, OptimizerModule] = {"adamw": adamw, "muon": muon}


def find_optimizer(config: OptimConfig) -> OptimizerModule:
    """The file of ``optim.kind``. A UsageError when there is none of that name."""
    if config.kind not in OPTIMIZERS:
        hint = did_you_mean(config.kind, OPTIMIZERS, or_list=False)
        raise UsageError(f"optim.kind must be one of {', '.join(OPTIMIZERS)}, not {config.kind!r}{hint}")
    return OPTIMIZERS[config.kind]


def build_optimizers(model: GPT, config: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model whose ``activation_dtype`` is set; each group keeps its ``peak_lr``."""
    optimizers = find_optimizer(config).build(model, config)
    claimed = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in model.named_parameters():
        count = sum(parameter is p for p in claimed)
        assert count == 1, f"parameter {name} is claimed {count} times by the optimizers"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
