"""Several processes: what each of them holds, and what they send one another in a step.

The three ways are those of ``training/parallel.py``: ddp holds everything everywhere and adds gradients up; fsdp
spreads weights, gradients and moments over all processes and fetches a block's weights when they are needed; hsdp does
so within a machine and adds gradients up between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pretrain.config import Config
from pretrain.device import GPU
from pretrain.model import GPT
from pretrain.optim import find_optimizer
from pretrain.sizing import count_parameters, meta_model

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Layout:
    """How processes, eight per machine, share a model."""

    parallelism: str
    """none (one process), ddp, fsdp or hsdp."""
    processes: int = 1

    @property
    def per_machine(self) -> int:
        """Processes on a machine."""
        return min(self.processes, GPUS_PER_MACHINE)

    @property
    def machines(self) -> int:
        """Machines, the last perhaps not full."""
        return math.ceil(self.processes / self.per_machine)

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are split into."""
        return {"fsdp": self.processes, "hsdp": self.per_machine}.get(self.parallelism, 1)


def group_sizes(model: GPT) -> tuple[int, int, int]:
    """Parameters as FSDP groups them: of all blocks together, of the largest block, and of the rest (the root)."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return sum(blocks), max(blocks), sum(p.numel() for p in model.parameters()) - sum(blocks)


def memory_parts(
    alone: dict[str, int], config: Config, vocab_size: int, layout: Layout, micro_steps: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes by part that each process holds at the worst moment of a step.

    ``alone`` is what the dry run of its micro-batch holds in one process.
    """
    if layout.shards == 1:
        return alone
    model = meta_model(config.model, vocab_size)
    blocks, largest, root = group_sizes(model)
    # Rows are dealt evenly, and the first process holds a row more of what does not divide.
    shard = sum(math.ceil(p.shape[0] / layout.shards) * p[0].numel() for p in model.parameters())
    # Gathered in the dtype of the products: the root at all times, and of the blocks two, each once as it arrives and
    # once in place, or all of them if they are not given back after the forward pass.
    gathered = 4 * largest if config.parallel.reshard else blocks + largest
    # A group's whole gradients in fp32 until they are added up; if that waits for the last micro-batch, the model's.
    wait = micro_steps > 1 and not config.parallel.reshard
    return {
        **alone,
        "weights": 4 * shard,
        "gradients": 4 * shard,
        "moments": round(alone["moments"] * shard / (blocks + root)),
        **({"average": 4 * shard} if "average" in alone else {}),
        "weight copies": dtype.itemsize * (root + gathered),
        "temporary": math.ceil(alone["temporary"] / layout.shards),
        "whole gradients": 4 * (blocks + root if wait else max(root, 2 * largest)),
    }


def traffic(config: Config, vocab_size: int, layout: Layout, micro_steps: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each process sends in an optimizer step: ``inside`` its machine, and by its network ``between`` them.

    A ring all-reduce of X bytes over N processes sends 2 X (N - 1) / N from each, an all-gather or a reduce-scatter
    half of that (Patarasu and Yuan 2009). Of a ring through all processes only one in each machine sends to another
    machine; the work is divided among as many rings as there are processes in a machine, each with its own network.
    """

    def ring(size: float, over: int) -> int:
        return round(size * (over - 1) / over)

    blocks, _, root = group_sizes(meta_model(config.model, vocab_size))
    gradients = 4 * (blocks + root)
    updates = find_optimizer(config.optim).exchanged_bytes(count_parameters(config.model, vocab_size), dtype)
    shards, machines = layout.shards, layout.machines
    if shards == 1:
        sent = 2 * ring(gradients, layout.processes) + ring(updates, layout.processes)
    else:
        fetched, added = (2, micro_steps) if config.parallel.reshard else (1, 1)
        sent = micro_steps * ring(dtype.itemsize * (root + fetched * blocks), shards) + added * ring(gradients, shards)
        # Under hsdp each machine updates a share of the matrices.
        sent += 2 * ring(updates / shards / (machines if layout.parallelism == "hsdp" else 1), shards)
    between = sent // layout.per_machine if machines > 1 else 0
    if layout.parallelism == "hsdp":
        between = 2 * ring(gradients / shards, machines) + ring(updates / shards, machines)
    return {"inside": sent, "between": between}


def traffic_seconds(sent: dict[str, int], layout: Layout, gpu: GPU) -> float:
    """Seconds for that at the published rates; where one ring uses both kinds of link, the slower decides."""
    inside = sent["inside"] / (gpu.link_gb * 1e9)
    between = sent["between"] / ((gpu.network_gb or gpu.link_gb) * 1e9)
    return inside + between if layout.parallelism == "hsdp" else max(inside, between)
