"""The numbers of steps: fetched from the device some steps at a time, and smoothed to be shown."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SMOOTHING = 0.95
"""What the smoothed loss keeps of itself at each step: about twenty steps weigh."""


def fetch(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same records with numbers in place of tensors: one wait for the device, however many they are."""
    tensors = [value for record in records for value in record.values() if isinstance(value, Tensor)]
    values = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else ())
    return [{k: next(values) if isinstance(v, Tensor) else v for k, v in record.items()} for record in records]


class Smoothed:
    """An exponential mean of losses, debiased (Adam, arXiv 1412.6980, section 3); skips those that are not finite."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float | None) -> float:
        """Add the loss of the next step; returns the mean so far, NaN before the first."""
        if loss is not None and math.isfinite(loss):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight if self._weight else math.nan
