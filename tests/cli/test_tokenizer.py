"""``pretrain tokenizer train`` and ``pretrain tokenizer show``."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.cli import tokenizer as command
from pretrain.tokenizer import Tokenizer, build_tokenizer


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    code = main(["tokenizer", *map(str, args)])
    line = capsys.readouterr().err.strip()
    assert code in (1, 2)
    assert line.startswith("pretrain: ")
    assert "\n" not in line
    return line


@pytest.fixture(autouse=True)
def without_gpt2(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As on a machine that does not have GPT-2's files, but for tests that ask for them."""
    if "gpt2" not in request.fixturenames:
        monkeypatch.setattr("pretrain.tokenizer.local_gpt2_tokenizer", lambda: None)


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Bytes in the place of GPT-2's tokens: one byte a token."""
    tokenizer = build_tokenizer("byte", 0, [])
    monkeypatch.setattr("pretrain.tokenizer.local_gpt2_tokenizer", lambda: tokenizer)
    return tokenizer


# train


def test_it_trains_what_build_tokenizer_trains(text_file: Path, tmp_path: Path, capsys: Any, gpt2: Tokenizer):
    out = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", str(text_file), "--vocab-size", "300", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    text = text_file.read_text(encoding="utf-8")
    tokenizer = Tokenizer.load(out)
    assert tokenizer.fingerprint == build_tokenizer("bpe", 300, [text]).fingerprint
    ratio = len(text.encode()) / len(tokenizer.encode(text))
    shown = dict(line.split(maxsplit=1) for line in printed.splitlines() if "merging" not in line)
    assert (shown["documents"], shown["vocab_size"], shown["text_bytes"]) == ("1", "300", str(len(text.encode())))
    assert (shown["bytes_per_token"], shown["gpt2_bytes_per_token"]) == (f"{ratio:.2f}", "1.00")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]  # nothing temporary stays


