import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import write_shard

from pretrain.errors import DataError
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens.datasets import prepared_dataset
from pretrain.tokens.shards import Manifest

TEXTS = ["hello world", "naïve 王", "a much longer third document " * 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training shards and one of validation, byte tokens."""
    tokenizer = build_tokenizer("byte", 0, TEXTS)
    shards = (
        write_shard(tmp_path, "train", 0, TEXTS[:2], tokenizer),
        write_shard(tmp_path, "train", 1, TEXTS[2:], tokenizer),
        write_shard(tmp_path, "val", 0, TEXTS[:1], tokenizer),
    )
    Manifest.of(tokenizer, shards).save(tmp_path)
    return tmp_path


def expected_tokens() -> list[int]:
    return [token for text in TEXTS for token in (256, *text.encode())]


def test_a_shard_is_what_nanogpt_reads(folder: Path):
    tokens = np.memmap(folder / "train-00000.bin", dtype=np.uint16, mode="r")
    assert tokens.tolist() == [token for text in TEXTS[:2] for token in (256, *text.encode())]


def test_the_manifest_counts(folder: Path):
    manifest = Manifest.load(folder)
    first = manifest.shards[0]
    assert (first.tokens, first.documents, first.text_bytes) == (23, 2, 21)
    assert manifest.tokens("train") == len(expected_tokens())
    assert manifest.bytes_per_token == pytest.approx((len(expected_tokens()) - 3) / len(expected_tokens()))
    assert Manifest.load(folder).fingerprint == manifest.fingerprint


def test_windows_run_over_the_edges_of_shards(folder: Path):
    stream = prepared_dataset(folder).stream("train")
    tokens = expected_tokens()
    assert len(stream) == len(tokens)
    for length in (1, 5, len(tokens)):
        starts = np.arange(len(tokens) - length + 1)
        windows = stream.windows(starts, length)
        assert windows.dtype == np.int64
        assert windows.tolist() == [tokens[s : s + length] for s in starts]
    val = prepared_dataset(folder).stream("val")
    assert val.windows(np.array([0, 2]), 3).tolist() == [[256, 104, 101], [101, 108, 108]]


def test_damage_is_found(folder: Path):
    file = folder / "train-00001.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match=f"has {len(data) - 2} bytes, not {len(data)}"):
        prepared_dataset(folder).stream("train")
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        prepared_dataset(folder).stream("train")


def test_a_bad_manifest_is_one_clear_line(folder: Path):
    file = folder / "manifest.json"
    good = json.loads(file.read_text())
    for text in ("{", "[]", json.dumps({**good, "shards": [{}]}), json.dumps({**good, "extra": 1})):
        file.write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            Manifest.load(folder)
    file.write_text(json.dumps({**good, "format": 99}))
    with pytest.raises(DataError, match="cannot read"):
        Manifest.load(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Manifest.load(folder)
