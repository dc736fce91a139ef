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
from pretrain.text import read_documents
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.patterns import GPT2, byte_alphabet, byte_level
from pretrain.tokens import Manifest


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
    assert main(["data", "prepare", documents, "--out", str(tmp_path / "t"), "--tokenizer", tokenizer]) == 0
    assert "name one of its tokens with --bos-token" in capsys.readouterr().out  # as the option is called there
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
    fields = ["--model.head_gates", "--model.ngram_heads", "6"]
    settings = ["--train.init_from", str(run), *fields, "--out", str(tmp_path / "next")]
    assert train(tmp_path, documents, tokenizer, *settings) == 0


def test_a_tokenizer_that_changes_text_is_said_everywhere(tmp_path: Path, documents: str, capsys):
    tokenizer = special(tmp_path / "nfkc.json", "<|endoftext|>", normalizer=normalizers.NFKC())
    assert main(["tokenizer", "show", tokenizer, "ﬁne ① x²"]) == 0
    assert "'ﬁ' comes back as 'fi'" in capsys.readouterr().err
    assert train(tmp_path, documents, tokenizer) == 0
    assert "'ﬁ' comes back as 'fi'" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "bits per byte are of the text that comes back" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "so bits per byte are of the text that comes back" in (tmp_path / "page.html").read_text()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    assert "- The tokenizer changes text ('ﬁ' comes back as 'fi'), so" in (tmp_path / "hf/README.md").read_text()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert "comes back as 'fi'" in numbers["caution"]
    shards = json.loads((tmp_path / "run/data/manifest.json").read_text())["shards"]
    assert numbers["bytes"] < sum(each["text_bytes"] for each in shards if each["split"] == "val")  # 'ﬁ' has one more
    assert main(["plan", "--data", documents, "--tokenizer.kind", tokenizer]) == 0
    assert "The tokenizer changes text" in capsys.readouterr().out


def test_a_mask_without_a_boundary_in_the_tokens_is_refused(tmp_path: Path, capsys):
    tokenizer = special(tmp_path / "two.json", "<|endoftext|>", "<sep>")
    ids = np.frombuffer(b"A fox sees Ada. " * 2000, np.uint8).astype("<u2")
    ids[::160] = 257  # documents begin with another token than the usual one
    (tmp_path / "tokens").mkdir()
    ids[:28_000].tofile(tmp_path / "tokens/train.bin")
    ids[28_000:].tofile(tmp_path / "tokens/val.bin")
    tokens = str(tmp_path / "tokens")
    plan = ["plan", "--data", tokens, "--tokenizer.kind", tokenizer, "--model.document_mask", "--no-measure"]
    for command in (lambda *more: train(tmp_path, tokens, tokenizer, "--model.document_mask", *more), None):
        run = command or (lambda *more: main([*plan, *more]))
        assert run() == 2
        assert f"{tokens} never has <|endoftext|>; name the one it has with --tokenizer.bos" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert train(tmp_path, tokens, tokenizer, "--model.document_mask", "--tokenizer.bos", "<sep>") == 0
    assert main([*plan, "--tokenizer.bos", "<sep>"]) == 0


def cutting(place: Path, regex: str = "") -> str:
    """A tokenizer.json in which, without a regex, a token takes the blank where a long text may be cut."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())} | {"dĠ": 256}
    hf = byte_level(models.BPE(vocabulary, [("d", "Ġ")]), regex)
    hf.add_special_tokens(["<|endoftext|>"])
    hf.save(str(place))
    return str(place)


CUT = "problem   {} places where a long document is cut; tokens beside them may differ"


def join_up_to(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Parts of documents are joined up to so many characters."""
    for module in ("problems", "formats", "pieces"):
        monkeypatch.setattr(f"pretrain.text.{module}.WHOLE", size)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_cuts_that_change_tokens_are_counted(tmp_path: Path, capsys, monkeypatch, suffix: str):
    monkeypatch.setattr("pretrain.text.pieces.RANGE_BYTES", 2000)
    monkeypatch.setattr("pretrain.text.formats.PART_CHARACTERS", 500)
    monkeypatch.setattr("pretrain.text.formats.CUT_WINDOW", 20)
    join_up_to(monkeypatch, 500)
    text, file, out = "good word " * 1200, tmp_path / f"long{suffix}", tmp_path / "out"
    file.write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    cuts = sum(document.continues for document in read_documents([str(file)]))
    assert cuts > 20
    tokenizer = cutting(tmp_path / "no_regex.json")
    command = ["data", "prepare", str(file), "--out", str(out), "--val-fraction", "0", "--tokenizer"]
    assert main([*command, tokenizer]) == 0
    assert CUT.format(cuts) in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert manifest.problems == {"cut": cuts}
    whole = len(Tokenizer.load(tokenizer).encode(text)) + 1
    assert manifest.tokens("train") == whole + cuts  # at each, "d" and a blank instead of the one token of both
    assert main(["tokenizer", "show", tokenizer, "--file", str(file)]) == 0
    assert CUT.format(cuts) in capsys.readouterr().err

    shutil.rmtree(out)
    assert main([*command, cutting(tmp_path / "words.json", GPT2)]) == 0  # words end there in any case
    assert Manifest.load(out).problems == {}


def test_cuts_inside_words_are_counted_for_tokenizers_of_words(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.text.pieces.RANGE_BYTES", 1000)
    monkeypatch.setattr("pretrain.text.formats.CUT_WINDOW", 20)
    join_up_to(monkeypatch, 900)
    (tmp_path / "long.txt").write_text("漢字" * 1000)  # 6,000 bytes
    command = ["data", "prepare", str(tmp_path / "long.txt"), "--val-fraction", "0", "--out"]
    words = cutting(tmp_path / "words.json", GPT2)
    assert main([*command, str(tmp_path / "words"), "--tokenizer", words]) == 0
    assert Manifest.load(tmp_path / "words").problems == {"cut": 5}
    for kind in ("byte", "char"):  # whose tokens are the same wherever a text is cut
        assert main([*command, str(tmp_path / kind), "--tokenizer", kind]) == 0
        assert Manifest.load(tmp_path / kind).problems == {}


def test_a_stream_and_a_plan_say_cuts(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.text.pieces.RANGE_BYTES", 2000)
    join_up_to(monkeypatch, 2000)
    (tmp_path / "long.txt").write_text("a good word " * 1000)
    (tmp_path / "val.txt").write_text("a good word " * 40)
    tokenizer, place = cutting(tmp_path / "no_regex.json"), str(tmp_path / "long.txt")
    assert main(["plan", "--data", place, "--tokenizer.kind", tokenizer, "--no-measure"]) == 0
    assert "from those of the whole document, or more" in (said := capsys.readouterr().out)
    assert CUT.format(5).replace("problem   ", "problem    ") in said
    options = ["--data.val_paths", str(tmp_path / "val.txt"), "--data.order", "sequential", "--data.stream"]
    assert train(tmp_path, place, tokenizer, *options, "--train.steps", "20") == 0
    assert CUT.format(5) in capsys.readouterr().out
