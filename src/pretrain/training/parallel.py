"""What is applied to the model from outside, in one function, and the parameters as each process then holds them.

The order matters: fp8 exchanges layers, so it comes first; then activation checkpointing, so that the compiler sees
what is computed again; then torch.compile, of the whole on one GPU, else by parts: on a CPU that takes half the time,
and where several processes train a block's gradients are on their way while the next block's are computed; then FSDP,
which spreads the parameters, or DDP, which adds up their gradients. None of it changes a name or what is learned.

FSDP and DTensor take 0.8 s to import, so only those who shard do.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pretrain.config import Config
from pretrain.device import Precision, free_memory
from pretrain.errors import UsageError
from pretrain.model import GPT, meta_model
from pretrain.model.attention import kernel_problem, obstacle
from pretrain.model.transformer import Block, Embedding, Linear, head_dim, layer_kinds
from pretrain.optim import Optimizer, alone, replicated, row_sharded
from pretrain.runs.checkpoint import Part, all_of_it
from pretrain.sizing import count_parameters, flops_per_token, parallelism_that_fits
from pretrain.training.world import World

VARIANTS = 32
"""How often torch.compile may compile the same code before it leaves it uncompiled, for all of these: blocks that see
all tokens or a window, with or without value embeddings; in training, in its last and smaller micro-batch, evaluated;
all this before and after the micro-batch is enlarged.
"""

FP8_CHANNELS = 128
"""Fewest inputs and outputs of a layer that is computed in fp8, as in nanochat."""

CPU_COMPILE_FLOPS = 1e14
"""From here on a run on a CPU is compiled: some minutes at 3e11 FLOP a second. Compiling takes half a minute, or some
seconds where the same was compiled before, and makes steps 1.4 to 1.7 times as fast."""


def choose_parallelism(config: Config, vocab_size: int, world: World) -> str:
    """How the processes share the model: what ``parallel.kind`` says, or for auto what fits.

    All processes call it.
    """
    if world.size == 1:
        return "none"
    if config.parallel.kind != "auto":
        return config.parallel.kind
    here = 1 if world.device.type == "cuda" else world.local_size  # processes that share this memory
    parameters = sum(count_parameters(config.model, vocab_size).values())
    smallest, largest = min(sizes := world.gather(world.local_size)), max(sizes)
    per_machine = largest if smallest == largest else 1  # unequal machines cannot hold the same rows
    return world.broadcast(
        parallelism_that_fits(parameters, free_memory(world.device) // here, world.size, per_machine)
    )


def parallelize(
    model: GPT, parallelism: str, config: Config, world: World, precision: Precision, say: Callable[[str], None]
) -> bool:
    """Apply what ``config`` asks for to a model on the meta device, then give it memory, still without values.

    ``say`` reports what could not be done. Returns whether the model is compiled.
    """
    train, device, compiled = config.train, world.device, False
    if train.fp8:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise UsageError("train.fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper); leave it out here")
        use_fp8(model)
    if train.activation_checkpointing:
        for block in model.blocks:
            block.forward = types.MethodType(recomputed, block)
    if repays_compiling(config, vocab_size=model.vocab_size, device=device):
        if problem := compiler_problem(device):
            say(f"torch.compile does not work here ({problem}); continuing without it")
        else:
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
            # It would split the graph of each block by DDP's buckets, and refuses, in older versions of torch, what
            # activation checkpointing and flex_attention leave in a graph. After each block DDP adds up all the same.
            torch._dynamo.config.optimize_ddp = False
            whole = parallelism == "none" and device.type == "cuda"
            for module in [model] if whole else [*model.blocks, model.chunk_loss]:
                module.compile(dynamic=False)
            compiled = True
    if device.type == "cuda":
        model.in_blocks, how = choose_attention(model, precision, compiled)
        say(f"attention {how}")
    if parallelism in ("fsdp", "hsdp"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = device_mesh(parallelism, world)
        shard = functools.partial(fully_shard, mesh=mesh)
        # Weights travel in the dtype of the products; their fp32 originals stay sharded, gradients are added in fp32.
        half = None if precision.dtype == torch.float32 else precision.dtype
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        reshard = config.parallel.reshard
        blocks = [shard(block, mp_policy=policy, reshard_after_forward=reshard) for block in model.blocks]
        for block, before in zip(blocks[1:], blocks, strict=False):  # and not a table that was looked up between them
            block.set_modules_to_backward_prefetch([before])
        if not config.model.tied_head:
            shard(model.head, mp_policy=policy, reshard_after_forward=False)  # the backward pass begins with it
        # Tables stay fp32: the gradients of a token's row are sums over all its places. A backward pass needs none.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for table in [module for module in model.modules() if isinstance(module, Embedding)]:
            if table.weight is not model.head.weight:
                shard(table, mp_policy=policy, reshard_after_forward=True).set_unshard_in_backward(False)
        shard(model, mp_policy=policy, reshard_after_forward=False)  # the rest, which is small but for a tied head
    model.to_empty(device=device)
    return compiled


def repays_compiling(config: Config, vocab_size: int, device: torch.device) -> bool:
    """Whether ``train.compile`` wants the model compiled: on a CPU, for auto, a run so long that it repays."""
    train = config.train
    if train.compile == "auto" and device.type == "cpu":
        work = train.steps * train.batch_tokens * flops_per_token(config.model, vocab_size)
        return work > CPU_COMPILE_FLOPS
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


def recomputed(block: Block, *inputs: Any) -> Tensor:
    """A block's forward pass, computed again in the backward pass instead of keeping what that needs.

    A function of ours, since torch.compile skips a frame of torch.utils.checkpoint with all that it calls; and a
    method, since a copy of the block must compute with its own weights.
    """
    return checkpoint(Block.forward, block, *inputs, use_reentrant=False)


def init_parameters(model: GPT, world: World, fill: Callable[[GPT], None]) -> None:
    """Give the model of :func:`parallelize` the values that ``fill`` puts into a whole one.

    Under FSDP rank 0 fills a whole model, on the CPU if it does not fit on the device beside rank 0's own part, and
    sends out the parts, one parameter at a time. Otherwise every process fills its own, to the same values.
    """
    if not is_sharded(model):
        fill(model)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    values: dict[str, Any] = {}
    if world.is_rank0:
        whole = meta_model(model.config, model.vocab_size, model.bos_id)
        size = sum(p.numel() for p in whole.parameters()) * 4
        whole.to_empty(device=world.device if size < free_memory(world.device) / 2 else "cpu")
        fill(whole)
        values = whole.state_dict()
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def is_sharded(module: object) -> bool:
    """Whether FSDP shards a module: without its class, an FSDPModule, which would have to be imported."""
    return hasattr(module, "set_requires_gradient_sync")


def training_forward(model: GPT, parallelism: str, world: World) -> Callable[..., Tensor]:
    """What to call in place of the model in a training step: under DDP its wrapper, which adds up gradients."""
    if parallelism != "ddp":
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def set_gradient_sync(forward: Any, last: bool, reshard: bool) -> None:
    """Let gradients be added up over processes only in the ``last`` backward pass of a step.

    Under FSDP a process would then hold the gradients of the whole model until that pass. Where memory comes before
    traffic (``parallel.reshard``) they are sharded again in every pass, and only the sum over machines (HSDP) waits for
    the last.
    """
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = last
    elif is_sharded(forward):
        forward.set_requires_gradient_sync(last or reshard)
        forward.set_requires_all_reduce(last)


def device_mesh(parallelism: str, world: World) -> DeviceMesh:
    """The processes as FSDP sees them: in a row, or (hsdp) a row for each machine."""
    if parallelism == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


class Parameters:
    """The parameters as this process holds them: plain tensors, whole, or under FSDP its rows of them.

    Optimizers, norms and checkpoints work on these, so that they need not know how the model is sharded.
    """

    def __init__(self, model: GPT, parallelism: str, world: World):
        self.model, self.parallelism, self.world = model, parallelism, world
        self.sharded = is_sharded(model)
        self.whole: dict[str, Any] = dict(model.named_parameters())  # DTensors, if it is
        self.local: dict[str, nn.Parameter] = {
            name: nn.Parameter(p.to_local().detach()) if self.sharded else p for name, p in self.whole.items()
        }
        mesh = next(iter(self.whole.values())).device_mesh if self.sharded else None
        self.group = mesh["shard"].get_group() if mesh else None
        self.between = mesh["replicate"].get_group() if mesh and mesh.ndim == 2 else None
        """The processes of other machines that hold the same rows (HSDP)."""
        self.groups = [group for group in (self.group, self.between) if group is not None]

    def distribute(self, optimizers: Iterable[Optimizer], compiled: bool) -> None:
        """Let optimizers of the model work on what this process holds, and share the work on whole matrices.

        They are ``compiled`` too where the model is, on a GPU; on a CPU the work beside the products is small.
        """
        local = {self.whole[name]: p for name, p in self.local.items()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [local[p] for p in group["params"]]
            if self.world.size > 1:
                exchange = functools.partial(row_sharded, group=self.group) if self.sharded else alone
                if self.between is not None or not self.sharded:
                    exchange = functools.partial(replicated, group=self.between, inside=exchange)
                optimizer.share(exchange, {self.local[name]: p.shape for name, p in self.whole.items()})
            if compiled and self.world.device.type == "cuda":
                optimizer.compile()

    def gradients(self) -> list[Tensor]:
        """The gradients that this process holds; its parameters have them then."""
        if self.sharded:
            for name, p in self.whole.items():
                self.local[name].grad = None if p.grad is None else p.grad.to_local()
        return [p.grad for p in self.local.values() if p.grad is not None]

    def gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients as one vector, of all processes together."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.sharded:
            square = norm.square()
            dist.all_reduce(square, group=self.group)
            norm = square.sqrt()
        return norm

    def reshard(self) -> None:
        """Before weights change from outside: forget those that FSDP gathered, as an evaluation leaves them."""
        for module in self.model.modules():
            if is_sharded(module):
                module.reshard()  # type: ignore[operator]

    def gather(self) -> None:
        """Before parts of the model are called by themselves: gather what FSDP gathers for the whole forward pass."""
        if self.sharded:
            self.model.unshard()  # type: ignore[operator]  # an FSDPModule

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.model.zero_grad(set_to_none=True)
        for p in self.local.values():
            p.grad = None

    def part(self, name: str, tensor: Tensor) -> Part:
        """Which part of a whole tensor of a checkpoint this process has: under FSDP some of the rows of parameters.

        ``name`` is ``model.PARAMETER``, ``ema.PARAMETER`` or ``optim.PARAMETER.KEY``, or anything else, which is whole.
        """
        kind, _, rest = name.partition(".")
        parameter = rest if kind in ("model", "ema") else rest.rpartition(".")[0] if kind == "optim" else ""
        whole = self.whole.get(parameter)
        if self.group is None or whole is None or tensor.shape != self.local[parameter].shape:
            return all_of_it(name, tensor)
        rows = -(-whole.shape[0] // self.group.size())  # of each process, the last ones fewer
        first = min(self.group.rank() * rows, whole.shape[0])
        return Part((first, *[0] * (tensor.ndim - 1)), tuple(whole.shape))


def use_fp8(model: GPT, emulate: bool = False) -> None:
    """Let torchao compute the blocks' matrix products in fp8 in training, scaled by tensor; names and parameters stay.

    ``emulate`` computes the same numbers without the hardware. The head stays in bf16, and so do evaluations: that is
    how the model is used.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("train.fp8 needs torchao; install it with: pip install 'pretrain[fp8]'") from None

    def large(layer: nn.Module, _name: str) -> bool:
        # Casting a small one takes longer than fp8 saves, and the hardware multiplies in tiles of 16.
        sizes = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (0,)
        return min(sizes) >= FP8_CHANNELS and not any(size % 16 for size in sizes)

    def in_training(layer: Any, x: Tensor) -> Tensor:
        return (type(layer) if layer.training else Linear).forward(layer, x)

    convert_to_float8_training(model.blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=large)
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, Linear):
            layer.forward = types.MethodType(in_training, layer)


def choose_attention(model: GPT, precision: Precision, compiled: bool) -> tuple[bool, str]:
    """Whether a GPU attends to windows and documents in blocks, and in words for the console what computes attention.

    Layers that see all tokens always take PyTorch's causal kernel, and a cache takes masks.
    """
    config, device = model.config, precision.device
    if not hides_tokens(model):
        return False, "by PyTorch's causal kernel"
    D, kv_heads = head_dim(config), config.kv_heads or config.heads
    if problem := (
        obstacle(device, compiled, config.context_length, D, config.dropout)
        or kernel_problem(device, precision.dtype, config.heads, kv_heads, D)
    ):
        return False, f"by masks, so that windows and documents save no time ({problem})"
    return True, "by flex_attention, which skips what windows and documents hide"


def hides_tokens(model: GPT) -> bool:
    """Whether windows or documents hide tokens in any layer."""
    return "S" in layer_kinds(model.config) or (model.config.document_mask and model.bos_id is not None)


@functools.cache  # two seconds, and a run that measures its steps asks twice
def compiler_problem(device: torch.device) -> str:
    """Why torch.compile cannot work here, in a line; empty if it can, tried on the smallest program."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing compiler, an old driver or a full /tmp raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
