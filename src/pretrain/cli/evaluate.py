"""``pretrain eval``: measure models."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.cli.parsing import parse

DEFAULT = "default"
"""The value of --core given without one."""


@dataclass
class EvalArguments:
    """Measure models: loss, perplexity and bits per byte on all held-out text; CORE; several side by side.

    What the numbers mean: docs/evaluation.md.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or hf:DIR for a Hugging Face model (with --data or --core)."""
    data: tuple[str, ...] = ()
    """Measure on this text instead: files, folders or patterns."""
    split: Literal["val", "train"] = "val"
    """Which of the run's own text: the held-out part, or what it was trained on."""
    batches: int = 0
    """Only estimate: the mean over this many random batches of both splits. 0: measure on all."""
    core: Annotated[str, tyro.conf.arg(metavar="[BUNDLE]")] = ""
    """Also measure CORE, accuracy on up to 22 tasks, from a folder, .zip file or URL; without one, nanochat's."""
    max_per_task: int = 0
    """Ask only this many questions of each task of CORE. 0: all."""
    json: bool = False
    """Print one JSON object per model, each on its own line."""
    csv: str = ""
    """Write the numbers to this file too."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        for name in ("batches", "max_per_task"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if self.batches and (self.data or self.split != "val"):
            raise ValueError("--batches estimates on both of the run's own splits; leave out --data and --split")
        if self.data and self.split != "val":
            raise ValueError("--split is of the run's own text; leave it out with --data")
        if not self.runs:
            raise ValueError("RUN is missing: give a run directory, or hf:DIR; see pretrain eval --help")


def evaluate(args: list[str]) -> int:
    """Measure each model and print them side by side."""
    for i, argument in enumerate(args):
        if argument == "--core" and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args = [*args[: i + 1], DEFAULT, *args[i + 1 :]]
    a = parse(EvalArguments, args, "eval")

    from pretrain.evaluation import open_bundle, read_tasks
    from pretrain.evaluation.compare import EvalRequest, check_places, json_line, measure, tables, write_csv

    tasks = read_tasks(open_bundle("" if a.core == DEFAULT else a.core)) if a.core else []
    request = EvalRequest(a.split, a.data, a.batches, tasks, a.max_per_task)
    check_places(a.runs, request)  # before the first of them takes its time
    measured = []
    for run in a.runs:
        measured.append(measure(run, request, a.device, lambda line: print(line, file=sys.stderr, flush=True)))
        if a.json:
            print(json_line(measured[-1]), flush=True)
    if not a.json:
        print(tables(measured))
    if a.csv:
        write_csv(Path(a.csv), measured)
    return 0
