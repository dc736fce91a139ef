"""The report: runs as one HTML file that loads nothing.

run directory → View: curves, samples, events, facts → templates in static/ → one file, with its data and plots inside

The same page is served live by ``watch``. Everything that comes from a run is escaped: as HTML by the templates, as
JSON in the data block; and the page's policy lets no other script run than its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pretrain.errors import UsageError
from pretrain.io import without_secrets, write_atomically
from pretrain.optim import find_optimizer
from pretrain.report.baselines import Baselines, baselines
from pretrain.report.curves import SMOOTHED, Curves, Table, Tail, thinned
from pretrain.report.facts import Size, config_differences, facts, size_of
from pretrain.runs import Run

ROWS, LEAST_ROWS, MOST_ROWS = 12_000, 600, 5_000
"""Rows of numbers in a page, shared by its runs; and the least and the most of a run."""
SAMPLES, SAMPLE_CHARACTERS = 200, 2_000
"""Samples in a page, shared by its runs, evenly taken from all; and how much of each."""
EVENTS = 200
"""The newest events of a run that are shown."""
FACT_FILES = ("config.toml", "summary.json", "environment.json", "data/manifest.json")
GROWING_FILES = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
RECENT_STEPS = 50
"""Steps that the time of one is measured over."""


class View:
    """A run directory, or what is to become one, as the page shows it; :meth:`refresh` takes in what changed there.

    Args:
        folder: the run directory.
        name: what the page calls it.
        of: how many runs share the page.

    Attributes:
        fingerprint: changes when anything that the page shows may have changed.
    """

    def __init__(self, folder: Path, name: str = "", of: int = 1):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.rows = min(MOST_ROWS, max(LEAST_ROWS, ROWS // of))
        self.most_samples = max(10, SAMPLES // of)
        self.run: Run | None = None
        self.size: Size | None = None
        self.baselines: Baselines | None = None
        self.curves = Curves(folder / "metrics.jsonl")
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.fingerprint = ""
        self._tails = ((Tail(folder / "samples.jsonl"), self.samples), (Tail(folder / "events.jsonl"), self.events))
        self._known: list[Any] = []

    def refresh(self) -> None:
        """Take in what is new. Raises CheckpointError: its config.toml is damaged."""
        known = [_stamp(self.folder / name) for name in FACT_FILES]
        # Before anything is read: what is written meanwhile makes another fingerprint.
        growing = [_stamp(self.folder / name) for name in GROWING_FILES]
        if known != self._known and Run.exists(self.folder):
            self.run = Run.open(self.folder)
            self.size = size_of(self.run)
            self.baselines = baselines(self.run)
            self._known = known
        self.curves.refresh()
        for tail, records in self._tails:
            for record in tail.new():
                if record is None:
                    records.clear()
                else:
                    records.append(record)
        self.fingerprint = hashlib.sha256(repr(known + growing).encode()).hexdigest()[:16]

    def payload(self) -> dict[str, Any]:
        """What the page's script shows, thinned."""
        config = self.run.config if self.run else None
        spiky = [name for name in self.curves.train.columns if name not in ("train/lr", SMOOTHED)]
        train = thinned(self.curves.train, self.rows, spiky)
        optimizer = find_optimizer(config.optim) if config else None
        if config and optimizer and "momentum" in optimizer.settings(0, config):
            momentum = [round(optimizer.settings(step - 1, config)["momentum"], 5) for step in train["step"]]
            train.setdefault("train/momentum", momentum)
        last = len(self.samples) - 1
        most = self.most_samples
        samples = self.samples if last < most else [self.samples[i * last // (most - 1)] for i in range(most)]
        return {
            "name": self.name,
            "train": train,
            "val": thinned(self.curves.val, self.rows),
            "samples": [
                {
                    "step": int(sample.get("step") or 0),
                    "prompt": str(sample.get("prompt", ""))[:SAMPLE_CHARACTERS],
                    "text": str(sample.get("text", ""))[:SAMPLE_CHARACTERS],
                }
                for sample in samples
            ],
            "events": [
                {
                    "step": event.get("step"),
                    "event": str(event.get("event", "")),
                    "text": without_secrets(str(event.get("text", ""))),
                }
                for event in self.events[-EVENTS:]
            ],
            "skipped": self.curves.skipped,
            "stats": self._stats(),
            "flops_per_token": self.size.flops_per_token if self.size else None,
            "clip": config.train.grad_clip if config else 0,
            "baselines": {
                "count tokens": round(self.baselines.unigram, 4),
                "count pairs": round(self.baselines.bigram, 4),
            }
            if self.baselines
            else {},
        }

    def _stats(self) -> dict[str, Any]:
        """The newest numbers."""
        train, val = self.curves.train, self.curves.val
        settings = self.run.config.train if self.run else None
        clipped, clippable = self.curves.clipped(settings.grad_clip, settings.grad_clip_from) if settings else (0, 0)
        return {
            "step": train.last("step"),
            "tokens": train.last("tokens"),
            "time": train.last("time"),
            "loss": train.last(SMOOTHED),
            "tokens_per_second": train.last("train/tokens_per_second"),
            "val_loss": val.last("val/loss"),
            "val_bpb": val.last("val/bpb"),
            "core": val.last("val/core"),
            "steps": settings.steps if settings else 0,
            "finished": bool(self.run and self.run.summary),
            "seconds_per_step": _seconds_per_step(train),
            "parameters": self.size.parameters if self.size else None,
            "skipped": sum(self.curves.skips.values()),
            "clipped": clipped,
            "clippable": clippable,
        }


def _stamp(file: Path) -> tuple[int, int] | None:
    """Tells one state of a file from another; None for one that is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _seconds_per_step(train: Table) -> float | None:
    if len(train) < 2 or "time" not in train.columns:
        return None
    steps, times = (train.columns[name][-1 - RECENT_STEPS :] for name in ("step", "time"))
    seconds = (times[-1] - times[0]) / (steps[-1] - steps[0])
    return seconds if seconds > 0 else None


# Writing ---------------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Run], file: Path) -> Path:
    """Write the page of one run, or of several overlaid, and give its file. Raises UsageError: it cannot be written."""
    views = [View(run.folder, name, len(runs)) for run, name in zip(runs, run_names(runs), strict=True)]
    for view in views:
        view.refresh()
    text = render(views).encode(errors="replace").decode()  # a path may hold any bytes
    try:
        write_atomically(file, text)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}; choose another file with --out") from None
    return file


def run_names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    folders = [run.folder.resolve() for run in runs]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def render(views: Sequence[View], token: str = "") -> str:
    """The page of what the views hold now; with ``token`` the live one, which asks its server what has changed."""
    script = f"{_static('uPlot.iife.min.js')}\n{_static('page.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One script, known by its hash; requests to a live page's server only.
    connect = "'self'" if token else "'none'"
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:;"
        f" connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    live = {"token": token, "fingerprint": views[0].fingerprint} if token else None
    runs = [
        {"name": view.name, **facts(view.run, view.curves, view.size, view.baselines)} for view in views if view.run
    ]
    several = len(runs) > 1
    return (
        _templates()
        .get_template("page.html")
        .render(
            policy=policy,
            title=" · ".join(view.name for view in views),
            subtitle=f"{len(views)} runs" if len(views) > 1 else _subtitle(views[0]),
            css=Markup(f"{_static('uPlot.min.css')}\n{_static('page.css')}"),
            script=Markup(script),
            data=Markup(json_in_html({"runs": [view.payload() for view in views], "live": live})),
            runs=runs,
            several=several,
            labels=[label for label in runs[0]["results"] if any(run["results"][label] for run in runs)]
            if several
            else [],
            vocabularies_differ=len({view.size.vocabulary for view in views if view.size}) > 1,
            differences=config_differences([view.run.config for view in views if view.run]) if several else [],
            live=live,
            version=version("pretrain"),
        )
    )


def json_in_html(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element, or begin a comment or another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(view: View) -> str:
    if view.run is None:
        return f"{view.folder} has not begun yet"
    model, count = view.run.config.model, view.size.parameters if view.size else 0
    shown = f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"
    parameters = f"{shown} parameters, " if count else ""
    return f"A GPT of {parameters}{model.layers} layers of width {model.width}, context {model.context_length} tokens"


@cache
def _static(name: str) -> str:
    return resources.files("pretrain.report").joinpath("static", name).read_text(encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_static), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
