"""What a larger run would reach, from a ladder of small ones: Chinchilla's form, fitted to their final held-out losses.

runs → a Point each → fit: L = E + A / N^alpha + B / D^beta → Forecast, kept as forecast.json → predict

N are the parameters that a token is multiplied with (``sizing.multiplied``): embeddings, most of a small model, are
only looked up. Where N and D of all runs lie on one line, they cannot be told apart: the fit is then
L = E + A / C^alpha, over FLOPs C, and holds on that line only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pretrain.config import Config
from pretrain.errors import DataError, UsageError
from pretrain.experiments.compare import text_hash
from pretrain.experiments.groups import runs_at
from pretrain.io import table, write_atomically
from pretrain.runs import Run
from pretrain.sizing import count_parameters, flops_per_token, multiplied

FILE = "forecast.json"
DELTA = 1e-3
"""Where Huber's loss turns from square to linear, in the logarithm of L (arXiv 2203.15556, appendix D.3)."""
EXPONENTS, BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 1.0, 1.4), (0.01, 3.0)
"""The grid from which fits start, and how far an exponent may go."""
STARTS, RESAMPLES, SHARES = 2, 300, (0.025, 0.975)
"""The best points of the grid that are tried; bootstrap samples; the ends of an interval of 95 %."""
LINE, SAME = 0.3, 0.05
"""Natural logarithms of N and D up to this far from a line are on it; and are one value if so near each other."""


@dataclass(frozen=True)
class Size:
    """How large a run is; with only FLOPs it is one of the ladder's kind."""

    flops: float
    parameters: int = 0  # that a token is multiplied with
    tokens: int = 0
    epochs: float = 0.0  # passes over the training tokens; 0: not known

    def __str__(self) -> str:
        both = f", {self.parameters:,} parameters and {self.tokens:,} tokens" if self.parameters else ""
        return f"{self.flops:.3g} FLOPs{both}"

    @property
    def warning(self) -> str:
        """What makes the form doubtful; empty if nothing does."""
        seen = f"{self.epochs:.2g} epochs, and the form is of tokens seen once: repeated ones teach less"
        return seen if self.epochs > 1.05 else ""


@dataclass(frozen=True)
class Point:
    """A run of the ladder and its final held-out loss in nats per token."""

    run: str
    size: Size
    loss: float


@dataclass(frozen=True)
class Prediction:
    """The held-out loss, in nats per token, that one run of a size would reach."""

    size: Size
    loss: float
    low: float  # the ends of the 95 % interval
    high: float
    bits_per_byte: float | None
    beyond: float  # its FLOPs as a multiple of those of the largest run of the ladder

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        doubt = f"; {self.size.warning}" if self.size.warning else ""
        far = f"at {self.beyond:.2g} times the FLOPs of the ladder's largest run"
        return f"loss {self.loss:.4f} (95 %: {self.low:.4f} to {self.high:.4f}){bits}, {far}{doubt}"

    def beside(self, measured: float | None) -> str:
        """A sentence, with what was measured, if it was."""
        found = "" if measured is None else f" Measured {measured:.4f}: it is {error(self.loss, measured)} off."
        return f"Forecast: {self}.{found}"


