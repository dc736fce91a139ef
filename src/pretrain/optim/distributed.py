"""How processes share the work on whole matrices: each takes some of them, and the results are exchanged.

    alone            one process does all
    replicated       all have the whole gradients (DDP): each works on its share, all-gather
    row_sharded      each has some rows of every matrix (FSDP): all-to-all to whole matrices, work, all-to-all back
    both             machines have the same rows (HSDP): each machine takes its share, and in it the processes theirs

An exchange is a generator, which yields wherever it would wait for others. ``in_turns`` runs those of all stacks of
matrices up to there before any goes on: first all rows are sent, then each stack is worked on as its rows arrive and
its results are sent, and in the end all results are received. Stacks seldom divide evenly: the remainder of each goes
to the processes after those that had that of the one before, so that over all stacks they have equally much to do.

Only the process that works on a matrix has its momentum. Under DDP gradients are added up in the backward pass all the
same. If each process got only those of its share, it would send 5.25 instead of 8.75 bytes a parameter (8 processes,
results in bf16), but 3.5 of them after that pass, where 7 are hidden behind it now. FSDP without resharding does both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

Begin = Callable[[int, int], Tensor]
"""``begin(start, stop)`` gives this process's rows (N, r, C) of the stack's matrices from ``start`` to ``stop``. It is
called once, for those that this process, or one that has other rows of them, works on: only these need a state."""

Work = Callable[[Tensor, int], Tensor]
"""``work(matrices, start)``: from whole matrices (N, R, C), those of the stack from ``start`` on, to as many."""

Exchange = Callable[[int, int, int, Begin, Work], Generator[None, None, Tensor | list[Tensor]]]
"""``exchange(count, rows, first, begin, work)`` works on a stack of ``count`` matrices of R rows together with other
processes, and returns this process's rows (r, C) of each result. ``first`` matrices were given out before these in this
step. It yields equally often in all processes, so that they send in the same order."""


def in_turns(generators: Iterable[Iterator[None]]) -> None:
    """Run all to their end, each up to where it waits before any goes on from there."""
    waiting, ended = list(generators), object()
    while waiting:
        waiting = [generator for generator in waiting if next(generator, ended) is not ended]


def alone(count: int, rows: int, first: int, begin: Begin, work: Work) -> Generator[None, None, Tensor]:
    """The exchange of one process, which has the whole of every matrix, and never waits."""
    yield from ()
    matrices = begin(0, count)
    return work(matrices, 0) if count else matrices


def shares(count: int, size: int, first: int) -> list[int]:
    """How many of ``count`` matrices each of ``size`` processes takes when ``first`` were given out before."""
    each, more = divmod(count, size)
    return [each + ((rank - first) % size < more) for rank in range(size)]


def replicated(
    count: int,
    rows: int,
    first: int,
    begin: Begin,
    work: Work,
    *,
    group: dist.ProcessGroup | None,
    inside: Callable[[int, int, int, Begin, Work], Generator[None, None, Tensor]],
) -> Generator[None, None, list[Tensor]]:
    """Every process of ``group`` has the same, and works on its share of the matrices, ``inside`` with others."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owned = shares(count, size, first)
    start, most = sum(owned[:rank]), max(owned)
    mine = yield from inside(
        owned[rank],
        rows,
        first,
        lambda a, b: begin(start + a, start + b),
        lambda matrices, n: work(matrices, start + n),
    )
    everything = mine.new_empty(size * most, *mine.shape[1:])
    own = everything[rank * most : (rank + 1) * most]  # all send as much
    own[: len(mine)] = mine
    del mine
    pending = all_gather(everything, own, group=group, async_op=True)
    yield
    assert pending is not None
    pending.wait()
    return [matrix for part, n in zip(everything.split(most), owned, strict=True) for matrix in part[:n]]


def row_sharded(
    count: int, rows: int, first: int, begin: Begin, work: Work, *, group: dist.ProcessGroup | None
) -> Generator[None, None, Tensor]:
    """Each process of ``group`` has the rows of every matrix that FSDP gives it: equal parts, the last ones shorter."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part = -(-rows // size)
    owned = shares(count, size, first)
    mine = owned[rank]
    same = [mine] * size
    update = begin(0, count)
    own, columns = update.shape[1:]
    if own < part:
        update = F.pad(update, (0, 0, 0, part - own))
    parts = update.new_empty(size * mine, part, columns)  # from each process its rows of the matrices of ours
    pending = dist.all_to_all_single(parts, update, same, owned, group=group, async_op=True)
    yield
    assert pending is not None
    pending.wait()
    whole = parts.view(size, mine, part, columns).transpose(0, 1).reshape(mine, size * part, columns)
    del parts
    if mine:
        whole[:, :rows] = work(whole[:, :rows], sum(owned[:rank]))
    back = whole.view(mine, size, part, columns).transpose(0, 1).reshape(size * mine, part, columns)
    del whole
    pending = dist.all_to_all_single(update, back, owned, same, group=group, async_op=True)  # in place of what was sent
    yield
    assert pending is not None
    pending.wait()
    return update[:, :own]
