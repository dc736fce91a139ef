"""How processes share the orthogonalising of Muon: each takes some of the matrices and hands the results round.

    one process      every matrix is its own
    Replicated       all have the whole gradients (DDP): each orthogonalises its share, all-gather
    RowSharded       each has some rows of every matrix (FSDP): all-to-all to whole matrices, orthogonalise, and back
    both             machines have the same rows (HSDP): each machine takes its share, and in it the processes theirs

An exchange begins at once and is waited for later, so that the traffic of one stack of matrices runs beside the
arithmetic on the next. Stacks seldom divide evenly; what is left over of one goes to the processes after those that
had more of the one before, so that over all stacks they have equally much to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

Work = Callable[[Tensor], Tensor]
"""From whole matrices (N, R, C) to as many of the same shape."""


class Exchange(Protocol):
    """Let processes work on matrices together."""

    def __call__(self, update: Tensor, rows: int, first: int, work: Work) -> Callable[[], Tensor]:
        """Begin; the function given back waits, and gives the results in the form of ``update``.

        Args:
            update: this process's rows of N matrices: (N, r, C).
            rows: R, the rows of a whole matrix.
            first: how many matrices came before these in this step.
            work: what to do with whole matrices.
        """
        ...


def alone(update: Tensor, rows: int, first: int, work: Work) -> Callable[[], Tensor]:
    """Nothing to exchange: ``update`` (N, R, C) holds whole matrices, all of them this process's own."""
    result = work(update)
    return lambda: result


def shares(count: int, size: int, first: int) -> list[int]:
    """How many of ``count`` matrices each of ``size`` processes takes when ``first`` were given out before."""
    each, more = divmod(count, size)
    return [each + ((rank - first) % size < more) for rank in range(size)]


class Replicated:
    """Every process of ``group`` has the same, and works on its share of the matrices, ``inside`` with others."""

    def __init__(self, group: dist.ProcessGroup | None, inside: Exchange = alone):
        self.group, self.inside = group, inside
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, update: Tensor, rows: int, first: int, work: Work) -> Callable[[], Tensor]:
        """See :class:`Exchange`."""
        owned = shares(len(update), self.size, first)
        mine = update.split(owned)[self.rank]
        result = update.new_zeros(max(owned), *update.shape[1:])  # the others send as much
        if len(mine):
            result[: len(mine)] = self.inside(mine, rows, first, work)()
        everything = result.new_empty(self.size * len(result), *update.shape[1:])
        pending = all_gather(everything, result, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert pending is not None
            pending.wait()
            if min(owned) == max(owned):
                return everything
            return torch.cat([part[:n] for part, n in zip(everything.split(len(result)), owned, strict=True)])

        return finish


class RowSharded:
    """Each process of ``group`` has the rows of every matrix that FSDP gives it: equal parts, the last ones shorter."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, update: Tensor, rows: int, first: int, work: Work) -> Callable[[], Tensor]:
        """See :class:`Exchange`."""
        count, own, columns = update.shape
        part = -(-rows // self.size)
        owned = shares(count, self.size, first)
        mine, same = owned[self.rank], [owned[self.rank]] * self.size
        padded = update.new_zeros(count, part, columns)
        padded[:, :own] = update
        parts = padded.new_empty(self.size * mine, part, columns)  # from each process its rows of the matrices of ours
        dist.all_to_all_single(parts, padded, same, owned, group=self.group)
        whole = parts.view(self.size, mine, part, columns).transpose(0, 1).reshape(mine, self.size * part, columns)
        if mine:
            whole[:, :rows] = work(whole[:, :rows])
        back = whole.view(mine, self.size, part, columns).transpose(0, 1).reshape(self.size * mine, part, columns)
        result = torch.empty_like(padded)
        pending = dist.all_to_all_single(result, back, owned, same, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert pending is not None
            pending.wait()
            return result[:, :own]

        return finish
