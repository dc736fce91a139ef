"""Which text a bpe learns from where there is more than it can learn from."""

import functools
import random
from collections import Counter
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.text.split import TRAIN, VAL, Part
from pretrain.tokens.source import learning_texts

SEVERAL = 4


def parts(seed: int) -> list[Part]:
    """Ten documents of Chinese characters drawn at random, about 3,000 bytes each, the fourth of them held out."""
    draw = random.Random(seed)
    texts = ["".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(1000)) for _ in range(10)]
    return [Part(text, VAL if number == 3 else TRAIN, True) for number, text in enumerate(texts)]


@pytest.fixture
def sources() -> list:
    return [(functools.partial(parts, seed), 30_000) for seed in range(SEVERAL)]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pretrain.tokens.source.DIFFERENT_BYTES", "pretrain.tokenizer.build.DIFFERENT_BYTES"):
        monkeypatch.setattr(place, 24_000)
    monkeypatch.setattr("pretrain.tokenizer.build.LONG_PIECE", 100)


def test_all_of_it_is_read_once(sources: list):
    for most in (120_000, 1e9):
        found = Counter("".join(learning_texts(sources, most)))
        training = [part.text for seed in range(SEVERAL) for part in parts(seed) if part.split == TRAIN]
        assert found == Counter("".join(training))


def test_the_beginning_is_of_all_sources(sources: list):
    taken = ""
    for text in learning_texts(sources, 120_000):
        taken += text
        if len(taken) >= 24_000 / 3:
            break
    whole = ["".join(part.text for part in parts(seed)) for seed in range(SEVERAL)]
    assert [sum(taken[at : at + 50] in text for at in range(0, len(taken), 50)) for text in whole] == [40] * SEVERAL


def test_a_limit_takes_evenly(sources: list):
    for most in (6_000, 60_000):  # below and above what may differ
        texts = list(learning_texts(sources, most))
        size = sum(len(text.encode()) for text in texts)
        assert 0.75 * most <= size <= 1.1 * most
        whole = ["".join(part.text for part in parts(seed)) for seed in range(SEVERAL)]
        counts = [sum(text in each for text in texts) for each in whole]
        assert min(counts) == max(counts)


def test_the_command_says_from_how_much_it_learned(tmp_path: Path, capsys):
    (tmp_path / "zh.txt").write_text("\n".join(part.text for seed in range(SEVERAL) for part in parts(seed)))
    options = ["--vocab-size", "300"]
    assert main(["data", "prepare", str(tmp_path / "zh.txt"), "--out", str(tmp_path / "t"), *options]) == 0
    assert "tokenizer trained on 0.0 MB, taken evenly: its words repeat so seldom" in capsys.readouterr().out
    assert main(["tokenizer", "train", str(tmp_path / "zh.txt"), "--out", str(tmp_path / "t.json"), *options]) == 0
    assert "trained on 0.1 MB: its words repeat so seldom" in capsys.readouterr().out
