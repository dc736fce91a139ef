"""A run is of one text: what changed is noticed, what moved is found again, what appears beside it is not taken."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run, killed_at

from pretrain.cli import main
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.tokens import Origin

WORDS = "The shepherd counts his sheep in the evening, and none of them is missing. "


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def tiny(**changes: object) -> list[str]:
    settings = {**TINY, "train.steps": 4, "sample.max_tokens": 0, **changes}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder of three books."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text((WORDS + f"Book {name}. ") * 40)
    return folder


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Train until something ends the process at a step."""
    with killed_at(step, monkeypatch):
        train(*arguments)


def replace_same_size(file: Path) -> None:
    """Other text of the same size, at another time."""
    text = file.read_text()
    file.write_text(text[:500] + text[500:].upper())
    os.utime(file, ns=(0, 1_500_000_000_000_000_000))


CHANGES = {
    "replaced": (lambda folder: (folder / "b.txt").write_text("Quite another text. " * 70), "b.txt has 1,400 bytes"),
    "of the same size": (lambda folder: replace_same_size(folder / "b.txt"), "b.txt has other content"),
    "gained": (lambda folder: (folder / "ab.txt").write_text(WORDS), "ab.txt is new"),
    "lost": (lambda folder: (folder / "c.txt").unlink(), "c.txt is gone"),
    "all gone": (shutil.rmtree, "books: no such file or folder"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_changed_text_is_noticed(books: Path, tmp_path: Path, change: str, finished: bool, monkeypatch, capsys):
    command = ["--data", books, "--out", tmp_path / "run", *tiny(), "--checkpoint.every", 1]
    if finished:
        assert train(*command) == 0
    else:
        stop_at(2, monkeypatch, *command)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    do, said = CHANGES[change]
    do(books)
    capsys.readouterr()
    for more in ([], ["--train.steps", "6"]):  # the same again, and longer
        assert train(*command, *more) == 1
        out, error = capsys.readouterr()
        assert said in error
        assert "finished" not in out
        assert error.endswith(f"or go on with the tokens that the run has: pretrain train --out {tmp_path / 'run'}\n")
        assert error.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    assert train("--out", tmp_path / "run") == 0  # which names no text
    out, _ = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.strip().startswith("changed")]
    assert said in line
    assert "the run keeps the tokens that it has" in line
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_without_its_text_ends_as_with_it(books: Path, tmp_path: Path, monkeypatch):
    command = ["--data", books, *tiny(), "--checkpoint.every", 1, "--out"]
    assert train(*command, tmp_path / "undisturbed") == 0
    stop_at(2, monkeypatch, *command, tmp_path / "run")
    shutil.rmtree(books)
    assert train("--out", tmp_path / "run") == 0
    assert_same_run(Run.open(tmp_path / "run"), Run.open(tmp_path / "undisturbed"))


def test_a_touch_or_a_copy_is_no_change(books: Path, tmp_path: Path, capsys):
    command = ["--data", books, "--out", tmp_path / "run", *tiny()]
    assert train(*command) == 0
    os.utime(books / "a.txt", ns=(0, 1_600_000_000_000_000_000))
    (books / "b.txt").rename(tmp_path / "away.txt")
    shutil.copyfile(tmp_path / "away.txt", books / "b.txt")
    capsys.readouterr()
    assert train(*command) == 0
    out = capsys.readouterr().out
    assert "is finished: 4 steps" in out
    assert "changed" not in out
    recorded = {Path(file.name).name: file for file in Origin.load(tmp_path / "run").text}
    assert recorded["a.txt"].changed == 1_600_000_000_000_000_000  # and is not read again next time
    assert recorded.keys() == {"a.txt", "b.txt", "c.txt"}


def test_a_run_of_before_knows_sizes_and_times(books: Path, tmp_path: Path, capsys):
    command = ["--data", books, "--out", tmp_path / "run", *tiny()]
    assert train(*command) == 0
    (tmp_path / "run" / "origin.json").unlink()
    assert train(*command) == 0
    capsys.readouterr()
    os.utime(books / "a.txt", ns=(0, 1_600_000_000_000_000_000))
    assert train(*command) == 0
    assert "a.txt has another time than when it was prepared" in capsys.readouterr().out
    (books / "a.txt").write_text(WORDS)
    assert train(*command) == 1
    assert "a.txt has 75 bytes and had 3,320 since" in capsys.readouterr().err
    assert train("--out", tmp_path / "run", "--train.steps", 6) == 0
    assert Run.open(tmp_path / "run").summary["steps"] == 6  # type: ignore[index]


# Tokens -----------------------------------------------------------------------------------------------------------


def measured(run: Path, capsys) -> dict:
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tokens_that_appear_beside_the_text_are_not_the_run_s(books: Path, tmp_path: Path, monkeypatch, capsys):
    """As where nanoGPT's prepare.py writes train.bin and val.bin beside its text."""
    command = ["--data", books, "--out", tmp_path / "run", *tiny(), "--checkpoint.every", 1]
    stop_at(2, monkeypatch, *command)
    for name in ("train.bin", "val.bin"):
        np.tile(np.arange(97, 107, dtype=np.uint16), 500).tofile(books / name)
    assert train(*command) == 0
    summary = Run.open(tmp_path / "run").summary
    assert summary is not None
    numbers = measured(tmp_path / "run", capsys)
    assert (numbers["val_loss"], numbers["val_bpb"]) == (summary["val_loss"], summary["val_bpb"])
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith(f"| {books}")]
    assert row.startswith(f"| {books} | {Run.open(tmp_path / 'run').corpus().tokens('train'):,} |")

    assert train("--data", books, "--out", tmp_path / "of tokens", *tiny(), "--tokenizer.kind", "byte") == 0
    assert Run.open(tmp_path / "of tokens").corpus().tokens("train") == 5000  # a new run takes them, as documented


