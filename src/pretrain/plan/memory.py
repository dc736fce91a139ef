"""Memory: what a training step holds, from a rehearsal of it on tensors without memory, and which micro-batch fits.

    model, optimizers, two steps under FakeTensorMode  ──Holding──>  bytes alive at every moment  ──>  Working

The rehearsal runs the real model, loss and optimizers, so it counts whatever they hold; only what torch.compile saves
by fusing, and what an allocator loses between blocks, it does not know.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import Config
from pretrain.model import GPT
from pretrain.model.loss import chunk_rows
from pretrain.model.transformer import Linear
from pretrain.optim import Optimizer, build_optimizers
from pretrain.training.parallel import recompute_blocks

LOGIT_BYTES = 12
"""Bytes that the loss holds for each logit of a chunk: the products, their fp32 copy, and the gradient of both."""


@dataclass(frozen=True)
class Working:
    """Bytes of one process in a training step of ``rows`` rows at once, as a rehearsal of it counted them."""

    rows: int
    weights: int
    moments: int
    gradients: int
    casts: int
    """Copies of the blocks' weights in the activations' dtype, held from the forward to the backward pass."""
    activations: int
    """What else the forward pass keeps for the backward pass."""
    chunk: int
    """The logits that the loss holds at once, with their gradients."""
    peak: int
    """The most that was alive at once, weights and moments included."""

    @property
    def temporary(self) -> int:
        """What the peak has beyond weights, moments, gradients, activations and the chunk of logits."""
        known = self.weights + self.moments + self.gradients + self.casts + self.activations + self.chunk
        return max(0, self.peak - known)


def rehearse(config: Config, vocab_size: int, rows: int, micro_steps: int, dtype: torch.dtype, device: str) -> Working:
    """Run a training step on tensors without memory, and count what it holds.

    Args:
        config: with its derived fields filled in.
        vocab_size: V.
        rows: rows in a forward and backward pass.
        micro_steps: such passes in an optimizer step; from the second on, gradients lie beside activations.
        dtype: of activations.
        device: the type of the device for which to count; the rehearsal itself runs on the CPU.
    """
    holding = Holding()
    with FakeTensorMode(), holding:
        model = GPT(config.model, vocab_size, 0)
        model.compute_as_on(device)
        model.activation_dtype = dtype
        weights = holding.live
        if config.train.activation_checkpointing:
            recompute_blocks(model)
        optimizers = build_optimizers(model, config.optim)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        _update(model, optimizers)
        moments = holding.live - weights
        tokens = torch.zeros(rows, config.model.context_length, dtype=torch.long)
        before, kept, forward, rest = holding.live, 0, 0, 0
        for _ in range(min(2, micro_steps)):
            holding.peak = already = holding.live
            loss = model(tokens, tokens)
            kept = holding.live - already
            forward = max(forward, holding.peak)
            holding.peak = holding.live
            loss.backward()
            del loss
            rest = max(rest, holding.peak)
        gradients = holding.live - before
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        _update(model, optimizers)
        rest = max(rest, holding.peak)

    # The loss has already taken the head's gradient when the forward pass ends; it is counted with the gradients.
    head_gradient = 4 * model.head.weight.numel()
    casts = 0
    if dtype != torch.float32 and not config.train.activation_checkpointing:
        cast = [module.weight for module in model.blocks.modules() if isinstance(module, Linear)]
        casts = dtype.itemsize * sum(weight.numel() for weight in cast)
    at_once = chunk_rows(device, model.head.weight.shape[0])
    chunk = LOGIT_BYTES * model.head.weight.shape[0] * min(at_once, rows * config.model.context_length)
    activations = max(0, kept - head_gradient - casts)
    return Working(rows, weights, moments, gradients, casts, activations, chunk, max(forward, rest))


def _update(model: GPT, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())  # as in training, where a step may be skipped
        optimizer.step()
    model.zero_grad(set_to_none=True)


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
        number = id(storage)
        if number in self._known:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[number]

        self._known[number] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
