import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from pretrain.errors import DataError, PretrainError
from pretrain.text import embedded_documents
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokenizer.patterns import PATTERNS, byte_alphabet
from pretrain.tokenizer.tokenizer import PIECE_CHARACTERS, split_text

NASTY = [
    "",
    " ",
    "\n",
    "\r\n\r\r\n \t\x0b\x0c\x85\u2028\u2029\xa0",
    "  leading, trailing  ",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|> b<|endoftext",
    "don't we'll they've I'M 'tis",
    "naïve café e\u0301 \u0301 \u200d \ufeff \ufffd \ufffe \uffff \U0010ffff \x00\x01\x7f\x80",
    "漢字かな交じり文。中文沒有空格一直寫下去 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
    "123456789 1,234.5 ½ ² ٣ 〇",
    "def f(x):\n    return x  # \t\n\n\n        y\n",
    "ĠĊ Ġthe Âł ▁",  # what byte-level and SentencePiece vocabularies write for blanks
]


def random_texts(seed: int, count: int) -> list[str]:
    """Strings of random characters from every plane and, mostly, from those that pre-tokenizers treat specially."""
    rng = random.Random(seed)
    special = " \n\t'.,s0é漢\u3000\xa0\u0301🙂"

    def character() -> str:
        if rng.random() < 0.6:
            return rng.choice(special)
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)  # every code point but the surrogates

    return ["".join(character() for _ in range(rng.randrange(1, 200))) for _ in range(count)]


def sequence(*parts: Any) -> Any:
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TEXTS = NASTY + random_texts(seed=7, count=100)


@pytest.fixture(scope="module", params=["bpe", "char", "byte"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return build_tokenizer(request.param, 290, TEXTS)


def test_every_text_comes_back_exactly(tokenizer: Tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_text_never_makes_a_special_token(tokenizer: Tokenizer):
    assert tokenizer.bos_id is not None
    for text in NASTY:
        assert not tokenizer.special_ids.intersection(tokenizer.encode(text))


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer):
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.dtype == np.int32
    assert token_bytes.shape == (tokenizer.vocab_size,)
    assert np.flatnonzero(token_bytes == 0).tolist() == sorted(tokenizer.special_ids)
    for text, ids in tokenizer.encode_documents((text, text) for text in TEXTS):
        assert token_bytes[ids].sum() == len(text.encode())


def test_documents_in_batches_are_encoded_as_each_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.BATCH_PIECES", 7)
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.BATCH_CHARACTERS", 500)
    encoded = list(tokenizer.encode_documents(enumerate(TEXTS)))
    assert [tag for tag, _ in encoded] == list(range(len(TEXTS)))
    for text, (_, ids) in zip(TEXTS, encoded, strict=True):
        assert ids.dtype == tokenizer.dtype == np.uint16
        assert ids.tolist() == tokenizer.encode(text)


def test_documents_are_encoded_as_they_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.BATCH_CHARACTERS", 1000)
    taken = 0

    def stream() -> Iterator[tuple[int, str]]:
        nonlocal taken
        for taken in range(1, 101):
            yield taken, "word " * 100

    documents = build_tokenizer("bpe", 257, []).encode_documents(stream())
    assert next(documents)[0] == 1
    assert taken == 2


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer):
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("s0"), tokenizer.bos_id]
    assert tokenizer.decode(ids) == "s0"
    assert tokenizer.decode(ids, show_special=True) == "<|endoftext|>s0<|endoftext|>"
    assert tokenizer.decode_bytes(np.array(ids)) == b"s0"


def test_an_id_that_is_not_in_the_vocabulary_is_refused(tokenizer: Tokenizer):
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="not in the vocabulary"):
            tokenizer.decode([0, id])


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for name in ("vocab_size", "bos_id", "special_ids", "fingerprint", "dtype"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    np.testing.assert_array_equal(loaded.token_bytes(), tokenizer.token_bytes())
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_fingerprint_is_of_the_content_not_of_the_layout_of_the_file(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "a.json")
    spec = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(spec, indent=1))
    assert Tokenizer.load(tmp_path / "b.json").fingerprint == tokenizer.fingerprint


