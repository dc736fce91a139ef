"""Which optimizer claims which parameter, with which rate and decay. Every parameter is claimed exactly once."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config import OptimConfig
from pretrain.model import GPT
from pretrain.optim.muon import Muon


def build_optimizers(
    model: GPT, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; each parameter group carries its peak rate and decay.

    adamw: one rate for all; decay on matrices only (``decay_all``: on everything). muon: the blocks' matrices by Muon;
    embeddings, head, and norms, biases and scalars by AdamW, each with its own rate and no decay. ``dtype`` is that of
    Muon's matrix products.
    """
    optimizers: list[torch.optim.Optimizer]
    if config.kind == "adamw":
        decayed = [p for p in model.parameters() if p.ndim >= 2 or config.decay_all]
        rest = [p for p in model.parameters() if not (p.ndim >= 2 or config.decay_all)]
        groups = [
            {"params": decayed, "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": rest, "lr": config.lr, "weight_decay": 0.0},
        ]
        optimizers = [_adamw(groups, config)]
    else:
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        head = [model.head.weight] if model.head.weight is not model.embedding.weight else []
        embeddings = [module.weight for module in model.children() if isinstance(module, torch.nn.Embedding)]
        value_embeddings = list(model.value_embeddings.parameters())
        claimed = {id(p) for p in (*matrices, *head, *embeddings, *value_embeddings)}
        scalars = [p for p in model.parameters() if id(p) not in claimed]
        width = (model.config.width / 768) ** -0.5 if config.width_scaling else 1.0
        value_lr = config.value_embedding_lr or config.embedding_lr
        groups = [
            {"params": embeddings, "lr": config.embedding_lr * width, "weight_decay": 0.0},
            {"params": value_embeddings, "lr": value_lr * width, "weight_decay": 0.0},
            {"params": head, "lr": config.head_lr * width, "weight_decay": 0.0},
            {"params": scalars, "lr": config.scalar_lr, "weight_decay": 0.0},
        ]
        muon = Muon(
            matrices,
            config.lr,
            config.momentum,
            config.weight_decay,
            config.cautious,
            config.newton_schulz,
            config.newton_schulz_steps,
            config.update_scale,
            dtype,
        )
        optimizers = [muon, _adamw(groups, config)]
    _check_claims(model, optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"], group["peak_decay"] = group["lr"], group["weight_decay"]
    return optimizers


def _adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _check_claims(model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    claims: list[Tensor] = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for name, parameter in model.named_parameters():
        count = sum(parameter is p for p in claims)
        assert count == 1, f"parameter {name} is claimed {count} times by the optimizers"
