"""What is applied to the model from outside, in one linear function.

The order matters: activation checkpointing first, so that the compiler sees what is computed again; then torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from pretrain.config import TrainConfig
from pretrain.model import GPT


def prepare_model(model: GPT, config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Apply to the model, in place, what ``config`` asks for; ``say`` hears what could not be done."""
    if config.activation_checkpointing:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    # Compiling takes about a minute on a CPU, more than short runs can win back.
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        problem = _compiler_problem(device)
        if problem:
            say(f"torch.compile does not work here ({problem}); going on without it")
        else:
            model.compile(dynamic=False)


def _compiler_problem(device: torch.device) -> str:
    """Why torch.compile cannot work here, in a line; empty if it can, tried on the smallest program."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing compiler, an old driver or a full /tmp raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