def test_a_run_whose_tokens_were_deleted_takes_no_others(books: Path, tmp_path: Path, capsys):
    assert train("--data", books, "--out", tmp_path / "run", *tiny()) == 0
    shutil.rmtree(tmp_path / "run" / "data")
    for beside in (False, True):
        if beside:
            np.tile(np.arange(97, 107, dtype=np.uint16), 500).tofile(books / "train.bin")
            np.tile(np.arange(97, 107, dtype=np.uint16), 500).tofile(books / "val.bin")
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err
        assert ("is not what" if beside else f"{tmp_path / 'run' / 'data'}, on which") in error


def test_another_tokenizer_under_the_same_name_is_noticed(books: Path, tmp_path: Path, capsys):
    learn = ["tokenizer", "train", str(books), "--out", str(tmp_path / "tokenizer.json"), "--vocab-size"]
    assert main([*learn, "270"]) == 0
    command = ["--data", books, "--out", tmp_path / "run", *tiny(**{"tokenizer.kind": tmp_path / "tokenizer.json"})]
    assert train(*command) == 0
    assert train(*command) == 0
    (tmp_path / "tokenizer.json").unlink()
    assert train(*command) == 0  # the run has its own
    assert main([*learn, "280"]) == 0
    capsys.readouterr()
    assert train(*command) == 1
    assert f"{tmp_path / 'tokenizer.json'} is another tokenizer than when" in capsys.readouterr().err
    assert train("--out", tmp_path / "run") == 0


@pytest.fixture
def tokens(books: Path, tmp_path: Path) -> Path:
    """Token shards of the books."""
    assert main(["data", "prepare", str(books), "--out", str(tmp_path / "tokens"), "--tokenizer", "byte"]) == 0
    return tmp_path / "tokens"


def test_other_token_shards_are_noticed(books: Path, tokens: Path, tmp_path: Path, capsys):
    command = ["--data", tokens, "--out", tmp_path / "run", *tiny()]
    assert train(*command) == 0
    shutil.rmtree(tokens)
    (books / "a.txt").write_text(WORDS * 50)
    assert main(["data", "prepare", str(books), "--out", str(tokens), "--tokenizer", "byte"]) == 0
    capsys.readouterr()
    for again in (["train", *command], ["train", *command, "--train.steps", 6], ["eval", tmp_path / "run"]):
        assert main([str(word) for word in again]) == 1
        error = capsys.readouterr().err
        assert f"{tokens} is not what {tmp_path / 'run'} was trained on; restore it" in error
        assert error.count("\n") == 1
    assert train("--out", tmp_path / "run", "--train.steps", 6) == 1
    assert Run.open(tmp_path / "run").summary is not None  # not reopened
    assert train("--out", tmp_path / "run") == 0  # it is finished, and needs them no more
    out = capsys.readouterr().out
    assert f"{tokens} is not what" in out
    assert "is finished: 4 steps" in out


