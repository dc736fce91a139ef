"""What is applied to the model from outside, in this order: torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch


def maybe_compile(model: torch.nn.Module, choice: str, device: torch.device, say: Callable[[str], None]) -> None:
    """Compile the model in place, as ``train.compile`` asks; auto compiles on a GPU, where it repays the wait."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return
    try:
        import torch._inductor.config  # noqa: F401  (fails where torch has no compiler)

        model.compile(dynamic=False)
    except (ImportError, RuntimeError) as error:
        say(f"torch.compile is not available ({error}); going on without it")
