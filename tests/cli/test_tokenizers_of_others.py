"""Tokenizers of others through the command line, as a new user would give them."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from tests.conftest import TINY
from tokenizers import models, normalizers

from pretrain.cli import main
from pretrain.runs import Run
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.patterns import byte_alphabet, byte_level


def special(place: Path, *tokens: str, **changes: Any) -> str:
    """A byte-level tokenizer.json with these special tokens."""
    hf = byte_level(models.BPE({character: byte for byte, character in enumerate(byte_alphabet())}, []))
    hf.add_special_tokens(list(tokens))
    for name, value in changes.items():
        setattr(hf, name, value)
    hf.save(str(place))
    return str(place)


@pytest.fixture
def documents(tmp_path: Path) -> str:
    lines = [json.dumps({"text": f"Document {number} is about 'ﬁsh'. " * 5}) for number in range(120)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "documents.jsonl")


def train(tmp_path: Path, documents: str, tokenizer: str, *more: str) -> int:
    settings = {**TINY, "tokenizer.kind": tokenizer, "train.steps": 2}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return main(["train", "--data", documents, "--out", str(tmp_path / "run"), *options, *more])


def test_documents_begin_with_a_token_of_another_name(tmp_path: Path, documents: str, capsys):
    tokenizer = special(tmp_path / "roberta.json", "<s>", "<pad>", "</s>")
    for _ in range(2):  # the second goes on with the first
        assert train(tmp_path, documents, tokenizer, "--model.document_mask") == 0
    assert "each document begins with <s>" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run/data/manifest.json").read_text())
    tokens = np.concatenate([np.fromfile(tmp_path / "run/data" / each["file"], "<u2") for each in manifest["shards"]])
    assert (manifest["boundary"], (tokens == 256).sum()) == (256, 120)
    assert Run.open(tmp_path / "run").load_model().bos_id == 256
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["data", "verify", str(tmp_path / "run/data"), "--tokenizer", tokenizer]) == 0
    assert (
        main(
            [
                "data",
                "prepare",
                documents,
                "--out",
                str(tmp_path / "t"),
                "--tokenizer",
                tokenizer,
                "--bos-token",
                "</s>",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "t/manifest.json").read_text())["boundary"] == 258


def test_a_tokenizer_without_a_boundary_is_said_and_refuses_the_mask(tmp_path: Path, documents: str, capsys):
    tokenizer = special(tmp_path / "none.json", "<one>", "<two>")
    for more in ((), ("--data.stream", "--data.split", "hash")):
        assert train(tmp_path, documents, tokenizer, "--model.document_mask", *more) == 2
        assert "this tokenizer has none; name one of its tokens with --tokenizer.bos" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main(["plan", "--data", documents, "--tokenizer.kind", tokenizer, "--model.document_mask"]) == 2
    assert train(tmp_path, documents, tokenizer, "--tokenizer.bos", "<zero>") == 1
    assert "no token '<zero>' for tokenizer.bos; its special tokens are: <one>, <two>" in capsys.readouterr().err
    assert train(tmp_path, documents, tokenizer) == 0
    assert "no token that begins a document, so documents run into one another" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    assert train(tmp_path, documents, tokenizer, "--tokenizer.bos", "<two>", "--model.document_mask") == 0
    assert Run.open(tmp_path / "run").load_model().bos_id == 257


def test_a_run_of_before_keeps_to_no_boundary(tmp_path: Path, documents: str):
    tokenizer = special(tmp_path / "roberta.json", "<s>", "</s>")
    old = Tokenizer.load(tokenizer)  # as it was read before: no usual name, no boundary
    with patch.object(Tokenizer, "adopt", lambda path, bos="": old):
        assert train(tmp_path, documents, tokenizer) == 0
    run, config = tmp_path / "run", (tmp_path / "run/config.toml").read_text()
    (run / "config.toml").write_text(
        "\n".join(line for line in config.splitlines() if line not in ('bos = ""', 'dtype = "auto"'))
    )
    assert train(tmp_path, documents, tokenizer, "--train.steps", "4") == 0
    assert Run.open(run).load_model().bos_id is None
    assert Run.open(run).corpus().tokenizer.fingerprint == old.fingerprint
    settings = ["--train.init_from", str(run), "--out", str(tmp_path / "next")]
    assert train(tmp_path, documents, tokenizer, *settings) == 0


def test_a_tokenizer_that_changes_text_is_said_everywhere(tmp_path: Path, documents: str, capsys):
    tokenizer = special(tmp_path / "nfkc.json", "<|endoftext|>", normalizer=normalizers.NFKC())
    assert main(["tokenizer", "show", tokenizer, "ﬁne ① x²"]) == 0
    assert "'ﬁ' comes back as 'fi'" in capsys.readouterr().err
    assert train(tmp_path, documents, tokenizer) == 0
    assert "'ﬁ' comes back as 'fi'" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "bits per byte are of the text that comes back" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert "comes back as 'fi'" in numbers["caution"]
    shards = json.loads((tmp_path / "run/data/manifest.json").read_text())["shards"]
    assert numbers["bytes"] < sum(each["text_bytes"] for each in shards if each["split"] == "val")  # 'ﬁ' has one more
    assert main(["plan", "--data", documents, "--tokenizer.kind", tokenizer]) == 0
    assert "The tokenizer changes text" in capsys.readouterr().out
