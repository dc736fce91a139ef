"""From logits to the next token: filters and draws, for all rows of a batch at once.

    logits (B, V) → repetition penalty → temperature → top_k → top_p → min_p → one token of each row

A row's token depends on its own logits and its own uniform number alone, never on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config.sampling import SamplingOptions


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were ``seen`` (B, V, bool) less likely: logits (B, V) → (B, V). CTRL, arXiv 1909.05858."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, options: SamplingOptions, uniform: Tensor) -> Tensor:
    """Choose one token of each row.

    Args:
        logits: (B, V), fp32, any repetition penalty already applied.
        options: temperature and filters.
        uniform: (B, 1), fp32 in [0, 1): where in the cumulative distribution to choose.

    Returns:
        Token ids (B, 1).
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature  # finite at any temperature
    tokens = None  # of the candidates, likeliest first; None: all V in order
    if 0 < options.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(options.top_k)
    elif options.top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    weights = logits.softmax(dim=-1)
    keep = torch.ones_like(weights, dtype=torch.bool)
    if options.top_p < 1:
        keep &= weights.cumsum(dim=-1) - weights < options.top_p
        keep[:, 0] = True
    if options.min_p:
        keep &= weights >= options.min_p * weights.amax(dim=-1, keepdim=True)
    weights = weights * keep  # they need not sum to 1
    cumulative = weights.cumsum(dim=-1)
    beyond = cumulative > uniform * cumulative[:, -1:]
    # The first token beyond the number, among those that are possible; where rounding leaves none, the first possible.
    index = (weights > 0).int().mul(1 + beyond.int()).argmax(dim=-1, keepdim=True)
    return index if tokens is None else tokens.gather(1, index)
