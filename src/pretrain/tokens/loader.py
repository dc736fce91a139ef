"""Batches of token windows: inputs, and targets one token later.

training:    step → DataOrder → starts → TokenStream.windows → (rows, T) inputs and targets [→ BatchesAhead: on a GPU]
validation:  every token of the split once as a target, in order; or windows of given starts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pretrain.tokens.order import DataOrder, MixedOrder
from pretrain.tokens.windows import TokenStream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STARTS_AHEAD = 65536  # rows whose starts are computed at once (an epoch, if shorter), to share the vectorised call


class Batches(Protocol):
    """What training reads from: shards by a data order, or a live stream."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step for one process, int64 (rows, T).

        The tensors stay as they are while the next batch is made, and may be overwritten by the one after it.
        """
        ...

    def epoch(self, step: int) -> float:
        """Epochs completed before a step."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON, to go on with ``step``: that of the last batch made, or the next."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave, perhaps in another number of processes."""
        ...


class TrainingBatches:
    """The global batch of every step, of ``rows`` windows, as a function of the step alone.

    Of each one process takes the rows ``rank::world``.
    """

    def __init__(self, stream: TokenStream, order: DataOrder | MixedOrder, rows: int, rank: int = 0, world: int = 1):
        import torch

        self.stream, self.order, self.rows, self.rank, self.world = stream, order, rows, rank, world
        self._first, self._starts = 0, np.empty(0, dtype=np.int64)
        self._count = max(rows, min(STARTS_AHEAD, order.windows))
        # Two buffers in turn, so that a batch stands while the next is made; each with its inputs and targets.
        shape = (len(range(rank, rows, world)), order.length + 1)
        buffers = [torch.empty(shape, dtype=torch.int64) for _ in range(2)]
        self._buffers = [(buffer.numpy(), (buffer[:, :-1], buffer[:, 1:])) for buffer in buffers]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step for the rank, both int64 (rows / world, T), as views of a buffer."""
        first = step * self.rows
        if not self._first <= first <= self._first + len(self._starts) - self.rows:
            self._first, self._starts = first, self.order.starts(first, self._count)
        begin = first - self._first
        window, batch = self._buffers[0]
        self._buffers.reverse()
        self.stream.windows(self._starts[begin + self.rank : begin + self.rows : self.world], window.shape[1], window)
        return batch

    def epoch(self, step: int) -> float:
        """Epochs completed before a step; of a mixture, rows read for each window of all data sets together."""
        return step * self.rows / self.order.windows

    def state(self, step: int) -> dict[str, Any]:
        """Nothing: every batch is a function of its step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class BatchesAhead:
    """Batches on a CUDA device, the next one being copied there while the current one is computed on."""

    def __init__(self, batches: Batches, device: torch.device):
        import torch

        self.batches, self.device = batches, device
        self.epoch, self.state = batches.epoch, batches.state  # of any step, whatever was made ahead
        self._copies = torch.cuda.Stream(device)
        self._next: tuple[int, tuple[Tensor, Tensor], torch.cuda.Event] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step on the device, int64 (rows, T), in the order of the current stream."""
        import torch

        if self._next is None or self._next[0] != step:
            self._next = self._begin(step)
        _, (inputs, targets), done = self._next
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for tensor in (inputs, targets):  # made on one stream and used on another: not to be freed before both are done
            tensor.record_stream(current)
        self._next = self._begin(step + 1)
        return inputs, targets

    def _begin(self, step: int) -> tuple[int, tuple[Tensor, Tensor], torch.cuda.Event]:
        """Start copying a batch, on a stream of its own: it waits neither for the CPU nor for the device's work.

        A page-locked block can be let go at once: torch gives it out again only when the copy from it is done.
        """
        import torch

        with torch.cuda.stream(self._copies):
            inputs, targets = (
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
                .copy_(part)
                .to(self.device, non_blocking=True)
                for part in self.batches.batch(step)
            )
            done = torch.cuda.Event()
            done.record(self._copies)
        return step, (inputs, targets), done

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; what was made ahead is forgotten."""
        self._next = None
        self.batches.restore(state)


def validation_batches(
    stream: TokenStream, length: int, rows: int, tokens: int = 0, rank: int = 0, world: int = 1, stride: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (up to ``rows``, T) that over all ranks count every token but the first once as a target.

    Each rank gets as many batches of the same shapes as the others, since they may have to compute together: what does
    not fill up a row, or a rank's rows, has targets of ``IGNORE``. ``tokens`` stops after about as many targets; 0
    takes all. With a ``stride`` below ``length`` rows overlap and count only their last ``stride`` targets, but for
    the first row: each target has at least ``length - stride`` tokens before it, or all there are.
    """
    import torch

    from pretrain.model.loss import IGNORE

    targets = len(stream) - 1
    if tokens:
        targets = min(targets, max(1, tokens // length) * length)
    stride = stride or length
    all_rows = 1 + -(-max(0, targets - length) // stride)
    for first in range(0, all_rows, rows * world):
        mine = -(-min(rows * world, all_rows - first) // world)
        begin, size = (first + rank * mine) * stride, (mine - 1) * stride + length
        count = max(0, min(size, targets - begin))
        flat = stream.windows(np.array([begin]), count + 1)[0] if count else np.zeros(1, dtype=np.int64)
        padding = size - count
        padded = np.pad(flat[:-1], (0, padding)), np.pad(flat[1:], (0, padding), constant_values=IGNORE)
        inputs, wanted = (sliding_window_view(each, length)[::stride].copy() for each in padded)
        wanted[0 if begin else 1 :, : length - stride] = IGNORE
        yield torch.from_numpy(inputs), torch.from_numpy(wanted)


def window_batches(
    stream: TokenStream, starts: np.ndarray, length: int, rows: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (up to ``rows``, T) of the windows of T + 1 tokens from ``starts``, over all ranks each once.

    As in :func:`validation_batches`, each rank gets batches of the same shapes, filled up with targets of ``IGNORE``.
    """
    import torch

    from pretrain.model.loss import IGNORE

    for first in range(0, len(starts), rows * world):
        mine = -(-min(rows * world, len(starts) - first) // world)
        windows = stream.windows(starts[first + rank * mine : first + (rank + 1) * mine], length + 1)
        padding = ((0, mine - len(windows)), (0, 0))
        wanted = np.pad(windows[:, 1:], padding, constant_values=IGNORE)
        yield torch.from_numpy(np.pad(windows[:, :-1], padding)), torch.from_numpy(wanted)
