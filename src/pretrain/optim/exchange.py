"""How processes share the orthogonalising of Muon: each takes some of the matrices and hands the results round.

    one process      every matrix is its own
    Replicated       all have the whole gradients (DDP): each orthogonalises its share, all-gather
    RowSharded       each has some rows of every matrix (FSDP): all-to-all to whole matrices, orthogonalise, and back

An exchange begins at once and is waited for later, so that the traffic of one stack of matrices runs beside the
arithmetic on the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[[Tensor], Tensor]
"""From whole matrices (N, R, C) to as many of the same shape."""


def alone(update: Tensor, rows: int, work: Work) -> Callable[[], Tensor]:
    """Nothing to exchange: ``update`` (N, R, C) holds whole matrices, all of them this process's own."""
    result = work(update)
    return lambda: result


class Replicated:
    """Every process of ``group`` has the same whole matrices, and works on its share of them."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, update: Tensor, rows: int, work: Work) -> Callable[[], Tensor]:
        """Begin with ``update`` (N, R, C); the function given back waits and gives all results (N, R, C)."""
        count = len(update)
        each = -(-count // self.size)
        mine = update[self.rank * each : (self.rank + 1) * each]
        result = update.new_zeros(each, *update.shape[1:])
        if len(mine):
            result[: len(mine)] = work(mine)
        everything = result.new_empty(each * self.size, *update.shape[1:])
        pending = dist.all_gather_into_tensor(everything, result, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert pending is not None
            pending.wait()
            return everything[:count]

        return finish


class RowSharded:
    """Each process of ``group`` has the rows of every matrix that FSDP gives it: equal parts, the last ones shorter."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, update: Tensor, rows: int, work: Work) -> Callable[[], Tensor]:
        """Begin with ``update`` (N, r, C), r of ``rows`` rows; the function given back waits for results (N, r, C)."""
        count, own, columns = update.shape
        each, part = -(-count // self.size), -(-rows // self.size)
        padded = update.new_zeros(self.size * each, part, columns)
        padded[:count, :own] = update
        parts = torch.empty_like(padded)  # from each process its rows of the matrices that are ours
        dist.all_to_all_single(parts, padded, group=self.group)
        whole = parts.view(self.size, each, part, columns).transpose(0, 1).reshape(each, -1, columns)
        whole[:, :rows] = work(whole[:, :rows])
        back = whole.view(each, self.size, part, columns).transpose(0, 1).contiguous()
        result = torch.empty_like(padded)
        pending = dist.all_to_all_single(result, back, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert pending is not None
            pending.wait()
            return result[:count, :own]

        return finish
