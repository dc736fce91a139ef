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
from pretrain.report.facts import (
    Size,
    commands,
    config_differences,
    config_rows,
    data_rows,
    environment_rows,
    loss_rows,
    recipe_of,
    remarks,
    results,
    size_of,
)
from pretrain.runs import Run

ROWS, LEAST_ROWS, MOST_ROWS = 12_000, 600, 5_000
"""Rows of numbers in a page, shared by its runs; and the least and the most of a run."""
SAMPLES, SAMPLE_CHARACTERS = 200, 2_000
"""Samples in a page, shared by its runs, evenly taken from all; and how much of each."""
EVENTS = 200
"""The newest events of a run that are shown."""
FACT_FILES = ("config.toml", "summary.json", "environment.json", "data/manifest.json")
RECENT_STEPS = 50
"""Steps that the time of one is measured over."""


class View:
    """A run directory as the page shows it; what changes there is taken in by :meth:`refresh`.

    Args:
        folder: a run directory, or what is to become one.
        name: what the page calls it.
        of: how many runs share the page.
    """

    def __init__(self, folder: Path, name: str = "", of: int = 1):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.rows = min(MOST_ROWS, max(LEAST_ROWS, ROWS // of))
        self._most_samples = max(10, SAMPLES // of)
        self.run: Run | None = None
        self.size: Size | None = None
        self.baselines: Baselines | None = None
        self.curves = Curves(folder / "metrics.jsonl")
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._samples, self._events = Tail(folder / "samples.jsonl"), Tail(folder / "events.jsonl")
        self.known: tuple[Any, ...] = ()  # the state of the files that the facts come from

    def refresh(self) -> None:
        """Take in what is new in the run directory.

        Raises:
            CheckpointError: its config.toml is damaged.
        """
        known = tuple(_stamp(self.folder / name) for name in FACT_FILES)
        if known != self.known and Run.exists(self.folder):
            self.run = Run.open(self.folder)
            self.size = size_of(self.run)
            self.baselines = baselines(self.run)
            train = self.run.config.train
            self.curves.clip_at(train.grad_clip, train.grad_clip_from)
            self.known = known
        self.curves.refresh()
        for tail, records in ((self._samples, self.samples), (self._events, self.events)):
            for record in tail.new():
                if record is None:
                    records.clear()
                else:
                    records.append(record)

    def payload(self) -> dict[str, Any]:
        """All that the page's script needs, thinned."""
        return {
            "name": self.name,
            "generation": self.curves.generation,
            "train": self._train(0),
            "val": thinned(self.curves.val, self.rows),
            "samples": self.shown_samples(),
            "events": self.shown_events(),
            "skipped": self.curves.skipped,
            "stats": self.stats(),
            **self.constants(),
        }

    def _train(self, first: int) -> dict[str, list[Any]]:
        spiky = [name for name in self.curves.train.columns if name not in ("train/lr", SMOOTHED)]
        columns = thinned(self.curves.train, self.rows, spiky, first)
        config = self.run.config if self.run else None
        optimizer = find_optimizer(config.optim) if config else None
        if config and optimizer and "momentum" in optimizer.settings(0, config):
            columns.setdefault(
                "train/momentum",
                [round(optimizer.settings(step - 1, config)["momentum"], 5) for step in columns["step"]],
            )
        return columns

    def news(self, after: int, generation: int) -> dict[str, Any]:
        """The numbers of the steps after ``after``, for a page that has those before; or all of them anew."""
        if generation != self.curves.generation:
            reset = {"train": self._train(0), "val": thinned(self.curves.val, self.rows)}
            return {"reset": True, "generation": self.curves.generation, **reset}
        train = self._train(self.curves.train.rows_to(after))
        val = thinned(self.curves.val, self.rows, first=self.curves.val.rows_to(after))
        return {"reset": False, "generation": generation, "train": train, "val": val}

    def constants(self) -> dict[str, Any]:
        """What hardly ever changes in a run."""
        found = self.baselines
        return {
            "flops_per_token": self.size.flops_per_token if self.size else None,
            "clip": self.run.config.train.grad_clip if self.run else 0,
            "baselines": {"count tokens": round(found.unigram, 4), "count pairs": round(found.bigram, 4)}
            if found
            else {},
        }

    def stats(self) -> dict[str, Any]:
        """The newest numbers."""
        train, val, curves = self.curves.train, self.curves.val, self.curves
        names = {
            "step": (train, "step"),
            "tokens": (train, "tokens"),
            "time": (train, "time"),
            "loss": (train, SMOOTHED),
            "tokens_per_second": (train, "train/tokens_per_second"),
            "val_loss": (val, "val/loss"),
            "val_bpb": (val, "val/bpb"),
            "core": (val, "val/core"),
        }
        return {key: table.last(name) for key, (table, name) in names.items()} | {
            "steps": self.run.config.train.steps if self.run else 0,
            "finished": bool(self.run and self.run.summary),
            "seconds_per_step": _seconds_per_step(train),
            "parameters": self.size.parameters if self.size else None,
            "skipped": sum(curves.skips.values()),
            "clipped": curves.clipped,
            "clippable": curves.clippable,
        }

    def shown_samples(self) -> list[dict[str, Any]]:
        """Samples evenly from all steps, the first and the last among them, cut where they are long."""
        last = len(self.samples) - 1
        most = self._most_samples
        kept = self.samples if last < most else [self.samples[i * last // (most - 1)] for i in range(most)]
        return [
            {
                "step": int(sample.get("step") or 0),
                "prompt": str(sample.get("prompt", ""))[:SAMPLE_CHARACTERS],
                "text": str(sample.get("text", ""))[:SAMPLE_CHARACTERS],
            }
            for sample in kept
        ]

    def shown_events(self) -> list[dict[str, Any]]:
        """The newest events."""
        return [
            {
                "step": event.get("step"),
                "event": str(event.get("event", "")),
                "text": without_secrets(str(event.get("text", ""))),
            }
            for event in self.events[-EVENTS:]
        ]

    def facts(self) -> dict[str, Any]:
        """What the templates show of it, once it is a run."""
        assert self.run is not None, "there is nothing to tell of a run that has not begun"
        run, curves = self.run, self.curves
        recipe, config, known = recipe_of(run, self.size.vocabulary if self.size else 0)
        rows = config_rows(run, config)
        return {
            "name": self.name,
            "results": results(run, curves, self.size),
            "remarks": remarks(run, curves, self.baselines),
            "losses": loss_rows(run, curves, self.baselines),
            "data": data_rows(run),
            "recipe": recipe,
            "recipe_known": known,
            "config": rows,
            "changed": [row for row in rows if row.recipe is not None],
            "environment": environment_rows(run),
            "commands": commands(run),
        }


def _stamp(file: Path) -> tuple[int, int]:
    """Tells one state of a file from another; the same for one that is not there."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _seconds_per_step(train: Table) -> float | None:
    if len(train) < 2 or "time" not in train.columns:
        return None
    steps, times = train.columns["step"], train.columns["time"]
    first = max(0, len(train) - 1 - RECENT_STEPS)
    seconds = (times[-1] - times[first]) / (steps[-1] - steps[first])
    return seconds if seconds > 0 else None


# Writing ---------------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Run], file: Path) -> Path:
    """Write the page of one run, or of several overlaid, and give its file.

    Raises:
        UsageError: the file cannot be written.
    """
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
    """The page of what the views hold now; with ``token`` the live one, which may ask its server for more."""
    script = f"{_static('uPlot.iife.min.js')}\n{_static('page.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"runs": [view.payload() for view in views], "live": {"token": token} if token else None}
    begun = [view for view in views if view.run]
    return (
        _templates()
        .get_template("page.html")
        .render(
            policy=policy(digest, live=bool(token)),
            title=" · ".join(view.name for view in views),
            subtitle=_subtitle(views),
            css=Markup(f"{_static('uPlot.min.css')}\n{_static('page.css')}"),
            script=Markup(script),
            data=Markup(json_in_html(data)),
            facts=Markup(render_facts(begun)),
            live=bool(token),
            version=version("pretrain"),
        )
    )


def render_facts(views: Sequence[View]) -> str:
    """The part of the page that stands still: tables of results, data, configuration, environment, commands."""
    if not views:
        return ""
    runs = [view.facts() for view in views]
    labels = runs[0]["results"]
    return (
        _templates()
        .get_template("facts.html")
        .render(
            runs=runs,
            several=len(runs) > 1,
            results_given={label: any(run["results"][label] for run in runs) for label in labels},
            vocabularies_differ=len({view.size.vocabulary for view in views if view.size}) > 1,
            differences=config_differences([view.run for view in views if view.run]) if len(runs) > 1 else [],
        )
    )


def policy(script_digest: str, live: bool) -> str:
    """The Content-Security-Policy: one script, known by its hash; requests to a live page's server only."""
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{script_digest}'; style-src 'unsafe-inline'; img-src data:;"
        f" connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def json_in_html(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element, or begin a comment or another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(views: Sequence[View]) -> str:
    view = views[0]
    if len(views) > 1:
        return f"{len(views)} runs"
    if view.run is None:
        return f"{view.folder} has not begun yet"
    model = view.run.config.model
    count = view.size.parameters if view.size else 0
    parameters = (
        f"{count / 1e6:.1f} million parameters, " if count >= 1e6 else f"{count:,} parameters, " if count else ""
    )
    return f"A GPT of {parameters}{model.layers} layers of width {model.width}, context {model.context_length} tokens"


@cache
def _static(name: str) -> str:
    return resources.files("pretrain.report").joinpath("static", name).read_text(encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_static), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
