"""Several processes: what each of them holds, and what they send one another in a step.

The three ways are those of ``training/parallel.py``: ddp holds everything everywhere and adds gradients up; fsdp
spreads weights, gradients and moments over all processes and fetches a block's weights when they are needed; hsdp does
so within a machine and adds gradients up between machines. N processes, P parameters, b bytes of an activation's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pretrain.config import Config
from pretrain.device import GPU
from pretrain.optim import find_optimizer
from pretrain.plan.memory import Working
from pretrain.sizing import count_parameters, meta_model

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Layout:
    """How processes share a model."""

    kind: str
    """none (one process), ddp, fsdp or hsdp."""
    processes: int = 1
    per_machine: int = 1

    @property
    def shards(self) -> int:
        """In how many parts weights, gradients and moments are held."""
        return {"fsdp": self.processes, "hsdp": self.per_machine}.get(self.kind, 1)

    @property
    def machines(self) -> int:
        """Machines, the last perhaps not full."""
        return math.ceil(self.processes / self.per_machine)


def layout(kind: str, processes: int) -> Layout:
    """Processes on machines of eight."""
    return Layout(kind if processes > 1 else "none", processes, min(processes, GPUS_PER_MACHINE))


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model as FSDP groups them: every block by itself, and all the rest."""

    blocks: int
    largest_block: int
    root: int
    shard: int
    """Of what the first process holds: it has a row more of what does not divide."""


def sizes(config: Config, vocab_size: int, shards: int = 1) -> Sizes:
    """Count the parameters of each group, and of one of ``shards`` parts of all."""
    model = meta_model(config.model, vocab_size)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    shard = sum(math.ceil(p.shape[0] / shards) * p[0].numel() for p in model.parameters())
    return Sizes(sum(blocks), max(blocks), sum(p.numel() for p in model.parameters()) - sum(blocks), shard)


def memory_parts(
    working: Working, config: Config, vocab_size: int, where: Layout, micro_steps: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that each process holds at the worst moment of a step, by part, from a rehearsal of its micro-batch."""
    parts = {
        "weights": working.weights,
        "gradients": working.gradients,
        "moments": working.moments,
        "weight copies": working.casts,
        "activations": working.activations,
        "logits chunk": working.chunk,
        "temporary": working.temporary,
    }
    if where.shards == 1:
        return parts
    size = sizes(config, vocab_size, where.shards)
    parts["weights"] = parts["gradients"] = 4 * size.shard
    parts["moments"] = round(parts["moments"] * size.shard / (size.blocks + size.root))
    # Under way in the dtype of the products: the rest of the model at all times, and of the blocks two, each once as
    # it arrives and once in place, or all of them if they are not given back after the forward pass.
    gathered = 4 * size.largest_block if config.parallel.reshard else size.blocks + size.largest_block
    parts["weight copies"] = dtype.itemsize * (size.root + gathered)
    # A group's whole gradients in fp32 until they are added up; if that waits for the last micro-batch, the model's.
    wait = micro_steps > 1 and not config.parallel.reshard
    waiting = size.blocks + size.root if wait else max(size.root, 2 * size.largest_block)
    parts["whole gradients"] = 4 * waiting
    parts["temporary"] = math.ceil(parts["temporary"] / where.shards)
    return parts


def traffic(config: Config, vocab_size: int, where: Layout, micro_steps: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each process sends in an optimizer step: ``inside`` its machine, and by its network ``between`` them.

    A ring all-reduce of X bytes over N processes sends 2 X (N - 1) / N from each, an all-gather or a reduce-scatter
    half of that (Patarasu and Yuan 2009). Of a ring through all processes only one in each machine sends to another
    machine; the work is divided among as many rings as there are processes in a machine, each with its own network.
    """
    size, N = sizes(config, vocab_size), where.processes
    P, b = size.blocks + size.root, dtype.itemsize
    if N == 1:
        return {"inside": 0, "between": 0}
    updates = find_optimizer(config.optim).exchanged_bytes(count_parameters(config.model, vocab_size), dtype)

    def ring(elements: float, bytes_each: int, over: int) -> int:
        return round(elements * bytes_each * (over - 1) / over)

    if where.kind == "ddp":
        sent = 2 * ring(P, 4, N) + ring(updates, 1, N)
        return {"inside": sent, "between": sent // where.per_machine if where.machines > 1 else 0}
    shards, (fetched, added) = where.shards, (2, micro_steps) if config.parallel.reshard else (1, 1)
    sent = micro_steps * ring(size.root + fetched * size.blocks, b, shards) + added * ring(P, 4, shards)
    machines = where.machines if where.kind == "hsdp" else 1  # each takes a share of the matrices
    sent += 2 * ring(updates / shards / machines, 1, shards)
    if where.kind == "fsdp":
        return {"inside": sent, "between": sent // where.per_machine if where.machines > 1 else 0}
    between = 2 * ring(P / shards, 4, machines) + ring(updates / shards, 1, machines)
    return {"inside": sent, "between": between}


def traffic_seconds(sent: dict[str, int], where: Layout, gpu: GPU) -> float:
    """How long that takes where the links carry what is published; the slower link decides where a ring uses both."""
    inside = sent["inside"] / (gpu.link_gb * 1e9)
    between = sent["between"] / ((gpu.network_gb or gpu.link_gb) * 1e9)
    return inside + between if where.kind == "hsdp" else max(inside, between)