@dataclass(frozen=True)
class Forecast:
    """The fit to a ladder."""

    points: list[Point]
    coefficients: list[float]  # E, A, alpha, B, beta; or over FLOPs E, A, alpha
    resampled: list[list[float]]  # the same of each bootstrap sample, and the error that one run adds, of its logarithm
    largest_left_out: tuple[float, float] | None  # predicted from the others, and measured; None: they are too few
    measured_by: dict[str, Any]  # what has to be the same for losses to compare
    bits_per_nat: float | None  # bits per byte for each nat per token; None: not known
    notes: list[str]

    @property
    def separable(self) -> bool:
        """Whether parameters and tokens are told apart."""
        return len(self.coefficients) == 5

    @property
    def largest(self) -> Size:
        """The size with the most FLOPs."""
        return max((point.size for point in self.points), key=lambda size: size.flops)

    @property
    def formula(self) -> str:
        """The fit as text."""
        e, *rest = self.coefficients
        terms = zip(rest[::2], "ND" if self.separable else "C", rest[1::2], strict=True)
        return f"L = {e:.4g}" + "".join(f" + {a:.4g} / {name}^{power:.3f}" for a, name, power in terms)

    def loss(self, size: Size) -> float:
        """The loss of a size by the formula."""
        return float(losses(self.coefficients, logarithms([size], self.separable))[0])

    def predict(self, size: Size) -> Prediction:
        """What one run of a size would reach. Raises UsageError where the ladder says nothing of such sizes."""
        if not self.separable and size.tokens and off_line([point.size for point in self.points], size) > LINE:
            raise UsageError(
                f"the ladder's runs do not tell parameters from tokens, and {size.tokens / size.parameters:.2g} tokens"
                " per parameter are not as in them: add runs that vary both"
            )
        x = logarithms([size], self.separable)
        drawn = [float(losses(draw[:-1], x)[0]) * math.exp(draw[-1]) for draw in self.resampled]
        low, high = np.quantile(drawn, SHARES).tolist()
        loss = self.loss(size)
        bits = self.bits_per_nat and loss * self.bits_per_nat
        return Prediction(size, loss, low, high, bits, size.flops / self.largest.flops)

    def of_run(self, run: Run) -> Prediction:
        """What a run should reach, or should have reached. Raises UsageError where the ladder does not say it."""
        self.check(measured_by(run), str(run.folder))
        if run.folder.resolve() in {Path(point.run).resolve() for point in self.points}:
            raise UsageError(f"{run.folder} is of the ladder that the forecast was fitted to; give a run that is not")
        return self.predict(size_of(run))

    def size(self, parameters: float, tokens: float) -> Size:
        """That of a model in training, with as many FLOPs for each parameter and token as the largest run: about 6."""
        flops = self.largest.flops / (self.largest.parameters * self.largest.tokens) * parameters * tokens
        return Size(flops, max(1, round(parameters)), max(1, round(tokens)))

    def best(self, flops: float) -> tuple[Size, float, float]:
        """The size that reaches the lowest loss with so many FLOPs, and the 95 % interval of its parameters."""
        if not 1e6 <= flops <= 1e40:
            raise UsageError(f"a forecast is for 1e6 to 1e40 FLOPs, not for {flops:.3g}")
        both, found = flops / self.size(1, 1).flops, []
        for _, a, alpha, b, beta, *_ in (self.coefficients, *self.resampled):  # equation 4 of arXiv 2203.15556
            found.append((alpha * a / (beta * b) * both**beta) ** (1 / (alpha + beta)))
        low, high = np.quantile(found[1:], SHARES).tolist()
        return self.size(found[0], both / found[0]), low, high

    def check(self, way: dict[str, Any], name: str) -> None:
        """A UsageError unless the losses of ``name``, which is or will be measured in this way, compare."""
        check_alike(self.measured_by, way, name)

    def __str__(self) -> str:
        rows = [["run", "parameters", "tokens", "FLOPs", "measured", "fitted", "error"]]
        for point in sorted(self.points, key=lambda point: point.size.flops):
            size, fitted = point.size, self.loss(point.size)
            sizes = [f"{size.parameters:,}", f"{size.tokens:,}", f"{size.flops:.3g}"]
            rows.append([Path(point.run).name, *sizes, f"{point.loss:.4f}", f"{fitted:.4f}", error(fitted, point.loss)])
        lines = [table(rows), "", self.formula]
        if self.largest_left_out:
            predicted, measured = self.largest_left_out
            said = f"{predicted:.4f}, measured {measured:.4f}: {error(predicted, measured)}"
            lines.append(f"The largest size, predicted from the others: {said}")
        return "\n".join([*lines, *self.notes])

    def save(self, folder: Path) -> Path:
        """Write ``forecast.json`` and give its path."""
        write_atomically(folder / FILE, msgspec.json.encode(self).decode() + "\n")
        return folder / FILE

    @staticmethod
    def load(folder: str) -> Forecast:
        """That of a ladder. Raises UsageError if there is none."""
        try:
            return msgspec.json.decode(Path(folder, FILE).read_bytes(), type=Forecast)
        except (OSError, msgspec.MsgspecError) as problem:
            fix = f"'pretrain forecast {folder}' makes it"
            raise UsageError(f"{folder} has no {FILE} that can be read ({problem}); {fix}") from None


def error(predicted: float, measured: float) -> str:
    """How far a prediction is off."""
    return f"{predicted / measured - 1:+.2%}"


# A ladder ---------------------------------------------------------------------------------------------------------


def size_of(run: Run) -> Size:
    """The size of a run; before its end what it will be."""
    config, vocab_size, text = run.config, run.tokenizer().vocab_size, 0
    tokens = (run.summary or {}).get("tokens") or config.train.steps * config.train.batch_tokens
    with suppress(DataError):  # its tokens may be gone
        text = 0 if config.data.stream else run.corpus().tokens("train")
    parameters = multiplied(config.model, count_parameters(config.model, vocab_size))
    flops = float(flops_per_token(config.model, vocab_size) * tokens)
    return Size(flops, parameters, tokens, tokens / text if text else 0.0)


