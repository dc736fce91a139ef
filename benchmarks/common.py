"""What the benchmarks of training share: a state for train_step without a run, and measurements in other processes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.training.state import TrainState
    from pretrain.training.world import World


def training_state(config: Config, vocabulary: int, world: World, kind: str = "none") -> TrainState:
    """A new model with its optimizers, ready for train_step on the same random rows every time."""
    import torch

    from pretrain.device import choose_precision, keep_freed_memory
    from pretrain.model import GPT
    from pretrain.optim import build_optimizers
    from pretrain.training.guard import Guard, LossScale
    from pretrain.training.parallel import Parameters, init_parameters, parallelize, training_forward
    from pretrain.training.state import Progress, TrainState

    def fill(whole: GPT) -> None:
        whole.init_weights(torch.Generator(next(whole.parameters()).device).manual_seed(0))

    if world.device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(config.train.precision, world.device)
    with torch.device("meta"):
        model = GPT(config.model, vocabulary)
    model.activation_dtype = precision.dtype
    compiled = parallelize(model, kind, config, world, precision, print)
    init_parameters(model, world, fill)
    parameters = Parameters(model, kind, world)
    optimizers = build_optimizers(model, config.optim)
    parameters.distribute(optimizers, compiled)
    forward = training_forward(model, kind, world)
    scale, guard = LossScale(precision), Guard(config.guard, world.device)
    rows = world.rows_per_rank(config.batch_rows)
    generator = torch.Generator().manual_seed(world.rank)
    rows_of_tokens = torch.randint(0, vocabulary, (2, rows, config.model.context_length), generator=generator)
    tokens, targets = rows_of_tokens.to(world.device)
    batches: Any = SimpleNamespace(batch=lambda step: (tokens, targets))
    progress = Progress(micro_rows=rows)
    return TrainState(config, world, model, forward, parameters, optimizers, scale, guard, batches, progress)


def worker(file: str, *args: str) -> dict[str, float]:
    """Run ``file worker ARGS`` in a process of its own; gives the JSON that it prints last."""
    result = subprocess.run([sys.executable, file, "worker", *args], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory() -> int:
    """Most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
