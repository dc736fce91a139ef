"""7 billion parameters on 512 processes, without them: what each would hold, compared with the plan."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import Config, load_config
from pretrain.device import Precision
from pretrain.model import GPT
from pretrain.optim import Optimizer, build_optimizers
from pretrain.plan.cluster import Layout
from pretrain.sizing import count_parameters
from pretrain.training.parallel import Parameters, parallelize
from pretrain.training.world import World

VOCABULARY, PROCESSES, PER_MACHINE = 32768, 512, 8
SEVEN_BILLION = {
    "model.layers": 32,
    "model.width": 4096,
    "model.heads": 32,
    "model.mlp": "swiglu",
    "model.mlp_width": 11008,
    "model.context_length": 4096,
    "train.batch_tokens": 2**22,
    "train.compile": "off",
}


@pytest.fixture
def join() -> Iterator[Callable[[int], World]]:
    """One rank of 512 whose collectives do nothing."""

    def as_rank(rank: int) -> World:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=PROCESSES)
        return World(torch.device("cpu"), rank, PROCESSES, PER_MACHINE)

    yield as_rank
    dist.destroy_process_group()


def hold(config: Config, kind: str, world: World) -> tuple[Parameters, list[Optimizer]]:
    """A process's part of the model, with memory, and its optimizers."""
    with torch.device("meta"):
        model = GPT(config.model, VOCABULARY)
    model.activation_dtype = torch.bfloat16
    parallelize(model, kind, config, world, Precision("bf16", world.device), print)
    parameters = Parameters(model, kind, world)
    optimizers = build_optimizers(model, config.optim)
    parameters.distribute(optimizers, compiled=False)
    return parameters, optimizers


@pytest.mark.parametrize(("kind", "rank"), [("fsdp", 0), ("fsdp", 511), ("hsdp", 300)])
def test_seven_billion_parameters_on_512_processes(join: Callable[[int], World], kind: str, rank: int):
    config = load_config("quickstart", **SEVEN_BILLION)
    total = sum(count_parameters(config.model, VOCABULARY).values())
    assert 6.7e9 < total < 6.8e9
    parameters, optimizers = hold(config, kind, join(rank))
    held = sum(p.numel() for p in parameters.local.values())
    shards = Layout(kind, PROCESSES).shards
    # Rows are dealt in equal parts, so the first processes hold up to one row of each matrix more than the mean, and
    # the last ones less: 11008 rows are 22 for each of 500 processes, 8 for the next, and none for the others.
    assert held <= total / shards * 1.02
    assert held >= total / shards * (0.98 if rank < 500 else 0.5)
    claimed = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in claimed) == held
    assert {id(p) for p in claimed} == {id(p) for p in parameters.local.values()}
