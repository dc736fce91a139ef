"""Fill rows with documents, in two ways; both can go on from any row, and lose or repeat no token.

    (place, ids), (place, ids), ...  ──concatenate or best_fit──>  (row, cursor of the next row), ...

A row is T + 1 tokens: inputs, and targets one token later. All rows are full, without padding. A cursor is all that it
takes to make the next row, given the documents from its place on; no other state is carried along.

concatenate: documents stand one after another and are cut where a row ends. A row begins with the last token of the row
before it, so that every token but the very first is a target exactly once.

best_fit: every row begins with a document, and documents are cut as seldom as possible ("Fewer Truncations Improve
Language Modeling", arXiv 2404.10830). What is cut off is not thrown away: it stands in another row, as a document by
itself. Every token of the text is a target exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pretrain.errors import DataError
from pretrain.tokens.order import key, mix

OTHER_TEXT = "the text is not what the run was trained on (files or split); restore it, or use another --out"

Place = tuple[int, int, int]
"""Where a document stands in what a reader reads: epoch, turn (number among its pieces of that epoch), document."""


class Cursor(NamedTuple):
    """Where a row begins."""

    epoch: int = 0
    turn: int = 0
    document: int = 0
    token: int = 0  # tokens of that document before it
    row: int = 0  # best_fit: rows before it that were packed together with it, from that token on

    @property
    def place(self) -> Place:
        """The document."""
        return self[:3]


class Span(NamedTuple):
    """A part of a document in a row."""

    document: int
    begin: int
    end: int


def concatenate(
    documents: Iterator[tuple[Place, np.ndarray]], length: int, start: Cursor
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Rows of ``length + 1`` tokens of documents that stand one after another, each with the cursor of the next row.

    ``documents`` are endless, from the place of ``start`` on; ids with the BOS token, never empty.
    """
    parts: list[np.ndarray] = []
    filled, at = 0, start.token
    for number, (place, ids) in enumerate(documents):
        if number == 0:
            _check_start(place, ids, start)
        while True:
            parts.append(ids[at : at + length + 1 - filled])
            filled += len(parts[-1])
            if filled <= length:
                break
            at += len(parts[-1]) - 1  # the next row begins with the last token of this one
            yield np.concatenate(parts), Cursor(*place, at)
            parts, filled = [], 0
        at = 0


