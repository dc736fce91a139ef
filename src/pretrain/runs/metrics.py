"""``metrics.jsonl``: one JSON object for each step, appended, with no step twice and none missing after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.io import append_jsonl, keep_steps


class Metrics:
    """Gathers the numbers of steps and writes them some steps at a time, so that no step waits for the device.

    Args:
        file: ``metrics.jsonl``; lines of steps later than ``step`` are dropped from it. None: nothing is written.
        step: steps done so far.
        every: steps between writes.
    """

    def __init__(self, file: Path | None, step: int, every: int):
        self.file, self.every = file, every
        self.last: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []
        if file is not None:
            keep_steps(file, step)

    def add(self, record: dict[str, Any]) -> None:
        """Take one step's numbers; tensors may still be in the making on the device."""
        self._waiting.append(record)

    @property
    def due(self) -> bool:
        """Whether enough is waiting to be written."""
        return len(self._waiting) >= self.every

    def drop(self, step: int) -> None:
        """Forget the steps after ``step``, written or waiting."""
        self._waiting = [record for record in self._waiting if record["step"] <= step]
        if self.file is not None:
            keep_steps(self.file, step)

    def write(self) -> list[dict[str, Any]]:
        """Fetch and append what is waiting, and give it.

        Raises:
            OSError: the file could not be written; the records stay for the next time.
        """
        tensors = [v for record in self._waiting for v in record.values() if isinstance(v, Tensor)]
        values = iter(torch.stack([t.float() for t in tensors]).tolist() if tensors else ())
        self._waiting = records = [
            {k: next(values) if isinstance(v, Tensor) else v for k, v in record.items()} for record in self._waiting
        ]
        if self.file is not None:
            append_jsonl(self.file, *records)
        self.last = records[-1] if records else self.last
        self._waiting = []
        return records
