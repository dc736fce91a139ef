"""Scaled dot-product attention: PyTorch's, or plain products where those are faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_LIMIT = 256
"""Longest context on a CPU for which plain matrix products beat PyTorch's blockwise kernel (benchmarks/train.py)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Attention of queries (B, H, T, D) over keys and values (B, G, S, D), G dividing H → (B, H, T, D).

    ``mask`` (broadcast to (B, H, T, S)) is True where looking is allowed; None is causal, or everything if T is 1.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and T > 1 and S <= PLAIN_LIMIT and not dropout:
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.where(mask, (q @ k.mT) * scale, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )
