"""Text as it is made: whole characters, and nothing of a stop string."""

import random

import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.errors import DataError
from pretrain.generation import encode_prompt, sample_text, sample_texts
from pretrain.generation.text import TextWriter
from pretrain.model import GPT
from pretrain.tokenizer import Tokenizer, build_tokenizer

CHAOS = dict(temperature=2.0, top_k=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("byte", 0, [])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    model = GPT(ModelConfig(layers=2, heads=2, width=32, context_length=16), tokenizer.vocab_size, 256)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.head.weight.data[256] = 0  # rarely an end, so that texts are long
    return model


def before_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, found letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["aba", "bab"], ["é🙂"], ["🙂a", "aé", "éé"], ["absent"]])
def test_stop_strings_across_tokens(tokenizer: Tokenizer, stops: list[str]):
    """Every text is one byte a token, so stop strings and characters are always torn."""
    draw = random.Random(1)
    stopped = 0
    for _ in range(200):
        text = "".join(draw.choice("ab é🙂") for _ in range(12))
        expected, out = before_stop(text, stops), ""
        writer = TextWriter(tokenizer, stops)
        for token in tokenizer.encode(text):
            out += writer.push(token)
            assert expected.startswith(out)
            if writer.stopped:
                break
        out += writer.finish()
        assert out == expected
        assert writer.stopped == (expected != text)
        stopped += writer.stopped
    assert stopped > 20 or stops == ["absent"]


def test_large_tokens_change_nothing():
    """Several stop strings within one token, or one begun in the token before."""
    tokenizer = build_tokenizer("bpe", 268, ["abababab abcabc bcabca " * 50])
    assert max(map(len, map(tokenizer.decode, ([id] for id in range(268))))) >= 4
    for text in ("abcabc abababab", " bcabca abab", "abababab abcabc bcabca"):
        for stops in (["ca"], ["abc", "b"], ["b a", "cab"], ["baba"]):
            writer = TextWriter(tokenizer, stops)
            out = "".join(writer.push(token) for token in tokenizer.encode(text) if not writer.stopped)
            assert out + writer.finish() == before_stop(text, stops)


def test_nothing_is_held_back_without_reason(tokenizer: Tokenizer):
    writer = TextWriter(tokenizer, ["end"])
    assert [writer.push(token) for token in b"bent en"] == ["b", "", "", "ent", " ", "", ""]
    assert writer.finish() == "en"


def test_text_is_whole_characters(model: GPT, tokenizer: Tokenizer):
    pieces = list(sample_text(model, tokenizer, "né", max_tokens=120, seed=2, **CHAOS))
    "".join(pieces).encode()  # no lone surrogates
    assert all(pieces)
    assert "".join(pieces) == "".join(sample_text(model, tokenizer, "né", max_tokens=120, seed=2, **CHAOS))
    euro = "€".encode()
    writer = TextWriter(tokenizer)
    assert [writer.push(byte) for byte in euro] + [writer.push(euro[0])] == ["", "", "€", ""]
    assert writer.finish() == "\ufffd"


def test_a_stop_string_ends_the_text_before_it(model: GPT, tokenizer: Tokenizer):
    for seed in range(3):
        free = "".join(sample_text(model, tokenizer, "", max_tokens=60, seed=seed, **CHAOS))
        stop = free[20:23]
        cut = "".join(sample_text(model, tokenizer, "", max_tokens=60, seed=seed, stop=(stop,), **CHAOS))
        assert cut == free[: free.index(stop)]


def test_many_texts_are_those_of_each_alone(model: GPT, tokenizer: Tokenizer):
    prompts = ["a", "", "a longer one than the context holds", "né", "a"]
    many = list(sample_texts(model, tokenizer, prompts, samples=8, max_tokens=25, seed=3, stop=("e",), **CHAOS))
    assert [(each.prompt, each.seed) for each in many] == [(prompt, 3 + i) for prompt in prompts for i in range(8)]
    for each in many[::7]:
        alone = sample_text(model, tokenizer, each.prompt, max_tokens=25, seed=each.seed, stop=("e",), **CHAOS)
        assert "".join(alone) == each.text
    assert [each.text for each in many[:8]] == [each.text for each in many[-8:]]  # the same prompt and seeds
    assert len({each.text for each in many[:8]}) > 4
    assert all(each.tokens <= 25 for each in many)
    assert any(each.tokens == 25 for each in many)


def test_it_is_wrong_at_once(model: GPT, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="top_p"):
        sample_text(model, tokenizer, "a", top_p=2.0)
    char = build_tokenizer("char", 0, ["abc"])
    with pytest.raises(DataError, match="'x'"):
        sample_text(model, char, "axb")
    with pytest.raises(DataError, match="'x'"):
        sample_texts(model, char, ["ab", "axb"])


def test_a_prompt_begins_with_bos(tokenizer: Tokenizer):
    assert encode_prompt(tokenizer, "é") == [256, 0xC3, 0xA9]
    assert encode_prompt(tokenizer, "") == [256]
    assert encode_prompt(build_tokenizer("char", 0, ["ab\n"]), "") == [0]


def test_any_bytes_give_the_text_that_decode_gives(tokenizer: Tokenizer):
    rng = random.Random(3)
    lead = [0xC3, 0xE6, 0xF0, 0x9F, 0x80, 0xFF, 65, 256]  # starts, continuations, never valid, a letter, BOS
    for _ in range(200):
        ids, writer = [rng.choice(lead) for _ in range(12)], TextWriter(tokenizer)
        assert "".join([writer.push(id) for id in ids]) + writer.finish() == tokenizer.decode(ids)