def measured_by(run: Run) -> dict[str, Any]:
    """What has to be the same for losses to compare. Raises DataError if the held-out tokens are gone."""
    tokenizer = run.tokenizer()
    known = measured_with(run.config, tokenizer.vocab_size)
    return {**known, "tokenizer": tokenizer.fingerprint, "held-out text": text_hash(run)}


def measured_with(config: Config, vocab_size: int) -> dict[str, Any]:
    """What of that is known of a run that is still to be made."""
    length = config.model.context_length
    return {"vocabulary": vocab_size, "context length": length, "eval.stride": config.eval.stride or length}


def check_alike(ladder: dict[str, Any], way: dict[str, Any], name: str) -> None:
    """A UsageError unless the losses of ``name``, measured in this ``way``, compare with those of the ladder."""
    if differing := [what for what, value in way.items() if ladder[what] != value]:
        raise UsageError(f"{name} has another {differing[0]} than the ladder, so their losses do not compare")


def forecast(places: Sequence[str], without: str = "") -> Forecast:
    """Fit the finished runs at ``places``, run directories and folders of them; ``without`` the run to be predicted.

    Raises:
        UsageError: they are too few or too alike, their losses do not compare, or scipy is missing.
        PretrainError: a run cannot be read.
    """
    runs = {run.folder.resolve(): run for place in places for run in runs_at(place)}
    runs.pop(Path(without).resolve(), None)
    found, notes, way, bits = list[Point](), list[str](), dict[str, Any](), None
    for run in runs.values():
        end = run.summary or {}
        if not math.isfinite(end.get("val_loss") or math.nan):
            notes.append(f"Left out: {run.folder} {'has no held-out loss' if end else 'is not finished'}.")
            continue
        found.append(Point(str(run.folder), size_of(run), end["val_loss"]))
        notes += [f"{run.folder}: {found[-1].size.warning}."] if found[-1].size.warning else []
        bits = bits or (end["val_bpb"] and end["val_bpb"] / end["val_loss"])
        this = measured_by(run)
        way = way or this
        check_alike(way, this, str(run.folder))
    sizes, measured = [point.size for point in found], np.array([point.loss for point in found])
    separable = tells_apart(sizes)
    x = logarithms(sizes, separable)
    best = fit(x, measured)
    if not separable:
        notes.append("Parameters and tokens vary together: the fit is over FLOPs C, and holds for such runs only.")
    if np.isin(best[2::2].round(6), BOUNDS).any():
        notes.append("An exponent is at the end of what was tried: these runs do not determine it.")

    left_out, top = None, (x == x[np.argmax([size.flops for size in sizes])]).all(axis=1)
    with suppress(UsageError):
        if tells_apart([size for size, largest in zip(sizes, top, strict=True) if not largest]) == separable:
            left_out = float(losses(fit(x[~top], measured[~top]), x[top])[0]), float(measured[top].mean())
    draw, errors = np.random.default_rng(0), np.log(measured / losses(best, x))
    errors *= math.sqrt(len(x) / (len(x) - len(best)))  # of runs that were not fitted they are larger
    resampled = list[list[float]]()
    while len(resampled) < RESAMPLES:
        chosen = draw.integers(len(x), size=len(x))
        if len(np.unique(x[chosen], axis=0)) >= len(best):  # fewer sizes do not determine it
            resampled.append([*fit(x[chosen], measured[chosen]).tolist(), float(draw.choice(errors))])
    return Forecast(found, best.tolist(), resampled, left_out, way, bits, notes)


def tells_apart(sizes: Sequence[Size]) -> bool:
    """Whether runs of these sizes tell parameters from tokens. Raises UsageError if they are too few for any fit."""
    separable = len(sizes) > 2 and any(off_line(sizes, size) > LINE for size in sizes)
    form = "L = E + A / N^alpha + B / D^beta" if separable else "L = E + A / C^alpha"
    different, needed = len({(size.parameters, size.tokens) for size in sizes}), 6 if separable else 4
    ordered = np.sort(logarithms(sizes, separable), axis=0)
    values = (1 + (ordered[1:] - ordered[:-1] > SAME).sum(axis=0)).tolist()
    if different < needed or min(values) < 3:
        what = "parameters and of tokens" if separable else "FLOPs"
        had = " and ".join(map(str, values))
        raise UsageError(
            f"{form} needs finished runs of {needed} sizes, with three different numbers of {what}: the ladder has"
            f" {different} sizes, and {had}"
        )
    return separable


