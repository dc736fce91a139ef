"""``pretrain train``: train a model, or resume a run that was stopped."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pretrain.cli.launch import count_processes, importing, is_process, launch, machines_join
from pretrain.cli.parsing import Command
from pretrain.config import Config

STARTED = time.monotonic()


@dataclass
class Train(Command):
    """Train a model, or resume a run that was stopped.

    Without arguments: the recipe 'quickstart' on the embedded corpus. On your own text: --data FILE_OR_FOLDER, with
    settings that fit it (the recipe 'fit') and in --train.minutes, 3 by default.
    'pretrain train --out RUN' alone resumes an existing run. The defaults shown below are those of the recipe named:
    'pretrain train laptop --help' shows those of laptop.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "quickstart"
    """A recipe by name ('pretrain recipes' lists them) or a path to a TOML file."""
    out: str = ""
    """The run directory. Default: runs/RECIPE. If it exists, the run is resumed."""
    resume_from: int = 0
    """Go back to the checkpoint of this step; everything after it is set aside. 0: resume from the newest."""
    nproc: str = ""
    """Number of processes on this machine that train together (docs/cluster.md). gpu: one for each GPU; auto: the same,
    or one where there is no GPU. Empty: this one alone."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.nproc not in ("", "gpu", "auto") and not (self.nproc.isdecimal() and int(self.nproc) >= 1):
            raise ValueError(f"--nproc must be a number of processes, gpu or auto, not '{self.nproc}'")

    def __call__(self) -> int:
        """Train, then write the plot, the report and a summary of what was learned."""
        out = self.out or f"runs/{Path(self.recipe).stem}"
        command = ["pretrain", "train", "--out", out] + (["--nproc", self.nproc] if self.nproc else [])
        unused = 0
        if not is_process():
            count = count_processes(self.nproc or "auto", self.config.train.device)
            if self.nproc and (count > 1 or machines_join()):
                return launch(["train", *self.typed], count, self.config.guard.grace_seconds, shlex.join(command))
            unused = count - 1 if "WORLD_SIZE" not in os.environ else 0

        with importing():
            from pretrain.report import explain, plot_run, write_report
            from pretrain.training import Console, train

        console = Console(command=command)
        if unused:
            console.say(f"gpus      1 of {unused + 1} will train; all of them with: --nproc gpu")
        run = train(self.config, out, console, STARTED, self.resume_from, named=self._names_data())
        if os.environ.get("RANK", "0") == "0":
            page = None
            try:  # a failed report must not make a finished training look failed
                page = write_report([run], run.folder / "report.html")
                plot_run(run)
            except Exception as error:
                missing = "no picture" if page else "no report"
                console.say(f"{missing} was written ({error}); try: pretrain report {out}{' --png' * bool(page)}")
            console.say("\n" + explain(run, page))
        return 0

    def _names_data(self) -> bool:
        """Whether the arguments say which text to train on, by a recipe or an option, rather than a run alone."""
        options = {word.partition("=")[0].replace("-", "_") for word in self.typed}
        recipe = self.typed[:1] and not self.typed[0].startswith("-")
        return bool(recipe or options & {"__data", "__data.paths", "__data.val_paths"})
