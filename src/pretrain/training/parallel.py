"""What is applied to the model from outside, in one linear function.

The order matters: fp8 exchanges layers, so it comes first; then activation checkpointing, so that the compiler sees
what is computed again; then torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from pretrain.config import TrainConfig
from pretrain.errors import UsageError
from pretrain.model import GPT


def prepare_model(model: GPT, config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Apply to the model, in place, what ``config`` asks for; ``say`` hears what could not be done."""
    if config.fp8:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise UsageError("train.fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper); leave it out here")
        use_fp8(model)
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


def use_fp8(model: GPT, emulate: bool = False) -> None:
    """Let torchao compute the blocks' matrix products in fp8, scaled by tensor; names and parameters stay.

    ``emulate`` computes the same numbers without the hardware. The head stays in bf16.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("train.fp8 needs torchao; install it with: pip install 'pretrain[fp8]'") from None

    def in_tiles(layer: torch.nn.Module, _name: str) -> bool:
        # The hardware multiplies in tiles of 16, which leaves out the small gates.
        return isinstance(layer, torch.nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0

    convert_to_float8_training(model.blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=in_tiles)


def _compiler_problem(device: torch.device) -> str:
    """Why torch.compile cannot work here, in a line; empty if it can, tried on the smallest program."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing compiler, an old driver or a full /tmp raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
