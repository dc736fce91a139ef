"""``pretrain plan``: what a run will need, before it starts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pretrain.cli.parsing import Command
from pretrain.config import Config
from pretrain.config.schema import Count, Fraction, Positive


@dataclass
class Plan(Command):
    """What a run will need, before it starts: parameters, memory, time; and warnings about unusual settings.

    Takes the same recipe and fields as 'pretrain train', with the recipe's values as defaults. The speed is measured
    here for some seconds, or with --gpu taken from published peaks (docs/plan.md).
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "quickstart"
    """A recipe by name ('pretrain recipes' lists them) or a path to a TOML file."""
    gpu: str = ""
    """Plan for a GPU by name, such as h100, h200, b200, a100, l4, rtx4090 or mi300x; none: for this machine's CPU.
    Empty: for this machine."""
    gpus: Count = 1
    """Processes, each with such a GPU, eight per machine."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How they share the model. auto: as parallel.kind says."""
    mfu: Fraction = 0.0
    """Share of the GPU's peak to assume, 0 to 1. 0: what is usual for this width."""
    disk_gb: Positive = 1.0
    """Gigabytes per second that a machine can write, for the time of a checkpoint."""
    measure: bool = True
    """Measure the speed on this machine, rather than assume a share of its peak."""
    forecast: Annotated[str, tyro.conf.arg(metavar="LADDER")] = ""
    """Also predict the held-out loss, from a folder of small runs where 'pretrain forecast' was run."""
    json: bool = False
    """Print one JSON object."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.gpus > 1 and self.gpu in ("", "none"):
            raise ValueError(f"--gpus {self.gpus} needs --gpu, the name of the GPU, such as h100")

    def __call__(self) -> int:
        from pretrain.experiments.forecast import Forecast
        from pretrain.plan import describe, make_plan, warnings
        from pretrain.training.init_from import resolve_init

        forecast = Forecast.load(self.forecast) if self.forecast else None
        config, measure = resolve_init(self.config), self.measure and not self.mfu
        made = make_plan(config, self.gpu, self.gpus, self.parallel, measure, self.mfu, self.disk_gb * 1e9)
        found = warnings(made)
        predicted = made.predicted(forecast) if forecast else None
        if self.json:
            loss = {"forecast": dataclasses.asdict(predicted)} if predicted else {}
            print(json.dumps({**made.as_dict(), **loss, "warnings": found}))
        else:
            print(describe(made, found, str(predicted or "")))
        return 0
