import dataclasses
from pathlib import Path

import pytest

from pretrain.config import Config
from pretrain.errors import DataError
from pretrain.tokens import Manifest, open_prepared, prepare, prepared_dataset


def with_text(config: Config, file: Path, text: str, **data) -> Config:
    file.write_text(text, encoding="utf-8")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paths=(str(file),), **data))


def test_text_comes_back_from_the_shards(tiny: Config, text_file: Path, tmp_path: Path):
    prepared = prepare(tiny, tmp_path / "data")
    text = text_file.read_text(encoding="utf-8")
    parts = []
    for split in ("train", "val"):
        stream = prepared_dataset(prepared.folder).stream(split)
        parts.append(prepared.tokenizer.decode(stream.windows([0], len(stream))[0].tolist()))
    assert "".join(parts) == text
    assert len(parts[1]) == len(text) - int(0.95 * len(text))
    assert sum(s.text_bytes for s in prepared.manifest.shards) == len(text.encode())
    again = open_prepared(prepared.folder)
    assert again.manifest == prepared.manifest
    assert again.tokenizer.fingerprint == prepared.manifest.tokenizer


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("too short", {"val_fraction": 0}, r"\d+ training tokens are fewer than one context of 32"),
        (
            "long enough to train on, " * 9,
            {"val_fraction": 0.05},
            "validation tokens are fewer .* larger --data.val_fraction",
        ),
    ],
)
def test_short_text_is_refused_and_leaves_nothing(tiny: Config, tmp_path: Path, text: str, data: dict, message: str):
    config = with_text(tiny, tmp_path / "short.txt", text, **data)
    with pytest.raises(DataError, match=message):
        prepare(config, tmp_path / "run" / "data")
    assert not (tmp_path / "run").exists()


def test_preparing_is_deterministic(tiny: Config, tmp_path: Path):
    first, second = prepare(tiny, tmp_path / "a"), prepare(tiny, tmp_path / "b")
    assert first.manifest.fingerprint == second.manifest.fingerprint
    assert isinstance(Manifest.load(tmp_path / "a"), Manifest)


def test_characters_of_a_single_text_are_nanogpts(tiny: Config, shared_data: Path, tmp_path: Path):
    data = dataclasses.replace(tiny.data, paths=(str(shared_data / "tinyshakespeare.txt"),), val_fraction=0.1)
    config = dataclasses.replace(tiny, data=data, tokenizer=dataclasses.replace(tiny.tokenizer, kind="char"))
    prepared = prepare(config, tmp_path / "data")
    assert prepared.tokenizer.vocab_size == 65
    assert (prepared.manifest.tokens("train"), prepared.manifest.tokens("val")) == (1_003_854, 111_540)
