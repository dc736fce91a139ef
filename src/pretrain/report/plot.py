"""Pictures of runs for papers and slides: losses and learning rate in one, or a file for each curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.report.curves import SMOOTHED, Curves
from pretrain.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = {
    "bits-per-byte.png": ("val/bpb", "bits per byte of held-out text"),
    "learning-rate.png": ("train/lr", "learning rate"),
    "gradient-norm.png": ("train/grad_norm", "gradient norm before clipping"),
    "throughput.png": ("train/tokens_per_second", "tokens per second"),
    "core.png": ("val/core", "CORE"),
}
"""Beside loss.png: the number in each file, and the label of its axis."""


def plot_run(run: Run) -> Path:
    """Draw training loss, validation loss and learning rate against steps and tokens into the run's ``loss.png``."""
    curves = Curves(run.metrics)
    curves.refresh()
    figure = _figure(8, 5)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_losses(losses, curves, "tab:blue", "tab:orange", "")
    losses.legend()
    per_step = run.config.train.batch_tokens
    top = losses.secondary_xaxis("top", functions=(lambda s: s * per_step / 1e6, lambda t: t * 1e6 / per_step))
    top.set_xlabel("tokens (millions)")
    _draw(rates, curves, "train/lr", "tab:green", "")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    file = run.folder / "loss.png"
    figure.savefig(file, dpi=120)
    return file


def plot_runs(runs: Sequence[Run], names: Sequence[str], folder: Path) -> list[Path]:
    """Draw runs over each other, a file in ``folder`` for each kind of curve that there is; gives the files."""
    every = [Curves(run.metrics) for run in runs]
    for curves in every:
        curves.refresh()
    files = []
    for file in ("loss.png", *DRAWN):
        figure = _figure(6, 4)
        axes = figure.subplots()
        drawn = False
        for number, (curves, name) in enumerate(zip(every, names, strict=True)):
            label = name if len(runs) > 1 else ""
            if file == "loss.png":
                held_out = f"C{number}" if len(runs) > 1 else "C1"
                drawn |= _draw_losses(axes, curves, f"C{number}", held_out, label)
            else:
                drawn |= _draw(axes, curves, DRAWN[file][0], f"C{number}", label)
        if not drawn:
            continue
        axes.set_xlabel("step")
        if file != "loss.png":
            axes.set_ylabel(DRAWN[file][1])
        if file == "gradient-norm.png":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        figure.savefig(folder / file, dpi=200)
        files.append(folder / file)
    return files


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_losses(axes: Axes, curves: Curves, color: str, held_out: str, name: str) -> bool:
    before = f"{name}: " if name else ""
    _draw(axes, curves, "train/loss", color, "" if name else "train, each step", alpha=0.35, linewidth=0.8)
    drawn = _draw(axes, curves, SMOOTHED, color, f"{before}train, smoothed")
    dash = "o--" if name else "o-"
    drawn |= _draw(axes, curves, "val/loss", held_out, f"{before}validation", dash, markersize=4)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    return drawn


def _draw(axes: Axes, curves: Curves, name: str, color: str, label: str, form: str = "-", **look: Any) -> bool:
    """Draw a number against the steps; gives whether there is any."""
    table = curves.val if name in curves.val.columns else curves.train
    if name not in table.columns:
        return False
    values = table.column(name)
    there = np.isfinite(values)
    axes.plot(table.column("step")[there], values[there], form, color=color, label=label, **look)
    return bool(there.any())
