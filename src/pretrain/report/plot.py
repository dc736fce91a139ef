"""Pictures of runs for papers and slides: losses and learning rate in one, or a file for each curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.report.curves import EVALUATED, HIGH, LOW, OF_ALL, Curves
from pretrain.runs import Run
from pretrain.runs.metrics import SMOOTHED_LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = {
    "loss.png": ("", "loss (nats per token)"),
    "bits-per-byte.png": ("val/bpb", "bits per byte of held-out text"),
    "learning-rate.png": ("train/lr", "learning rate"),
    "gradient-norm.png": ("train/grad_norm", "gradient norm before clipping"),
    "throughput.png": ("train/tokens_per_second", "tokens per second"),
    "core.png": ("val/core", "CORE"),
}
"""The number in each file (in loss.png all losses), and the label of its axis."""


def plot_run(run: Run) -> Path:
    """Draw training loss, validation loss and learning rate against steps and tokens into the run's ``loss.png``."""
    from matplotlib.figure import Figure

    curves, file = Curves(run.metrics), run.folder / "loss.png"
    figure = Figure(figsize=(8, 5))  # with places of its own: to have them found takes as long as to draw
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    figure.subplots_adjust(left=0.1, right=0.98, top=0.9, bottom=0.1, hspace=0.1)
    _draw_losses(losses, curves, "tab:blue", "tab:orange", "")
    if losses.lines:
        losses.legend()
    per_step = run.config.train.batch_tokens
    if (curves.train.column("tokens") == curves.train.column("step") * per_step).all():  # else a fork
        top = losses.secondary_xaxis("top", functions=(lambda s: s * per_step / 1e6, lambda t: t * 1e6 / per_step))
        top.set_xlabel("tokens (millions)")
    _draw(rates, curves, "train/lr", color="tab:green")
    losses.set(ylabel="loss (nats per token)")
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    return file


def plot_runs(groups: Sequence[Sequence[Run]], names: Sequence[str], folder: Path) -> list[Path]:
    """Draw runs over each other, a file in ``folder`` for each kind of curve that there is; gives the files.

    Groups of several runs are drawn as their mean in a band from the least to the greatest.
    """
    from matplotlib.figure import Figure

    several, every = len(groups) > 1, [Curves.over([Curves(run.metrics) for run in runs]) for runs in groups]
    written = []
    for file, (number, ylabel) in FILES.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for i, (curves, name) in enumerate(zip(every, names, strict=True)):
            color, label = f"C{i}", name if several else ""
            if number:
                _draw(axes, curves, number, color=color, label=label)
                _draw(axes, curves, f"{number}{OF_ALL}", color=color, linestyle="", marker="D")
            else:
                _draw_losses(axes, curves, color, color if several else "C1", label)
        if axes.lines:
            axes.set(xlabel="step", ylabel=ylabel, yscale="log" if number == "train/grad_norm" else "linear")
            axes.grid(alpha=0.3)
            if several or not number:
                axes.legend(fontsize="small")
            figure.savefig(folder / file, dpi=200)
            written.append(folder / file)
    return written


def _draw_losses(axes: Axes, curves: Curves, color: str, held_out: str, name: str) -> None:
    """Training and validation loss of a run, which the legend calls ``name`` among several."""
    before, dash = (f"{name}: ", "--") if name else ("", "-")
    _draw(axes, curves, "train/loss", color=color, label="" if name else "train, each step", alpha=0.35, linewidth=0.8)
    _draw(axes, curves, SMOOTHED_LOSS, color=color, label=f"{before}train, smoothed")
    points: dict[str, Any] = {"marker": "o", "linestyle": dash, "markersize": 4}
    if not name:
        _draw(axes, curves, EVALUATED, color="tab:red", label="train, in evaluation", **points)
    _draw(axes, curves, "val/loss", color=held_out, label=f"{before}validation", **points)
    whole = {"label": "" if name else "validation, all held-out text", "linestyle": "", "marker": "D"}
    _draw(axes, curves, f"val/loss{OF_ALL}", color=held_out, **whole)
    if lowest := curves.lowest():
        step, loss = lowest
        label = "" if name else f"lowest validation: {loss:.3f} at step {step:,.0f}"
        axes.plot(step, loss, color=held_out, label=label, linestyle="", marker="*", markersize=13)


def _draw(axes: Axes, curves: Curves, name: str, **look: Any) -> None:
    """Draw a number against the steps, if there is any."""
    table = curves.val if name in curves.val.columns else curves.train
    values = table.column(name)
    there = np.isfinite(values)
    if there.any():
        (line,) = axes.plot(table.column("step")[there], values[there], **look)
        if name + LOW in table.columns:
            step, low, high = (table.column(each)[there] for each in ("step", name + LOW, name + HIGH))
            axes.fill_between(step, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
