"""Pretrain GPT-style language models from raw text.

The few names that make a training script of twenty lines; see examples/. Each is imported when first used, so that
``import pretrain`` alone costs nothing.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import Config, load_config
    from pretrain.errors import PretrainError
    from pretrain.generation import sample_text
    from pretrain.runs import Run
    from pretrain.training import Callback, Console, train

__all__ = ["Callback", "Config", "Console", "PretrainError", "Run", "load_config", "sample_text", "train"]

if "torch" not in sys.modules:
    # Operations that MPS lacks then run on the CPU instead of failing. torch reads it once, when its library loads.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Free pieces of a GPU's memory can then be joined, so that less is lost between tensors when their sizes change.
    # Not where the driver lacks that: on Windows, and under it. torch 2.9 does not know this name of the variable yet.
    if sys.platform == "linux" and "microsoft" not in os.uname().release.lower():
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which the user may have set
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

_HOMES = {
    "Callback": "training",
    "Config": "config",
    "Console": "training",
    "PretrainError": "errors",
    "Run": "runs",
    "load_config": "config",
    "sample_text": "generation",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"pretrain.{_HOMES[name]}"), name)
