"""Other weights in the place of a model's own, for measurements: their exponential moving average (``optim.ema``), kept
beside them on the device that has them; and a head that divides its logits by a temperature (``eval.calibrate``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.training.parallel import Parameters

EVERY = 5
"""Steps between updates: one takes 2.7 % of a step of quickstart's model on a CPU, so that all take 0.5 %."""


class WeightAverage:
    """The average of what this process holds of the weights, whole or under FSDP its rows: ``values``, by name.

    It decays by ``decay`` in a step. Until enough steps are done it is their plain mean, so that the initial weights
    have no part in it; before :data:`EVERY` steps there is none.
    """

    def __init__(self, decay: float, parameters: Parameters):
        self.decay, self.parameters = decay, parameters
        self.values = {name: p.detach().clone() for name, p in parameters.local.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Take in the weights after ``step`` steps, if it is their turn; where ``skip`` is 1 every bit stays."""
        if step % EVERY:
            return
        weight = max(1 - self.decay**EVERY, EVERY / step)
        for name, parameter in self.parameters.local.items():
            average = self.values[name]
            torch.where(skip == 0, average.lerp(parameter, weight), average, out=average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the model has the average as its weights; then, whatever was raised, its own again, exactly.

        Values are exchanged, one parameter at a time: compiled and sharded models keep their tensors.
        """
        exchanged: list[str] = []
        try:
            self.parameters.reshard()
            for name in self.values:
                self._exchange(name)
                exchanged.append(name)
            yield
        finally:
            self.parameters.reshard()
            for name in exchanged:
                self._exchange(name)

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        parameter, average = self.parameters.local[name], self.values[name]
        held = parameter.clone()
        parameter.copy_(average)
        average.copy_(held)


@contextmanager
def at_temperature(parameters: Parameters, temperature: float) -> Iterator[None]:
    """While entered, the head divides its logits by ``temperature``; then it is as it was, exactly."""
    if temperature == 1:
        yield
        return
    parameters.reshard()
    head = parameters.local["head.weight"].detach()
    held = head.clone()
    head.div_(temperature)
    try:
        yield
    finally:
        parameters.reshard()
        head.copy_(held)