# Another place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "stream", "tokens"])
def test_moved_data_is_found_at_its_new_place(books: Path, tmp_path: Path, kind: str, monkeypatch, capsys, request):
    options = [*tiny(), "--checkpoint.every", 1]
    options += ["--data.stream", "--data.split", "last_file"] if kind == "stream" else []
    data = request.getfixturevalue("tokens") if kind == "tokens" else books
    assert train("--data", data, "--out", tmp_path / "undisturbed", *options) == 0
    stop_at(2, monkeypatch, "--data", data, "--out", tmp_path / "run", *options)
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(data, moved, copy_function=shutil.copyfile)  # at other times
    shutil.rmtree(data)
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    changed = sorted(other.glob("*.bin" if kind == "tokens" else "*.txt"))[0]
    changed.write_bytes(changed.read_bytes()[:-4] + changed.read_bytes()[:4])

    capsys.readouterr()
    if kind == "tokens":  # a manifest is believed until the tokens are verified
        manifest = json.loads((other / "manifest.json").read_text())
        manifest["shards"][0]["sha256"] = "0" * 64
        (other / "manifest.json").write_text(json.dumps(manifest))
    assert train("--out", tmp_path / "run", "--data", other) == 2
    error = capsys.readouterr().err
    assert f"another configuration (data.paths ['{data}'] → ['{other}'])" in error
    assert Run.open(tmp_path / "run").config.data.paths == (str(data),)

    assert train("--out", tmp_path / "run", "--data", moved) == 0
    assert f"the data is as it was, now at {moved}" in capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    assert run.config.data.paths == (str(moved),)
    if kind == "tokens":  # its name, which is its place, is in no number
        assert read_jsonl(run.metrics)[-1]["step"] == 4
        moved.rename(data)
        assert train("--out", tmp_path / "run", "--data", data) == 0  # a finished run too
    assert_same_run(Run.open(tmp_path / "run"), Run.open(tmp_path / "undisturbed"))


@pytest.mark.parametrize("kind", ["text", "stream", "tokens"])
def test_a_run_of_before_goes_on_where_it_is(books: Path, tmp_path: Path, kind: str, monkeypatch, capsys, request):
    data = request.getfixturevalue("tokens") if kind == "tokens" else books
    command = ["--data", data, "--out", tmp_path / "run", *tiny(), "--checkpoint.every", 1]
    command += ["--data.stream", "--data.split", "last_file"] if kind == "stream" else []
    stop_at(2, monkeypatch, *command)
    (tmp_path / "run" / "origin.json").unlink()
    assert train(*command) == 0
    assert train(*command) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert train("--out", tmp_path / "run", "--data", tmp_path / "moved") == 2
    assert "another configuration (data.paths" in capsys.readouterr().err


def test_files_change_no_sides_by_moving(books: Path, tmp_path: Path, capsys):
    """The same files in the same order, but another is held out."""
    a, b, c = sorted(books.iterdir())
    command = ["--out", tmp_path / "run", *tiny()]
    for more in ([], ["--data.stream"]):
        assert train("--data", a, b, "--data.val_paths", c, *command, *more) == 0
        assert train("--data", a, "--data.val_paths", b, c, *command, *more) == 2
        assert "another configuration (data.paths" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "run")


# Streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 2])
def test_a_changed_text_of_a_stream_is_noticed(books: Path, tmp_path: Path, first: int, monkeypatch, capsys):
    """Before the first checkpoint too: its tokenizer and its held-out text are made of what was there."""
    command = ["--data", books, "--data.stream", "--data.split", "last_file", "--out", tmp_path / "run"]
    command += [*tiny(), "--checkpoint.every", 1]
    stop_at(first, monkeypatch, *command)
    kept = (books / "b.txt").read_text()
    replace_same_size(books / "b.txt")
    capsys.readouterr()
    for again in (command, ["--out", tmp_path / "run"]):
        assert train(*again) == 1
        error = capsys.readouterr().err
        assert f"b.txt has other content since {tmp_path / 'run'} was made; restore it, or choose another" in error
    (books / "b.txt").write_text(kept)
    assert train(*command) == 0
    (books / "d.txt").write_text(WORDS)
    capsys.readouterr()
    assert train(*command) == 1
    assert "d.txt is new" in capsys.readouterr().err
    assert train("--out", tmp_path / "run", "--train.steps", 6) == 1
    assert Run.open(tmp_path / "run").summary is not None
    assert train("--out", tmp_path / "run") == 0
    assert "d.txt is new" in capsys.readouterr().out


def test_tokens_are_not_streamed(books: Path, tmp_path: Path, monkeypatch, capsys):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    command = [
        "--data.stream",
        "--data.split",
        "last_file",
        *tiny(),
        "--checkpoint.every",
        1,
        "--out",
        tmp_path / "run",
    ]
    assert train("--data", tmp_path / "train.bin", *command) == 2
    assert "holds tokens already" in capsys.readouterr().err
    stop_at(2, monkeypatch, "--data", books, *command)
    np.arange(100, dtype=np.uint16).tofile(books / "train.bin")  # appears beside the text of a stream
    assert train("--out", tmp_path / "run") == 0
