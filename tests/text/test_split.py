from pathlib import Path

import pytest

from pretrain.errors import DataError, UsageError
from pretrain.text import Document, read_documents, split_documents


def documents(*texts: str) -> list[Document]:
    return [Document(text, f"{number}.txt") for number, text in enumerate(texts)]


def split(val_fraction: float, *texts: str) -> tuple[list[str], list[str]]:
    training, validation = split_documents(documents(*texts), val_fraction)
    return [document.text for document in training], [document.text for document in validation]


def test_documents_stay_whole_and_in_order():
    assert split(0.5, "aa", "bb", "cc", "dd") == (["aa", "bb"], ["cc", "dd"])


def test_the_document_in_which_the_cut_falls_is_trained_on():
    assert split(0.5, "aa", "bbbb", "cc") == (["aa", "bbbb"], ["cc"])


def test_the_last_document_is_cut_at_exactly_the_character():
    assert split(0.3, "aa", "bbbbbbbb") == (["aa", "bbbbb"], ["bbb"])
    training, validation = split_documents(documents("abcdefghij"), 0.1)
    assert (training, validation) == ([Document("abcdefghi", "0.txt")], [Document("j", "0.txt")])


def test_no_fraction_no_validation():
    assert split(0.0, "aa", "b") == (["aa", "b"], [])


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
    training, validation = split_documents(read_documents([str(file)]), 0.1)
    assert (len(training[0].text), len(validation[0].text)) == sizes
    assert (training[0].text + validation[0].text).encode() == file.read_bytes()


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_fraction_that_cannot_be_is_refused(val_fraction: float):
    with pytest.raises(UsageError, match=r"data\.val_fraction"):
        split(val_fraction, "some text")


def test_text_too_short_for_both_halves_is_refused():
    with pytest.raises(DataError, match="no text is left for training"):
        split(0.5, "x")
    with pytest.raises(DataError, match="there is no text to train on"):
        split(0.1)
