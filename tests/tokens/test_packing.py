"""Packing by itself: documents of numbered tokens, so that each token can be followed to its row."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.tokens.packing import Cursor, Place, best_fit, concatenate, pack

BOS = 0
START = Cursor()


def made(lengths: list[int], with_bos: bool) -> list[tuple[Place, np.ndarray]]:
    """Documents of one epoch whose tokens are 1, 2, 3, ... through all of them."""
    first, documents = 1, []
    for number, length in enumerate(lengths):
        ids = np.arange(first, first + length, dtype=np.uint32)
        documents.append(((number // 4, number % 4), np.concatenate(([BOS], ids)) if with_bos else ids))
        first += length
    return [((0, *place), ids.astype(np.uint32)) for place, ids in documents]


def endless(documents: list[tuple[Place, np.ndarray]], start: Cursor) -> Iterator[tuple[Place, np.ndarray]]:
    for epoch in itertools.count(start.epoch):
        for (_, turn, document), ids in documents:
            if (epoch, turn, document) >= start.place:
                yield (epoch, turn, document), ids


def rows_of(
    packing: str, lengths: list[int], length: int, start: Cursor = START, **how
) -> Iterator[tuple[np.ndarray, Cursor]]:
    if packing == "concatenate":
        return concatenate(endless(made(lengths, True), start), length, start)
    how = {"bos": BOS, "budget": 200, "first_budget": 50, "seed": 5, **how}
    return best_fit(endless(made(lengths, False), start), length, start, **how)


def web_like(count: int, seed: int = 0, mean: float = 700, sigma: float = 1.06) -> list[int]:
    """Document lengths as of web text: log-normal."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(1, draws).astype(int).tolist()


SHAPES = {
    "short": [1, 2, 3, 1, 1, 5, 2],
    "long": [100, 3, 64, 7, 33],
    "exact": [8, 7, 9, 16, 15, 17, 1],
    "one": [3],
    "mixed": web_like(60, mean=12),
}


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 2, 8, 50])
def test_concatenated_rows_are_the_documents_in_order(lengths: list[int], length: int):
    epochs = [np.concatenate([ids for _, ids in made(lengths, True)])] * (2 + 40 * length // sum(lengths))
    stream = np.concatenate(epochs)
    rows = itertools.islice(rows_of("concatenate", lengths, length), (len(stream) - 1) // length)
    for number, (row, _) in enumerate(rows):
        assert row.tolist() == stream[number * length : (number + 1) * length + 1].tolist()


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 2, 8, 50])
@pytest.mark.parametrize("bos", [BOS, None])
def test_best_fit_loses_and_repeats_nothing(lengths: list[int], length: int, bos: int | None):
    """Each token came as often as its document was reached, and always after the token before it."""
    seen: Counter[int] = Counter()
    ends = set(np.cumsum(lengths).tolist())
    rows = rows_of("best_fit", lengths, length, bos=bos)
    for row, cursor in itertools.islice(rows, 300 + 1500 // length):
        assert len(row) == length + 1
        assert bos is None or row[0] == BOS
        if bos is not None:
            for before, token in itertools.pairwise(row.tolist()):
                if token == BOS:  # never tells of the end of a document that goes on elsewhere
                    assert before in ends
                else:
                    assert before in (BOS, token - 1)
        seen.update(row[row != BOS].tolist() if bos is not None else row.tolist())
        if cursor.row == 0:  # a packing is complete: everything before the cursor was given, nothing after it
            begins = {place[1:]: int(ids[0]) for place, ids in made(lengths, False)}
            first_missing = begins[cursor.turn, cursor.document] + cursor.token
            for token in range(1, sum(lengths) + 1):
                assert seen[token] == cursor.epoch + (token < first_missing)
    assert seen[1] > 1


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 8, 50])
def test_any_row_can_be_the_first(packing: str, lengths: list[int], length: int):
    rows = list(itertools.islice(rows_of(packing, lengths, length), 60))
    for number in range(0, 50, 3):
        again = rows_of(packing, lengths, length, start=rows[number][1])
        for (row, cursor), (expected, expected_cursor) in zip(again, rows[number + 1 : number + 9], strict=False):
            assert row.tolist() == expected.tolist()
            assert cursor == expected_cursor


