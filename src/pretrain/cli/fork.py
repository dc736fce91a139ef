"""``pretrain fork``: a new run that begins in the middle of another."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pretrain.cli.launch import is_process
from pretrain.cli.parsing import Command, typed_fields
from pretrain.cli.train import Train
from pretrain.config import Config
from pretrain.config.schema import BelowOne, Natural
from pretrain.errors import UsageError


@dataclass
class Fork(Command):
    """Begin a new run in the middle of another, with another schedule, data or settings from there on, and train it.

    The new run has all of the state of a checkpoint: weights, moments, random states, place in the data. What differs
    is said and recorded in fork.json. The other run is only read; it may be training, or be deleted later. A decay
    off a stable run (warmup-stable-decay): 'pretrain fork RUN --step 800 --anneal 0.2 --out NEW' decays over steps
    801 to 1000. The defaults shown below are those of RUN, once it is given.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """The run directory to begin in."""
    step: Natural = 0
    """A step that RUN has a checkpoint of. 0: the newest."""
    out: str = ""
    """The new run directory. If it is there already, made by the same command, it is resumed."""
    anneal: BelowOne = 0.0
    """Decay the rate linearly to zero over this share of the new run's steps, its last: from STEP on, which makes
    train.steps STEP / (1 - share), unless train.steps is given. 0: the schedule of RUN."""
    train: bool = True
    """Train it right away. --no-train: only make it, for 'pretrain train --out NEW' on other machines."""
    json: bool = False
    """With --no-train: print one JSON object, what fork.json records and the place of the run as 'out'."""
    nproc: str = ""
    """Number of processes on this machine that train together, as of 'pretrain train'."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.json and self.train:
            raise ValueError("--json is of a run that is only made; give --no-train too")
        self.training = Train(out=self.out, nproc=self.nproc)  # refuses a wrong number of processes

    def __call__(self) -> int:
        """Make the run, say what differs, and train it as ``pretrain train`` does."""
        if not self.run or not self.out:
            raise UsageError(f"{'--out' if self.run else 'RUN'} is missing: pretrain fork RUN --out NEW")
        if is_process() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            alone = f"pretrain fork {self.run} --out {self.out} --no-train"
            raise UsageError(
                f"make it with one process: {alone} ..., then train it with all: pretrain train --out {self.out}"
            )
        from pretrain.experiments.fork import fork
        from pretrain.training import Console

        console, given = Console(quiet=self.json), typed_fields(self.typed)
        made = fork(Path(self.run), Path(self.out), self.config, self.step, self.anneal, given, console)
        if self.json:
            print(json.dumps({"out": str(made.folder), **(made.fork or {})}, ensure_ascii=False))
            return 0
        if not self.train:
            console.say(f"made      {self.out}; train it with: pretrain train --out {self.out}")
            return 0
        self.training.config, self.training.typed = made.config, ["--out", self.out]
        self.training.typed += ["--nproc", self.nproc] if self.nproc else []
        return self.training()
