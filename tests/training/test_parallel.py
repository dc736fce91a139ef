from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention
from tests.training.test_loop import change
from tests.training.test_world import assert_near
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import Config, load_config
from pretrain.device import Precision
from pretrain.errors import UsageError
from pretrain.model import GPT, meta_model
from pretrain.model.packed import for_inference
from pretrain.model.transformer import Block, Linear
from pretrain.plan.cluster import Layout, traffic
from pretrain.sizing import count_parameters
from pretrain.training import train
from pretrain.training.parallel import (
    choose_attention,
    choose_parallelism,
    init_parameters,
    parallelize,
    repays_compiling,
    training_forward,
    use_fp8,
)
from pretrain.training.world import World


def small_model(**fields: Any) -> GPT:
    model = GPT(load_config("quickstart", **{"model.layers": 2} | fields).model, 64)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.activation_dtype = torch.bfloat16
    return model


def test_fp8_is_near_bf16_and_keeps_every_name():
    """Emulated: the same numbers as on the hardware."""
    pytest.importorskip("torchao")
    model = small_model()
    tokens, targets = torch.randint(0, 64, (2, 4, 128)).unbind()
    names = [name for name, _ in model.named_parameters()]

    def loss_and_gradients() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients)

    loss, gradient = loss_and_gradients()
    use_fp8(model, emulate=True)
    loss_fp8, gradient_fp8 = loss_and_gradients()
    assert [name for name, _ in model.named_parameters()] == names
    assert loss_fp8 != loss
    assert loss_fp8 == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, gradient_fp8, dim=0) > 0.98
    with torch.no_grad():
        assert model.eval()(tokens, targets).item() == loss  # evaluated without fp8


def test_small_layers_are_not_computed_in_fp8():
    pytest.importorskip("torchao")
    model = small_model(**{"model.mlp_width": 112})
    use_fp8(model, emulate=True)
    assert [type(layer) is Linear for layer in (model.blocks[0].attention.out, model.blocks[0].mlp.up)] == [False, True]  # type: ignore[union-attr]


def test_fp8_without_the_hardware_is_refused():
    config = load_config("quickstart", **{"train.fp8": True})
    cpu = torch.device("cpu")
    with pytest.raises(UsageError, match=r"train.fp8 needs a GPU of compute capability 8\.9"):
        parallelize(small_model(), "none", config, World(cpu), Precision("bf16", cpu), print)


def test_a_run_that_repays_compiling_is_compiled():
    def compiled(device: str, **fields: Any) -> bool:
        config = load_config("quickstart", **{f"train.{name}": value for name, value in fields.items()})
        return repays_compiling(config, 4096, torch.device(device))

    assert not compiled("cpu")
    assert compiled("cpu", compile="on")
    assert compiled("cpu", steps=5000)
    assert not compiled("mps", steps=5000)
    assert not compiled("cuda", compile="off")
    assert compiled("cuda")


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that torch.compile finds in modules; they run as they are, without a compiler."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    compile = nn.Module.compile
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "")
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile(module, backend=keep, **how))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, for FSDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("free", "machines", "kind"),
    [
        (25.0, [4] * 8, "ddp"),
        (25.0 / 3, [4] * 8, "hsdp"),
        (25.0 / 5, [4] * 8, "fsdp"),  # it does not fit on a machine
        (25.0 / 3, [8] * 8, "fsdp"),  # one machine
        (25.0 / 3, [1] * 8, "fsdp"),  # one process on each
        (25.0 / 3, [4] * 4 + [2] * 4, "fsdp"),  # machines that are not alike
    ],
)
def test_how_processes_share_a_model(free: float, machines: list[int], kind: str, monkeypatch):
    """By the bytes that are free for each parameter: 20 must take at most 60 %, whole or divided in a machine."""
    config = load_config("quickstart", **{"model.layers": 2})
    parameters = sum(p.numel() for p in meta_model(config.model, 64).parameters())
    monkeypatch.setattr("pretrain.training.parallel.free_memory", lambda device: int(free / 0.6 * 0.81 * parameters))
    world = World(torch.device("cuda"), 0, len(machines), machines[0])
    monkeypatch.setattr(World, "gather", lambda *_: machines)
    assert choose_parallelism(config, 64, world) == kind


