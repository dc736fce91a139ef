"""The commands of ``pretrain data`` that make and read token shards, as a user meets them."""

from pathlib import Path

import pytest

from pretrain.cli import main

WRONG_USE = {
    "no folder": (["prepare", "IN"], 2, "--out is missing"),
    "no such text": (["prepare", "absent.txt", "--out", "o"], 1, "absent.txt: no such file"),
    "negative workers": (["prepare", "IN", "--out", "o", "--workers", "-1"], 2, "--workers must be at least 0, not -1"),
    "empty shards": (
        ["prepare", "IN", "--out", "o", "--shard-tokens", "0"],
        2,
        "--shard-tokens must be at least 1, not 0",
    ),
    "too few tokens": (
        ["prepare", "IN", "--out", "o", "--vocab-size", "9"],
        2,
        "tokenizer.vocab_size must be at least",
    ),
    "too many tokens": (["prepare", "IN", "--out", "o"], 1, "the text is too small for tokenizer.vocab_size 4096"),
    "no such tokenizer": (["prepare", "IN", "--out", "o", "--tokenizer", "gtp2"], 2, "did you mean 'gpt2'?"),
    "fraction": (["prepare", "IN", "--out", "o", "--val-fraction", "1"], 2, "data.val_fraction must be below 1.0"),
    "no such engine": (["prepare", "IN", "--out", "o", "--engine", "spark"], 2, "ray"),
    "no shards": (["verify", "."], 1, "not a finished folder of token shards"),
    "nothing to look at": (["inspect", "."], 2, "has no manifest.json; for token shards made by another tool add"),
    "no tokens": (["inspect", ".", "--tokenizer", "byte"], 1, "there are no such files"),
    "no folder to look at": (["inspect"], 2, "DIR"),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use_is_one_line_and_leaves_nothing(name: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN").mkdir()
    (tmp_path / "IN" / "a.txt").write_text("some text, some text, and some more text. " * 20)
    args, code, expected = WRONG_USE[name]
    assert main(["data", *args]) == code
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.startswith("pretrain: ")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["IN"]


def test_the_next_command_after_prepare_without_bos_is_not_refused(tmp_path: Path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some text, some text, and some more text. " * 20)
    out = str(tmp_path / "tokens")
    assert main(["data", "prepare", str(text), "--out", out, "--tokenizer", "byte", "--no-bos"]) == 0
    following = capsys.readouterr().out.splitlines()[-1].partition("pretrain ")[2].split()
    run = ["--train.steps", "1", "--train.device", "cpu", "--out", str(tmp_path / "run")]
    sizes = ["--model.layers", "1", "--model.width", "32", "--model.context_length", "32", "--train.batch_tokens", "64"]
    assert main([*following, *sizes, *run]) == 0


def test_the_embedded_corpus_from_text_to_training(tmp_path: Path, capsys):
    out = str(tmp_path / "tokens")
    assert main(["data", "prepare", "--out", out, "--tokenizer", "byte", "--val-fraction", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "1.00 bytes of text per token" in printed
    assert printed.endswith(f"pretrain train --data {out}\n")
    assert main(["data", "verify", out]) == 0
    assert main(["data", "inspect", out]) == 0
    assert "In the beginning God created the heaven and the earth" in capsys.readouterr().out
    assert main(["data", "prepare", "--out", out, "--tokenizer", "byte", "--val-fraction", "0.1"]) == 0
    assert "is complete; nothing left to prepare" in capsys.readouterr().out
