"""The picture of a run: losses and learning rate over the steps."""

from __future__ import annotations

from pathlib import Path

from pretrain.training import Run
from pretrain.training.metrics import read_jsonl


def plot_run(run: Run) -> Path:
    """Draw training loss, validation loss and learning rate against steps and tokens into ``loss.png``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_jsonl(run.metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    train = [(r["step"], r["train/loss"]) for r in records if r["train/loss"] is not None]
    val = [(r["step"], r["val/loss"]) for r in records if r.get("val/loss") is not None]
    losses.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8, label="train, each step")
    losses.plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="train, smoothed")
    if val:
        losses.plot(*zip(*val, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    losses.grid(alpha=0.3)
    per_step = run.config.train.batch_tokens
    top = losses.secondary_xaxis("top", functions=(lambda s: s * per_step / 1e6, lambda t: t * 1e6 / per_step))
    top.set_xlabel("tokens (millions)")
    rates.plot([r["step"] for r in records], [r["train/lr"] for r in records], color="tab:green")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    file = run.folder / "loss.png"
    figure.savefig(file, dpi=120)
    return file


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential average that forgets over about 2 % of the run, corrected for its start."""
    keep = 1 - 1 / max(2, len(points) // 50)
    average, weight, smoothed = 0.0, 0.0, []
    for step, loss in points:
        average, weight = keep * average + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append((step, average / weight))
    return smoothed
