"""Protection against bad steps: one whose loss or gradients are not finite, or jump, changes nothing.

The decision is made on the device and carried out by selecting the old values (``found_inf`` of the optimizers), so
that no step waits for it and nothing is ever multiplied by a zero that should hide a NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import GuardConfig
from pretrain.device import Precision

NOT_FINITE, SPIKE = 1, 2
"""Why a step was skipped, in ``train/skipped``."""


class Guard:
    """Judges each step by its loss and gradient norm, compared with those of the last good steps."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self.sigma = config.spike_sigma
        self.window = torch.zeros(2, config.spike_window, device=device)  # losses, norms
        self.good = torch.zeros((), dtype=torch.int64, device=device)  # good steps so far

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is not finite, and whether it is a spike; a good one enters the statistics."""
        values = torch.stack((loss, norm)).float()
        not_finite = ~torch.isfinite(values).all()
        if not self.sigma:
            return not_finite, torch.zeros_like(not_finite)
        limit = self.window.mean(1) + self.sigma * self.window.std(1)
        size = self.window.shape[1]
        spike = (self.good >= size) & (values > limit).any() & ~not_finite
        refused = not_finite | spike
        place = (self.good % size).view(1)
        self.window.index_copy_(1, place, torch.where(refused, self.window[:, place], values[:, None]))
        self.good += ~refused
        return not_finite, spike

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state to save and load in place."""
        return {"guard.window": self.window, "guard.good": self.good} if self.sigma else {}


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740), all on the device.

    Doubles after 2,000 good steps, halves after one whose gradients overflow. With other precisions it does nothing.
    """

    def __init__(self, precision: Precision):
        self.active = precision.name == "fp16"
        self.scale = torch.full((), 2.0**16, device=precision.device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=precision.device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss * self.scale if self.active else loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Bring gradients of the scaled loss back, in place."""
        if self.active:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, found_inf: Tensor) -> None:
        """Adapt after a step; ``found_inf`` is 1 if the gradients were not finite."""
        if self.active:
            torch._amp_update_scale_(self.scale, self.good_steps, found_inf, 2.0, 0.5, 2000)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state to save and load in place."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.active else {}
