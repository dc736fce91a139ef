"""AdamW (arXiv 1711.05101): torch's fused one."""

from __future__ import annotations

import inspect
import math

import torch

from pretrain.config import Config, GroupConfig, OptimConfig
from pretrain.errors import UsageError, did_you_mean
from pretrain.model import GPT
from pretrain.optim.optimizer import Optimizer


class AdamW(Optimizer, torch.optim.AdamW):
    """Each of ``groups`` has its own rate and decay; ``optim.groups`` divides them further. The kernel itself reads
    ``found_inf``.
    """

    # As torch's own without what torch.compile needs of it, as in Optimizer.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, groups: list[dict], config: OptimConfig, model: GPT):
        groups = divided(groups, config, model)
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def divided(groups: list[dict], config: OptimConfig, model: GPT) -> list[dict]:
    """The groups with ``optim.groups`` applied: one for all parameters of a group to which the same applies.

    Of several that name a parameter the longest applies. Raises UsageError if one names none of the parameters.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    divided: dict[tuple[int, str], dict] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            matching = [key for key in config.groups if f"{names[parameter]}.".startswith(f"{key}.")]
            key = max(matching, key=len, default="")
            own = config.groups.get(key, GroupConfig())
            values = {
                "lr": own.lr or group["lr"] * own.lr_factor,
                "betas": own.betas or config.betas,
                "weight_decay": group["weight_decay"] if own.weight_decay is None else own.weight_decay,
            }
            divided.setdefault((number, key), {"params": [], **values})["params"].append(parameter)
    for key in config.groups:
        if not any(key == applied for _, applied in divided):
            there = {names[p].partition(".")[0] for group in groups for p in group["params"]}
            hint = did_you_mean(key, sorted(there))
            raise UsageError(f"optim.groups.{key} names no parameter of this model that AdamW updates{hint}")
    return list(divided.values())


def build(model: GPT, config: OptimConfig) -> list[Optimizer]:
    """One rate for all parameters; decay on matrices only, or with ``decay_all`` on everything."""
    decayed = [p for p in model.parameters() if p.ndim >= 2 or config.decay_all]
    rest = [p for p in model.parameters() if not (p.ndim >= 2 or config.decay_all)]
    groups = [
        {"params": decayed, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": rest, "lr": config.lr, "weight_decay": 0.0},
    ]
    return [AdamW(groups, config, model)]


def settings(step: int, config: Config) -> dict[str, float]:
    """Nothing but the learning rate follows the schedule."""
    return {}


def state_bytes(counts: dict[str, int]) -> int:
    """Two moments in fp32."""
    return 8 * sum(counts.values())


def exchanged_bytes(counts: dict[str, int], dtype: torch.dtype) -> int:
    """Elementwise: each process updates what it holds."""
    return 0


def usual_rates(config: OptimConfig, parameters: int) -> tuple[float, float, float]:
    """A tenth to ten times the fit of Kaplan et al. (arXiv 2001.08361, equation D.1; not fitted below 1e-4)."""
    usual = max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))
    return usual / 10, usual, usual * 10