def test_transformers_reads_the_file_and_agrees(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(theirs) == tokenizer.vocab_size
    # There the name of a special token in a text is that token, unless told so.
    for text, ids in tokenizer.encode_documents((text, text) for text in TEXTS):
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids.tolist()
        assert theirs.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_half_a_surrogate_pair_is_refused(kind: str):
    tokenizer = build_tokenizer(kind, 257, ["abc"])
    with pytest.raises(DataError, match=r"U\+DCFF"):
        tokenizer.encode("abc\udcff")  # what a shell makes of a prompt that is not UTF-8


@pytest.mark.parametrize("character", ["é", "Æ", "\x00", "🙂"])  # beyond those it knows, and before
def test_char_names_a_character_it_does_not_know(character: str):
    tokenizer = build_tokenizer("char", 0, ["abc"])
    with pytest.raises(DataError, match=r"U\+0*" + f"{ord(character):X}"):
        tokenizer.encode("ab" + character)


# Long texts


def test_cutting_a_long_text_changes_no_token():
    text = "\n".join(document.text for document in embedded_documents())[: 5 * PIECE_CHARACTERS]
    tokenizer = build_tokenizer("bpe", 600, [text])
    assert len(list(split_text(text))) == 5
    assert tokenizer.encode(text) == tokenizer.hf.encode(text, add_special_tokens=False).ids


def test_cutting_changes_no_token_wherever_it_falls(monkeypatch: pytest.MonkeyPatch):
    runs = "x        y\n\n\n\n\n\t\t\tz!   \n" * 50  # so that it has tokens of several blanks, which a cut could break
    tokenizer = build_tokenizer("bpe", 330, [*TEXTS, runs])
    text = "\n".join([*TEXTS, runs])
    whole = tokenizer.hf.encode(text, add_special_tokens=False).ids
    for size in (1, 2, 3, 50):
        monkeypatch.setattr("pretrain.tokenizer.tokenizer.PIECE_CHARACTERS", size)
        assert "".join(split_text(text)) == text
        assert tokenizer._can_cut
        assert len(list(split_text(text))) > 20  # it is indeed cut
        assert tokenizer.encode(text) == whole


def test_a_tokenizer_whose_tokens_span_words_is_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.PIECE_CHARACTERS", 1)
    hf = byte_level_model(merges=[("a", "Ġ"), ("aĠ", "b")])
    assert Tokenizer(hf.to_str()).encode("a b") == [257]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"normalizer": normalizers.NFKC(), "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
        {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Prepend("x")},
        {"split": pre_tokenizers.WhitespaceSplit()},
        {"split": pre_tokenizers.Metaspace()},
        {"split": pre_tokenizers.Punctuation()},
        {"split": pre_tokenizers.Digits()},
        {"split": pre_tokenizers.Split(Regex(r'"[^"]*"|\w+ \d+'), "isolated")},
        *({"split": pre_tokenizers.Split(Regex(pattern), "isolated")} for pattern in PATTERNS.values()),
    ],
    ids=lambda changes: " ".join(f"{type(part).__name__}{i}" for i, part in enumerate(changes.values())) or "no words",
)
def test_cutting_changes_no_token_of_any_kind_of_words(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]):
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.PIECE_CHARACTERS", 1)
    text = "".join(TEXTS) + 'say "a b\n c" twice 12 12 ⑴\n ⒈ \u0958\n\u0958 İ\n12 <x>\n a b\na b ' * 20
    joints = [
        ("a", "Ġ"),
        ("aĠ", "b"),
        ("1", "2"),
        ("Ġ", "12"),
        (")", "Ċ"),
        (".", "Ġ"),
        ("¼", "Ċ"),
        ("Ċ", "Ġ"),
        ("e", "Ġ"),
    ]
    hf = byte_level_model(joints, **{name: part for name, part in changes.items() if name != "split"})
    if "split" in changes:
        hf.pre_tokenizer = sequence(changes["split"])
    for added in ([], [AddedToken("12 <x>\n a", normalized=False)]):
        hf.add_tokens(added)
        tokenizer = Tokenizer(hf.to_str())
        assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 1_000_000, "漢" * 300_000, "\n" * 1_000_000 + "x"])
def test_a_word_of_a_megabyte_is_encoded(text: str):
    tokenizer = build_tokenizer("bpe", 262, [text[:2000]])
    ids = np.array(tokenizer.encode(text))
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


# Files from elsewhere


def byte_level_model(merges: list[tuple[str, str]] = [], **changes: Any) -> HFTokenizer:  # noqa: B006
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    hf = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(hf, name, value)
    return hf


def refusal(hf: HFTokenizer) -> str:
    with pytest.raises(DataError) as caught:
        Tokenizer(hf.to_str(), "mine.json")
    line = str(caught.value)
    assert line.startswith("mine.json: ")
    assert "\n" not in line
    return line


def test_added_tokens_stand_for_their_text_and_special_ones_for_none():
    hf = byte_level_model()
    hf.add_tokens([AddedToken("   ", normalized=False), AddedToken("Ġx", normalized=False)])
    hf.add_special_tokens(["<|bos|>", "<|pad|>"])
    tokenizer = Tokenizer(hf.to_str())
    assert (tokenizer.bos_id, tokenizer.special_ids) == (258, {258, 259})
    text = "a   b Ġx <|bos|>"
    ids = tokenizer.encode(text)
    assert {256, 257} < set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[-4:].tolist() == [3, 3, 0, 0]


