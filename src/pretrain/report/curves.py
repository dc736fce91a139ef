"""The numbers of a run as columns, read line by line as they come; smoothed, and thinned for a plot.

metrics.jsonl → Curves: a Table of training and one of validation → thinned
"""

from __future__ import annotations

import functools
import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.runs.metrics import SMOOTHED_LOSS, Smoothed

AXES = ("step", "tokens", "time")
SKIPPED = "train/skipped"
WITHOUT_SPIKES = {*AXES, SMOOTHED_LOSS, SKIPPED, "train/lr"}
EVALUATED = "train/eval_loss"
OF_ALL = " of all"
LOWEST = "val/loss lowest"
LOW, HIGH = " low", " high"


class Table:
    """Columns of numbers, equally long; NaN where a row lacks one. 8 bytes a number, for runs of any length."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {"step": array("d")}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; a name that is new has been NaN so far."""
        rows = len(self)
        for name in row:
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * rows
        for name, column in self.columns.items():
            column.append(row.get(name, math.nan))

    def column(self, name: str) -> np.ndarray:
        """A copy of a column, float64; NaN if there is none of this name."""
        return np.array(self.columns[name]) if name in self.columns else np.full(len(self), math.nan)

    def last(self, name: str) -> float | None:
        """The newest finite number of a column."""
        return next((value for value in reversed(self.columns.get(name, ())) if math.isfinite(value)), None)


class Curves:
    """All numbers of a run, from its metrics.jsonl, which may not be there yet.

    Attributes:
        train: a row for each step, with ``train/smoothed_loss`` where an older run lacks it.
        val: a row for each step at which something with a name of ``val/...``, ``core/...`` or ``test/...``, or the
            loss on training text in evaluation mode, was measured. Where both all held-out text and ``eval.tokens`` of
            it were measured, ``val/loss`` and ``val/bpb`` go on with the latter, and the former is
            ``val/loss of all``.
    """

    def __init__(self, file: Path):
        self.file = file
        self._clear()
        self.refresh()

    def _clear(self) -> None:
        self.train, self.val = Table(), Table()
        self._smoothed = Smoothed()
        self._step: float = -1
        self._offset, self._last_line = 0, b""

    @staticmethod
    def over(every: Sequence[Curves]) -> Curves:
        """The mean over runs at the steps that all have; beside it, where they differ, the least and the greatest.

        Those of ``val/loss`` are in the columns ``val/loss low`` and ``val/loss high``.
        """
        mean = Curves(Path(os.devnull))
        mean.train, mean.val = _mean([curves.train for curves in every]), _mean([curves.val for curves in every])
        return mean

    def refresh(self) -> None:
        """Take in the lines written since the last time."""
        with self.file.open("rb") if self.file.exists() else BytesIO() as lines:
            lines.seek(self._offset - len(self._last_line))
            if lines.read(len(self._last_line)) != self._last_line:  # a resume rewrote the file
                self._clear()
                lines.seek(0)
            for line in lines:
                if not line.endswith(b"\n"):  # still being written, or cut short by a crash
                    break
                self._offset += len(line)
                self._last_line = line
                with suppress(ValueError):
                    self._add(json.loads(line))

    def _add(self, record: dict[str, Any]) -> None:
        row = {name: value for name, value in record.items() if type(value) in (int, float)}  # not bool
        if row.get("step", -1) <= self._step:  # written twice
            return
        self._step = row["step"]
        names = [name for name in row if name.startswith(("val/", "core/", "test/")) or name == EVALUATED]
        measured = {name: row.pop(name) for name in names}
        for name in ("loss", "bpb"):
            if f"val/part_{name}" in measured:
                measured[f"val/{name}{OF_ALL}"] = measured.pop(f"val/{name}", math.nan)
                measured[f"val/{name}"] = measured.pop(f"val/part_{name}")
        if measured:
            self.val.add({name: row[name] for name in AXES if name in row} | measured)
        if "train/loss" in record:  # not so before the first step
            row.setdefault(SMOOTHED_LOSS, self._smoothed.add(row))
            self.train.add(row)

    def lowest(self) -> tuple[float, float] | None:
        """Step and loss of the lowest validation, among those that compare; None before the first one."""
        rows = zip(self.val.column("step").tolist(), self.val.column("val/loss").tolist(), strict=True)
        return min((row for row in rows if math.isfinite(row[1])), key=lambda row: row[1], default=None)

    def skipped(self) -> list[tuple[int, int]]:
        """The steps that were skipped, and why: 1 not finite, 2 a spike."""
        reasons = np.nan_to_num(self.train.column(SKIPPED)).astype(int)
        steps = self.train.column("step").astype(int)
        return [(steps[row].item(), reasons[row].item()) for row in np.flatnonzero(reasons)]

    def clipped(self, norm: float, first: int) -> tuple[int, int]:
        """Of the steps after ``first``: those with a gradient norm above ``norm`` (0: no clipping), and all."""
        norms = self.train.column("train/grad_norm")[self.train.column("step") > first]
        return (int((norms > norm).sum()), int(np.isfinite(norms).sum())) if norm else (0, 0)


def _mean(tables: Sequence[Table]) -> Table:
    mean = Table()
    steps = functools.reduce(np.intersect1d, [table.column("step") for table in tables])
    rows = [np.isin(table.column("step"), steps) for table in tables]
    for name in tables[0].columns:
        values = np.stack([table.column(name)[chosen] for table, chosen in zip(tables, rows, strict=True)])
        low, high = values.min(0), values.max(0)
        mean.columns[name] = array("d", values.mean(0))
        if name not in (*AXES, SKIPPED) and (low < high).any():
            mean.columns |= {name + LOW: array("d", low), name + HIGH: array("d", high)}
    return mean


def thinned(table: Table, limit: int) -> dict[str, list[Any]]:
    """The columns of a table, ready for JSON, with about ``limit`` rows at most.

    Of each stretch of steps the rows with the least and the greatest number of each column stay, so that no spike is
    lost; and the first and the last row.
    """
    columns = {name: table.column(name) for name in table.columns}
    if len(table) > limit:
        spiky = columns.keys() - WITHOUT_SPIKES
        stretches = np.array_split(np.arange(len(table)), max(1, limit // max(1, 2 * len(spiky))))
        kept = {0, len(table) - 1}
        for values in (columns[name] for name in spiky):
            for stretch in stretches:
                rows = stretch[np.isfinite(values[stretch])]
                if len(rows):
                    kept |= {rows[values[rows].argmin()].item(), rows[values[rows].argmax()].item()}
        columns = {name: values[sorted(kept)] for name, values in columns.items()}
    return {name: _plain(values, whole=name in ("step", "tokens")) for name, values in columns.items()}


def _plain(values: np.ndarray, whole: bool) -> list[Any]:
    """Numbers for JSON, with six digits unless they are whole; None for what is not finite."""
    return [
        None if not math.isfinite(value) else int(value) if whole else float(f"{value:.6g}")
        for value in values.tolist()
    ]
