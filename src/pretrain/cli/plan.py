"""``pretrain plan``: what a run will need, before it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pretrain.cli.parsing import parse
from pretrain.config import Config, load_config


@dataclass
class PlanArguments:
    """What a run will need, before it starts: parameters, memory, time; and what is unusual about it.

    Takes the recipe and the fields that 'pretrain train' takes. The speed is measured here for some seconds, or with
    --gpu taken from published peaks (docs/plan.md).
    """

    recipe: tyro.conf.Positional[str] = "quickstart"
    """A recipe by name ('pretrain recipes' lists them) or a path to a TOML file."""
    gpu: str = ""
    """Plan for a GPU by name, such as h100, h200, b200, a100, l4, rtx4090 or mi300x; none: for this machine's CPU.
    Empty: for this machine."""
    gpus: int = 1
    """Processes, each with such a GPU, eight a machine."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How they share the model. auto: as parallel.kind says."""
    mfu: float = 0.0
    """Share of the GPU's peak to assume, 0 to 1. 0: what is usual for this width."""
    disk_gb: float = 1.0
    """Gigabytes a second that a machine can write, for the time of a checkpoint."""
    no_measure: bool = False
    """Assume a share of the peak on this machine too, instead of measuring."""
    json: bool = False
    """Print one JSON object."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, not {self.gpus}")
        if self.gpus > 1 and self.gpu in ("", "none"):
            raise ValueError(f"--gpus {self.gpus} needs --gpu, the name of the GPU, such as h100")
        if not 0 <= self.mfu <= 1:
            raise ValueError(f"--mfu must be between 0 and 1, not {self.mfu}")
        if self.disk_gb <= 0:
            raise ValueError(f"--disk-gb must be positive, not {self.disk_gb}")


def plan(args: list[str]) -> int:
    """What a run will need: parameters, memory, time; and what is unusual about it."""
    given = args[0] if args and not args[0].startswith("-") else ""
    a = parse(PlanArguments, args, "plan", PlanArguments(config=load_config(given or "quickstart")))

    from pretrain.plan import describe, make_plan, warnings
    from pretrain.training.init_from import resolve_init

    made = make_plan(
        resolve_init(a.config), a.gpu, a.gpus, a.parallel, not a.no_measure and not a.mfu, a.mfu, a.disk_gb * 1e9
    )
    found = warnings(made)
    print(json.dumps({**made.as_dict(), "warnings": found}) if a.json else describe(made, found))
    return 0