def test_what_a_file_asks_around_each_text_is_left_out():
    from tokenizers.processors import TemplateProcessing

    hf = byte_level_model()
    hf.add_special_tokens(["<|bos|>"])
    hf.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    hf.enable_truncation(max_length=4)
    hf.enable_padding(length=20)
    tokenizer = Tokenizer(hf.to_str())
    assert tokenizer.encode("a longer text") == list(b"a longer text")


def test_a_large_vocabulary_has_32_bit_ids():
    spec = json.loads(byte_level_model().to_str())
    spec["model"]["vocab"] |= {f"token{id}": id for id in range(256, 2**16)}
    assert Tokenizer(json.dumps(spec)).dtype == np.uint16
    spec["model"]["vocab"] |= {"one more": 2**16}
    tokenizer = Tokenizer(json.dumps(spec))
    assert tokenizer.dtype == np.uint32
    assert next(tokenizer.encode_documents([("", "ab")]))[1].dtype == np.uint32


@pytest.mark.parametrize(
    ("text", "back", "changes"),
    [
        ("ﬁ", "fi", {"normalizer": normalizers.NFKC()}),
        ("Word", "word", {"normalizer": normalizers.Lowercase()}),
        ("\u212b", "\xc5", {"normalizer": normalizers.NFC()}),
        (" a", "a", {"normalizer": normalizers.Strip()}),
        ("\xe9", "e", {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}),
        ("a  wow  b", "a  wew  b", {"normalizer": normalizers.Replace("wow", "wew")}),
        ("ﬁ", " ﬁ", {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}),
        ("a b", "ab", {"pre_tokenizer": sequence(pre_tokenizers.WhitespaceSplit())}),
        ("a b", "a▁b", {"pre_tokenizer": sequence(pre_tokenizers.Metaspace(prepend_scheme="never"))}),
    ],
)
def test_a_tokenizer_that_changes_text_says_so(text: str, back: str, changes: dict[str, Any]):
    tokenizer = Tokenizer(byte_level_model(**changes).to_str())
    assert tokenizer.decode(tokenizer.encode(text)) == back != text
    assert tokenizer.change is not None
    found, given_back = tokenizer.change
    assert tokenizer.decode(tokenizer.encode(found)) == given_back != found
    said = tokenizer.cautions()[-1]
    assert f"comes back as {given_back[:40]!r}" in said or f"comes back as {given_back[:40]!a}" in said


def test_the_kinds_made_here_change_no_text(tokenizer: Tokenizer):
    assert tokenizer.change is None
    assert tokenizer.cautions() == []


def test_a_tokenizer_that_takes_blanks_beside_an_added_token_changes_text():
    hf = byte_level_model()
    hf.add_tokens([AddedToken("<x>", lstrip=True)])
    assert Tokenizer(hf.to_str()).change == ("a  <x>  b", "a<x>  b")
    hf = byte_level_model()
    hf.add_tokens([AddedToken("  "), AddedToken("<x>", rstrip=True)])
    assert Tokenizer(hf.to_str()).change == ("a <x> b", "a <x>b")


def test_tokenizers_that_lose_letters_are_refused():
    for lossy in (pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()):
        assert "does not give back" in refusal(byte_level_model(pre_tokenizer=lossy))


def test_tokenizers_whose_bytes_are_not_known_are_refused():
    assert "decoder Metaspace" in refusal(byte_level_model(decoder=decoders.Metaspace()))
    unigram = HFTokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
    assert "model Unigram, decoder None" in refusal(unigram)
    wordpiece = HFTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert "model WordPiece" in refusal(wordpiece)


def test_a_vocabulary_without_all_bytes_is_refused():
    hf = HFTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    hf.decoder = decoders.ByteLevel()
    assert "254 of the 256 bytes have no token" in refusal(hf)


def test_a_vocabulary_with_gaps_is_refused():
    spec = json.loads(byte_level_model().to_str())
    spec["model"]["vocab"]["gap"] = 300
    with pytest.raises(DataError, match="without gaps"):
        Tokenizer(json.dumps(spec))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe", b'"text"'])
def test_files_that_are_no_tokenizer_are_one_clear_line(tmp_path: Path, content: bytes):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unwritable_place(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing\.json: no tokenizer can be read there \(No such file"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(PretrainError, match="cannot be written"):
        build_tokenizer("byte", 0, []).save(tmp_path / "no" / "folder" / "tokenizer.json")
