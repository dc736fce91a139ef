"""Next-token cross-entropy from the last hidden states, without ever holding all logits.

The (tokens × vocabulary) matrix is made one chunk of rows at a time; each chunk's gradient is taken at once, while it
is in cache, so that backward only scales what forward has already computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -1
"""The target that does not count."""

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits held at once, by device: a CPU chunk stays in its cache, a GPU chunk keeps its matrix units busy."""

CHUNK_ROWS = 512
"""Rows in a chunk at least: each chunk adds to the whole gradient of the head once."""


def chunk_rows(device_type: str, vocab_rows: int) -> int:
    """Rows of logits that are held at once on a type of device."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS.get(device_type, 2**24) // vocab_rows)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Bound logits smoothly to (-cap, cap): ``cap * tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118). 0: unbounded."""
    return logits if cap == 0 else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float,
    reduction: str,
    vocab_size: int,
    chunk: int,
    chunk_loss: ChunkLoss | None = None,
) -> Tensor:
    """Cross-entropy in nats of ``softcap(x @ weight.T)`` against ``targets``, softmax in fp32.

    Args:
        x: hidden states (..., C).
        weight: the head (V or more, C), fp32.
        targets: (...) token ids, or ``IGNORE``.
        cap: the softcap of the logits; 0 for none.
        reduction: ``sum`` (a scalar with gradients) or ``none`` (same shape as targets, without gradients).
        vocab_size: V; rows of a padded head past it are never predicted.
        chunk: tokens whose logits are held at once.
        chunk_loss: what computes a chunk, perhaps compiled; by default it is not.
    """
    chunk_loss = chunk_loss or ChunkLoss()
    losses = _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), cap, reduction, vocab_size, chunk, chunk_loss
    )
    return losses if reduction == "sum" else losses.view_as(targets)


class ChunkLoss(nn.Module):
    """The losses of some rows and their gradients: a module without parameters, which can be compiled by itself."""

    def forward(
        self, x: Tensor, weight: Tensor, targets: Tensor, cap: float, vocab_size: int, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """X (N, C), weight (V or more, C) of the same dtype, targets (N) → losses (N), the gradients of their sum."""
        counted = targets != IGNORE
        index = targets.clamp_min(0)[:, None]
        compiled = (
            torch.compiler.is_compiling()
        )  # one kernel is made of all that is done to a logit: no scatter, gather
        chosen = torch.arange(weight.shape[0], device=x.device) == index if compiled else None
        logits = (x @ weight.T).float()
        if cap:
            logits = logits.div_(cap).tanh_().mul_(cap)
        if vocab_size < logits.shape[1]:
            logits[:, vocab_size:] = -torch.inf
        log_total = torch.logsumexp(logits, dim=1, keepdim=True)
        own = logits.gather(1, index) if chosen is None else torch.where(chosen, logits, 0).sum(dim=1, keepdim=True)
        losses = (log_total - own).squeeze(1) * counted
        if not want_gradient:
            return losses, None, None
        # d loss / d logits = softmax - onehot, then through the cap: d capped / d raw = 1 - tanh^2
        grad = torch.exp(logits - log_total)
        grad = grad.scatter_add_(1, index, torch.full_like(own, -1.0)) if chosen is None else grad - chosen.float()
        if cap:
            if vocab_size < logits.shape[1]:
                logits[:, vocab_size:] = 0
            grad.mul_(logits.div_(cap).square_().neg_().add_(1))
        grad = grad.mul_(counted[:, None]).to(x.dtype)
        return losses, grad @ weight, grad.T @ x


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float,
        reduction: str,
        vocab_size: int,
        rows: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        """X (N, C), weight (V or more, C), targets (N) → the sum of losses, or one for each row (N)."""
        want_gradient = reduction == "sum" and any(ctx.needs_input_grad[:2])
        w = weight.to(x.dtype)
        losses = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if want_gradient else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if want_gradient else None
        for start in range(0, x.shape[0], rows):
            chunk = slice(start, start + rows)
            losses[chunk], more_x, more_w = chunk_loss(x[chunk], w, targets[chunk], cap, vocab_size, want_gradient)
            if grad_x is not None and grad_w is not None:
                grad_x[chunk] = more_x
                grad_w += more_w
        if want_gradient:
            ctx.save_for_backward(grad_x, grad_w)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):  # type: ignore[override]
        """Scale the gradients that forward computed."""
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_output.to(grad_x.dtype), grad_w * grad_output, None, None, None, None, None, None
