"""Several processes: what each of them holds, and what they send one another in a step.

The three ways are those of ``training/parallel.py``: ddp holds everything everywhere and adds gradients up; fsdp
spreads weights, gradients and moments over all processes and fetches those of a block, a table or the head when they
are needed; hsdp does so within a machine and adds gradients up between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pretrain.config import Config
from pretrain.device import GPU
from pretrain.model import GPT
from pretrain.model.transformer import Embedding
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


class Groups(NamedTuple):
    """Parameters as FSDP gathers them (``training/parallel.py``)."""

    blocks: int
    """In all blocks together."""
    block: int
    """In the largest block."""
    tables: int
    """In all embeddings together, each gathered by itself, in fp32."""
    table: int
    """In the largest of them."""
    head: int
    """In the head, unless it is tied."""
    rest: int
    """In what is gathered once for all of a micro-batch, in fp32; a tied head with its embedding among it."""


def groups_of(model: GPT) -> Groups:
    """The groups of a model."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    head = model.head.weight
    tables = [m.weight.numel() for m in model.modules() if isinstance(m, Embedding) and m.weight is not head]
    alone = 0 if model.config.tied_head else head.numel()
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks) - sum(tables) - alone
    return Groups(sum(blocks), max(blocks), sum(tables), max(tables, default=0), alone, rest)


def memory_parts(
    alone: dict[str, int], config: Config, vocab_size: int, layout: Layout, micro_steps: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes by part that each process holds at the worst moment of a step.

    ``alone`` is what the dry run of its micro-batch holds in one process.
    """
    if layout.shards == 1:
        return alone
    model = meta_model(config.model, vocab_size)
    groups, size = groups_of(model), dtype.itemsize
    whole = sum(p.numel() for p in model.parameters())
    # Rows are dealt evenly, and the first process holds a row more of what does not divide.
    shard = sum(math.ceil(p.shape[0] / layout.shards) * p[0].numel() for p in model.parameters())
    # Of the blocks one, as it arrived and in place, or all if they are not given back after the forward pass; beside it
    # the group that follows, twice too. Blocks and head are gathered in the dtype of the products.
    held = size * (2 * groups.block if config.parallel.reshard else groups.blocks)
    follows = 2 * max(size * groups.block, size * groups.head, 4 * groups.table)
    # Whole gradients in fp32: those of tables until the backward pass ends, and of the group that is added up, that of
    # blocks once more as they were computed. If that waits for the last micro-batch, those of the model.
    wait = micro_steps > 1 and not config.parallel.reshard
    late = groups.tables + groups.rest + max(2 * groups.block, groups.table)
    return {
        **alone,
        "weights": 4 * shard,
        "gradients": 4 * shard,
        "moments": round(alone["moments"] * shard / whole),
        **({"average": 4 * shard} if "average" in alone else {}),
        "weight copies": 4 * groups.rest + held + follows,
        "temporary": math.ceil(alone["temporary"] / layout.shards),
        "whole gradients": 4 * (whole if wait else max(late, 2 * groups.head)),
    }


def traffic(config: Config, vocab_size: int, layout: Layout, micro_steps: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each process sends in an optimizer step: ``inside`` its machine, and by its network ``between`` them.

    A ring all-reduce of X bytes over N processes sends 2 X (N - 1) / N from each, an all-gather or a reduce-scatter
    half of that (Patarasu and Yuan 2009). Of a ring through all processes only one in each machine sends to another
    machine; the work is divided among as many rings as there are processes in a machine, each with its own network.
    """

    def ring(size: float, over: int) -> int:
        return round(size * (over - 1) / over)

    groups = groups_of(meta_model(config.model, vocab_size))
    gradients = 4 * sum(count_parameters(config.model, vocab_size).values())
    updates = find_optimizer(config.optim).exchanged_bytes(count_parameters(config.model, vocab_size), dtype)
    shards, machines = layout.shards, layout.machines
    if shards == 1:
        sent = 2 * ring(gradients, layout.processes) + ring(updates, layout.processes)
    else:
        fetched, added = (2, micro_steps) if config.parallel.reshard else (1, 1)
        gathered = dtype.itemsize * (groups.head + fetched * groups.blocks) + 4 * (groups.tables + groups.rest)
        sent = micro_steps * ring(gathered, shards) + added * ring(gradients, shards)
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
