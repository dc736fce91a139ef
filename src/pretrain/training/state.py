"""A run in progress, and the one pair of functions that saves it and loads it back.

A checkpoint is tensors by name (``model.NAME``, ``ema.NAME``, ``optim.NAME.KEY``, the guard's, the loss scale's, random
states) and the plain values of :class:`Progress`. Everything else is a function of the step: the data order and the
schedules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.model import GPT
from pretrain.optim import Optimizer
from pretrain.runs.checkpoint import Checkpoint, name_in_checkpoint
from pretrain.tokens import Batches, merge_states
from pretrain.training.average import WeightAverage
from pretrain.training.guard import Guard, LossScale
from pretrain.training.parallel import Parameters
from pretrain.training.world import World


@dataclass
class Progress:
    """How far a run is: the plain values of a checkpoint, as ``state.json`` holds them."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Seconds spent, over all resumes."""
    precision: str = ""
    micro_rows: int = 0
    """Rows in a forward and backward pass: a resume keeps it, since another would round differently."""
    data: str = ""
    """The fingerprint of the training data."""
    batches: dict[str, Any] = field(default_factory=dict)
    """Where the readers of a live stream are; empty for token shards, whose batches are functions of the step."""
    skipped_batches: int = 0
    """Batches skipped by rolling back: the next step takes batch ``step + skipped_batches``. Of a fork with other
    batches what makes that the place in the data, perhaps below 0."""
    more_tokens: int = 0
    """Tokens above ``train.batch_tokens`` of each step so far, in all: those of a fork's parent may differ."""
    went_back_to: int = 0
    """The step to which ``--resume-from`` went back."""
    pending: dict[str, Any] | None = None
    """Metrics of the last step while its validation is still to be done."""
    world: int = 1
    """Number of processes that saved."""

    @staticmethod
    def of(checkpoint: Checkpoint | None) -> Progress:
        """The values of a checkpoint; those of a new run without one."""
        state = checkpoint.state if checkpoint else {}
        state.setdefault("skipped_batches", state.get("left_out", 0))  # its name in older checkpoints
        return msgspec.convert(state, Progress)


@dataclass
class TrainState:
    """All that a step reads and changes."""

    config: Config
    world: World
    model: GPT
    forward: Callable[..., Tensor]
    """What a training step calls in place of the model: under DDP its wrapper."""
    parameters: Parameters
    optimizers: list[Optimizer]
    loss_scale: LossScale
    guard: Guard
    batches: Batches
    progress: Progress
    average: WeightAverage | None = None
    """That of the weights, with ``optim.ema``."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a checkpoint holds: tensors of this process, and plain values. All processes call it."""
        progress = self.progress
        batches = self.world.gather(self.batches.state(progress.step + progress.skipped_batches))
        progress.batches, progress.world = merge_states(batches), self.world.size
        return self.tensors(), dataclasses.asdict(progress)

    def load_state_dict(self, checkpoint: Checkpoint, batches: bool = True) -> None:
        """Go back to a checkpoint, saved by any number of processes; ``batches`` False leaves the data where it is.

        All processes call it.
        """
        progress, rank = Progress.of(checkpoint), self.world.rank
        self.parameters.reshard()
        tensors, index = self.tensors(), checkpoint.index(self.world)
        if missing := {name for name in tensors if name.startswith("random.")} - index.keys():
            # Saved without a random state for this rank or type of device: seed anew, differently at each step.
            tensors = {name: tensor for name, tensor in tensors.items() if name not in missing}
            torch.manual_seed(self.config.train.seed + rank + 1_000_003 * checkpoint.step)
        checkpoint.load(tensors, self.parameters.part, index)
        set_random_state(tensors, rank, self.world.device)
        if batches:
            self.batches.restore(progress.batches)
        self.progress = dataclasses.replace(progress, micro_rows=self.progress.micro_rows)

    def load_weights(self, checkpoint: Checkpoint, weights: str) -> None:
        """Give the model alone the ``last`` weights of a checkpoint or their ``average``. All processes call it."""
        self.parameters.reshard()
        values = {name_in_checkpoint(name, weights): p.detach() for name, p in self.parameters.local.items()}
        checkpoint.load(values, self.parameters.part, checkpoint.index(self.world))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by name, to be read or filled in place."""
        local = self.parameters.local
        tensors = {f"model.{name}": parameter.detach() for name, parameter in local.items()}
        if self.average:
            tensors |= {f"ema.{name}": value for name, value in self.average.values.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in local.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                tensors |= {f"optim.{names[parameter]}.{key}": value for key, value in values.items()}
        random = random_state(self.world.rank, self.world.device)
        return tensors | self.loss_scale.tensors | self.guard.tensors | random

    def make_moments(self) -> None:
        """Give the optimizers their state, for a checkpoint to be loaded into: by an update that changes nothing."""
        for parameter in self.parameters.local.values():
            parameter.grad = torch.zeros_like(parameter)
        update(self.optimizers, 0, self.config, skip=torch.ones((), device=self.world.device))
        self.parameters.zero_grad()


def update(optimizers: Iterable[Optimizer], step: int, config: Config, skip: Tensor) -> None:
    """Step all optimizers; where ``skip`` is 1 parameters and moments keep every bit. Does not wait for the device."""
    for optimizer in optimizers:
        optimizer.set_step(step, config)
        optimizer.found_inf = skip
        optimizer.step()


def random_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The random states that this process draws from in training (dropout)."""
    state = {f"random.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"random.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Set what :func:`random_state` gave, as far as ``state`` has it."""
    if f"random.cpu.{rank}" in state:
        torch.set_rng_state(state[f"random.cpu.{rank}"])
    if f"random.cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"random.cuda.{rank}"], device)
