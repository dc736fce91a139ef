import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pretrain.report import baselines as module
from pretrain.report.baselines import baselines, measure_baselines, some_blocks
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens.windows import TokenFile, TokenStream


@pytest.fixture
def stream(tmp_path):
    """A function that makes a stream of tokens."""

    def make(tokens, name="t.bin"):
        np.array(tokens, dtype="<u2").tofile(tmp_path / name)
        return TokenStream([TokenFile(tmp_path / name, len(tokens), "uint16")])

    return make


def test_against_counting_by_hand(stream):
    tokenizer = build_tokenizer("byte", 0, [])
    train, held_out = list(b"abracadabra abracadabra"), list(b"cadabra xb")
    found = measure_baselines(stream(train), stream(held_out, "v.bin"), tokenizer, "print")
    counts, total, vocabulary = Counter(train), len(train), tokenizer.vocab_size
    kinds = len(counts)

    def single(token):
        if token in counts:
            return counts[token] / (total + kinds)
        return kinds / (total + kinds) / (vocabulary - kinds)

    pairs = Counter(pairwise(train))

    def pair(before, token):
        total = sum(count for (first, _), count in pairs.items() if first == before)
        followers = sum(first == before for first, _ in pairs)
        if not total:
            return single(token)
        return (pairs[before, token] + followers * single(token)) / (total + followers)

    guessed = list(pairwise(held_out))
    assert found.uniform == math.log(vocabulary)
    assert found.unigram == pytest.approx(-np.mean([math.log(single(token)) for _, token in guessed]))
    assert found.bigram == pytest.approx(-np.mean([math.log(pair(*both)) for both in guessed]))
    assert (found.tokens, found.guessed, found.bytes_per_token) == (total, len(guessed), 1.0)
    assert found.bits_per_byte(math.log(2)) == 1.0
    assert sum(map(single, range(vocabulary))) == pytest.approx(1)
    assert sum(pair(ord("a"), token) for token in range(vocabulary)) == pytest.approx(1)


def test_nothing_held_out_and_hardly_anything_at_all(stream):
    tokenizer = build_tokenizer("byte", 0, [])
    for tokens in (list(b"abcabcabc" * 40), [1, 2]):
        found = measure_baselines(stream(tokens), stream([], "v.bin"), tokenizer, "print")
        assert found.guessed >= 1
        assert np.isfinite([found.unigram, found.bigram, found.zipped]).all()


def test_a_bounded_sample_is_taken_from_everywhere(stream, monkeypatch):
    blocks = some_blocks(stream(np.arange(50_000) % 60_000), 6_400)
    assert blocks.shape == (32, 200)
    assert (blocks[0, 0], blocks[-1, -1]) == (0, 49_999)
    assert some_blocks(stream(range(100)), 6_400).shape == (1, 100)


def test_they_are_kept_with_the_run_and_made_anew_for_other_data(make_run, monkeypatch):
    run = make_run()
    found = baselines(run)
    assert found is not None
    assert found.bigram < found.unigram < found.uniform
    assert 0 < found.zipped < 8
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_baselines", None)
        assert baselines(run) == found
    file = run.folder / module.CACHE
    for damage in ("{}", "nonsense", json.dumps({**json.loads(file.read_text()), "fingerprint": "another"})):
        file.write_text(damage)
        assert baselines(run) == found


def test_none_without_shards(make_run):
    run = make_run()
    next(run.data.glob("train-*.bin")).unlink()
    assert baselines(run) is None
    (run.data / "manifest.json").unlink()
    assert baselines(run) is None
