"""``pretrain export``: a run's model in other formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.cli.parsing import Command


@dataclass
class Export(Command):
    """Export a run's model into a folder.

    hf: transformers loads it with AutoModelForCausalLM and AutoTokenizer, as GPT-2, Llama or Qwen3 if the model
    computes exactly that, else with a model file written beside it. safetensors: tensors under pretrain's names, and
    config.json.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    out: str
    """The folder to write; it must not exist, or be empty."""
    format: Literal["hf", "safetensors"] = "hf"
    """What to write."""
    step: int = 0
    """Use the checkpoint of this step. 0: the newest, or the best that the finished run kept (checkpoint.keep_best)."""

    def __call__(self) -> int:
        from pretrain.hf.export import export_run
        from pretrain.runs import Run

        run = Run.open(self.run)
        checkpoint = run.model_checkpoint(self.step)
        how = export_run(run, self.format, Path(self.out), checkpoint)
        print(f"Wrote {self.out}, {run.model_in_words(checkpoint)}. In Python:  {how}")
        return 0
