"""Batches of a live stream: text that is tokenized while training on it.

    LiveText ──Deal──> reader 0: pieces → documents → ids ──packing──> rows 0, R, 2R, ... of every batch
                       reader 1: ...                                   rows 1, R + 1, ...
                       ...                                             └─ in a thread, some batches ahead ─> LiveBatches

Which tokens are row j of the batch of step s does not depend on the number of processes nor on how far ahead was read:
row j always comes from reader j % R, and each reader reads its own pieces. All that is needed to go on is one cursor
for each reader, of the step in question: no text and no tokens are kept. The document in which a reader stopped is read
and tokenized again, those before it in its piece are only read.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.config import DataConfig
from pretrain.errors import DataError
from pretrain.text.split import TRAIN
from pretrain.tokenizer import Tokenizer
from pretrain.tokens.live_text import LiveText, bytes_per_token, no_text
from pretrain.tokens.order import key, permute
from pretrain.tokens.packing import Cursor, Place, best_fit, concatenate

if TYPE_CHECKING:
    from torch import Tensor

PACKED_TOKENS, PACKED_ROWS = 2**20, 256
"""Tokens that best_fit packs at once: so many, or of so many rows. More would cut fewer documents (docs/data.md)."""
AHEAD_TOKENS = 2**21
"""Tokens made ahead at most, but MOST_AHEAD batches, and at least 2."""
MOST_AHEAD = 64
KEPT = 3
"""Batches that can be asked for again, as after running out of memory."""
END_SECONDS = 10.0
"""How long to wait for the thread to end. It looks at every document whether it should; a slow server may hold it."""
KEPT_EPOCHS = 8
"""Epochs whose deals are kept; others are dealt again."""
WAIT_SECONDS = 0.2
"""How long a wait lasts before it is looked up whether the thread still lives."""


class Deal:
    """Which reader reads which pieces, epoch by epoch: each piece once in each epoch.

    The pieces of an epoch go, one after another, to the reader that was given the fewest bytes so far, from the first
    epoch on. So the readers stay within about a piece of each other, as rows take as much from each of them.

    Args:
        sizes: bytes of the pieces.
        readers: R.
        shuffled: whether each epoch permutes the pieces; otherwise they are dealt as they stand.
        seed: of the permutations.
    """

    def __init__(self, sizes: Sequence[int], readers: int, shuffled: bool, seed: int):
        self.sizes, self.readers, self.shuffled, self.seed = [max(1, size) for size in sizes], readers, shuffled, seed
        self._loads: list[list[int]] = [[0] * readers]  # at the beginning of each epoch
        self._epochs: dict[int, list[list[int]]] = {}

    def turns(self, epoch: int, reader: int) -> list[int]:
        """The numbers of the pieces that a reader reads in an epoch, in order; may be none."""
        while len(self._loads) <= epoch:
            self._deal(len(self._loads) - 1)
        if epoch not in self._epochs:
            self._deal(epoch)
        return self._epochs[epoch][reader]

    def _deal(self, epoch: int) -> None:
        pieces = np.arange(len(self.sizes), dtype=np.uint64)
        if self.shuffled:
            pieces = permute(pieces, len(pieces), key(self.seed, epoch, 4))
        # Where two were given equally much, the turn goes round, so that equal pieces do not stay with their readers.
        heap = [(load, (reader - epoch) % self.readers, reader) for reader, load in enumerate(self._loads[epoch])]
        heapq.heapify(heap)
        turns: list[list[int]] = [[] for _ in range(self.readers)]
        for piece in pieces.tolist():
            load, place, reader = heap[0]
            turns[reader].append(piece)
            heapq.heapreplace(heap, (load + self.sizes[piece], place, reader))
        self._epochs[epoch] = turns
        if len(self._epochs) > KEPT_EPOCHS:  # readers are in neighbouring epochs
            del self._epochs[next(iter(self._epochs))]
        if len(self._loads) == epoch + 1:
            self._loads.append([load for _, load in sorted((reader, load) for load, _, reader in heap)])


def reader_count(text: LiveText, most: int, rows: int) -> int:
    """How many readers to have: the largest number that divides the rows of a batch and is at most

    - ``most``;
    - the number of pieces;
    - so many that the largest piece is at most half as large again as an even share, since otherwise several readers
      would read it at the same time, in different epochs.
    """
    sizes = [max(1, piece.size) for piece in text.train]
    limit = min(most, len(sizes), max(1, 3 * sum(sizes) // (2 * max(sizes))))
    return next(number for number in range(limit, 0, -1) if rows % number == 0)


class _Stopped(Exception):
    """Nobody wants more batches."""


@dataclass(frozen=True)
class _Reading:
    """All that the thread needs; it must not know the LiveBatches, or that would never be let go."""

    text: LiveText
    tokenizer: Tokenizer
    packing: str
    deal: Deal
    rows: int
    length: int
    seed: int
    rank: int
    world: int
    barren: set[int] = field(default_factory=set)
    """Pieces known to have no training text."""
    problems: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def readers(self) -> list[int]:
        """Those that feed this rank's rows."""
        return sorted({row % self.deal.readers for row in range(self.rank, self.rows, self.world)})

    def batches(
        self, cursors: Mapping[int, Cursor], stop: threading.Event
    ) -> Iterator[tuple[np.ndarray, dict[int, Cursor]]]:
        """Batches (rows of this rank, T + 1), each with the cursors of the next one. Endless."""
        cursors = {reader: cursors[reader] for reader in self.readers()}
        streams = {reader: self.packed(reader, cursor, stop) for reader, cursor in cursors.items()}
        mine = {row: place for place, row in enumerate(range(self.rank, self.rows, self.world))}
        while True:
            batch = np.empty((len(mine), self.length + 1), dtype=self.tokenizer.dtype)
            for row in range(self.rows):
                reader = row % self.deal.readers
                if reader in streams:
                    tokens, cursors[reader] = next(streams[reader])
                    if row in mine:
                        batch[mine[row]] = tokens
            yield batch, dict(cursors)

    def packed(self, reader: int, start: Cursor, stop: threading.Event) -> Iterator[tuple[np.ndarray, Cursor]]:
        """The rows of a reader, each with the cursor of the next one."""
        documents = self.documents(reader, start, stop)
        if self.packing == "concatenate":
            return concatenate(documents, self.length, start, self.counts)
        budget = max(PACKED_TOKENS, PACKED_ROWS * self.length)
        return best_fit(
            documents,
            self.length,
            start,
            self.counts,
            boundary=self.tokenizer.bos_id,
            budget=budget,
            first_budget=budget * (reader + 1) // self.deal.readers,
            seed=self.seed,
        )

    def documents(self, reader: int, start: Cursor, stop: threading.Event) -> Iterator[tuple[Place, np.ndarray]]:
        """What a reader reads from a place on, as ids."""
        boundary = self.tokenizer.bos_id if self.packing == "concatenate" else None  # best_fit puts it everywhere
        lead = np.array([] if boundary is None else [boundary], dtype=self.tokenizer.dtype)
        texts = (((place, begins), text) for place, text, begins in self.texts(reader, start.place, stop))
        for (place, begins), ids in self.tokenizer.encode_documents(texts):
            yield place, np.concatenate((lead, ids)) if begins and len(lead) else ids

    def texts(self, reader: int, start: Place, stop: threading.Event) -> Iterator[tuple[Place, str, bool]]:
        """Training documents from a place on, epoch after epoch, and whether each begins rather than goes on.

        Raises DataError when there turn out to be none.
        """
        first_epoch, first_turn, first_document = start
        pieces = self.text.train
        idle = 0  # turns without text, one after another
        for epoch in itertools.count(first_epoch):
            turns = self.deal.turns(epoch, reader)
            for turn in range(first_turn, len(turns)):
                number = turns[turn]
                found = False
                # The later part of a large file goes on only if it comes right after the part before.
                follows = turn > 0 and turns[turn - 1] == number - 1 and pieces[number - 1].file == pieces[number].file
                problems = self.problems if epoch == 0 else Counter[str]()
                parts = self.text.parts(pieces[number], problems) if number not in self.barren else iter(())
                for document, part in enumerate(parts):
                    if stop.is_set():
                        raise _Stopped
                    if part.split != TRAIN or not part.text:
                        continue
                    begins = part.begins or not (found or follows)
                    found = True
                    if document >= first_document:
                        yield (epoch, turn, document), part.text, begins
                first_document = 0
                if found:
                    idle = 0
                else:
                    self.barren.add(number)
                    idle += 1
            first_turn = 0
            idle += not turns
            # All pieces come round to every reader sooner or later; the limit is there should they not.
            if len(self.barren) == len(pieces) or idle > 1000 + 100 * len(pieces):
                raise no_text()


