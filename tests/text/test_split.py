import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.text import Document, read_documents
from pretrain.text.split import (
    SIDES,
    TEST,
    TRAIN,
    VAL,
    Part,
    Shares,
    find_tail,
    join_surveys,
    side_by_hash,
    split_hash,
    split_tail,
    survey,
)


def documents(*texts: str) -> list[Document]:
    return [Document(text, f"{number}.txt") for number, text in enumerate(texts)]


def split_all(parts: Sequence[Document], val_fraction: float) -> list[Part]:
    return list(split_tail(parts, find_tail(survey(parts), Shares(val_fraction))))


def by_side(parts: Sequence[Part]) -> dict[str, list[str]]:
    """The documents of each side."""
    found: dict[str, list[str]] = {side: [] for side in SIDES}
    for part in parts:
        if part.begins:
            found[part.split].append(part.text)
        else:
            found[part.split][-1] += part.text
    return found


def sides(parts: Sequence[Part]) -> tuple[list[str], list[str]]:
    """The documents of each side, where there is no test."""
    found = by_side(parts)
    assert not found[TEST]
    return found[TRAIN], found[VAL]


def split(val_fraction: float, *texts: str) -> tuple[list[str], list[str]]:
    return sides(split_all(documents(*texts), val_fraction))


def test_documents_stay_whole_and_in_order():
    assert split(0.5, "aa", "bb", "cc", "dd") == (["aa", "bb"], ["cc", "dd"])


def test_the_document_in_which_the_cut_falls_is_trained_on():
    assert split(0.5, "aa", "bbbb", "cc") == (["aa", "bbbb"], ["cc"])


def test_the_last_document_is_cut_at_exactly_the_character():
    assert split(0.3, "aa", "bbbbbbbb") == (["aa", "bbbbb"], ["bbb"])
    assert split_all(documents("abcdefghij"), 0.1) == [Part("abcdefghi", TRAIN, True), Part("j", VAL, True)]


@pytest.mark.parametrize("val_fraction", [0.1, 0.05, 0.2])
def test_the_cut_is_the_one_of_the_published_scripts(val_fraction: float):
    keep = {0.1: 0.9, 0.05: 0.95, 0.2: 0.8}[val_fraction]  # as they write it: int(0.9 * len(text))
    for length in [*range(2, 3000), 1_115_394, 20_479, 999_999, 2**20]:
        cut = int(keep * length)
        training, validation = split(val_fraction, "x" * length)
        assert ([len(text) for text in training], [len(text) for text in validation]) == ([cut], [length - cut])


def test_the_cut_does_not_suffer_from_floats():
    assert int((1 - 0.9) * 1000) == 99  # what is to be avoided
    training, _ = split(0.9, "x" * 1000)
    assert len(training[0]) == 100


@pytest.mark.parametrize(
    ("name", "sizes"), [("tinyshakespeare.txt", (1_003_854, 111_540)), ("the-verdict.txt", (18_431, 2_048))]
)
def test_published_splits(name: str, sizes: tuple[int, int]):
    file = Path(__file__).parents[2].parent / "shared" / "data" / name
    if not file.exists():
        pytest.skip(f"{name} is not beside the checkout")
    (training,), (validation,) = sides(split_all(list(read_documents([str(file)])), 0.1))
    assert (len(training), len(validation)) == sizes
    assert (training + validation).encode() == file.read_bytes()


def test_text_too_short_for_both_halves_is_refused():
    with pytest.raises(DataError, match="no text is left for training"):
        split(0.5, "x")
    with pytest.raises(DataError, match="there is no text to train on"):
        split(0.1)


