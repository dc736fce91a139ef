"""Live streams: text that is tokenized while training on it.

    data.paths ──find_text──> LiveText ──prepare_stream──> tokenizer.json and shards of held-out tokens
                                 │
      Assignment of its pieces to readers
      ├─ reader 0: pieces → documents → ids ──packing──> rows 0, R, 2R, ... of every batch
      ├─ reader 1: ...                                   rows 1, R + 1, ...
      └─ ...                                             └─ in a thread, some batches ahead ─> LiveBatches

Which tokens are row j of the batch of step s does not depend on the number of processes nor on how far ahead was read:
row j always comes from reader j % R, and each reader reads its own pieces. Resuming needs only one cursor for each
reader, of the step in question: no text and no tokens are kept. The document in which a reader stopped is read and
tokenized again, those before it in its piece are only read.

The held-out tokens are written as shards, so that a run with a stream validates as any other does, now and later.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.config import Config, DataConfig
from pretrain.errors import DataError, UsageError
from pretrain.text import ReadStats, refuse_broken
from pretrain.text.files import Say
from pretrain.text.opening import unreadable
from pretrain.text.pieces import EMBEDDED, Piece, join_ranges
from pretrain.text.problems import Cuts
from pretrain.text.split import NOTHING, TEST, TRAIN, VAL, Part, Shares
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.order import PIECES, key, permute
from pretrain.tokens.packing import OTHER_TEXT, Cursor, Place, best_fit, concatenate
from pretrain.tokens.prepare import TOKENIZER, Prepared, check_boundary, introduce
from pretrain.tokens.shards import Manifest, Shard, ShardWriter, bytes_per_token, utf8_bytes
from pretrain.tokens.source import (
    HASH,
    NO_TEST,
    NO_TEXT,
    NO_VALIDATION,
    describe,
    find_sides,
    read_parts,
    training_texts,
)

if TYPE_CHECKING:
    from torch import Tensor

LEARN_BYTES = 32_000_000  # of text that a bpe is trained on, at most
HELD_OUT_TOKENS = 2**23  # written for validation and for the test, at most, unless eval.tokens is more
SEARCHED_BYTES = 512_000_000  # read for them, once there are some: a small share by hash is spread over all of the text
MEASURED_BYTES = 2**18  # of text, to know the bytes of a token
SAMPLED_BYTES = 64 * 1024  # hashed at the beginning and at the end of each file, to know it again

# What best_fit packs at once, at least; more cuts fewer documents (docs/data.md).
PACKED_TOKENS, PACKED_ROWS = 2**20, 256
AHEAD_TOKENS, MOST_AHEAD = 2**21, 64  # tokens and batches made ahead, at most, but at least 2 batches
KEPT = 3  # batches that can be asked for again, as after running out of memory
KEPT_EPOCHS = 8  # whose assignments are kept; others are computed again
END_SECONDS = 10.0  # to wait for the thread, which may be held by a slow server
WAIT_SECONDS = 0.2  # for a batch, in turn: between two waits Python's signal handlers run on every system


@dataclass(frozen=True)
class LiveText:
    """The text of a stream in pieces."""

    train: tuple[Piece, ...]  # in the order of data.paths
    val: tuple[Piece, ...]  # those held out; all pieces if documents are held out by a hash
    field: str
    shares: Shares = NOTHING  # of the documents of `train` that are held out by a hash of their text
    test: tuple[Piece, ...] = ()  # as `val`

    def parts(self, piece: Piece, side: str = TRAIN, stats: ReadStats | None = None) -> Iterator[Part]:
        """The documents of a piece of the ``side`` that is named; by a hash some of them are of another."""
        hashed = {TRAIN: bool(self.shares), VAL: self.shares.val > 0, TEST: self.shares.test > 0}[side]
        return read_parts([piece], self.field, HASH if hashed else side, self.shares, stats or ReadStats())

    def training(self, pieces: Sequence[Piece], stats: ReadStats | None = None) -> Iterator[Part]:
        """The documents to train on of pieces of ``train``."""
        parts = itertools.chain.from_iterable(self.parts(piece, TRAIN, stats) for piece in pieces)
        return (part for part in parts if part.split == TRAIN and part.text)

    def joined(self, cuts: Cuts) -> LiveText:
        """The same for a tokenizer with these ``cuts`` (:func:`join_ranges`)."""
        train, val, test = (tuple(join_ranges(pieces, cuts)) for pieces in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    @property
    def size(self) -> int:
        """About how many bytes of text an epoch has."""
        return round(sum(piece.size for piece in self.train) * (1 - self.shares.val - self.shares.test))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the pieces, of the names of their files and of samples of those on this machine.

        Files may be moved or copied, but not changed, since the place in a stream is counted in them.
        """
        test = [self.shares.test] if self.shares.test else []
        digest = hashlib.sha256(json.dumps([self.field, self.shares.val, *test]).encode())
        pieces = [*self.train, *self.val, *self.test]
        for piece in pieces:
            digest.update(json.dumps([Path(piece.file).name, piece.size, piece.begin, piece.end]).encode())
        for file in dict.fromkeys(piece.file for piece in pieces):
            digest.update(hash_of_ends(file))
        return digest.hexdigest()


