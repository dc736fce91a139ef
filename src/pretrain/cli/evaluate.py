"""``pretrain eval``: measure models."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.cli.launch import importing
from pretrain.cli.parsing import Command
from pretrain.config.schema import Natural
from pretrain.errors import UsageError


@dataclass
class Evaluate(Command):
    """Measure models: loss, perplexity and bits per byte on all held-out text; CORE; tasks of lm-eval.

    What the numbers mean: docs/evaluation.md.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or hf:DIR for a Hugging Face model (with --data, --core or --tasks)."""
    data: tuple[str, ...] = ()
    """Measure on this text instead: files, folders or patterns."""
    field: str | None = None
    """Name of the text in --data's JSONL objects and Parquet columns. Default: that of the run."""
    separator: str | None = None
    """Separator of the documents in --data's plain text files. Default: that of the run."""
    allow_broken: bool = False
    """Measure what is left of --data where more than half of the records have no text that can be used."""
    split: Literal["val", "test", "train"] = "val"
    """Which of the run's own text: what validation measures, what data.test_fraction holds out besides, or what it was
    trained on."""
    batches: Natural = 0
    """Only estimate: the mean over this many random batches of both splits. 0: measure on all."""
    core: Annotated[str, tyro.conf.arg(metavar="[BUNDLE]")] = ""
    """Also measure CORE, accuracy on up to 22 tasks, from a folder, .zip file or URL; without one, nanochat's."""
    tasks: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = ""
    """Also measure these tasks of lm-eval (pip install 'pretrain[lm-eval]'), such as arc_easy,piqa: by its code, and
    with the numbers that its hf loader has of the exported model."""
    tasks_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder with YAML files of your own tasks, which --tasks may name."""
    num_fewshot: Natural | None = None
    """Put this many solved examples before each question of --tasks. Default: as each task says."""
    max_per_task: Natural = 0
    """Ask only this many questions of each task of CORE and of --tasks. 0: all."""
    step: Natural = 0
    """Measure the checkpoints of this step. 0: the newest, or the best that the run kept (checkpoint.keep_best)."""
    json: bool = False
    """Print one JSON object per model, each on its own line."""
    csv: str = ""
    """Write the numbers to this file too."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        if self.batches and (self.data or self.split != "val"):
            raise ValueError("--batches estimates on both of the run's own splits; leave out --data and --split")
        if self.data and self.split != "val":
            raise ValueError("--split is of the run's own text; leave it out with --data")
        if not self.tasks and (self.tasks_dir or self.num_fewshot is not None):
            raise ValueError("--tasks-dir and --num-fewshot are for --tasks; name some with it")
        if not self.runs:
            raise ValueError("RUN is missing: give a run directory, or hf:DIR")

    def __call__(self) -> int:
        with importing():
            from pretrain.evaluation import open_bundle, read_tasks
            from pretrain.evaluation.measure import EvalRequest, check_places, json_line, measure, tables, write_csv

        tasks = read_tasks(open_bundle("" if self.core == "default" else self.core)) if self.core else []
        harness = None
        if self.tasks:
            try:
                from pretrain.evaluation.harness import Tasks
            except ImportError as error:
                raise UsageError(f"--tasks needs lm-eval ({error}); pip install 'pretrain[lm-eval]'") from None
            if self.tasks_dir and not Path(self.tasks_dir).is_dir():
                raise UsageError(f"--tasks-dir {self.tasks_dir} is no folder; give one with YAML files of tasks")
            harness = Tasks(self.tasks.split(","), self.tasks_dir, self.num_fewshot)
        request = EvalRequest(
            split=self.split,
            data=self.data,
            field=self.field,
            separator=self.separator,
            allow_broken=self.allow_broken,
            batches=self.batches,
            core=tasks,
            tasks=harness,
            max_per_task=self.max_per_task,
            step=self.step,
        )
        check_places(self.runs, request)  # before the first of them takes its time
        measured = []
        for run in self.runs:
            measured.append(measure(run, request, self.device, lambda line: print(line, file=sys.stderr, flush=True)))
            if self.json:
                print(json_line(measured[-1]), flush=True)
        if not self.json:
            print(tables(measured))
        if self.csv:
            write_csv(Path(self.csv), measured)
        return 0
