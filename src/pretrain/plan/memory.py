"""Memory: what a training step holds, from a dry run of it on tensors without memory.

    model, optimizers, two steps under FakeTensorMode  ──Holding──>  bytes alive at every moment  ──>  bytes by part

The model, loss and optimizers are training's own, so whatever they hold is counted; only what torch.compile saves by
fusing, and what an allocator loses between blocks, the dry run does not know.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import Config
from pretrain.device import Precision
from pretrain.model.attention import obstacle
from pretrain.model.loss import chunk_rows
from pretrain.model.transformer import Linear, head_dim
from pretrain.optim import build_optimizers
from pretrain.sizing import meta_model
from pretrain.training.parallel import parallelize
from pretrain.training.state import update
from pretrain.training.world import World

LOGIT_BYTES = 12
"""Bytes that the loss holds for each logit of a chunk: the products, their fp32 copy, and the gradient of both."""


def dry_run(
    config: Config, vocab_size: int, rows: int, micro_steps: int, precision: Precision
) -> tuple[dict[str, int], int]:
    """Bytes by part that one process holds in a training step, and the most that is alive at once.

    The peak may be less than the sum of the parts, which need not all be there at the same time.

    Args:
        config: with its derived fields filled in.
        vocab_size: V.
        rows: rows in a forward and backward pass.
        micro_steps: such passes in an optimizer step; from the second on, gradients lie beside activations.
        precision: of activations, and the device whose memory is counted; the dry run itself takes place on the CPU.
    """
    compiled, length = config.train.compile != "off", config.model.context_length
    if not obstacle(precision.device, compiled, length, head_dim(config.model), config.model.dropout):
        # In blocks it holds what plain attention holds, and no mask.
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, window_pattern="L", document_mask=False)
        )
    # Neither the compiler nor fp8 runs on tensors without memory.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile="off", fp8=False))
    device, dtype = precision.device.type, precision.dtype
    model = meta_model(config.model, vocab_size, bos_id=0)
    model.activation_dtype = dtype
    model.compute_as_on(device)
    with FakeTensorMode(allow_non_fake_inputs=True), Holding() as holding:
        parallelize(model, "none", config, World(torch.device("cpu")), precision, say=lambda _: None)
        optimizers = build_optimizers(model, config.optim)
        weights = holding.live

        def optimizer_step() -> None:
            update(optimizers, 0, config, skip=torch.zeros(()))
            model.zero_grad(set_to_none=True)

        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer_step()
        moments = holding.live - weights
        tokens = torch.zeros(rows, config.model.context_length, dtype=torch.long)
        before, kept, peak = holding.live, 0, 0
        for _ in range(min(2, micro_steps)):
            holding.peak = already = holding.live
            loss = model(tokens, tokens)
            kept = holding.live - already
            loss.backward()
            del loss
            peak = max(peak, holding.peak)
        gradients = holding.live - before
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer_step()
        peak = max(peak, holding.peak)

    # Copies of the blocks' weights in the activations' dtype, kept from the forward to the backward pass.
    copies = 0
    if dtype != torch.float32 and not config.train.activation_checkpointing:
        cast = [module.weight for module in model.blocks.modules() if isinstance(module, Linear)]
        copies = dtype.itemsize * sum(weight.numel() for weight in cast)
    # The loss already has the head's gradient when the forward pass ends; it is counted with the gradients.
    head_rows, head_gradient = model.head.weight.shape[0], 4 * model.head.weight.numel()
    parts = {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        **({"average": weights} if config.optim.ema else {}),
        "weight copies": copies,
        "activations": max(0, kept - head_gradient - copies),
        "logits chunk": LOGIT_BYTES * head_rows * min(chunk_rows(device, head_rows), tokens.numel()),
    }
    peak += parts.get("average", 0)  # the dry run does not have it
    return {**parts, "temporary": max(0, peak - sum(parts.values()))}, peak


class Holding(TorchDispatchMode):
    """While entered, counts the bytes of all tensors made and still alive: ``live`` now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()
        if number in self._known:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[number]

        self._known[number] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
