"""The data order: which window of tokens is row ``g`` of the run. A pure function, never a state.

    row g = step × rows per step + row in the batch  →  epoch, place in the epoch  →  start of its window

    of a mixture: row g  →  its stage, a data set and a row of its own  →  the same with its own epochs

Nothing here depends on the number of processes, the micro-batch, or what was read before: resuming is calling it with a
later step. A shuffled epoch is a keyed permutation of all its windows in O(1) memory: a Feistel network over the next
power of four, walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.errors import UsageError

OFFSETS, MIXTURE, DATASETS, PIECES, ESTIMATE, HELD_OUT, STAGES = 1, 2, 3, 4, 5, 6, 7
"""The last part of keys for different uses, which must not be equal; that of the windows themselves has none."""
FEISTEL_ROUNDS = 6
ENCRYPT_BLOCK = 8192  # numbers encrypted at once: they and the intermediate results stay in the nearest caches
MIXTURE_BLOCK = 1000  # rows in which a mixture has its shares exactly


def mix(x: np.ndarray, out: np.ndarray | None = None, scratch: np.ndarray | None = None) -> np.ndarray:
    """A bijective hash of uint64 values whose output bits all depend on all input bits (splitmix64's finaliser).

    ``out`` may be ``x``.
    """
    out = np.empty_like(x) if out is None else out
    scratch = np.empty_like(x) if scratch is None else scratch
    np.bitwise_xor(x, np.right_shift(x, np.uint64(30), out=scratch), out=out)
    np.multiply(out, np.uint64(0xBF58476D1CE4E5B9), out=out)
    np.bitwise_xor(out, np.right_shift(out, np.uint64(27), out=scratch), out=out)
    np.multiply(out, np.uint64(0x94D049BB133111EB), out=out)
    return np.bitwise_xor(out, np.right_shift(out, np.uint64(31), out=scratch), out=out)


def key(*parts: int) -> np.ndarray:
    """A uint64 key (a one-element array) from integers such as (seed, epoch)."""
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for part in parts:
        state = mix(state ^ mix(np.array([part], dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    return state


def permute(index: np.ndarray, size: int, round_key: np.ndarray) -> np.ndarray:
    """Where each ``index`` (uint64, each below ``size``) lands in the permutation of range(size) named by the key."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [mix(round_key + np.uint64(r + 1)) for r in range(FEISTEL_ROUNDS)]
    result = _encrypt(index, half, keys)
    outside = np.flatnonzero(result >= np.uint64(size))
    while len(outside):  # a walk along its cycle comes back inside, since the start was inside
        result[outside] = _encrypt(result[outside], half, keys)
        outside = outside[result[outside] >= np.uint64(size)]
    return result


def _encrypt(x: np.ndarray, half: np.uint64, keys: list[np.ndarray]) -> np.ndarray:
    """The Feistel network on numbers of 2 x ``half`` bits."""
    low = np.uint64((1 << int(half)) - 1)
    out = np.empty_like(x)
    for begin in range(0, len(x), ENCRYPT_BLOCK):
        part = x[begin : begin + ENCRYPT_BLOCK]
        left, right = part >> half, part & low
        mixed, scratch = np.empty_like(part), np.empty_like(part)
        for k in keys:
            np.add(right, k, out=mixed)
            mix(mixed, mixed, scratch)
            np.bitwise_and(mixed, low, out=mixed)
            np.bitwise_xor(left, mixed, out=left)
            left, right = right, left
        np.bitwise_or(np.left_shift(left, half, out=left), right, out=out[begin : begin + ENCRYPT_BLOCK])
    return out


@dataclass(frozen=True)
class DataOrder:
    """The order of training windows of T + 1 tokens (inputs and the targets one later) in a token stream."""

    tokens: int  # in the stream
    length: int  # T, the context length
    kind: str  # shuffled, random or sequential: DataConfig.order
    stride: int  # tokens between neighbouring starts; 0: T, with a fresh offset each shuffled epoch
    seed: int

    def __post_init__(self):
        assert self.tokens > self.length, "checked by the caller"

    @property
    def windows(self) -> int:
        """Windows in one epoch."""
        last = self.tokens - self.length - 1  # the last start at which a whole window fits
        if self.stride:
            return last // self.stride + 1
        whole = last // self.length + 1
        # A fresh offset below T fits only if one window is given up; too few windows to notice keep them all.
        return whole - 1 if self.kind == "shuffled" and whole >= 100 else whole

    def starts(self, first: int, count: int) -> np.ndarray:
        """Starts (int64) of the windows of rows ``first`` to ``first + count - 1`` of the run."""
        if self.kind == "random":
            row = np.arange(first, first + count, dtype=np.uint64)
            return (mix(key(self.seed) + row) % np.uint64(self.tokens - self.length)).astype(np.int64)
        step, windows = self.stride or self.length, self.windows
        slack = self.tokens - self.length - 1 - (windows - 1) * step
        parts = [np.empty(0, dtype=np.int64)]
        for epoch in range(first // windows, -(-(first + count) // windows)):
            begin, end = max(first - epoch * windows, 0), min(first + count - epoch * windows, windows)
            place = np.arange(begin, end, dtype=np.uint64)
            if self.kind == "sequential":
                parts.append(place.astype(np.int64) * step)
                continue
            starts = permute(place, windows, key(self.seed, epoch)).astype(np.int64) * step
            if not self.stride:
                starts += int(key(self.seed, epoch, OFFSETS)[0] % np.uint64(min(slack, self.length - 1) + 1))
            parts.append(starts)
        return np.concatenate(parts)

    def estimate(self, step: int, row: int = 0) -> DataOrder:
        """Another draw of the same windows, to measure on after ``step``: it says nothing of what training reads.

        ``row``, the last that was read, matters to a mixture.
        """
        seed = int(key(self.seed, step, ESTIMATE)[0])
        if self.kind == "sequential":  # shuffled, but at the places where training has them
            return replace(self, kind="shuffled", stride=self.stride or self.length, seed=seed)
        return replace(self, seed=seed)


@dataclass(frozen=True)
class MixedOrder:
    """The order of training windows drawn from several data sets, which stand one after another in the token stream.

    Every ``MIXTURE_BLOCK`` rows hold a fixed number of rows of each data set, in an order permuted anew for each block.
    A data set's rows, numbered by themselves, follow its own order: each of its windows comes once in each of its
    epochs, however large its share, and over all stages (:func:`mixture`).
    """

    orders: tuple[DataOrder, ...]  # of each data set, with seeds of their own
    shares: tuple[int, ...]  # rows of each data set in a block: mixture_shares
    seed: int  # fixes which row of a block is of which data set
    before: tuple[int, ...] = ()  # rows of each data set that earlier stages read
    then: tuple[int, MixedOrder] | None = None  # the row at which the next stage begins, and its order from there on

    def __post_init__(self):
        assert len(self.orders) == len(self.shares)
        assert sum(self.shares) == MIXTURE_BLOCK
        assert min(self.shares) >= 0

    @property
    def length(self) -> int:
        """The context length T."""
        return self.orders[0].length

    @property
    def windows(self) -> int:
        """Windows of all data sets together."""
        return sum(order.windows for order in self.orders)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Starts (int64) of the windows of rows ``first`` to ``first + count - 1`` of the run, in the whole stream."""
        if self.then and first + count > self.then[0]:
            end, later = self.then
            ours = replace(self, then=None).starts(first, max(0, end - first))
            return np.concatenate([ours, later.starts(max(0, first - end), min(count, first + count - end))])
        first_block, skip = divmod(first, MIXTURE_BLOCK)
        blocks = range(first_block, -(-(first + count) // MIXTURE_BLOCK))
        sets = np.concatenate([np.empty(0, dtype=np.int64), *map(self._sets, blocks)])
        starts = np.empty(len(sets), dtype=np.int64)
        begin = 0  # of the data set in the stream
        before = self.before or (0,) * len(self.shares)
        for number, (order, share) in enumerate(zip(self.orders, self.shares, strict=True)):
            row = before[number] + first_block * share
            starts[sets == number] = order.starts(row, len(blocks) * share) + begin
            begin += order.tokens
        return starts[skip : skip + count]

    def _sets(self, block: int) -> np.ndarray:
        """The number of the data set of each row of a block."""
        within = np.arange(MIXTURE_BLOCK, dtype=np.uint64)
        # mix is bijective, so no two of a block are equal, and every sort gives the same order
        order = mix(key(self.seed, block, MIXTURE) + within).argsort()
        return np.repeat(np.arange(len(self.shares)), self.shares)[order]

    def rows_before(self, row: int) -> tuple[int, ...]:
        """Rows of each data set before a row of the run, in a time that depends on the number of stages alone."""
        if self.then and row > self.then[0]:
            return self.then[1].rows_before(row - self.then[0])
        block, rest = divmod(row, MIXTURE_BLOCK)
        cut = np.bincount(self._sets(block)[:rest], minlength=len(self.shares)).tolist()
        before = self.before or (0,) * len(self.shares)
        return tuple(b + block * share + c for b, share, c in zip(before, self.shares, cut, strict=True))

    def estimate(self, step: int, row: int = 0) -> MixedOrder:
        """Another draw of the same windows in the shares of the stage of ``row``, to measure on after ``step``."""
        if self.then and row >= self.then[0]:
            return self.then[1].estimate(step, row - self.then[0])
        orders = tuple(order.estimate(step) for order in self.orders)
        return MixedOrder(orders, self.shares, int(key(self.seed, step, ESTIMATE)[0]))


def mixture(
    orders: tuple[DataOrder, ...],
    stages: Sequence[tuple[int, tuple[int, ...]]],
    seed: int,
    before: tuple[int, ...] = (),
) -> MixedOrder:
    """A mixture in stages: the row at which each begins, the first at 0, and its ``shares``.

    What a row is depends on its own stage and those before it, not on those after it.
    """
    (begin, shares), *later = stages
    order = MixedOrder(orders, shares, int(key(seed, begin, STAGES)[0]) if begin else seed, before)
    if not later:
        return order
    rows = later[0][0] - begin
    return replace(order, then=(rows, mixture(orders, later, seed, order.rows_before(rows))))


def mixture_shares(weights: Sequence[float], names: Sequence[str], field: str = "data.weights") -> tuple[int, ...]:
    """Rows of each data set in a block of ``MIXTURE_BLOCK``: in proportion to the weights, by largest remainder.

    Raises UsageError for a weight of a ``field`` too small for a single row, but not 0.
    """
    wanted = np.array(weights, dtype=np.float64) / sum(weights) * MIXTURE_BLOCK
    shares = np.floor(wanted).astype(np.int64)
    missing = MIXTURE_BLOCK - int(shares.sum())
    shares[np.argsort(shares - wanted, kind="stable")[:missing]] += 1
    for name, share, weight in zip(names, shares, weights, strict=True):
        if weight and not share:
            raise UsageError(
                f"{field} gives {name} {weight / sum(weights):.2g} of the rows, less than one in {MIXTURE_BLOCK};"
                f" give it at least {sum(weights) / MIXTURE_BLOCK:.2g}, or leave it out"
            )
    return tuple(shares.tolist())
