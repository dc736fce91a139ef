"""How fast a step is where nothing is measured: assumed from a share of the hardware's peak."""

from __future__ import annotations

from pretrain.config import Config, ModelConfig
from pretrain.sizing import Speed

EVALUATION_SHARE = 1 / 3
"""The forward pass's part of the compute of a training step."""


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
