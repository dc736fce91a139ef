"""``pretrain report`` and ``pretrain watch``: runs in the browser."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from msgspec import Meta

from pretrain.cli.parsing import Command
from pretrain.errors import UsageError


@dataclass
class Report(Command):
    """Write runs as one HTML page that loads nothing: docs/report.md.

    Curves, samples, the loss in plain words, data, configuration, environment, commands; several runs overlaid, those
    of the same settings as one curve in a band, with the verdicts of 'pretrain compare'.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, which need not be finished, or folders of them."""
    out: str = ""
    """The file to write. Default: report.html in the run directory, or comparison.html here for several runs."""
    forecast: Annotated[str, tyro.conf.arg(metavar="LADDER")] = ""
    """Show the predicted loss beside the measured one, by a folder of small runs where 'pretrain forecast' was run."""
    png: bool = False
    """Also draw the curves for papers, as loss.png and others beside the page."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("RUN is missing: give a run directory")

    def __call__(self) -> int:
        from pretrain.experiments.forecast import Forecast
        from pretrain.experiments.groups import groups_at
        from pretrain.report import write_report
        from pretrain.report.page import run_names
        from pretrain.report.plot import plot_runs

        groups = groups_at(self.runs)
        runs = [run for group in groups for run in group.runs]
        file = Path(self.out or (runs[0].folder / "report.html" if len(runs) == 1 else "comparison.html"))
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise UsageError(f"cannot write {file}: give a file in a folder that exists with --out")
        forecast = Forecast.load(self.forecast) if self.forecast else None
        print(f"Wrote {write_report(runs, file, patient=True, forecast=forecast, groups=groups)}")
        if self.png:
            names = run_names(runs) if len(groups) == len(runs) else [group.name for group in groups]
            for picture in plot_runs([group.runs for group in groups], names, file.parent):
                print(f"Wrote {picture}")
        return 0


@dataclass
class Watch(Command):
    """Show a run in the browser while it trains: the page of 'pretrain report', which reloads itself.

    A server on this machine only (127.0.0.1), which also answers prompts with the newest checkpoint. Ctrl-C ends it;
    training is not affected.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory; it may not have begun yet."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8765
    """The port to serve on. 0: any that is free."""
    open: bool = False
    """Open the page in the browser."""

    def __call__(self) -> int:
        from pretrain.report.watch import Watcher
        from pretrain.runs import Run

        with Watcher(Path(self.run), self.port) as watcher:
            print(f"Watching {self.run} on {watcher.address} (Ctrl-C ends)", flush=True)
            if not Run.exists(Path(self.run)):
                print("It has not begun yet; the page shows it when it does.", flush=True)
            if hasattr(os, "nice"):
                os.nice(5)  # training comes first
            if self.open:
                import webbrowser

                webbrowser.open(watcher.address)
            with suppress(KeyboardInterrupt):
                watcher.serve_forever()
        return 0