class Gathered(TorchDispatchMode):
    """While entered, lists how many bytes each all-gather gives, as the process group is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_tables_and_head_are_gathered_by_themselves(tied: bool):
    """Each table once, in fp32, and freed; the head once, in the dtype of the products, as blocks; as planned."""
    fields = {"model.layers": 4, "model.value_embeddings": True, "model.bigram_rows": 512, "model.tied_head": tied}
    fixed = {"model.norm_weight": False, "model.smear": False, "model.residual_scalars": False, "optim.kind": "adamw"}
    config = load_config("quickstart", **fields, **fixed, **{"model.context_length": 32, "train.compile": "off"})
    cpu, width, rows = torch.device("cpu"), config.model.width, 256
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        model = meta_model(config.model, rows)
        model.activation_dtype = torch.bfloat16
        parallelize(model, "fsdp", config, World(cpu, 0, 4, 4), Precision("bf16", cpu), print)
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        with Gathered() as gathered:
            loss = model(*torch.randint(0, rows, (2, 2, 32)))
            assert all(
                isinstance(table.weight, DTensor)
                for table in (model.bigram_embedding, *model.value_embeddings.values())
            )  # type: ignore[union-attr]
            assert isinstance(model.embedding.weight, DTensor) != tied
            loss.backward()
    finally:
        dist.destroy_process_group()
    blocks = [sum(p.numel() for p in block.parameters()) for block in meta_model(config.model, rows).blocks]
    table, twice = rows * width, [2 * size for size in blocks]
    middle = [twice[0], 4 * table, twice[1], twice[2], 4 * table, twice[3]]
    last = [] if tied else [2 * table]
    assert gathered.bytes == [4 * table, 4 * 512 * width, *middle, *last, *twice[::-1]]
    sent = traffic(config, rows, Layout("fsdp", 4), 1, torch.bfloat16)["inside"]
    gradients = 4 * sum(count_parameters(config.model, rows).values())
    assert sent == (sum(gathered.bytes) + gradients) * 3 // 4


VARIED = {
    "model__layers": 5,
    "model__window_pattern": "SSL",
    "model__window": 8,
    "model__value_embeddings": True,
    "eval__tokens": 40 * 32,
    "eval__train_tokens": 9 * 32,
    "sample__max_tokens": 12,
}
"""Blocks of three kinds, validated on three numbers of rows that no 16 divides, and sampled from."""


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["none", "ddp", "fsdp"])
def test_nothing_is_compiled_twice(
    parallelism: str, tiny: Config, tmp_path: Path, graphs: list, one_process: None, monkeypatch
):
    """Once to train and once to evaluate: no batch of a validation and no sample is compiled by itself."""
    monkeypatch.setattr("pretrain.sizing.VALIDATION_TOKENS", 16 * 32)
    eager = train(change(tiny, **VARIED, train__compile="off"), tmp_path / "eager")
    monkeypatch.setattr("pretrain.training.setup.choose_parallelism", lambda *_: parallelism)
    run = train(change(tiny, **VARIED, train__compile="on"), tmp_path / "run")
    assert len(graphs) == 2 * (3 + 1)  # the blocks of three kinds and the loss
    assert_near(run, eager)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["none", "fsdp"])
def test_a_run_in_blocks_is_the_run_with_masks(
    parallelism: str, tiny: Config, tmp_path: Path, graphs: list, one_process: None, monkeypatch
):
    """Trained, validated and sampled from, with no more compiled: what is not compiled has masks.

    By PyTorch's reference of the operation, which it does not offer on a CPU otherwise.
    """
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr("pretrain.training.setup.choose_parallelism", lambda *_: parallelism)
    monkeypatch.setattr("pretrain.sizing.VALIDATION_TOKENS", 4 * 128)
    sizes = {"model__context_length": 128, "train__batch_tokens": 512, "eval__tokens": 11 * 128}
    config = change(tiny, **VARIED | sizes, model__document_mask=True, train__compile="on")
    runs, compiled = [], []
    for in_blocks in (False, True):

        def parallelized(model: GPT, *given: Any, in_blocks: bool = in_blocks) -> bool:
            model.in_blocks = in_blocks
            return parallelize(model, *given)

        monkeypatch.setattr("pretrain.training.setup.parallelize", parallelized)
        torch.compiler.reset()
        graphs.clear()
        runs.append(train(config, tmp_path / str(in_blocks)))
        compiled.append(len(graphs))
    assert compiled == [2 * (2 + 1), 2 * (3 + 1)]  # a mask does not tell windows and none apart
    assert_near(*runs)


@pytest.mark.parametrize("parallelism", ["none", "ddp", "fsdp"])
def test_blocks_have_one_graph(parallelism: str, graphs: list[torch.fx.GraphModule], one_process: None):
    """All together, though each has more than DDP adds up at first; with the gradients of what is not compiled."""
    cpu, found = torch.device("cpu"), []
    tokens, targets = torch.randint(0, 64, (2, 4, 32)).unbind()
    fields = {"model.layers": 3, "model.context_length": 32, "model.bigram_rows": 64, "model.backout": True}
    for compiled in ("off", "on"):
        config = load_config("quickstart", **fields, **{"train.compile": compiled})
        model = meta_model(config.model, 64)
        parallelize(model, parallelism, config, World(cpu), Precision("fp32", cpu), print)
        init_parameters(model, World(cpu), lambda whole: whole.load_state_dict(small_model(**fields).state_dict()))
        assert sum(p.nbytes for p in model.blocks[0].parameters()) > dist._DEFAULT_FIRST_BUCKET_BYTES
        training_forward(model, parallelism, World(cpu))(tokens, targets).backward()
        found.append([p.grad.norm().item() for p in model.parameters() if p.grad is not None])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert min(found[0]) > 0
    assert len(graphs) == 2  # a block and the loss


@pytest.mark.parametrize("parallelism", ["none", "ddp", "fsdp"])
def test_activation_checkpointing_is_compiled_too(
    parallelism: str, graphs: list[torch.fx.GraphModule], one_process: None
):
    """As many graphs with it as without, each with what is computed again in it, and the same gradients."""
    cpu, found, norms = torch.device("cpu"), [], []
    tokens, targets = torch.randint(0, 64, (2, 4, 32)).unbind()
    for checkpointing in (False, True):
        fields = {"model.layers": 3, "model.context_length": 32, "train.compile": "on"}
        config = load_config("quickstart", **fields, **{"train.activation_checkpointing": checkpointing})
        model = meta_model(config.model, 64)
        parallelize(model, parallelism, config, World(cpu), Precision("fp32", cpu), print)
        init_parameters(model, World(cpu), lambda whole: whole.init_weights(torch.Generator().manual_seed(0)))
        model(tokens, targets).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())
        again = sum("checkpoint" in str(node.target) for graph in graphs for node in graph.graph.nodes)
        found.append((len(graphs), again))
        graphs.clear()
        torch.compiler.reset()
    (plain, none), (compiled, again) = found
    assert plain == compiled > 1
    assert (none, again) == (0, compiled - 1)  # all but the loss
    assert norms[0] == norms[1]


@pytest.mark.parametrize("parallelism", ["whole", "none", "ddp", "fsdp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_in_blocks_is_compiled_once(
    parallelism: str, checkpointing: bool, graphs: list[torch.fx.GraphModule], one_process: None, monkeypatch
):
    """For all batches, though their documents differ, with the gradients of masks; whole, as on one GPU, and by parts.

    By PyTorch's reference of the operation, which it does not offer on a CPU otherwise.
    """
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    cpu, found = torch.device("cpu"), []
    shape = {"model.layers": 2, "model.width": 32, "model.heads": 2, "model.kv_heads": 1, "model.context_length": 256}
    masks = {"model.window_pattern": "SL", "model.window": 100, "model.document_mask": True}
    batches = torch.randint(0, 64, (3, 2, 2, 256), generator=torch.Generator().manual_seed(0))
    for in_blocks in (False, True):
        torch.compiler.reset()
        graphs.clear()
        how = {
            "train.compile": "off" if parallelism == "whole" else "on",
            "train.activation_checkpointing": checkpointing,
        }
        config = load_config("quickstart", **shape, **masks, **how)
        model = meta_model(config.model, 64, bos_id=0)
        parallelize(model, parallelism, config, World(cpu), Precision("fp32", cpu), print)
        if parallelism == "whole":
            model.compile(dynamic=False)
        model.in_blocks = in_blocks
        init_parameters(model, World(cpu), lambda whole: whole.init_weights(torch.Generator().manual_seed(0)))
        forward, norms = training_forward(model, parallelism, World(cpu)), []
        for tokens, targets in batches:
            forward(tokens, targets).backward()
            norms += [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        operations = [
            str(node.target) for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
        ]  # fmt: skip
        found.append(norms)
        assert operations.count("flex_attention") == 2 * in_blocks  # once in each of two layers
        parts = 3 if in_blocks else 2  # one layer has a window, which a mask does not tell; and the loss
        assert len(graphs) == (1 if parallelism == "whole" else parts)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "problem", "in_blocks", "words"),
    [
        ({}, "", False, "by PyTorch's causal kernel"),
        ({"model.window_pattern": "SL"}, "", True, "by flex_attention, which skips what windows and documents hide"),
        ({"model.document_mask": True}, "", True, "by flex_attention, which skips what windows and documents hide"),
        (
            {"model.document_mask": True}, "no memory", False,
            "by masks, so that windows and documents save no time (no memory)",
        ),
        (
            {"model.window_pattern": "SL", "model.dropout": 0.1}, "", False,
            "by masks, so that windows and documents save no time (model.dropout drops weights of attention)",
        ),
    ],
)  # fmt: skip
def test_how_a_gpu_computes_attention(fields: dict, problem: str, in_blocks: bool, words: str, monkeypatch):
    monkeypatch.setattr("pretrain.training.parallel.kernel_problem", lambda *_: problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config("quickstart", **{"model.layers": 2, "model.context_length": 256} | fields)
    precision = Precision("bf16", torch.device("cuda"))
    assert choose_attention(meta_model(config.model, 64, bos_id=0), precision, True) == (in_blocks, words)


def test_a_copy_of_a_model_with_activation_checkpointing_is_its_own():
    """What samples and measures: with its own weights, without the dropout of the model in training."""
    cpu, found = torch.device("cpu"), []
    fields = {"model.layers": 2, "model.dropout": 0.5, "train.compile": "off"}
    for checkpointing in (False, True):
        config = load_config("quickstart", **fields, **{"train.activation_checkpointing": checkpointing})
        model = meta_model(config.model, 64)
        parallelize(model, "none", config, World(cpu), Precision("fp32", cpu), print)
        model.init_weights(torch.Generator().manual_seed(0))
        for block in model.blocks:  # which adds nothing at first
            assert isinstance(block, Block)
            block.mlp.down.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        copy = for_inference(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        found.append(copy.blocks[0](torch.ones(1, 4, model.config.width), None, None, None, None))
    assert torch.equal(*found)