def best_fit(
    documents: Iterator[tuple[Place, np.ndarray]],
    length: int,
    start: Cursor,
    bos: int | None,
    budget: int,
    first_budget: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Rows of ``length + 1`` tokens that each begin with a document, each with the cursor of the next row.

    Documents of ``budget`` tokens, or up to the end of the epoch, are packed at once. The last of their rows is filled
    up with the documents after them, the last one of which is cut; the next packing begins inside of it. So a packing
    is a function of the place where it begins.

    Args:
        documents: endless, from the place of ``start`` on; ids without BOS token, never empty.
        length: T.
        start: where the first row begins.
        bos: the token put before each part of a document; None for a vocabulary that has none.
        budget: tokens that are packed at once.
        first_budget: the same for the first packing of all, so that not all readers pack in the same step.
        seed: of the order of the rows.
    """
    place, ids = next(documents)
    _check_start(place, ids, start)
    lead = np.array([] if bos is None else [bos], dtype=ids.dtype)
    size, skipped = length + 1, start.row
    begin, at = start._replace(row=0), start.token
    while True:
        chunk: list[tuple[np.ndarray, int]] = []  # documents, and where in them to begin
        tokens, limit = 0, first_budget if begin == Cursor() else budget
        epoch = place[0]
        while tokens < limit and place[0] == epoch:
            chunk.append((ids, at))
            tokens += len(ids) - at
            place, ids = next(documents)
            at = 0
        rows = pack([(at, len(ids)) for ids, at in chunk], size, len(lead))
        space = size - sum(span.end - span.begin + len(lead) for span in rows[-1])
        filling: list[Span] = []  # of the last row
        while space > len(lead):
            taken = min(len(ids) - at, space - len(lead))
            filling.append(Span(len(chunk), at, at + taken))
            chunk.append((ids, at))
            space -= taken + len(lead)
            at += taken
            if at == len(ids):
                (place, ids), at = next(documents), 0

        order_key = key(seed, *begin)
        rows = [_shuffled(row, chunk, order_key + np.uint64(number + 1)) for number, row in enumerate(rows)]
        rows[-1] += filling
        # Packing goes from long documents to short ones; training must not.
        order = mix(order_key + np.arange(1 << 32, (1 << 32) + len(rows), dtype=np.uint64)).argsort(kind="stable")
        then = Cursor(*place, at)
        for number in range(skipped, len(rows)):
            parts = []
            for span in rows[order[number]]:
                parts += [lead, chunk[span.document][0][span.begin : span.end]]
            row = np.concatenate(parts)
            if len(row) < size:  # one token is left: a BOS, which ends the last document
                row = np.concatenate((row, lead))
            assert len(row) == size
            yield row, (begin._replace(row=number + 1) if number + 1 < len(rows) else then)
        begin, skipped = then, 0


def pack(documents: Sequence[tuple[int, int]], size: int, overhead: int) -> list[list[Span]]:
    """Put documents into rows of ``size`` tokens, cutting as few as possible; only the last row may be short.

    Documents longer than a row give as many full rows as they can. Then each row takes the longest remaining part that
    fits, again and again, except that its last two are chosen to fill it exactly if two such remain. When nothing fits,
    the longest remaining part is cut; its head ends the row. (A row that lacks ``overhead`` tokens is full: only a BOS
    token fits there.)

    Args:
        documents: the first token, and one after the last, of each.
        size: tokens of a row.
        overhead: tokens that each part needs beside its own.
    """
    body = size - overhead
    rows: list[list[Span]] = []
    waiting: list[list[Span]] = [[] for _ in range(size + 1)]  # by the tokens they take
    present = np.zeros(size + 1, dtype=bool)  # which lists of `waiting` have some
    left = 0

    def put(span: Span) -> None:
        taken = span.end - span.begin + overhead
        waiting[taken].append(span)
        present[taken] = True

    def take(taken: int) -> Span:
        span = waiting[taken].pop()
        present[taken] = bool(waiting[taken])
        return span

    for number, (begin, end) in enumerate(documents):
        while end - begin >= body:
            rows.append([Span(number, begin, begin + body)])
            begin += body
        if begin < end:
            put(Span(number, begin, end))
            left += 1
    while left:
        row: list[Span] = []
        space = size
        while left and space > overhead:
            chosen = _choose(present, waiting, space, ends=bool(row))
            if chosen:
                row.append(take(chosen))
                space -= chosen
                left -= 1
            else:
                number, begin, end = take(int(present.nonzero()[0][-1]))
                cut = begin + space - overhead
                row.append(Span(number, begin, cut))
                put(Span(number, cut, end))
                space = 0
        rows.append(row)
    return rows


def _choose(present: np.ndarray, waiting: list[list[Span]], space: int, ends: bool) -> int:
    """The length that comes next into a row with ``space`` left; 0: none fits. ``ends``: two that fill it go first."""
    if present[space]:
        return space
    if ends:
        pairs = (present[: space + 1] & present[space::-1]).nonzero()[0]
        if len(pairs) and (pairs[-1] * 2 != space or len(waiting[pairs[-1]]) > 1):
            return int(pairs[-1])
    fitting = present[: space + 1].nonzero()[0]
    return int(fitting[-1]) if len(fitting) else 0


def _shuffled(row: list[Span], chunk: list[tuple[np.ndarray, int]], order_key: np.ndarray) -> list[Span]:
    """Give a row another order, since packing puts the longest document first.

    A part that is cut off stays the last, so that no BOS token after it says that its document ends there.
    """
    whole = [span for span in row if span.end == len(chunk[span.document][0])]
    row_key = order_key * np.uint64(0x9E3779B97F4A7C15)
    order = mix(row_key + np.arange(len(whole), dtype=np.uint64)).argsort(kind="stable")
    return [whole[index] for index in order] + [span for span in row if span.end < len(chunk[span.document][0])]


def _check_start(place: Place, ids: np.ndarray, start: Cursor) -> None:
    if start.token and (place != start.place or start.token >= len(ids)):
        raise DataError(OTHER_TEXT)
