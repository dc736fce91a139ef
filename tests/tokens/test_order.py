import numpy as np
import pytest

from pretrain.errors import UsageError
from pretrain.tokens import order as order_module
from pretrain.tokens.order import MIXTURE_BLOCK, DataOrder, MixedOrder, key, mixture_shares, permute


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


def mixture(weights=(0.5, 0.3, 0.2), kind="shuffled") -> MixedOrder:
    sizes = (3001, 901, 20_001)
    orders = tuple(order(tokens=size, seed=i, kind=kind) for i, size in enumerate(sizes))
    return MixedOrder(orders, mixture_shares(weights, ["a", "b", "c"]), seed=5)


def sets_of(mixed: MixedOrder, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([part.tokens for part in mixed.orders]), starts, side="right")


def test_a_mixture_has_its_shares_in_every_block():
    mixed = mixture()
    sets = sets_of(mixed, mixed.starts(0, 5 * MIXTURE_BLOCK))
    for block in sets.reshape(5, MIXTURE_BLOCK):
        assert np.bincount(block).tolist() == [500, 300, 200]
    assert (sets[:MIXTURE_BLOCK] != sets[MIXTURE_BLOCK : 2 * MIXTURE_BLOCK]).mean() > 0.4  # permuted anew
    assert abs(np.bincount(sets[:100]) - [50, 30, 20]).max() < 16  # and well mixed inside


def test_windows_of_a_mixture_stay_inside_their_data_set():
    mixed = mixture()
    starts = mixed.starts(0, 4000)
    assert (sets_of(mixed, starts) == sets_of(mixed, starts + mixed.length)).all()


def assert_own_epochs(mixed: MixedOrder, starts: np.ndarray) -> np.ndarray:
    """Each data set's windows come in its own order, once in each of its epochs; gives the data set of each row."""
    sets, begins = sets_of(mixed, starts), np.cumsum([0, 3001, 901])
    for number, part in enumerate(mixed.orders):
        own = starts[sets == number] - begins[number]
        assert own.tolist() == part.starts(0, len(own)).tolist()
        for epoch in range(len(own) // part.windows):
            assert len(set(own[epoch * part.windows :][: part.windows].tolist())) == part.windows
    return sets


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_each_data_set_of_a_mixture_has_its_own_epochs(kind: str):
    mixed = mixture(kind=kind)
    starts = mixed.starts(0, 6000)
    assert_own_epochs(mixed, starts)


def test_a_mixture_is_a_function_of_the_row_alone():
    mixed = mixture()
    whole = mixed.starts(0, 3500)
    for first, count in ((0, 1), (3, 500), (999, 2), (1000, 1000), (3499, 1)):
        assert mixed.starts(first, count).tolist() == whole[first : first + count].tolist()
    far = mixed.starts(10**12 + 7, 3)
    assert far.tolist() == mixed.starts(10**12, 10)[7:].tolist()


def test_shares_are_of_largest_remainder():
    assert mixture_shares([1, 1, 1], "abc") == (334, 333, 333)
    assert mixture_shares([2, 1], "ab") == (667, 333)
    assert mixture_shares([0.0006, 0.9994], "ab") == (1, 999)
    with pytest.raises(UsageError, match=r"gives b 0\.0001 of the rows, less than one in 1000; give it at least 0\.01"):
        mixture_shares([9.999, 0.001], "ab")


STAGES = [(0, (0.5, 0.3, 0.2)), (1234, (0.0, 1.0, 0.0)), (1240, (0.0, 0.1, 0.9)), (5000, (0.5, 0.3, 0.2))]


def staged(stages=STAGES, kind="shuffled") -> MixedOrder:
    parts = mixture(kind=kind).orders
    return order_module.mixture(parts, [(row, mixture_shares(weights, "abc")) for row, weights in stages], seed=5)


@pytest.mark.parametrize("kind", ["shuffled", "random", "sequential"])
def test_stages_are_a_function_of_the_row_alone(kind: str):
    mixed = staged(kind=kind)
    whole = mixed.starts(0, 7000)
    for first, count in ((0, 1), (1233, 1), (1233, 2), (1234, 6), (1000, 3000), (1239, 3800), (4999, 2001), (6999, 1)):
        assert mixed.starts(first, count).tolist() == whole[first : first + count].tolist()
    assert len(mixed.starts(1234, 0)) == len(mixed.starts(3, 0)) == 0


def test_the_first_stage_is_the_mixture_without_stages_and_a_later_one_changes_nothing_before_it():
    plain, mixed = mixture().starts(0, 7000), staged().starts(0, 7000)
    assert mixed[:1234].tolist() == plain[:1234].tolist()
    assert staged(STAGES[:3]).starts(0, 5000).tolist() == mixed[:5000].tolist()
    assert staged(STAGES[:1]).starts(0, 7000).tolist() == plain.tolist()


def test_each_stage_has_its_shares():
    sets = sets_of(mixture(), staged().starts(0, 7000))
    assert set(sets[1234:1240].tolist()) == {1}
    assert np.bincount(sets[1240:3240], minlength=3).tolist() == [0, 200, 1800]
    assert np.bincount(sets[5000:6000]).tolist() == [500, 300, 200]


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_each_data_set_has_its_own_epochs_over_all_stages(kind: str):
    mixed = staged(kind=kind)
    starts = mixed.starts(0, 9000)
    sets = assert_own_epochs(mixed, starts)
    for row in (0, 1, 999, 1000, 1234, 1237, 1240, 4999, 5000, 5001, 9000):
        assert mixed.rows_before(row) == tuple(np.bincount(sets[:row], minlength=3))
    assert sum(mixed.rows_before(10**14 + 3)) == 10**14 + 3  # counted, not read


def test_a_stage_is_measured_in_its_own_shares():
    mixed = staged()
    for row, shares in ((0, [500, 300, 200]), (1233, [500, 300, 200]), (1240, [0, 100, 900]), (9000, [500, 300, 200])):
        estimate = mixed.estimate(7, row)
        assert np.bincount(sets_of(mixed, estimate.starts(0, MIXTURE_BLOCK)), minlength=3).tolist() == shares
    assert mixed.estimate(7, 3).starts(0, 50).tolist() == mixture().estimate(7).starts(0, 50).tolist()
