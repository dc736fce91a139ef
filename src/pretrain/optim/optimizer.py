"""What training needs of an optimizer besides ``step``."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.optim.distributed import Exchange
from pretrain.optim.schedule import learning_rate_factor


class Optimizer(torch.optim.Optimizer):
    """The base of every optimizer here; each parameter group has its ``peak_lr``."""

    # Without its decorator, which imports all of torch.compile at the first call, in 0.7 s; no optimizer is compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    found_inf: Tensor | None = None
    """A scalar, set before ``step``: where it is positive, parameters and state must keep every bit."""

    def set_step(self, step: int, config: Config) -> None:
        """Set what the schedule decides for ``step`` (0 for the first): here each group's learning rate."""
        factor = learning_rate_factor(config.schedule, step, config.train.steps)
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def compile(self) -> None:
        """Called once if the model is compiled for a GPU; one whose update is a single kernel has nothing to do."""

    def share(self, exchange: Exchange, shapes: dict[Tensor, torch.Size]) -> None:
        """Called once if several processes train together; an elementwise optimizer has nothing to do.

        ``exchange`` lets them work on whole matrices together; ``shapes`` has the whole shape of every parameter, of
        which this process may hold some rows.
        """
