"""How processes share the work on whole matrices: each takes some of them, and the results are exchanged.

    alone            one process does all
    replicated       all have the whole gradients (DDP): each works on its share, all-gather
    row_sharded      each has some rows of every matrix (FSDP): all-to-all to whole matrices, work, all-to-all back
    both             machines have the same rows (HSDP): each machine takes its share, and in it the processes theirs

An exchange is waited for only at the end, so that the traffic of one stack of matrices overlaps with the work on the
next. Stacks seldom divide evenly: the remainder of each goes to the processes after those that had that of the one
before, so that over all stacks they have equally much to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

Work = Callable[[Tensor, int], Tensor]
"""``work(matrices, start)``: from whole matrices (N, R, C), those of the stack from ``start`` on, to as many."""

Exchange = Callable[[Tensor, int, int, Work], Callable[[], Tensor]]
"""``exchange(update, rows, first, work)`` begins to work on N matrices of R rows together with other processes. The
function it returns waits for the results, which have the shape of ``update``.

``update`` (N, r, C) has this process's r rows of each; ``first`` matrices were given out before these in this step."""


def alone(update: Tensor, rows: int, first: int, work: Work) -> Callable[[], Tensor]:
    """The exchange of one process, which has the whole of every matrix."""
    result = work(update, 0)
    return lambda: result


def shares(count: int, size: int, first: int) -> list[int]:
    """How many of ``count`` matrices each of ``size`` processes takes when ``first`` were given out before."""
    each, more = divmod(count, size)
    return [each + ((rank - first) % size < more) for rank in range(size)]


def replicated(
    update: Tensor, rows: int, first: int, work: Work, *, group: dist.ProcessGroup | None, inside: Exchange
) -> Callable[[], Tensor]:
    """Every process of ``group`` has the same, and works on its share of the matrices, ``inside`` with others."""
    size = dist.get_world_size(group)
    owned = shares(len(update), size, first)
    start = sum(owned[: dist.get_rank(group)])
    mine = update.split(owned)[dist.get_rank(group)]
    result = update.new_zeros(max(owned), *update.shape[1:])  # the others send as much
    if len(mine):
        result[: len(mine)] = inside(mine, rows, first, lambda matrices, n: work(matrices, start + n))()
    everything = result.new_empty(size * len(result), *update.shape[1:])
    pending = all_gather(everything, result, group=group, async_op=True)

    def finish() -> Tensor:
        assert pending is not None
        pending.wait()
        if min(owned) == max(owned):
            return everything
        return torch.cat([part[:n] for part, n in zip(everything.split(len(result)), owned, strict=True)])

    return finish


def row_sharded(
    update: Tensor, rows: int, first: int, work: Work, *, group: dist.ProcessGroup | None
) -> Callable[[], Tensor]:
    """Each process of ``group`` has the rows of every matrix that FSDP gives it: equal parts, the last ones shorter."""
    size, (count, own, columns) = dist.get_world_size(group), update.shape
    part = -(-rows // size)
    owned = shares(count, size, first)
    mine = owned[dist.get_rank(group)]
    same = [mine] * size
    padded = update.new_zeros(count, part, columns)
    padded[:, :own] = update
    parts = padded.new_empty(size * mine, part, columns)  # from each process its rows of the matrices of ours
    dist.all_to_all_single(parts, padded, same, owned, group=group)
    whole = parts.view(size, mine, part, columns).transpose(0, 1).reshape(mine, size * part, columns)
    if mine:
        whole[:, :rows] = work(whole[:, :rows], sum(owned[: dist.get_rank(group)]))
    back = whole.view(mine, size, part, columns).transpose(0, 1).reshape(size * mine, part, columns)
    result = torch.empty_like(padded)
    pending = dist.all_to_all_single(result, back, owned, same, group=group, async_op=True)

    def finish() -> Tensor:
        assert pending is not None
        pending.wait()
        return result[:, :own]

    return finish
