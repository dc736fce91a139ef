"""Attention that skips what windows and documents hide, on GPUs: whole blocks of BLOCK x BLOCK pairs of tokens.

    tokens  →  block_mask: which blocks are computed, once for all layers of a kind  →  attend_in_blocks

A boolean mask has every pair computed and keeps PyTorch's fastest kernels away, so that a window costs more than none.
Of what skips blocks, flex_attention (arXiv 2412.05496) is in every PyTorch that is supported, and takes windows,
documents and grouped heads at once. ``varlen_attn`` is newer, took windows and groups later still, and wants documents
as a list, whose length is another in each batch. FlashAttention 3 comes as a binary from elsewhere, which torch.compile
could not take in 2026 (kernels-community issue 312).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens on each side of a block, as the kernels want them."""


def block_mask(T: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """Which of the T tokens each may look at: those up to itself, of the newest ``window``, of its own document.

    ``documents`` (B, T) numbers each token's document, never falling along a row. T must be a multiple of BLOCK. No
    mask of all pairs is made: where even the nearest pair of a block is hidden, all are; where the farthest is seen,
    all are, and only blocks between the two ask for each pair.
    """
    documents = None if documents is None else documents.int()

    def seen(batch: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        allowed = key <= query
        if window is not None:
            allowed = allowed & (key > query - window)
        if documents is not None:
            allowed = allowed & (documents[batch, query] == documents[batch, key])
        return allowed

    first = torch.arange(0, T, BLOCK, device=device)
    last = first + (BLOCK - 1)
    batch = torch.arange(1 if documents is None else documents.shape[0], device=device)[:, None, None]
    diagonal = torch.eye(len(first), dtype=torch.bool, device=device)  # a token sees itself, and not the one after it
    some = seen(batch, None, first[:, None], last) | diagonal
    whole = seen(batch, None, last[:, None], first) & ~diagonal
    part, parts = some & ~whole, []
    for dense in (part, whole, part.mT, whole.mT):  # the blocks of each query's block, then of each key's
        dense = dense.view(-1, 1, len(first), len(first)).int()
        parts += [dense.sum(-1, dtype=torch.int32), dense.argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask((T, T), *parts, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention of queries (B, H, T, D) over keys and values (B, G, T, D), G dividing H → (B, H, T, D).

    Only fast where it is compiled: otherwise it holds all scores.
    """
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    assert isinstance(out, Tensor)
    return out


def obstacle(device: torch.device, compiled: bool, length: int, head_dim: int, dropout: float) -> str:
    """What keeps a model from attending in blocks on a device, in a few words; empty if nothing is known to."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    if not compiled:
        return "the model is not compiled"
    if dropout:
        return "model.dropout drops weights of attention"
    if length % BLOCK:
        return f"model.context_length is no multiple of {BLOCK}"
    return "heads have fewer than 16 channels" if head_dim < 16 else ""


def kernel_problem(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str:
    """Why attention in blocks cannot be used for such heads, in a line; empty if it can.

    Tried forward and backward on two documents and a window, and compared with a mask: its kernels are made for the
    GPU at hand, which may have too little fast memory for them.
    """
    T = 4 * BLOCK
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, weight = (
        torch.randn(1, h, T, head_dim, device=device, dtype=dtype, generator=generator).requires_grad_()
        for h in (heads, kv_heads, kv_heads, heads)
    )
    positions = torch.arange(T, device=device)
    documents = (positions[None] >= T // 8).int()
    try:
        mask = block_mask(T, 2 * BLOCK + 1, documents, device)  # with blocks of all kinds
        found = torch.compile(attend_in_blocks, dynamic=False)(q, k, v, mask, 0.1)
        seen = mask.mask_mod(positions.new_zeros(()), positions.new_zeros(()), positions[:, None], positions)
        all_k, all_v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        wanted = F.scaled_dot_product_attention(q, all_k, all_v, seen, scale=0.1)
        for a, b in zip(
            (found, *torch.autograd.grad(found, (q, k, v), weight)),
            (wanted, *torch.autograd.grad(wanted, (q, k, v), weight)),
            strict=True,
        ):
            if not (a - b).float().norm() < 0.03 * b.float().norm():  # bf16 rounds to 0.004
                return "its results differ from those of a mask"
    except Exception as error:  # whatever a compiler or a kernel raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
