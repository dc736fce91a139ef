"""Loss scaling for fp16."""

from __future__ import annotations

import torch

from pretrain.device import Precision


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740), all on the device.

    Doubles after 2,000 good steps, halves after one whose gradients overflow. With other precisions it is 1 and does
    nothing. ``tensors`` is its state.
    """

    def __init__(self, precision: Precision):
        self.active = precision.name == "fp16"
        device = precision.device
        self.scale = torch.full((), 2.0**16 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to run backward from."""
        return loss * self.scale if self.active else loss

    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Bring gradients of the scaled loss back, in place."""
        if self.active:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, found_inf: torch.Tensor) -> None:
        """Adapt after a step; ``found_inf`` is 1 if the gradients were not finite."""
        if self.active:
            torch._amp_update_scale_(self.scale, self.good_steps, found_inf, 2.0, 0.5, 2000)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to save and load in place."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.active else {}
