"""Shared by all tests: a tiny text, and a configuration that trains on it in about a second."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from pretrain.config import Config, load_config
from pretrain.tokenizer import Tokenizer
from pretrain.tokens.shards import Shard, ShardWriter


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of larger texts beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is absent")
    return folder


def write_shard(folder: Path, split: str, index: int, texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """A shard of whole documents."""
    with ShardWriter(folder, f"{split}-{index:05d}.bin", split, tokenizer) as writer:
        for text, ids in tokenizer.encode_documents((text, text) for text in texts):
            writer.write(ids, len(text.encode()))
        return writer.close()


def made_up_text() -> str:
    """About 20 kB of made-up sentences with structure to learn, some of it not ASCII."""
    draw = random.Random(0)
    names, verbs = ["Ada", "Noël", "the fox", "王さん", "a child"], ["sees", "hears", "finds", "calls"]
    return "\n".join(f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}." for _ in range(900))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of :func:`made_up_text`."""
    file = tmp_path_factory.mktemp("text") / "tiny.txt"
    file.write_text(made_up_text(), encoding="utf-8")
    return file


TINY = {
    "tokenizer.kind": "byte",
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.context_length": 32,
    "train.steps": 12,
    "train.batch_tokens": 256,
    "train.precision": "fp32",
    "eval.every": 5,
    "eval.tokens": 256,
    "checkpoint.every": 4,
    "sample.max_tokens": 8,
    "schedule.warmup_steps": 2,
}
"""Overrides that make a run of a second."""


@pytest.fixture
def tiny(text_file: Path) -> Config:
    """The smallest sensible run."""
    return load_config("quickstart", **{**TINY, "data.paths": [str(text_file)]})
