"""``pretrain train``: train a model, or resume a run that was stopped."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pretrain.cli.launch import count_processes, is_process, launch, machines_join, one_voice
from pretrain.cli.parsing import parse, value_of
from pretrain.config import Config, load_config

STARTED = time.monotonic()


@dataclass
class TrainArguments:
    """Train a model, or resume a run that was stopped.

    Without arguments: the recipe 'quickstart' on the embedded corpus. On your own text: --data FILE_OR_FOLDER.
    'pretrain train --out RUN' alone resumes an existing run.
    """

    recipe: tyro.conf.Positional[str] = "quickstart"
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


def train(args: list[str]) -> int:
    """Train, then write the plot, the report and a summary of what was learned."""
    with one_voice():
        arguments = parse(TrainArguments, args, "train", TrainArguments(config=_base_config(args)))
    config, out = arguments.config, arguments.out or f"runs/{Path(arguments.recipe).stem}"
    command = ["pretrain", "train", "--out", out] + (["--nproc", arguments.nproc] if arguments.nproc else [])
    unused = 0
    if not is_process():
        count = count_processes(arguments.nproc or "auto", config.train.device)
        if arguments.nproc and (count > 1 or machines_join()):
            return launch(["train", *args], count, config.guard.grace_seconds, shlex.join(command))
        unused = count - 1 if "WORLD_SIZE" not in os.environ else 0

    from pretrain.report import explain, plot_run, write_report
    from pretrain.training import Console, train

    console = Console(command=command)
    if unused:
        console.say(f"gpus      1 of {unused + 1} will train; all of them with: --nproc gpu")
    run = train(config, out, console, STARTED, arguments.resume_from)
    if os.environ.get("RANK", "0") == "0":
        plot_run(run)
        try:
            page = write_report([run], run.folder / "report.html")
        except Exception as error:  # a failed report must not make a finished training look failed
            console.say(f"no report was written ({error}); try: pretrain report {out}")
            page = None
        console.say("\n" + explain(run, page))
    return 0


def _base_config(args: list[str]) -> Config:
    """What the arguments override: the recipe they name, or the configuration of the run to resume."""
    recipe = args[0] if args and not args[0].startswith("-") else ""
    out = value_of(args, "--out")
    if out and not recipe and Path(out, "config.toml").is_file():
        from pretrain.runs.run import Run

        return Run.open(out).config
    return load_config(recipe or "quickstart")