def hash_of_ends(file: str) -> bytes:
    """A hash of the size and both ends of a file on this machine; empty for others, known by their pieces only."""
    if file == EMBEDDED or "://" in file:
        return b""
    try:
        with open(file, "rb") as source:
            head = source.read(SAMPLED_BYTES)
            end = source.seek(0, os.SEEK_END)
            source.seek(max(0, end - SAMPLED_BYTES))
            return hashlib.sha256(end.to_bytes(8, "big") + head + source.read(SAMPLED_BYTES)).digest()
    except OSError as error:
        raise unreadable(file, error) from error


def find_text(data: DataConfig, say: Say = lambda _: None) -> LiveText:
    """Find the pieces that ``data`` names, and divide them.

    ``data.split`` tail holds out whole pieces, since no stream knows how many characters it will have read: for the
    test the last ones, of together at most ``test_fraction`` of the bytes, and for validation those before them.

    Raises:
        UsageError: the configuration asks for what a stream cannot do.
        DataError: the text is missing or cannot be read, or a side of the split would be empty.
    """
    for name, given in (("order random", data.order == "random"), ("stride", data.stride), ("weights", data.weights)):
        if given:
            raise UsageError(f"data.{name} needs token shards (pretrain data prepare), not a stream; leave one out")
    sides = find_sides(data, say)
    train, shares = sides.train, sides.shares
    held_out = {TEST: sides.test, VAL: sides.val}  # the test is the last of the text
    size = sum(piece.size for piece in train)
    for side, share in ((TEST, shares.test), (VAL, shares.val)):
        if share and sides.split == HASH:
            held_out[side] = train
        elif share:
            left = share * size
            first = len(train)
            while first > 1 and train[first - 1].size <= left:
                first -= 1
                left -= train[first].size
            if first == len(train):
                raise DataError(
                    f"data.split tail of a stream holds out whole pieces, and the last one (of {train[-1].size:,}"
                    f" bytes) is more than data.{side}_fraction {share}; use --data.split hash"
                    + (" or --data.val_paths" if side == VAL else "")
                )
            train, held_out[side] = train[:first], train[first:]
    hashed = shares if sides.split == HASH else NOTHING
    return LiveText(tuple(train), tuple(held_out[VAL]), data.field, hashed, tuple(held_out[TEST]))


