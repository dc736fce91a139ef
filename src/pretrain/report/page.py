"""The report: runs as one HTML file that loads nothing.

run directory → View: curves, facts → templates in static/ → one file, with its data and plots inside

The same page is served live by ``watch``. Everything that comes from a run is escaped: as HTML by the templates, as
JSON in the data block; and the page's policy lets no other script run than its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from pretrain.errors import PretrainError, UsageError
from pretrain.experiments.groups import Group, differences
from pretrain.io import read_jsonl, without_secrets, write_atomically
from pretrain.optim import find_optimizer
from pretrain.report.curves import LOWEST, SKIPPED, Curves, thinned
from pretrain.report.facts import facts, progress
from pretrain.report.family import family
from pretrain.runs import Run

if TYPE_CHECKING:
    from pretrain.experiments.forecast import Forecast

ROWS, LEAST_ROWS, MOST_ROWS = 12_000, 600, 5_000
"""Rows of numbers in a page, shared by its runs; and the least and the most of a run."""
SAMPLES, SAMPLE_CHARACTERS = 200, 2_000
"""Samples in a page, shared by its runs, of steps evenly taken from all; and how much of each."""
EVENTS, MARKS = 200, 1000
"""The newest events and skipped steps of a run that are shown."""
FIXED = ("config.toml", "tokenizer.json", "data/manifest.json", "environment.json", "summary.json")
GROWING = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
"""The files that the page is made of."""


def fingerprint(folder: Path, names: Sequence[str] = (*FIXED, *GROWING)) -> str:
    """Changes when anything that the page shows of a run directory may have changed."""
    stamps = []
    for name in names:
        with suppress(OSError):
            status = (folder / name).stat()
            stamps.append((name, status.st_mtime_ns, status.st_size))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


class View:
    """A run directory, or what is to become one, as the page shows it; :meth:`refresh` takes in what changed there.

    Args:
        folder: the run directory.
        name: what the page calls it.
        of: how many runs share the page.
        patient: whether to wait some seconds for baselines that take them.
    """

    def __init__(self, folder: Path, name: str = "", of: int = 1, patient: bool = False):
        self.folder, self.name, self.of, self.patient = folder, name or folder.resolve().name, of, patient
        self.run: Run | None = None
        self.facts: dict[str, Any] = {}
        self.curves = Curves(folder / "metrics.jsonl")
        self.fingerprint = self._fixed = ""

    def refresh(self) -> None:
        """Take in what is new. Raises CheckpointError: its config.toml is damaged."""
        # Before anything is read: what is written meanwhile makes another fingerprint.
        self.fingerprint, fixed = fingerprint(self.folder), fingerprint(self.folder, FIXED)
        self.curves.refresh()
        if fixed != self._fixed and Run.exists(self.folder):
            self.run = Run.open(self.folder)
            self.facts = {"name": self.name, **facts(self.run, self.patient)}
            self._fixed = fixed
        if self.run:
            self.facts |= progress(self.run, self.curves, self.facts)

    def payload(self) -> dict[str, Any]:
        """What the page's script shows, thinned."""
        samples = read_jsonl(self.folder / "samples.jsonl")
        steps = list(dict.fromkeys(sample["step"] for sample in samples))
        prompts = -(-len(samples) // max(1, len(steps)))
        shown = set(evenly(steps, max(10, SAMPLES // self.of // max(1, prompts))))
        return self.plotted(self.curves) | {
            "samples": [
                sample | {name: sample[name][:SAMPLE_CHARACTERS] for name in ("prompt", "text")}
                for sample in samples
                if sample["step"] in shown
            ],
            "events": without_secrets(read_jsonl(self.folder / "events.jsonl")[-EVENTS:]),
        }

    def plotted(self, curves: Curves) -> dict[str, Any]:
        """What its plots show: of its own curves, or of those of runs of the same settings together."""
        rows = min(MOST_ROWS, max(LEAST_ROWS, ROWS // self.of))
        train = thinned(curves.train, rows)
        train.pop(SKIPPED, None)
        if config := self.run.config if self.run else None:
            settings = find_optimizer(config.optim).settings
            if "momentum" in settings(0, config):
                train["train/momentum"] = [round(settings(step - 1, config)["momentum"], 5) for step in train["step"]]
        val = thinned(curves.val, rows)
        if lowest := curves.lowest():
            val[LOWEST] = [lowest[1] if step == lowest[0] else None for step in val["step"]]
        counted = self.facts.get("baselines")
        return {
            "name": self.name,
            "train": train,
            "val": val,
            "skipped": curves.skipped()[-MARKS:],
            "flops_per_token": self.facts.get("flops_per_token"),
            "clip": config.train.grad_clip if config else 0,
            "baselines": {"count tokens": counted.unigram, "count pairs": counted.bigram} if counted else {},
        }


def evenly(records: list[Any], most: int) -> list[Any]:
    """At most ``most`` of the records (two at least), with the first and the last."""
    last = len(records) - 1
    return records if last < most else [records[i * last // (most - 1)] for i in range(most)]


def write_report(
    runs: Sequence[Run],
    file: Path,
    patient: bool = False,
    forecast: Forecast | None = None,
    groups: Sequence[Group] = (),
) -> Path:
    """Write the page of one run, or of several overlaid, and give its file. Raises UsageError: it cannot be written.

    ``patient``: as in :class:`View`. With a forecast the page has what was predicted, too. ``groups`` of the runs, if
    any is of several seeds, have a curve each, in a band, and what can be said of them.
    """
    views = [View(run.folder, name, len(runs), patient) for run, name in zip(runs, run_names(runs), strict=True)]
    for view in views:
        view.refresh()
        if forecast and view.run:
            predicted = forecast.of_run(view.run)
            view.facts["results"]["predicted loss"] = f"{predicted.loss:.4f}"
            view.facts["remarks"].append(predicted.beside((view.run.summary or {}).get("val_loss")))
    try:
        write_atomically(file, render(views, groups=groups if any(len(group.runs) > 1 for group in groups) else ()))
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}; choose another file with --out") from None
    return file


def run_names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    folders = [run.folder.resolve() for run in runs]
    names, parts = [folder.name for folder in folders], 1
    while len(set(names)) < len(set(folders)):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    return names


def render(views: Sequence[View], live: bool = False, groups: Sequence[Group] = ()) -> str:
    """The page of what the views hold now; if ``live`` one that asks its server what has changed."""
    script = f"{_static('uPlot.iife.min.js')}\n{_static('page.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = [view.facts for view in views if view.run]
    data = {"runs": [view.payload() for view in views], "live": live and {"fingerprint": views[0].fingerprint}}
    said, table = [], []
    if groups:
        from pretrain.experiments.compare import compare  # not above: the report of a training needs none

        by_folder = {view.folder: view for view in views}
        members = [[by_folder[run.folder] for run in group.runs] for group in groups]
        plotted = [several[0].plotted(Curves.over([view.curves for view in several])) for several in members]
        data["groups"] = [curves | {"name": group.name} for curves, group in zip(plotted, groups, strict=True)]
        for run in data["runs"]:
            run["train"] = {}  # only the groups' are shown
        try:
            comparison = compare(groups, measure=False)
            table, said = comparison.rows(), [*(each.words for each in comparison.verdicts), *comparison.notes]
        except PretrainError as error:
            said = [f"{error}."]
    page = TEMPLATES.get_template("page.html").render(
        digest=digest,
        css=Markup(f"{_static('uPlot.min.css')}\n{_static('page.css')}"),
        script=Markup(script),
        data=data,
        groups=table,
        said=said,
        views=views,
        runs=runs,
        labels=[label for label in runs[0]["results"] if any(run["results"][label] for run in runs)] if runs else [],
        differences=differences([view.run.config for view in views if view.run]),
        family=family([view.run for view in views if view.run]),
        live=live,
        version=version("pretrain"),
    )
    return page.encode(errors="replace").decode()  # a path may hold any bytes


def _static(name: str) -> str:
    return resources.files("pretrain.report").joinpath("static", name).read_text(encoding="utf-8")


TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(_static), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)
TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
