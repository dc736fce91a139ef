import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models

from pretrain.errors import DataError, UsageError
from pretrain.text import embedded_documents
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokenizer.patterns import PATTERNS, byte_level

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want.\n\n"
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property.",
    "naïve café — 漢字 漢字 🙂🙂 they're we've I'll\n\n\tindented  twice\n" * 3,
]


def test_bpe_has_exactly_the_size_asked_for_with_bos_last():
    tokenizer = build_tokenizer("bpe", 300, TEXTS)
    assert tokenizer.vocab_size == 300
    assert tokenizer.bos_id == 299
    assert tokenizer.special_ids == {299}
    assert tokenizer.decode([299], show_special=True) == "<|endoftext|>"


def test_bpe_learns_merges_and_every_byte_has_a_token():
    tokenizer = build_tokenizer("bpe", 300, TEXTS)
    text = "".join(TEXTS)
    assert len(tokenizer.encode(text)) < 0.8 * len(text.encode())
    assert {tokenizer.decode_bytes([id]) for id in range(256)} == {bytes([byte]) for byte in range(256)}
    assert build_tokenizer("bpe", 257, ["x"]).vocab_size == 257  # no merges at all


def test_bpe_training_gives_the_same_bytes_for_the_same_text(tmp_path: Path):
    for name in ("a", "b"):
        build_tokenizer("bpe", 360, TEXTS * 50).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert build_tokenizer("bpe", 360, TEXTS[:1] * 50).fingerprint != Tokenizer.load(tmp_path / "a").fingerprint


def test_bpe_reads_a_stream_of_texts_once():
    def stream() -> Iterator[str]:
        yield from TEXTS

    assert build_tokenizer("bpe", 300, stream()).fingerprint == build_tokenizer("bpe", 300, TEXTS).fingerprint


def test_bpe_larger_than_the_text_supports_names_the_largest_that_works():
    with pytest.raises(DataError, match=r"--tokenizer\.vocab_size (\d+) or less") as caught:
        build_tokenizer("bpe", 50_000, TEXTS)
    largest = int(str(caught.value).split("--tokenizer.vocab_size ")[1].split()[0])
    assert build_tokenizer("bpe", largest, TEXTS).vocab_size == largest
    with pytest.raises(DataError):
        build_tokenizer("bpe", largest + 1, TEXTS)


@pytest.mark.parametrize("texts", [[], [""], ["abc"]])
def test_bpe_on_hardly_any_text(texts: list[str]):
    with pytest.raises(DataError, match=r"too small .* --tokenizer\.vocab_size 257 or less"):
        build_tokenizer("bpe", 300, texts)


def test_bpe_smaller_than_the_bytes():
    with pytest.raises(UsageError, match="at least 257"):
        build_tokenizer("bpe", 256, TEXTS)


@pytest.mark.parametrize("run", [" " * 1_000_000, "a" * 1_000_000, "\n" * 1_000_000, "abcdefghij" * 100_000])
def test_bpe_trains_on_a_word_of_a_million_characters(run: str):
    # The library's time grows with the square of a word's length: without our cuts this takes hours.
    tokenizer = build_tokenizer("bpe", 270, ["some words before ", run, "and after " * 10])
    assert tokenizer.vocab_size == 270
    assert len(tokenizer.encode(run)) < len(run) / 4  # it has learned from the run
    assert tokenizer.token_bytes().max() <= 128


def test_bpe_merges_do_not_depend_on_where_long_texts_are_cut(monkeypatch: pytest.MonkeyPatch):
    whole = build_tokenizer("bpe", 320, TEXTS)
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.PIECE_CHARACTERS", 7)
    assert build_tokenizer("bpe", 320, TEXTS).fingerprint == whole.fingerprint


def test_bpe_of_the_embedded_corpus_is_as_it_always_was():
    texts = [document.text for document in embedded_documents()]
    for pattern, fingerprint in (("gpt2", "a1e1ad4f8ddc75df"), ("gpt4", "2b4a32d6ec356e61")):
        assert build_tokenizer("bpe", 512, texts, pattern).fingerprint.startswith(fingerprint)


@pytest.mark.parametrize(
    "alphabet", ["漢字文中國語書人大學", "0123456789", "abcdefghijklmnopqrstuvwxyz+/", " \t\n\u3000", "a \n"]
)
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_bpe_learns_from_a_bounded_amount_of_different_words(
    monkeypatch: pytest.MonkeyPatch, alphabet: str, pattern: str
):
    # Memory of the trainer is about 120 bytes for each byte of different words, however long the text.
    monkeypatch.setattr("pretrain.tokenizer.build.DIFFERENT_BYTES", 20_000)
    monkeypatch.setattr("pretrain.tokenizer.build.LONG_PIECE", 1000)
    rng, taken = random.Random(0), []

    def stream() -> Iterator[str]:
        for _ in range(400):
            taken.append("".join(rng.choices(alphabet, k=1000)))
            yield taken[-1]

    build_tokenizer("bpe", 260, stream(), pattern)
    words = byte_level(models.BPE(), PATTERNS[pattern]).pre_tokenizer.pre_tokenize_str
    different = {word for text in taken for word, _ in words(text)}
    assert sum(map(len, different)) < 2 * 20_000  # characters that stand for bytes
    if pattern == "gpt2" and alphabet != "a \n":
        assert len(taken) < 100


def test_char_is_nanogpt_s_vocabulary_for_one_text():
    text = "hello, Wörld!\n 🙂"
    tokenizer = build_tokenizer("char", 0, [text])
    characters = sorted(set(text))
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.bos_id is None
    assert tokenizer.special_ids == frozenset()
    assert tokenizer.encode(text) == [characters.index(character) for character in text]


def test_char_of_several_texts_ends_with_bos():
    tokenizer = build_tokenizer("char", 0, ["ab", "bc"])
    assert tokenizer.vocab_size == 4
    assert tokenizer.bos_id == 3
    assert tokenizer.encode("cab") == [2, 0, 1]


def test_char_of_tinyshakespeare_is_nanogpt_s():
    file = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip("tinyshakespeare.txt is not beside the checkout")
    tokenizer = build_tokenizer("char", 0, [file.read_text()])
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]  # as published with nanoGPT's lecture


def test_char_of_nothing():
    with pytest.raises(DataError, match="no text"):
        build_tokenizer("char", 0, [""])


def test_byte_ids_are_the_bytes():
    tokenizer = build_tokenizer("byte", 0, [])
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    assert tokenizer.encode("aé🙂\n") == list("aé🙂\n".encode())
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


def test_a_path_is_loaded(tmp_path: Path):
    built = build_tokenizer("bpe", 300, TEXTS)
    built.save(tmp_path / "tokenizer.json")
    loaded = build_tokenizer(str(tmp_path / "tokenizer.json"), 0, [])
    assert loaded.fingerprint == built.fingerprint
    assert loaded.encode(TEXTS[0]) == built.encode(TEXTS[0])
    np.testing.assert_array_equal(loaded.token_bytes(), built.token_bytes())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


@pytest.mark.parametrize(
    ("kind", "nearest"), [("bpee", "bpe"), ("GPT-2", "gpt2"), ("chars", "char"), ("bytes", "byte")]
)
def test_an_unknown_kind_names_the_nearest(kind: str, nearest: str):
    with pytest.raises(UsageError, match=f"did you mean '{nearest}'"):
        build_tokenizer(kind, 300, TEXTS)


@pytest.mark.parametrize("kind", ["no/such/tokenizer.json", "tokenizer.json", "", "."])
def test_a_path_that_is_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such kind or file"):
        build_tokenizer(kind, 300, TEXTS)
