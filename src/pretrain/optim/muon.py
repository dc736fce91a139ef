"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

A matrix's momentum is replaced by the nearest matrix with all singular values near 1, so every direction of the weight
moves at the same rate. Matrices of one shape are stacked and orthogonalised together, in few large products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: steep at 0, so that five rounds bring all singular values near 1."""


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The orthogonal factor of each matrix in (N, R, C), to about 0.3 in its singular values, by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products below are square in the first dimension: make it the smaller one
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for the hidden matrices of a network.

    Updates are scaled by sqrt(max(1, rows / columns)), as in the original. ``found_inf``, when set to a positive
    scalar tensor before :meth:`step`, leaves parameters and momentum bit for bit as they are (torch's fused AdamW reads
    the same attribute).

    Args:
        params: matrices (two dimensions each).
        lr: learning rate; about 0.02 regardless of width.
        momentum: decay of the running gradient.
        weight_decay: decoupled, times the learning rate.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            assert all(p.ndim == 2 for p in group["params"]), "Muon is for matrices"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for shape, parameters in by_shape.items():
                self._step_stack(parameters, shape, group)

    def _step_stack(self, parameters: list[Tensor], shape: tuple[int, ...], group: dict) -> None:
        """Update parameters of one shape (R, C) as a stack (N, R, C)."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        old = torch.stack(buffers)
        momentum = old.lerp(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp_(momentum, group["momentum"]))
        change = update.mul_(-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)
        if group["weight_decay"]:
            change.add_(torch.stack(parameters), alpha=-group["lr"] * group["weight_decay"])
        if self.found_inf is not None:  # select: a zero times NaN would still be NaN
            good = self.found_inf == 0
            momentum = torch.where(good, momentum, old)
            change = torch.where(good, change, -0.0)  # x + -0.0 is x in every bit, also for x = -0.0
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        torch._foreach_add_(parameters, list(change.unbind()))
