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
        file: ``metrics.jsonl``; lines of steps later than ``step`` are dropped from it.
        step: steps done so far.
        every: steps between writes.
    """

    def __init__(self, file: Path, step: int, every: int):
        self.file, self.every = file, every
        self.last: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []
        keep_steps(file, step)

    def add(self, record: dict[str, Any]) -> None:
        """Take one step's numbers; tensors may still be in the making on the device."""
        self._waiting.append(record)
        if len(self._waiting) >= self.every:
            self.write()

    def write(self) -> None:
        """Fetch and append what is waiting."""
        if not self._waiting:
            return
        tensors = [v for record in self._waiting for v in record.values() if isinstance(v, Tensor)]
        values = iter(torch.stack([t.float() for t in tensors]).tolist() if tensors else ())
        records = [
            {k: next(values) if isinstance(v, Tensor) else v for k, v in record.items()} for record in self._waiting
        ]
        append_jsonl(self.file, *records)
        self.last = records[-1]
        self._waiting.clear()


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
    """Append records, one line each. JSON has no NaN or infinity: they become null."""
    with file.open("a", encoding="utf-8") as out:
        for record in records:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            out.write(json.dumps(clean, ensure_ascii=False) + "\n")


def keep_steps(file: Path, up_to: int) -> None:
    """Drop the records of steps after ``up_to``, which a run that goes on from there will write again."""
    kept = [record for record in read_jsonl(file) if record["step"] <= up_to]
    if kept or file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        append_jsonl(temporary, *kept)
        os.replace(temporary, file)