def test_it_reads_fields_of_json_lines_and_cuts_words_as_asked(tmp_path: Path, capsys: Any):
    texts = ["in 1234 12 years", "12 34 they'LL", "12 34 56 they'LL, they'LL"] * 5
    rows = [json.dumps({"content": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "t.json"
    args = ["tokenizer", "train", str(tmp_path / "a.jsonl"), "--field", "content", "--pattern", "nanochat", "--json"]
    assert main([*args, "--vocab-size", "270", "--out", str(out)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["documents"], numbers["text_bytes"]) == (15, sum(map(len, texts)))
    assert (numbers["vocab_size"], numbers["cut"], numbers["gpt2_bytes_per_token"]) == (270, False, None)
    assert Tokenizer.load(out).fingerprint == build_tokenizer("bpe", 270, texts, "nanochat").fingerprint
    assert numbers["fingerprint"] != build_tokenizer("bpe", 270, texts).fingerprint


def test_it_learns_from_so_many_bytes_and_says_so(tmp_path: Path, capsys: Any):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}{name}x {name}{name}y " * 100)
    out = tmp_path / "out.json"
    args = ["tokenizer", "train", str(tmp_path), "--vocab-size", "260", "--out", str(out), "--max-bytes", "801"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "--max-bytes is reached" in printed
    assert "text_bytes            1600\n" in printed
    texts = [(tmp_path / f"{name}.txt").read_text() for name in "ab"]
    assert Tokenizer.load(out).fingerprint == build_tokenizer("bpe", 260, texts).fingerprint
    assert main([*args[:-1], "0", "--force"]) == 0
    assert "all text is read" in capsys.readouterr().out


def test_the_sample_is_spread_over_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(command, "SAMPLES", 10)
    rows = ["all the same words"] * 500 + ["".join(random.Random(i).choices("qxzjk", k=18)) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    out = tmp_path / "t.json"
    args = ["tokenizer", "train", str(tmp_path / "a.jsonl"), "--vocab-size", "280", "--out", str(out), "--json"]
    assert main(args) == 0
    measured = json.loads(capsys.readouterr().out)["bytes_per_token"]
    first, whole = (
        sum(map(len, some)) / sum(len(Tokenizer.load(out).encode(row)) for row in some) for some in (rows[:500], rows)
    )
    assert measured == pytest.approx(whole, rel=0.3)
    assert measured < first / 2


def test_bad_places_and_numbers_are_one_line(text_file: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "t.json"
    assert "--out is missing" in refusal(capsys, "train", text_file)
    assert "--vocab-size must be at least 257" in refusal(capsys, "train", text_file, "--out", out, "--vocab-size", 9)
    assert "does not exist" in refusal(capsys, "train", text_file, "--out", tmp_path / "no" / "t.json")
    assert "exists; give another --out" in refusal(capsys, "train", text_file, "--out", tmp_path)
    assert "nothing.txt" in refusal(capsys, "train", tmp_path / "nothing.txt", "--out", out)
    assert "use --vocab-size" in refusal(capsys, "train", text_file, "--out", out, "--vocab-size", 60000)
    assert not out.exists()
    out.write_text("precious")
    assert "exists; give another --out, or --force" in refusal(capsys, "train", text_file, "--out", out)
    assert out.read_text() == "precious"
    assert main(["tokenizer", "train", str(text_file), "--out", str(out), "--vocab-size", "260", "--force"]) == 0
    assert Tokenizer.load(out).vocab_size == 260


# show


def test_tokens_stand_beside_their_bytes(capsys: Any, gpt2: Tokenizer):
    assert main(["tokenizer", "show", "byte", "a \té\n\x00"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "97\ta\t61",
        "32\t␣\t20",
        "9\t⇥\t09",
        "195\t\\xc3\tc3",
        "169\t\\xa9\ta9",
        "10\t⏎\t0a",
        "0\t\\x00\t00",
        "bytes                 7",
        "tokens                7",
        "bytes_per_token       1.00",
        "gpt2_tokens           7",
        "gpt2_bytes_per_token  1.00",
        "bos                   <|endoftext|>",
    ]


def test_files_and_runs_are_shown_and_counted_whole(text_file: Path, tmp_path: Path, capsys: Any):
    tokenizer = build_tokenizer("bpe", 300, [text_file.read_text(encoding="utf-8")])
    tokenizer.save(tmp_path / "tokenizer.json")
    size = len(text_file.read_bytes())
    count = len(tokenizer.encode(text_file.read_text(encoding="utf-8")))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert main(["tokenizer", "show", str(name), "--file", str(text_file), "--tokens", "3", "--json"]) == 0
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["bytes"], numbers["tokens"], numbers["gpt2_tokens"]) == (size, count, None)
        assert numbers["bytes_per_token"] == size / count
        assert [token["id"] for token in numbers["shown"]] == tokenizer.encode(text_file.read_text("utf-8"))[:3]
    assert main(["tokenizer", "show", str(tmp_path), "--file", str(text_file), "--tokens", "3"]) == 0
    assert f"... {count - 3:,} more tokens" in capsys.readouterr().out


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    for given, shown in (("naïve".encode(), "tokens                6"), (b"\xff", None)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        if shown:
            assert main(["tokenizer", "show", "byte", "-"]) == 0
            assert shown in capsys.readouterr().out
        else:
            assert "not UTF-8" in refusal(capsys, "show", "byte", "-")


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    assert "give the text: TEXT" in refusal(capsys, "show", "byte")
    assert "only one of them" in refusal(capsys, "show", "byte", "text", "--file", "file")
    assert "no tokenizer 'gpt3'" in refusal(capsys, "show", "gpt3", "x")
    assert "no tokenizer 'char'" in refusal(capsys, "show", "char", "x")
    assert "tokenizer.json" in refusal(capsys, "show", tmp_path, "x")
    assert "no such file" in refusal(capsys, "show", "byte", "--file", tmp_path / "none.txt").lower()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "the text is empty" in refusal(capsys, "show", "byte", "-")