def made_up(draw: random.Random) -> list[Document]:
    """Documents of 0 to 12 characters, some of them in parts."""
    found = []
    for number in range(draw.randrange(1, 8)):
        text = "".join(draw.choice("abcdefgh") for _ in range(draw.randrange(12)))
        cuts = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(draw.choice([0, 0, 2]))), len(text)]
        found += [Document(text[a:b], str(number), i > 0) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    return found


def test_parts_of_documents_are_split_as_if_they_were_whole():
    draw = random.Random(1)
    for _ in range(500):
        parts = made_up(draw)
        whole = [""] * (int(parts[-1].source) + 1)
        for part in parts:
            whole[int(part.source)] += part.text
        for fraction in (0.1, 0.5, 0.9):
            try:
                expected = split(fraction, *whole)
            except DataError:
                with pytest.raises(DataError):
                    split_all(parts, fraction)
                continue
            assert sides(split_all(parts, fraction)) == expected
            assert sum(map(len, expected[0] + expected[1])) == sum(map(len, whole))


def test_runs_of_documents_are_split_by_themselves_as_they_are_together():
    draw = random.Random(2)
    for _ in range(300):
        parts = made_up(draw)
        cuts = sorted(draw.randrange(len(parts) + 1) for _ in range(2))
        runs = [parts[: cuts[0]], parts[cuts[0] : cuts[1]], parts[cuts[1] :]]
        surveys = [survey(run, alphabet=True) for run in runs]
        whole = join_surveys(surveys)
        assert whole == survey(parts, alphabet=True)
        if not whole.characters:
            continue
        tail = find_tail(whole, Shares(0.1, 0.2)) if whole.characters > 1 else None
        for kind in ("tail", "hash"):
            if kind == "tail" and tail is None:
                continue
            together, apart = [], []
            position = opened = 0
            side = TRAIN
            for run, found in zip([parts, *runs], [None, *surveys], strict=True):
                if kind == "tail":
                    done = list(split_tail(run, tail, position, opened))
                else:
                    done = list(split_hash(run, Shares(0.3, 0.2), side))
                if found is None:
                    together = done
                    continue
                apart += done
                opened = opened if found.last is None else position + found.last
                position += found.characters
                side = done[-1].split if done else side
            assert together == apart


def test_the_hash_chooses_by_the_text_alone():
    texts = [f"document {number}" for number in range(4000)]
    first = {part.text: part.split for part in split_hash(documents(*texts), Shares(0.1))}
    again = {part.text: part.split for part in split_hash(documents(*reversed(texts[:100])), Shares(0.1))}
    assert again == {text: first[text] for text in texts[:100]}
    assert 300 < sum(split == VAL for split in first.values()) < 500
    assert {part.split for part in split_hash(documents(*texts), Shares())} == {TRAIN}
    # sha256sum of "document 0" begins with 19e6bd2cd5bf6096, which is 0.10118 of all 64-bit numbers
    assert [side_by_hash("document 0", Shares(share)) for share in (0.101, 0.102)] == [TRAIN, VAL]
    assert [side_by_hash("document 0", Shares(0.0, share)) for share in (0.898, 0.899)] == [TRAIN, TEST]


# The test -----------------------------------------------------------------------------------------------------------


def split_three(val: float, test: float, *texts: str) -> tuple[list[str], ...]:
    parts = documents(*texts)
    return tuple(by_side(split_tail(parts, find_tail(survey(parts), Shares(val, test)))).values())


def test_the_test_is_the_last_of_the_text():
    assert split_three(0.25, 0.25, "aa", "bb", "cc", "dd") == (["aa", "bb"], ["cc"], ["dd"])
    assert split_three(0.25, 0.25, "abcdefgh") == (["abcd"], ["ef"], ["gh"])
    assert split_three(0.3, 0.2, "aa", "bbbb", "cccc") == (["aa", "bbbb"], ["cc"], ["cc"])
    assert split_three(0.3, 0.3, "aa", "bbbb", "cccc") == (["aa", "bbbb"], ["c"], ["ccc"])
    assert split_three(0.0, 0.25, "aaaa", "bbbb") == (["aaaa", "bb"], [], ["bb"])
    # Of another document than the last each cut leaves it whole, on the side before.
    assert split_three(0.2, 0.4, "aaa", "bbbbbb", "c") == (["aaa", "bbbbbb"], [], ["c"])
    with pytest.raises(DataError, match=r"data\.val_fraction 0\.4 and data\.test_fraction 0\.5\); give more"):
        split_three(0.4, 0.5, "x")


def test_parts_of_documents_are_split_in_three_as_if_they_were_whole():
    draw = random.Random(3)
    for _ in range(500):
        parts = made_up(draw)
        whole = [""] * (int(parts[-1].source) + 1)
        for part in parts:
            whole[int(part.source)] += part.text
        for val, test in ((0.1, 0.1), (0.3, 0.4), (0.0, 0.5)):
            try:
                expected = split_three(val, test, *whole)
            except DataError:
                continue
            found = by_side(split_tail(parts, find_tail(survey(parts), Shares(val, test))))
            assert tuple(found.values()) == expected
            assert "".join(itertools.chain(*expected)) == "".join(whole)


def test_the_share_of_the_test_and_that_of_validation_do_not_touch_each_other():
    texts = [f"document {number}" for number in range(4000)]

    def chosen(side: str, shares: Shares) -> set[str]:
        return {part.text for part in split_hash(documents(*texts), shares) if part.split == side}

    assert chosen(VAL, Shares(0.1)) == chosen(VAL, Shares(0.1, 0.2)) == chosen(VAL, Shares(0.1, 0.85))
    assert chosen(TEST, Shares(0.0, 0.2)) == chosen(TEST, Shares(0.7, 0.2))
    assert 700 < len(chosen(TEST, Shares(0.1, 0.2))) < 900