def test_nearly_no_document_of_the_web_is_cut_and_nothing_is_cropped():
    lengths, length = web_like(6000), 2048
    total = sum(lengths)
    how = {"budget": 2**20, "first_budget": 2**20}
    rows = []
    for row, cursor in rows_of("best_fit", lengths, length, **how):
        rows.append(row)
        total -= int((row != BOS).sum())
        if cursor.epoch:
            break
    assert -2 * length < total < 2**20  # all of the epoch, and perhaps a little of the next one
    longer = sum(tokens + 1 > length + 1 for tokens in lengths) / len(lengths)
    assert share_cut(rows, lengths) < longer + 0.012
    rows = [row for row, _ in itertools.islice(rows_of("concatenate", lengths, length), 2000)]
    assert share_cut(rows, lengths) > 0.25


def share_cut(rows: list[np.ndarray], lengths: list[int]) -> float:
    """Of the documents that begin in these rows, the share of those that a row ends before their last token."""
    firsts = np.cumsum([1, *lengths])  # the token with which each document begins
    begun = np.isin(firsts[:-1], np.concatenate(rows)).sum()
    ends = np.array([row[-1] for row in rows])  # no other token of best_fit's rows can be followed by a cut
    ends = ends[(ends != BOS) & ~np.isin(ends, firsts - 1)]
    return len(set(firsts.searchsorted(ends, "right").tolist())) / begun


def test_rows_do_not_come_sorted_by_the_length_of_their_documents():
    lengths = [100, 30] * 50
    how = {"budget": 10**6, "first_budget": 10**6}
    rows = [row for row, _ in itertools.islice(rows_of("best_fit", lengths, 101, **how), 60)]
    boundaries = [int((row == BOS).sum()) for row in rows]
    assert sorted(boundaries, reverse=True) != boundaries
    assert sorted(boundaries) != boundaries
    lengths = [40, 10] * 50
    firsts = [row.tolist().index(BOS, 1) for row, _ in itertools.islice(rows_of("best_fit", lengths, 51, **how), 40)]
    assert {11, 41} <= set(firsts)


@pytest.mark.parametrize("overhead", [0, 1])
def test_pack_fills_every_row_but_the_last(overhead: int):
    draw = np.random.default_rng(1)
    for _ in range(100):
        documents = [
            (begin, begin + taken) for begin, taken in draw.integers((0, 1), (5, 60), (draw.integers(1, 80), 2))
        ]
        size = int(draw.integers(2, 40))
        rows = pack(documents, size, overhead)
        filled = [sum(span.end - span.begin + overhead for span in row) for row in rows]
        assert all(size - overhead <= taken <= size for taken in filled[:-1])
        assert 0 < filled[-1] <= size
        spans = sorted(span for row in rows for span in row)
        joined = {
            number: [(begin, end) for _, begin, end in group]
            for number, group in itertools.groupby(spans, lambda s: s[0])
        }
        for number, (begin, end) in enumerate(documents):
            parts = joined[number]
            assert (parts[0][0], parts[-1][1]) == (begin, end)
            assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))


def test_pack_cuts_nothing_where_all_fits():
    assert [len(row) for row in pack([(0, 9), (0, 4), (0, 3), (0, 6)], 11, 1)] == [1, 2, 1]
    assert sorted(map(len, pack([(0, 5), (0, 2), (0, 2), (0, 5), (0, 3), (0, 3)], 10, 0))) == [2, 4]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_another_text_is_noticed(packing: str):
    start = Cursor(0, 0, 1, token=4)
    with pytest.raises(DataError, match="not what the run was trained on"):
        next(rows_of(packing, [5, 3, 5], 8, start=start))