def off_line(sizes: Sequence[Size], size: Size) -> float:
    """How far a size is from the line nearest to others, in logarithms of parameters and tokens."""
    x, (point,) = logarithms(sizes, True), logarithms([size], True)
    across = np.linalg.svd(x - x.mean(axis=0))[2][1]
    return abs(float(across @ (point - x.mean(axis=0))))


def draw(forecast: Forecast, target: Prediction | None, file: Path) -> None:
    """Draw the runs, the fit and a prediction: losses against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, most = figure.subplots(), forecast.largest.flops * max(1, target.beyond if target else 1)
    groups: dict[int, list[Point]] = {}
    for point in sorted(forecast.points, key=lambda point: point.size.flops):
        groups.setdefault(point.size.parameters if forecast.separable else 0, []).append(point)
    for number, (parameters, points) in enumerate(sorted(groups.items())):
        first, color = points[0].size, f"C{number}"
        label = f"{parameters:,} parameters" if parameters else "measured"
        axes.plot([p.size.flops for p in points], [p.loss for p in points], "o", color=color, label=label)
        times = np.geomspace(1, most / first.flops)
        curve = [forecast.loss(Size(first.flops * t, first.parameters, int(first.tokens * t))) for t in times]
        axes.plot(first.flops * times, curve, color=color, linewidth=1)
    if target:
        axes.plot(target.size.flops, target.loss, "k*", markersize=12, label="forecast, with 95 % interval")
        axes.vlines(target.size.flops, target.low, target.high, color="k")
    axes.set(xscale="log", xlabel="FLOPs", ylabel="held-out loss (nats per token)", title=forecast.formula)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


# The fit ----------------------------------------------------------------------------------------------------------


def logarithms(sizes: Sequence[Size], separable: bool) -> np.ndarray:
    """Of parameters and tokens (n, 2), or of FLOPs (n, 1)."""
    values = [[size.parameters, size.tokens] if separable else [size.flops] for size in sizes]
    return np.log(np.array(values, dtype=float).reshape(len(sizes), 1 + separable))


def losses(coefficients: Sequence[float] | np.ndarray, x: np.ndarray) -> np.ndarray:
    """Losses (n) at logarithms (n, k), by E and for each of k an A and an exponent."""
    c = np.asarray(coefficients)
    return c[0] + (c[1::2] * np.exp(-c[2::2] * x)).sum(axis=1)


def fit(x: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """E, and for each column of the logarithms ``x`` (n, k) an A and an exponent, fitted to losses (n).

    Huber's loss of log L, by L-BFGS from a grid of starts, as arXiv 2203.15556 (appendix D.3) and 2404.10102 do; at
    each exponent of the grid E, A and B are already those of least squares.
    """
    try:
        from scipy.optimize import minimize, nnls
    except ImportError:
        raise UsageError("pretrain forecast needs scipy: pip install 'pretrain[forecast]'") from None
    middle, k = x.mean(axis=0), x.shape[1]
    z, starts = x - middle, []
    for powers in product(EXPONENTS, repeat=k):
        terms = np.hstack([np.ones((len(z), 1)), np.exp(-np.array(powers) * z)])
        scales, rest = nnls(terms / measured[:, None], np.ones(len(z)))
        starts.append((rest, [*np.log(np.maximum(scales, 1e-3)), *powers]))

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        parts = np.hstack([np.full((len(z), 1), p[0]), p[1 : 1 + k] - p[1 + k :] * z])
        total = np.logaddexp.reduce(parts, axis=1)
        off = (total - np.log(measured)) / DELTA
        slopes = np.clip(off, -1, 1)[:, None] * np.exp(parts - total[:, None]) / DELTA
        value = np.where(np.abs(off) <= 1, off**2 / 2, np.abs(off) - 0.5).sum()
        return value, np.concatenate([slopes.sum(axis=0), -(slopes[:, 1:] * z).sum(axis=0)])

    bounds, options = [(-7, 7)] * (1 + k) + [BOUNDS] * k, {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-6}
    tried = [start for _, start in sorted(starts)[:STARTS]]
    ends = [minimize(objective, p, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for p in tried]
    p = min(ends, key=lambda end: end.fun).x
    scales = np.exp(p[1 : 1 + k] + p[1 + k :] * middle)
    return np.array([math.exp(p[0]), *np.column_stack([scales, p[1 + k :]]).ravel()])
