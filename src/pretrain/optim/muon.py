"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

A matrix's momentum is replaced by the nearest matrix with all singular values near 1, so every direction of the weight
moves at the same rate. Matrices of one shape are stacked and orthogonalised together, in few large products.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import Config, OptimConfig
from pretrain.model import GPT
from pretrain.optim import adamw
from pretrain.optim.distributed import Exchange, alone, in_turns
from pretrain.optim.optimizer import Optimizer
from pretrain.optim.schedule import stable_share
from pretrain.sizing import matrices

CLASSIC = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic a x + b x^3 + c x^5: steep at 0, so that five rounds bring all singular values to about 0.7-1.2."""

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Quintics that follow each other, each the best for what the ones before leave (Amsel et al., arXiv 2505.16932)."""


Part = TypeVar("Part", bound=Callable[..., Any])

STACK = 2**25
"""Numbers in the matrices that one process works on at a time: it fills a GPU, and needs 0.5 GB at most."""


def quintics(kind: str, rounds: int) -> list[tuple[float, float, float]]:
    """The coefficients of each round. Fewer than five of Polar Express are taken evenly: the first lifts, the last
    settles.
    """
    if kind == "classic":
        return [CLASSIC] * rounds
    return [POLAR_EXPRESS[round(i * (len(POLAR_EXPRESS) - 1) / (rounds - 1))] for i in range(rounds)]


def orthogonalize(matrices: Tensor, kind: str, rounds: int, eps: float = 1e-7) -> Tensor:
    """The orthogonal factor of each matrix in (N, R, C), to about 0.3 in its singular values, by Newton-Schulz.

    Computes in the dtype of the matrices; bfloat16 suffices, as the result is only a direction.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]  # products with the smaller side are the cheaper ones
    # Polar Express converges for singular values up to 1, which bfloat16 would round beyond: hence a little below.
    limit = 1.0 if kind == "classic" else 1.01
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * limit + eps)
    for a, b, c in quintics(kind, rounds):
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def equilibrate(matrices: Tensor) -> Tensor:
    """Each of (N, R, C) with all its rows scaled to their root mean square norm (MuonEq, arXiv 2603.28254)."""
    norms = matrices.float().norm(dim=-1, keepdim=True)
    common = norms.square().mean(dim=-2, keepdim=True).sqrt()
    return matrices * (common / norms.clamp_min(1e-6)).to(matrices.dtype)


def renormalize(matrices: Tensor) -> Tensor:
    """Each of (N, R, C) scaled to the Frobenius norm of an orthogonal matrix (Muon+, arXiv 2602.21545)."""
    norms = matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    return matrices * (min(matrices.shape[-2:]) ** 0.5 / norms)


def equalize_neurons(matrices: Tensor, mean_squares: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Divide each row, or column of wide ones, of (N, R, C) by the root of its mean square, averaged over the steps.

    The Frobenius norm stays (NorMuon, arXiv 2510.05491). ``mean_squares`` are the averages so far, (N, R) or (N, C);
    also returns the new ones.
    """
    along = -1 if matrices.shape[-2] >= matrices.shape[-1] else -2
    now = matrices.square().mean(dim=along)
    mean_squares = mean_squares.lerp(now, 1 - beta2)
    scale = mean_squares.clamp_min(1e-10).rsqrt()
    before, after = (squares.sum(dim=-1, keepdim=True).sqrt() for squares in (now, now * scale.square()))
    scale = scale * before / after.clamp_min(1e-10)
    return matrices * scale.unsqueeze(along), mean_squares


Scalar = float | Tensor
"""A number that changes from step to step; where the update is compiled a tensor, so that it is compiled once."""


def accelerate(buffer: Tensor, gradient: Tensor, direction: Tensor, momentum: Scalar, good: Tensor | None) -> None:
    """Fold a gradient into the momentum ``buffer``, unless not ``good``, and write Nesterov's ``direction``."""
    new = buffer.lerp(gradient, 1 - momentum)
    direction.copy_(gradient.lerp(new, momentum))
    buffer.copy_(new if good is None else torch.where(good, new, buffer))  # select: a zero times NaN would still be NaN


