"""The numbers of steps: fetched from the device some steps at a time, and their losses smoothed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SMOOTHED_LOSS = "train/smoothed_loss"
SMOOTHING = 0.9
"""What the smoothed loss keeps of itself at each step, as in nanochat: about ten steps weigh."""
OVERFIT = 0.02
"""Nats by which the held-out loss must have risen from its lowest before that is remarked on; less may be chance."""


def fetch(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same records with numbers in place of tensors: one wait for the device, however many they are."""
    tensors = [value for record in records for value in record.values() if isinstance(value, Tensor)]
    values = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else ())
    return [{k: next(values) if isinstance(v, Tensor) else v for k, v in record.items()} for record in records]


def comparable_loss(record: dict[str, Any]) -> float | None:
    """The held-out loss to compare with other validations of the run: over ``eval.tokens``, as they were."""
    return record.get("val/part_loss", record.get("val/loss"))


def comparable_losses(records: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Those of the records that have one, by step."""
    losses = {record["step"]: comparable_loss(record) for record in records}
    return {step: loss for step, loss in losses.items() if loss is not None}


class Smoothed:
    """The training loss as it is shown: an exponential mean, debiased (Adam, arXiv 1412.6980, section 3).

    Steps that were skipped, and losses that are not finite, are left out.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        """``records``, of metrics.jsonl, are taken first: what follows is then as if there had been no interruption."""
        self._sum, self._losses = 0.0, 0
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> float:
        """Take the metrics of the next step; returns the mean so far, NaN before the first loss."""
        loss = record.get("train/loss")
        if loss is not None and math.isfinite(loss) and not record.get("train/skipped"):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
            self._losses += 1
        return self.loss

    @property
    def loss(self) -> float:
        """The mean so far."""
        return self._sum / (1 - SMOOTHING**self._losses) if self._losses else math.nan
