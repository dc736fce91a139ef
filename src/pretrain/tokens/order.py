"""The data order: which window of tokens is row ``g`` of the run. A pure function, never a state.

    row g = step × rows per step + row in the batch  →  epoch, place in the epoch  →  start of its window

Nothing here depends on the number of processes, the micro-batch, or what was read before: resuming is calling it with a
later step. A shuffled epoch is a keyed permutation of all its windows in O(1) memory: a Feistel network over the next
power of four, walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values whose output bits all depend on all input bits (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*parts: int) -> np.ndarray:
    """A uint64 key (a one-element array) from integers such as (seed, epoch)."""
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for part in parts:
        state = mix(state ^ mix(np.array([part], dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    return state


def permute(index: np.ndarray, size: int, round_key: np.ndarray) -> np.ndarray:
    """Where each ``index`` (uint64, each below ``size``) lands in the permutation of range(size) named by the key."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [mix(round_key + np.uint64(r + 1)) for r in range(FEISTEL_ROUNDS)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (mix(right + k) & low)
        return (left << half) | right

    result = encrypt(index)
    outside = result >= np.uint64(size)
    while outside.any():  # a walk along its cycle comes back inside, since the start was inside
        result[outside] = encrypt(result[outside])
        outside = result >= np.uint64(size)
    return result


@dataclass(frozen=True)
class DataOrder:
    """The order of training windows of ``length + 1`` tokens (inputs and the targets one later) in a token stream.

    Args:
        tokens: tokens in the stream.
        length: the context length T.
        kind: ``shuffled``, ``random`` or ``sequential`` (see ``DataConfig.order``).
        stride: tokens between neighbouring starts; 0 for T, with a fresh offset each shuffled epoch.
        seed: fixes everything.
    """

    tokens: int
    length: int
    kind: str
    stride: int
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
        row = np.arange(first, first + count, dtype=np.uint64)
        if self.kind == "random":
            return (mix(key(self.seed) + row) % np.uint64(self.tokens - self.length)).astype(np.int64)
        step = self.stride or self.length
        epochs, place = np.divmod(row, np.uint64(self.windows))
        if self.kind == "sequential":
            return (place * np.uint64(step)).astype(np.int64)
        starts = np.empty(count, dtype=np.int64)
        slack = self.tokens - self.length - 1 - (self.windows - 1) * step
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = permute(place[here], self.windows, key(self.seed, int(epoch)))
            starts[here] = order.astype(np.int64) * step
            if not self.stride:
                starts[here] += int(key(self.seed, int(epoch), 1)[0] % np.uint64(min(slack, self.length - 1) + 1))
        return starts