def move(
    parameter: Tensor, direction: Tensor, rate: Scalar, decay: Scalar | None, config: OptimConfig, good: Tensor | None
) -> None:
    """Add ``rate`` times the direction and ``decay`` times the parameter, unless not ``good``."""
    change = direction.float() * rate
    if decay is not None:
        shrink = parameter * decay
        if config.cautious:
            agreement = change * shrink
            shrink = torch.where(agreement >= 0 if config.nanochat_decay else agreement > 0, shrink, 0)
        change = change.add_(shrink)
    # x + -0.0 is x in every bit, also for x = -0.0
    parameter.add_(change if good is None else torch.where(good, change, -0.0))


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised in ``dtype``, for the hidden matrices of a network."""

    exchange: Exchange = staticmethod(alone)

    def __init__(self, params: Iterable[Tensor], config: OptimConfig, dtype: torch.dtype = torch.float32):
        defaults = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        super().__init__(params, defaults)
        self.config, self.dtype = config, dtype
        self.shapes: dict[Tensor, torch.Size] = {}
        self.processes = 1
        self.compiled: dict[Any, Any] = {}
        for group in self.param_groups:
            assert all(p.ndim == 2 for p in group["params"]), "Muon is for matrices"

    def set_step(self, step: int, config: Config) -> None:
        """See :class:`Optimizer`."""
        super().set_step(step, config)
        for group in self.param_groups:
            group.update(settings(step, config))

    def share(self, exchange: Exchange, shapes: dict[Tensor, torch.Size]) -> None:
        """See :class:`Optimizer`: each process orthogonalises some whole matrices, and has the state of those."""
        self.exchange, self.shapes, self.processes = exchange, shapes, dist.get_world_size()

    def compile(self) -> None:
        """See :class:`Optimizer`: what is done to each number of a matrix in one pass; products are as they were."""
        parts = (accelerate, move, equilibrate, renormalize, equalize_neurons)
        self.compiled = {part: torch.compile(part, dynamic=False) for part in parts}

    def _part(self, part: Part) -> Part:
        """A part of the update, compiled or not."""
        return self.compiled.get(part, part)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        updates, before = [], 0
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[self.shapes.get(p, p.shape)].append(p)
            for shape, parameters in by_shape.items():
                size = self.processes * max(1, STACK // shape.numel())
                updates += [
                    self._update(parameters[first : first + size], shape, before + first, group)
                    for first in range(0, len(parameters), size)
                ]
                before += len(parameters)
        in_turns(updates)

    def _update(self, parameters: list[Tensor], shape: torch.Size, before: int, group: dict) -> Iterator[None]:
        """Update parameters of one shape (R, C) as a stack; ``before`` matrices are in stacks before this one."""
        config = self.config
        good = None if self.found_inf is None else self.found_inf == 0

        def scalar(value: float) -> Scalar:
            return torch.full((), value, device=parameters[0].device) if self.compiled else value

        def begin(start: int, stop: int) -> Tensor:
            own = parameters[start:stop]
            momentum = scalar(group["momentum"])
            directions = parameters[0].new_empty(len(own), *parameters[0].shape, dtype=self.dtype)
            for p, direction in zip(own, directions, strict=True):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                assert p.grad is not None
                self._part(accelerate)(self.state[p]["momentum_buffer"], p.grad, direction, momentum, good)
            return directions

        def work(matrices: Tensor, start: int) -> Tensor:
            return self._direction(matrices, parameters[start : start + len(matrices)])

        rows, columns = shape
        orthogonal = yield from self.exchange(len(parameters), rows, before, begin, work)
        scale = max(1, rows / columns) ** 0.5 if config.update_scale == "spectral" else 0.2 * max(rows, columns) ** 0.5
        rate, decay = scalar(-group["lr"] * scale), None
        if group["weight_decay"]:
            decay = scalar(-group["lr"] * group["weight_decay"] * (scale if config.nanochat_decay else 1.0))
        for p, direction in zip(parameters, orthogonal, strict=True):
            self._part(move)(p, direction, rate, decay, config, good)

    def _direction(self, matrices: Tensor, parameters: list[Tensor]) -> Tensor:
        """The directions of update for whole matrices (N, R, C) of momentum, those of N ``parameters``."""
        config = self.config
        if config.row_equilibration:
            matrices = self._part(equilibrate)(matrices)
        kind, rounds = config.newton_schulz, config.newton_schulz_steps
        update = orthogonalize(matrices, kind, rounds, config.newton_schulz_eps)
        if config.renormalize:
            update = self._part(renormalize)(update.float())
        if config.normuon_beta2:
            # Only the process that works on a matrix has this state; a checkpoint has it from whichever that was.
            states = [self.state[p] for p in parameters]
            for state in states:
                if "mean_square" not in state:
                    state["mean_square"] = update.new_zeros(max(update.shape[-2:]), dtype=torch.float32)
            old = torch.stack([state["mean_square"] for state in states])
            update, new = self._part(equalize_neurons)(update.float(), old, config.normuon_beta2)
            if self.found_inf is not None:
                new = torch.where(self.found_inf == 0, new, old)
            torch._foreach_copy_([state["mean_square"] for state in states], list(new.unbind()))
        return update.to(matrices.dtype)


def build(model: GPT, config: OptimConfig) -> list[Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, head, and norms, biases and scalars, each with its own rate
    and without decay, unless ``optim.groups`` says otherwise.
    """
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
    head = [] if model.config.tied_head else [model.head.weight]
    bigrams = [] if model.bigram_embedding is None else [model.bigram_embedding.weight]
    tables = [module for module in model.children() if isinstance(module, torch.nn.Embedding)]
    embeddings = [table.weight for table in tables if table is not model.bigram_embedding]
    value_embeddings = list(model.value_embeddings.parameters())
    claimed = {id(p) for p in (*blocks, *head, *embeddings, *value_embeddings, *bigrams)}
    scalars = [p for p in model.parameters() if id(p) not in claimed]
    width = (model.config.width / 768) ** -0.5 if config.width_scaling else 1.0
    rates = (
        (embeddings, config.embedding_lr * width),
        (value_embeddings, (config.value_embedding_lr or config.embedding_lr) * width),
        (bigrams, config.bigram_lr * width),
        (head, config.head_lr * width),
        (scalars, config.scalar_lr),
    )
    groups = [{"params": parameters, "lr": lr, "weight_decay": 0.0} for parameters, lr in rates]
    return [Muon(blocks, config, products_dtype(model.activation_dtype)), adamw.AdamW(groups, config, model)]