def prepare_stream(
    config: Config, text: LiveText, folder: Path, say: Callable[[str], None] = lambda _: None
) -> Prepared:
    """Make the tokenizer and the shards of held-out tokens of a run that trains on a stream, in ``folder``.

    The folder appears whole or not at all. Its manifest has no training shards.

    Raises:
        UsageError: the tokenizer is of kind char.
        DataError: a side of the split is empty, or the text cannot be read or does not fit the vocabulary.
    """
    kind = config.tokenizer.kind
    if kind == "char":
        raise UsageError(
            "tokenizer.kind char needs the whole text beforehand; use byte, bpe or gpt2, or leave out --data.stream"
        )
    say(f"{describe(config.data, text.size)} in {len(text.train):,} pieces, tokenized while training")
    wanted, bos = config.tokenizer, config.data.bos
    read = ReadStats()  # of the text to train on, only its beginning if there is nothing to learn from it
    texts = _learning_texts(text, read)
    fewer = "tokenizer.vocab_size" in config.fit.fields
    tokenizer = build_tokenizer(kind, wanted.vocab_size, texts, wanted.pattern, wanted.bos, fewer).with_bos(bos)
    check_boundary(tokenizer, config.model.document_mask)
    introduce(tokenizer, bos, say)
    if not read.records:
        _measure(text, tokenizer, read)
    refuse_broken(read, config.data.allow_broken)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shards, held_out = [], ReadStats(cuts=tokenizer.cuts)
        for side, name, missing in ((VAL, "validation", NO_VALIDATION), (TEST, "the test", NO_TEST)):
            if not getattr(text, side):
                continue
            limit = max(HELD_OUT_TOKENS, config.eval.tokens)
            stats = ReadStats(cuts=tokenizer.cuts)
            shard = _write_held_out(temporary, text.joined(tokenizer.cuts), side, tokenizer, limit, stats)
            refuse_broken(stats, config.data.allow_broken)
            if side == VAL or text.test != text.val:  # by a hash both are of the same text
                held_out.add(stats)
            if shard.tokens < 2:
                raise DataError(missing)
            say(f"held out  {shard.tokens:,} tokens of {shard.documents:,} documents are kept for {name}")
            shards.append(shard)
        tokenizer.save(temporary / TOKENIZER)
        manifest = Manifest.of(tokenizer, shards, held_out)
        manifest.save(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed before the run was there
        temporary.rename(folder)
        for line in dict.fromkeys([*read.lines(), *held_out.lines()]):  # by a hash both are of the same text
            say(f"{line}, so far")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Prepared(folder, manifest, tokenizer)


def _learning_texts(text: LiveText, stats: ReadStats) -> Iterator[str]:
    """Training texts for a tokenizer to learn from: about LEARN_BYTES, from pieces spread evenly over all of them."""
    pieces, limit = text.train, math.inf
    if (size := sum(piece.size for piece in pieces)) > LEARN_BYTES:
        mean = max(1, size // len(pieces))
        pieces = pieces[:: max(1, len(pieces) // max(16, LEARN_BYTES // mean))]
        limit = LEARN_BYTES // len(pieces)
    return itertools.chain.from_iterable(training_texts(text.training([piece], stats), limit) for piece in pieces)


def _write_held_out(
    folder: Path, text: LiveText, side: str, tokenizer: Tokenizer, limit: int, stats: ReadStats
) -> Shard:
    """Tokenize what is held out for a side, up to about ``limit`` tokens."""

    def parts() -> Iterator[tuple[Part, str]]:
        searched = 0
        for part in itertools.chain.from_iterable(text.parts(piece, side, stats) for piece in getattr(text, side)):
            if part.split == side and part.text:
                yield part, part.text
            searched += utf8_bytes(part.text)
            if searched >= SEARCHED_BYTES and writer.tokens:
                return

    with ShardWriter(folder, f"{side}-00000.bin", side, tokenizer) as writer:
        for part, ids in tokenizer.encode_documents(parts()):
            # Held-out text may begin in the middle of a document, the rest of which is trained on.
            writer.write(ids, utf8_bytes(part.text), part.begins or not writer.tokens)
            if writer.tokens >= limit:
                break
        return writer.close()


def _measure(text: LiveText, tokenizer: Tokenizer, stats: ReadStats | None = None) -> float:
    """UTF-8 bytes that a token of the training text stands for, at its beginning. Raises DataError if it is empty."""
    texts = [part[:MEASURED_BYTES] for part in training_texts(text.training(text.train, stats), MEASURED_BYTES)]
    if not texts:
        raise DataError(NO_TEXT)
    return bytes_per_token(texts, tokenizer)


def reader_count(text: LiveText, most: int, rows: int) -> int:
    """How many readers to have: the largest number that divides the rows of a batch, at most ``most`` and one a piece.

    The largest piece is at most half as large again as an even share, or several readers would read it at the same
    time, in different epochs.
    """
    sizes = [max(1, piece.size) for piece in text.train]
    limit = min(most, len(sizes), max(1, 3 * sum(sizes) // (2 * max(sizes))))
    return next(number for number in range(limit, 0, -1) if rows % number == 0)


class Assignment:
    """Which reader reads which pieces, epoch by epoch: each piece once in each epoch.

    The pieces of an epoch go, one after another, to the reader that was given the fewest bytes so far, from the first
    epoch on. So the readers stay within about a piece of each other, as rows take as much from each of them.
    """

    def __init__(self, sizes: Sequence[int], readers: int, shuffled: bool, seed: int):
        self.sizes, self.readers, self.shuffled, self.seed = [max(1, size) for size in sizes], readers, shuffled, seed
        self._loads: list[list[int]] = [[0] * readers]  # bytes given to each reader before each epoch
        self._kept: dict[int, list[list[int]]] = {}

    def pieces(self, epoch: int, reader: int) -> list[int]:
        """The numbers of the pieces that a reader reads in an epoch, in order; may be empty."""
        for before in range(len(self._loads) - 1, epoch):
            self._assign(before)
        if epoch not in self._kept:
            self._assign(epoch)
        return self._kept[epoch][reader]

    def _assign(self, epoch: int) -> None:
        pieces = np.arange(len(self.sizes), dtype=np.uint64)
        if self.shuffled:
            pieces = permute(pieces, len(pieces), key(self.seed, epoch, PIECES))
        # Of readers with equal loads another comes first in each epoch, so that equal pieces change their readers.
        readers = sorted(range(self.readers), key=lambda reader: (reader - epoch) % self.readers)
        loads = list(self._loads[epoch])
        assigned: list[list[int]] = [[] for _ in readers]
        for piece in pieces.tolist():
            reader = min(readers, key=loads.__getitem__)
            assigned[reader].append(piece)
            loads[reader] += self.sizes[piece]
        self._kept[epoch] = assigned
        if len(self._kept) > KEPT_EPOCHS:  # readers are in neighbouring epochs
            del self._kept[next(iter(self._kept))]
        if len(self._loads) == epoch + 1:
            self._loads.append(loads)


class _Stopped(Exception):
    """Nobody wants more batches."""


@dataclass(frozen=True)
class Readers:
    """The readers that feed the rows of one rank: all of a stream that a thread needs.

    It must not hold the LiveBatches, which would then never be freed.
    """

    text: LiveText
    tokenizer: Tokenizer
    packing: str
    assignment: Assignment
    rows: int  # of the global batch
    mine: range  # the rows of this rank
    length: int
    seed: int
    stop: threading.Event = field(default_factory=threading.Event)
    empty: set[int] = field(default_factory=set)  # pieces known to have no training text
    read: ReadStats = field(default_factory=ReadStats)  # in the first epoch of each reader, counted from its cursor

    def batches(self, cursors: Mapping[int, Cursor]) -> Iterator[tuple[np.ndarray, dict[int, Cursor]]]:
        """Batches (rows of this rank, T + 1), each with the cursors of the next one. Endless."""
        cursors = dict(cursors)
        streams = {reader: self.packed(reader, cursor) for reader, cursor in cursors.items()}
        while True:
            batch = np.empty((len(self.mine), self.length + 1), dtype=self.tokenizer.dtype)
            for row in range(self.rows):
                reader = row % self.assignment.readers
                if reader in streams:  # its rows are all made, those of other ranks too
                    tokens, cursors[reader] = next(streams[reader])
                    if row in self.mine:
                        batch[self.mine.index(row)] = tokens
            yield batch, dict(cursors)

    def packed(self, reader: int, start: Cursor) -> Iterator[tuple[np.ndarray, Cursor]]:
        """The rows of a reader, each with the cursor of the next one."""
        return self.pack(self.documents(reader, start.place), reader, start, self.tokenizer.bos_id)

    def documents(self, reader: int, start: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """The ids of the documents from a place on, as :meth:`pack` wants them: best_fit puts BOS itself."""
        bos, texts = self.tokenizer.bos_id, self.texts(reader, start)
        lead = np.array([] if bos is None or self.packing == "best_fit" else [bos], dtype=self.tokenizer.dtype)
        documents = self.tokenizer.encode_documents(((place, begins), text) for place, text, begins in texts)
        return ((at, np.concatenate((lead, ids)) if begins else ids) for (at, begins), ids in documents)

    def pack(
        self, documents: Iterator[tuple[Place, np.ndarray]], reader: int, start: Cursor, bos: int | None
    ) -> Iterator[tuple[np.ndarray, Cursor]]:
        """The rows of a reader of these documents, each with the cursor of the next one."""
        if self.packing == "concatenate":
            return concatenate(documents, self.length, start)
        budget = max(PACKED_TOKENS, PACKED_ROWS * self.length)
        first_budget = budget * (reader + 1) // self.assignment.readers
        return best_fit(documents, self.length, start, bos, budget, first_budget, self.seed)

    def texts(self, reader: int, start: Place) -> Iterator[tuple[Place, str, bool]]:
        """Training documents from a place on, epoch after epoch, and whether each begins rather than goes on.

        Raises DataError when there turn out to be none.
        """
        pieces = self.text.train
        idle = 0  # turns without text, one after another
        for epoch in itertools.count(start[0]):
            again = ReadStats(cuts=self.read.cuts, whole=self.read.whole)
            stats = self.read if epoch == start[0] else again  # later it is the same text again
            before = None  # the piece of the turn before
            for turn, number in enumerate(self.assignment.pieces(epoch, reader)):
                previous, before = before, number
                if (epoch, turn) < start[:2]:
                    continue
                # The later part of a large file goes on only if it comes right after the part before.
                goes_on = previous == number - 1 and pieces[number - 1].file == pieces[number].file
                found = False
                parts = () if number in self.empty else self.text.parts(pieces[number], TRAIN, stats)
                for document, part in enumerate(parts):
                    if self.stop.is_set():
                        raise _Stopped
                    if part.split != TRAIN or not part.text:
                        continue
                    begins = part.begins or not (found or goes_on)
                    found = True
                    if (epoch, turn, document) >= start:
                        yield (epoch, turn, document), part.text, begins
                if found:
                    idle = 0
                else:
                    self.empty.add(number)
                    idle += 1
            idle += 1  # an epoch may have no turn for this reader
            # All pieces come round to every reader sooner or later; the limit is there should they not.
            if len(self.empty) == len(pieces) or idle > 1000 + 100 * len(pieces):
                raise DataError(NO_TEXT)


class ReadAhead:
    """The items of an endless iterator, which a thread makes up to ``most`` ahead of the one who asks for them.

    The thread ends when ``close`` is called, when nobody has this object any more, and at the end of the process. It
    looks for ``stop`` between two items, and the iterator should do so more often.
    """

    def __init__(self, items: Iterator[Any], most: int, stop: threading.Event):
        self._made, self._room = queue.SimpleQueue[Any](), threading.Semaphore(most)
        self._failure: BaseException | None = None
        arguments = (items, self._made, self._room, stop)
        self.thread = threading.Thread(target=self._make, args=arguments, name="stream", daemon=True)
        self.close = weakref.finalize(self, self._end, self._room, stop, self.thread)
        self.thread.start()

    def __next__(self) -> Any:
        while self._failure is None:
            try:
                item = self._made.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                continue
            self._room.release()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    @staticmethod
    def _make(items: Iterator[Any], made: queue.SimpleQueue[Any], room: threading.Semaphore, stop: threading.Event):
        """Put items, and at last what went wrong, until nobody wants more."""
        try:
            while room.acquire() and not stop.is_set():
                made.put(next(items))
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is belongs to the one who waits
            made.put(error)

    @staticmethod
    def _end(room: threading.Semaphore, stop: threading.Event, thread: threading.Thread) -> None:
        stop.set()
        room.release()  # the thread may wait for some
        # A thread that is in the middle of a library cannot outlive the interpreter, so it is waited for. Garbage may
        # be collected in the thread itself.
        if thread is not threading.current_thread():
            thread.join(END_SECONDS)


class LiveBatches:
    """The batches of a live stream, made in a thread ahead of the step that asks for them.

    They can be asked for in order, beginning with step 0 or where ``restore`` says, and the last KEPT again.

    Attributes:
        readers: R, the number of logical readers.
        bytes_per_token: UTF-8 bytes of text that a token stands for, measured at the beginning of the text.
        read: what the readers of this process have read since it began, ahead of the steps, each piece once.
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
        whole: bool = True,
    ):
        """Prepare to read; the thread starts with the first batch.

        ``rows`` are those of the global batch of a step, of which this process takes ``rank::world``. It reads all that
        feeds them, so that if ``world`` does not divide the number of readers, some text is tokenized by several.
        ``whole`` is that of the run's origin (:class:`Origin`).

        Raises DataError if there is no text to train on.
        """
        self.text, self.rows, self.length = text, rows, length
        joined = text.joined(tokenizer.cuts) if whole and tokenizer.cuts == "all" else text
        self.readers = reader_count(joined, data.readers, rows)
        self.bytes_per_token = _measure(text, tokenizer)
        self.read = ReadStats(cuts=tokenizer.cuts, whole=whole)
        sizes = [piece.size for piece in joined.train]
        assignment = Assignment(sizes, self.readers, data.order == "shuffled", seed)
        mine = range(rank, rows, world)
        self._mine = sorted({row % self.readers for row in mine})  # the readers that feed the rows of this rank
        arguments = (joined, tokenizer, data.packing, assignment, rows, mine, length, seed)
        self.new_readers = functools.partial(Readers, *arguments, read=self.read)
        self._ahead: ReadAhead | None = None
        self._begin(0, dict.fromkeys(range(self.readers), Cursor()))

    def _begin(self, step: int, cursors: dict[int, Cursor]) -> None:
        self._next = step
        self._cursors = {step: {reader: cursors[reader] for reader in self._mine}}
        self._made: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process of a step, both int64 (rows / world, T); waits until they are made.

        Raises DataError if the text cannot be read, is not what it was, or there is none.
        """
        import torch

        if step not in self._made:
            assert step == self._next, f"batches come in order: step {step} after {self._next - 1}"
            if self._ahead is None:
                readers = self.new_readers()
                most = min(MOST_AHEAD, max(2, AHEAD_TOKENS // (self.rows * self.length)))
                self._ahead = ReadAhead(readers.batches(self._cursors[step]), most, readers.stop)
            self._made[step], self._cursors[step + 1] = next(self._ahead)
            self._next += 1
            self._made.pop(step - KEPT, None)
            self._cursors.pop(step - KEPT, None)
        tokens = torch.from_numpy(self._made[step].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def close(self) -> None:
        """End the thread; a later batch starts it anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

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

        Nothing happens with an empty state. Raises DataError if the text is not what it was.
        """
        if not state:
            return
        if state["text"] != self.text.fingerprint:
            raise DataError(OTHER_TEXT)
        self.close()
        self._begin(state["step"], {int(reader): Cursor(*cursor) for reader, cursor in state["readers"].items()})


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks, at the same step; empty for batches that have none."""
    if not states[0]:
        return {}
    merged = {**states[0], "readers": dict(states[0]["readers"])}
    for state in states[1:]:
        assert state["step"] == merged["step"]
        for reader, cursor in state["readers"].items():
            assert merged["readers"].setdefault(reader, cursor) == cursor, f"reader {reader} stands at two places"
    return merged
