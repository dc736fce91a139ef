"""Batches of token windows: inputs, and targets one token later.

training:    step → DataOrder → starts → TokenStream.windows → (rows, T) inputs and targets
validation:  every token of the split once as a target, in order
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pretrain.tokens.order import DataOrder
from pretrain.tokens.shards import TokenStream

IGNORE = -1
"""The target that does not count."""

STARTS_AHEAD = 4096
"""Rows whose starts are computed at once: many small steps share the cost of one vectorised call."""


class TrainingBatches:
    """The global batch of every step, as a function of the step alone.

    Args:
        stream: the training tokens.
        order: which window is which row.
        rows: rows in the global batch of one step.
    """

    def __init__(self, stream: TokenStream, order: DataOrder, rows: int):
        self.stream, self.order, self.rows = stream, order, rows
        self._first, self._starts = 0, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, both int64 (rows, T)."""
        first = step * self.rows
        if not self._first <= first <= self._first + len(self._starts) - self.rows:
            self._first = first
            self._starts = self.order.starts(first, max(STARTS_AHEAD, self.rows))
        starts = self._starts[first - self._first :][: self.rows]
        window = torch.from_numpy(self.stream.windows(starts, self.order.length + 1))
        return window[:, :-1], window[:, 1:]

    def epoch(self, step: int) -> float:
        """Epochs completed before a step."""
        return step * self.rows / self.order.windows


def validation_batches(stream: TokenStream, length: int, rows: int, tokens: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (up to ``rows``, T) that count every token but the first exactly once as a target, in order.

    The last row is filled up with targets of ``IGNORE``. ``tokens`` stops after about as many targets; 0 takes all.
    """
    targets = len(stream) - 1
    if tokens:
        targets = min(targets, max(1, tokens // length) * length)
    for first in range(0, targets, rows * length):
        count = min(rows * length, targets - first)
        flat = stream.windows(np.array([first]), count + 1)[0]
        padding = -count % length
        inputs = np.pad(flat[:-1], (0, padding))
        wanted = np.pad(flat[1:], (0, padding), constant_values=IGNORE)
        yield torch.from_numpy(inputs.reshape(-1, length)), torch.from_numpy(wanted.reshape(-1, length))