def products_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of Newton-Schulz: bf16 with bf16 activations; fp16 lacks the range."""
    return torch.bfloat16 if activations == torch.bfloat16 else torch.float32


def settings(step: int, config: Config) -> dict[str, float]:
    """Momentum, up from ``momentum_from`` and down to ``momentum_final`` with a linear schedule; and weight decay."""
    optim, steps = config.optim, config.train.steps
    momentum = optim.momentum
    if step < optim.momentum_warmup_steps:
        momentum = optim.momentum_from + (momentum - optim.momentum_from) * step / optim.momentum_warmup_steps
    elif optim.momentum_final and config.schedule.kind == "linear":
        stable = stable_share(config.schedule, step, steps)
        momentum = optim.momentum_final + (momentum - optim.momentum_final) * stable
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if optim.decay_to_zero else 1.0
    return {"momentum": momentum, "weight_decay": optim.weight_decay * decay}


def state_bytes(counts: dict[str, int]) -> int:
    """One moment in fp32 for the blocks' matrices, AdamW's two for the rest; NorMuon's few numbers are not counted."""
    return adamw.state_bytes(counts) - 4 * matrices(counts)


def exchanged_bytes(counts: dict[str, int], dtype: torch.dtype) -> int:
    """The blocks' matrices, in the dtype of Newton-Schulz."""
    return matrices(counts) * products_dtype(dtype).itemsize


def usual_rates(config: OptimConfig, parameters: int) -> tuple[float, float, float]:
    """0.02 with the original scale; with ``rms``, made for AdamW's rates, those."""
    usual = 0.02 if config.update_scale == "spectral" else adamw.usual_rates(config, parameters)[1]
    return usual / 10, usual, usual * 20
