"""The numbers of a run as columns: read once, or line by line as they come; smoothed, and thinned for a plot.

metrics.jsonl → Tail: new lines only → Curves: Table of training, Table of validation, skipped steps → thinned
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.runs.metrics import Smoothed

MEASURED = "val/"
"""Numbers with names that begin so come at some steps only, and have a table of their own."""
SMOOTHED = "train/loss smoothed"
SKIPPED = "train/skipped"
AXES = ("step", "tokens", "time")
END_BYTES = 256
MARKS = 1000
"""Skipped steps that are listed one by one, at most."""


class Tail:
    """Reads a file of JSON lines as it grows, each line once.

    A resume rewrites the file with fewer lines; then it is read from its beginning again.
    """

    def __init__(self, file: Path):
        self.file = file
        self._forget()

    def _forget(self) -> None:
        self._offset, self._end = 0, b""

    def new(self) -> Iterator[dict[str, Any] | None]:
        """The records that are whole and not given yet; None first if all that was given before is void."""
        try:
            handle = self.file.open("rb")
        except FileNotFoundError:
            if self._offset:
                self._forget()
                yield None
            return
        with handle:
            handle.seek(self._offset - len(self._end))
            if handle.read(len(self._end)) != self._end:  # the last line given is not there any more
                self._forget()
                yield None
                handle.seek(0)
            for line in handle:
                if not line.endswith(b"\n"):  # still being written, or cut short by a crash
                    return
                self._offset += len(line)
                self._end = line[-END_BYTES:]
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


class Table:
    """Columns of numbers, equally long; NaN where a row lacks one. 8 bytes a number, for runs of any length."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {"step": array("d")}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; a name that is new has been NaN so far."""
        columns, rows = self.columns, len(self)
        for name in row:
            if name not in columns:
                columns[name] = array("d", [math.nan]) * rows
        for name, column in columns.items():
            column.append(row.get(name, math.nan))

    def column(self, name: str) -> np.ndarray:
        """A copy of a column, float64; NaN if there is none of this name."""
        return np.array(self.columns[name]) if name in self.columns else np.full(len(self), math.nan)

    def last(self, name: str) -> float | None:
        """The newest finite number of a column."""
        values = self.columns.get(name, ())
        return next((value for value in reversed(values) if math.isfinite(value)), None)


class Curves:
    """All numbers of a run, from its metrics.jsonl, which may not be there yet.

    Attributes:
        train: a row for each step, with ``train/loss smoothed`` added.
        val: a row for each step at which something with a name of ``val/...`` was measured.
        skipped: the newest of the steps that were skipped, and why (1: not finite, 2: a spike).
        skips: how many there were, by that.
    """

    def __init__(self, file: Path):
        self._tail = Tail(file)
        self._clear()
        self.refresh()

    def _clear(self) -> None:
        self.train, self.val = Table(), Table()
        self.skipped: list[tuple[int, int]] = []
        self.skips: dict[int, int] = {}
        self._step, self._smoothed = 0.0, Smoothed()

    def refresh(self) -> None:
        """Take in what was written since the last time."""
        for record in self._tail.new():
            if record is None:
                self._clear()
            else:
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        row, measured = {}, {}
        for name, value in record.items():
            if type(value) is float or type(value) is int:  # not bool
                (measured if name.startswith(MEASURED) else row)[name] = value
        step = row.get("step", 0)
        if step <= self._step:
            return
        self._step = step
        if measured:
            self.val.add({name: row[name] for name in AXES if name in row} | measured)
        if skipped := int(row.pop(SKIPPED, 0)):
            self.skips[skipped] = self.skips.get(skipped, 0) + 1
            self.skipped = [*self.skipped[1 - MARKS :], (int(step), skipped)]
        if "train/loss" in record:
            row[SMOOTHED] = self._smoothed.add(None if skipped else row.get("train/loss"))
        self.train.add(row)

    def clipped(self, norm: float, first: int) -> tuple[int, int]:
        """Of the steps after ``first``: those with a gradient norm above ``norm`` (0: no clipping), and all."""
        if not norm or "train/grad_norm" not in self.train.columns:
            return 0, 0
        norms = self.train.column("train/grad_norm")[self.train.column("step") > first]
        return int((norms > norm).sum()), int(np.isfinite(norms).sum())


def thinned(table: Table, limit: int, spiky: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a table, ready for JSON, with about ``limit`` rows at most.

    Of each stretch of steps the rows stay that hold the least and the greatest number of each of ``spiky`` (all
    columns but the axes if not given), so that no spike is lost; and the first and the last row.
    """
    columns = {name: table.column(name) for name in table.columns}
    rows = len(table)
    if rows > limit:
        spiky = [name for name in (spiky or columns) if name in columns and name not in AXES]
        buckets = max(1, limit // max(1, 2 * len(spiky)))
        edges = np.linspace(0, rows, buckets + 1).astype(int)
        kept = {0, rows - 1}
        for name in spiky:
            values = columns[name]
            finite = np.isfinite(values)
            low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
            for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                if finite[begin:end].any():
                    kept.update((begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())))
        chosen = np.array(sorted(kept))
        columns = {name: values[chosen] for name, values in columns.items()}
    return {name: _plain(name, values) for name, values in columns.items()}


def _plain(name: str, values: np.ndarray) -> list[Any]:
    """Numbers for JSON: steps and tokens whole, others of six digits, None for what is not finite."""
    if name in ("step", "tokens"):
        return [int(v) if math.isfinite(v) else None for v in values.tolist()]
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
