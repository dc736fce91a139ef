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
    config.json. gguf: model.gguf, with the tokenizer, for llama.cpp and what is built on it (pip install
    'pretrain[gguf]'), if the model is one of the three and its tokenizer a bpe of pattern gpt2 or gpt4.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    out: str
    """The folder to write; it must not exist, or be empty."""
    format: Literal["hf", "safetensors", "gguf"] = "hf"
    """What to write."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the matrices in gguf; the other formats are fp32."""
    step: int = 0
    """Use the checkpoint of this step. 0: the newest, or the best that the finished run kept (checkpoint.keep_best)."""

    def __post_init__(self):
        if self.dtype != "fp32" and self.format != "gguf":
            raise ValueError("--dtype is for --format gguf; leave it out")

    def __call__(self) -> int:
        from pretrain.hf.export import export_run
        from pretrain.runs import Run

        run = Run.open(self.run)
        checkpoint = run.model_checkpoint(self.step)
        how = export_run(run, self.format, Path(self.out), checkpoint, self.dtype)
        lead = "With llama.cpp" if self.format == "gguf" else "In Python"
        print(f"Wrote {self.out}, {run.model_in_words(checkpoint)}. {lead}:  {how}")
        return 0
