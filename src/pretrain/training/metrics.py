"""``metrics.jsonl``: one JSON object for each step, appended, with no step twice and none missing after a resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a file such as metrics.jsonl; a last line that a crash cut short is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def append_jsonl(file: Path, *records: dict[str, Any]) -> None:
    """Append records, one line each, or nothing at all. JSON has no NaN or infinity: they become null."""
    lines = []
    for record in records:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        lines.append(json.dumps(clean, ensure_ascii=False) + "\n")
    data = memoryview("".join(lines).encode())
    with file.open("ab", buffering=0) as out:
        size = out.tell()
        try:
            while data:
                data = data[out.write(data) :]
        except OSError:  # such as a full disk: half a line would spoil the next one
            os.truncate(file, size)
            raise


def keep_steps(file: Path, up_to: int) -> None:
    """Drop the records of steps after ``up_to``, which a run that goes on from there will write again."""
    kept = [record for record in read_jsonl(file) if record["step"] <= up_to]
    if kept or file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        append_jsonl(temporary, *kept)
        os.replace(temporary, file)
