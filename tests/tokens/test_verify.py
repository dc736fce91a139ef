"""``pretrain data verify``: each fault is found and told by its own line."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.config import DataConfig, TokenizerConfig
from pretrain.errors import DataError
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens import Manifest
from pretrain.tokens.prepare import prepare_text
from pretrain.tokens.verify import verify


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(f"text number {number} " * 50)
    data = DataConfig(paths=(str(folder),), val_fraction=0.2)
    prepare_text(data, TokenizerConfig("byte"), folder / "out", shard_tokens=1500, workers=1)
    return folder / "out"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def flip(folder: Path) -> None:
    file = folder / "train-00001-000.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    file = folder / "train-00001-000.bin"
    file.write_bytes(file.read_bytes()[:-2])


def extra(folder: Path) -> None:
    shutil.copy(folder / "train-00001-000.bin", folder / "train-99999-000.bin")


def beyond(folder: Path) -> None:
    """An id that the vocabulary lacks, in a shard whose hash is right."""
    file = folder / "train-00001-000.bin"
    tokens = np.fromfile(file, dtype=np.uint16)
    tokens[77] = 257
    tokens.tofile(file)
    tree = json.loads((folder / "manifest.json").read_text())
    shard = next(shard for shard in tree["shards"] if shard["file"] == file.name)
    shard["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree))


def other_tokenizer(folder: Path) -> None:
    build_tokenizer("bpe", 260, ["some text, some text, some more text"]).save(folder / "tokenizer.json")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip, r"train-00001-000.bin is not what was written"),
    "truncated": (truncate, r"train-00001-000.bin has [\d,]+ bytes, not"),
    "missing": (lambda folder: (folder / "train-00001-000.bin").unlink(), r"train-00001-000.bin is missing"),
    "extra": (extra, r"train-99999-000.bin is not in manifest.json"),
    "beyond": (beyond, r"train-00001-000.bin has the token 257, beyond the vocabulary of 257"),
    "other tokenizer": (other_tokenizer, r"was made with another tokenizer than .*tokenizer.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer can be read there"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_its_line(name: str, folder: Path, capsys):
    damage, expected = FAULTS[name]
    damage(folder)
    (fault,) = verify(folder)
    assert re.search(expected, fault)
    assert main(["data", "verify", str(folder)]) == 1
    assert capsys.readouterr() == ("", f"pretrain: {fault}\n")


def test_all_faults_are_found_together(folder: Path):
    for damage in (flip, extra, other_tokenizer):
        damage(folder)
    (folder / "train-00002-000.bin").unlink()
    assert len(verify(folder)) == 4


def test_what_is_whole_is_said_to_be(good: Path, tmp_path: Path, capsys):
    assert main(["data", "verify", str(good), "--tokenizer", "byte"]) == 0
    assert "shards with" in capsys.readouterr().out
    build_tokenizer("char", 0, ["abc", "def"]).save(tmp_path / "other.json")
    assert main(["data", "verify", str(good), "--tokenizer", str(tmp_path / "other.json")]) == 1
    assert "made with another tokenizer than the one given" in capsys.readouterr().err
    assert main(["data", "verify", str(good), "--tokenizer", "bpe"]) == 2
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "it is not a finished folder of token shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "/etc/passwd"}, r"damaged .*\[0\]\.file"),
        ({"file": "../x.bin"}, r"\[0\]\.file"),
        ({"file": "a\\b.bin"}, r"\[0\]\.file"),
        ({"file": ""}, r"\[0\]\.file"),
        ({"file": "train-00001-000.bin"}, "listed twice"),
        ({"tokens": -1}, r"\[0\]\.tokens"),
        ({"tokens": 2**70}, r"\[0\]\.tokens"),
        ({"tokens": True}, r"\[0\]\.tokens"),
        ({"tokens": "1"}, r"\[0\]\.tokens"),
        ({"split": "dev"}, r"train\|val.*\[0\]\.split"),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused(change: dict, message: str, folder: Path):
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    tree["shards"][0].update(change)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        Manifest.load(folder)


def test_a_manifest_is_not_read_at_any_size(folder: Path):
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(101 * 2**20)  # a hole: nothing on the disk
    with pytest.raises(DataError, match="more than any such file"):
        Manifest.load(folder)
