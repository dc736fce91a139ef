import numpy as np
import pytest

from pretrain.tokens.order import DataOrder, key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permute_is_a_permutation(size: int):
    index = np.arange(size, dtype=np.uint64)
    landed = permute(index, size, key(1, 2))
    assert sorted(landed.tolist()) == list(range(size))


def test_permute_looks_random():
    size = 10_000
    a, b = (permute(np.arange(size, dtype=np.uint64), size, key(seed)).astype(float) for seed in (1, 2))
    for x, y in ((a, np.arange(size)), (a, b), (a[:-1], a[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
    assert np.mean(a == b) < 0.002


def test_permute_of_more_than_memory_holds():
    landed = permute(np.arange(1000, dtype=np.uint64), 10**15, key(3))
    assert len(set(landed.tolist())) == 1000
    assert int(landed.max()) > 10**14


def order(**changes) -> DataOrder:
    return DataOrder(**{"tokens": 10_001, "length": 20, "kind": "shuffled", "stride": 0, "seed": 7, **changes})


def test_each_epoch_reads_every_window_once():
    data = order()
    first, second = data.starts(0, data.windows), data.starts(data.windows, data.windows)
    for starts in (first, second):
        covered = np.sort(starts)
        assert (np.diff(covered) == data.length).all()  # back to back: no token twice, none between them left out
        assert covered[0] < data.length  # so at most two context lengths of the stream are not in an epoch
        assert covered[-1] + data.length < data.tokens
    assert sorted(first % 20) != sorted(second % 20)  # a fresh offset
    assert first.tolist() != second.tolist()


def test_few_windows_are_all_kept():
    data = order(tokens=20 * 18 + 1)
    assert data.windows == 18
    assert sorted(data.starts(0, 18).tolist()) == list(range(0, 360, 20))


def test_a_stride_gives_the_same_windows_every_epoch():
    data = order(stride=5)
    expected = list(range(0, 10_001 - 20, 5))
    assert data.windows == len(expected)
    for epoch in range(2):
        assert sorted(data.starts(epoch * data.windows, data.windows).tolist()) == expected


@pytest.mark.parametrize("kind", ["shuffled", "random", "sequential"])
def test_order_is_a_function_of_the_row_alone(kind: str):
    data = order(kind=kind)
    whole = data.starts(0, 2000)
    for first, count in ((0, 1), (3, 500), (497, 30), (1999, 1)):
        assert data.starts(first, count).tolist() == whole[first : first + count].tolist()
    assert whole.min() >= 0
    assert whole.max() + data.length + 1 <= data.tokens
    other_seed = order(kind=kind, seed=8).starts(0, 2000).tolist()
    assert (other_seed == whole.tolist()) == (kind == "sequential")


def test_random_covers_all_starts_evenly():
    starts = order(kind="random").starts(0, 100_000)
    counts = np.histogram(starts, bins=10, range=(0, 9981))[0]
    assert abs(counts - 10_000).max() < 500
    assert starts.max() == 10_001 - 21


def test_sequential_reads_on():
    assert order(kind="sequential").starts(0, 3).tolist() == [0, 20, 40]