class LiveBatches:
    """The batches of a live stream, made in a thread ahead of the step that asks for them.

    They can be asked for in order, beginning with step 0 or where ``restore`` says, and the last KEPT again.

    Attributes:
        readers: R, the number of logical readers.
        bytes_per_token: UTF-8 bytes of text that a token stands for, measured at the beginning of the text.
        problems: what of the text was mended or left out so far, in the first epoch, and how often.
        counts: ``documents`` packed so far by this process, and those ``cut``, which are not in one row.
    """

    def __init__(
        self,
        text: LiveText,
        tokenizer: Tokenizer,
        data: DataConfig,
        *,
        rows: int,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        """Prepare to read; the thread begins with the first batch.

        Args:
            text: from :func:`find_text`.
            tokenizer: of any kind but char.
            data: its ``order``, ``packing`` and ``readers``.
            rows: rows in the global batch of one step.
            length: T.
            seed: of the order.
            rank: which of the processes this is; it takes rows ``rank::world`` of every global batch.
            world: the number of processes. Each reads what feeds its rows, so that where ``world`` does not divide the
                number of readers, some text is read and tokenized by several.

        Raises:
            DataError: there is no text to train on.
        """
        self.text, self.rows, self.length = text, rows, length
        self.readers = reader_count(text, data.readers, rows)
        self.bytes_per_token = bytes_per_token(text, tokenizer)
        deal = Deal([piece.size for piece in text.train], self.readers, data.order == "shuffled", seed)
        self._reading = _Reading(text, tokenizer, data.packing, deal, rows, length, seed, rank, world)
        self.problems, self.counts = self._reading.problems, self._reading.counts
        self._thread: threading.Thread | None = None
        self._begin(0, dict.fromkeys(self._reading.readers(), Cursor()))

    def _begin(self, step: int, cursors: dict[int, Cursor]) -> None:
        self._next = step
        self._cursors = {step: cursors}
        self._made: dict[int, np.ndarray] = {}
        self._failure: BaseException | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process of a step, both int64 (rows / world, T); waits until they are made.

        Raises:
            DataError: the text cannot be read, is not what it was, or there is none.
        """
        import torch

        if step not in self._made:
            assert step == self._next, f"batches come in order: step {step} after {self._next - 1}"
            self._made[step], self._cursors[step + 1] = self._take()
            self._next += 1
            self._made.pop(step - KEPT, None)
            self._cursors.pop(step - KEPT, None)
        tokens = torch.from_numpy(self._made[step].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _take(self) -> tuple[np.ndarray, dict[int, Cursor]]:
        if self._thread is None:
            self._start()
        assert self._thread is not None
        while self._failure is None:
            try:  # in short waits, between which Python's signal handlers run on every system
                made = self._queue.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                assert self._thread.is_alive(), "the thread that tokenizes ended without a word"
                continue
            if not isinstance(made, BaseException):
                return made
            self._failure = made
        raise self._failure

    def _start(self) -> None:
        ahead = min(MOST_AHEAD, max(2, AHEAD_TOKENS // (self.rows * self.length)))
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        stop = threading.Event()
        made = self._reading.batches(self._cursors[self._next], stop)
        self._thread = threading.Thread(target=_fill, args=(self._queue, made, stop), name="stream", daemon=True)
        # Called once: by close, or when nobody has this object any more, or at the end of the process.
        self._end = weakref.finalize(self, _end, self._queue, stop, self._thread)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a later batch begins it anew, where it is wanted."""
        if self._thread is not None:
            self._end()
            self._thread = None

    def epoch(self, step: int) -> float:
        """About how many epochs are completed before a step, by the sizes of the files."""
        return step * self.rows * self.length * self.bytes_per_token / max(1, self.text.size)

    def state(self, step: int) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON, to go on with ``step``: that of one of the last batches, or the next.

        It has the cursors of the readers of this rank; :func:`merge_states` puts those of all ranks together.
        """
        cursors = {str(reader): list(cursor) for reader, cursor in self._cursors[step].items()}
        return {"step": step, "text": self.text.fingerprint, "readers": cursors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave, or in several processes :func:`merge_states`; in any number of processes.

        Nothing happens with an empty state.

        Raises:
            DataError: the text is not what it was.
        """
        if not state:
            return
        if state["text"] != self.text.fingerprint:
            raise DataError(
                "the text of this stream is not what the run was trained on (other files, other contents or another"
                " split), so it cannot go on exactly; restore the text, or start anew with another --out"
            )
        cursors = {int(reader): Cursor(*cursor) for reader, cursor in state["readers"].items()}
        self.close()
        self._begin(state["step"], {reader: cursors[reader] for reader in self._reading.readers()})


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks, at the same step; of batches that have none, none."""
    if not states[0]:
        return {}
    merged = {**states[0], "readers": dict(states[0]["readers"])}
    for state in states[1:]:
        assert state["step"] == merged["step"]
        for reader, cursor in state["readers"].items():
            assert merged["readers"].setdefault(reader, cursor) == cursor, f"reader {reader} stands at two places"
    return merged


def _fill(made: queue.Queue[Any], batches: Iterator[Any], stop: threading.Event) -> None:
    """Put batches, and at last what went wrong, until nobody wants more."""
    try:
        for batch in batches:
            if not _put(made, batch, stop):
                return
    except _Stopped:
        return
    except BaseException as error:  # whatever it is belongs to the one who waits
        _put(made, error, stop)


def _end(made: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread, and wait for it: a thread that is in the middle of a library cannot outlive the interpreter."""
    stop.set()
    with suppress(queue.Empty):  # so that it does not wait for a place
        while True:
            made.get_nowait()
    if thread is not threading.current_thread():  # where garbage may be collected too
        thread.join(END_SECONDS)


def _put(made: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            made.put(item, timeout=WAIT_SECONDS)
            return True
        except queue.Full:
            continue
    return False
