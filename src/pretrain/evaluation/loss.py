"""Validation loss and bits per byte: a pass over held-out tokens, weighted by tokens, the same in any batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.evaluation.scorer import evaluating
from pretrain.model.loss import IGNORE


@dataclass(frozen=True)
class LossResult:
    """Sums over the counted targets, and what they say."""

    nats: float
    """Cross-entropy summed over all targets."""
    tokens: int
    """Targets counted."""
    text_nats: float
    """Cross-entropy summed over targets that stand for text, not for special tokens."""
    text_bytes: int
    """UTF-8 bytes of those."""

    def __add__(self, other: LossResult) -> LossResult:
        """Of both texts together."""
        sums = (mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))
        return LossResult(*sums)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token; NaN of no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss): among how many equally likely tokens the model hesitates, on average."""
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of text costs; comparable between tokenizers. Special tokens count in neither sum."""
        return self.text_nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> LossResult:
    """Run the model over batches of inputs and targets (B, T) and sum up.

    Args:
        model: a GPT, or anything called like one; put in evaluation mode for the pass, and back as it was.
        batches: such as ``tokens.validation_batches``.
        token_bytes: UTF-8 bytes of each token (V), 0 for special ones.
        reduce: adds up a float64 tensor on the CPU over the processes that share the batches.
    """
    device = next(model.parameters()).device
    lengths = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    sums = torch.zeros(4, dtype=torch.float64)
    with evaluating(model):
        for inputs, targets in batches:
            targets = targets.to(device)
            losses = model(inputs.to(device), targets, reduction="none")
            counted = targets != IGNORE
            sizes = lengths[targets.clamp_min(0)] * counted
            # Summed in float64 on the CPU: MPS has no float64, and a sum in fp32 depends on the batch size.
            nats = losses.cpu().double()
            text = (sizes > 0).cpu()
            sums += torch.stack([nats.sum(), counted.cpu().sum(), nats[text].sum(), sizes.cpu().sum()]).double()
    nats, tokens, text_nats, text_bytes = reduce(sums).tolist()
    return LossResult(nats, int(tokens), text_nats, int(text_bytes))
