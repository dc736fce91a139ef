"""The text of a run and its sides: which files are held out, and what of the text cannot be used."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import DataConfig, TokenizerConfig
from pretrain.errors import DataError
from pretrain.text.pieces import Piece
from pretrain.tokens import Manifest, find_text
from pretrain.tokens.prepare import prepare_text
from pretrain.tokens.source import find_sides

BYTE = TokenizerConfig("byte")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts to train on and one to validate on, with two copies of that one."""
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "val.txt", "z.txt"):
        (folder / name).write_text(f"{name} says so. " * 20)
    (folder / "same size.txt").write_text((folder / "val.txt").read_text().upper())
    (folder / "copy.txt").write_text((folder / "val.txt").read_text())
    (folder / "deep" / "also.md").write_text((folder / "val.txt").read_text())
    (folder / "link.txt").symlink_to(folder / "val.txt")
    return folder


@pytest.mark.parametrize("find", [find_sides, find_text])
def test_no_copy_of_validation_text_is_trained_on(folder: Path, find: Callable):
    said: list[str] = []
    found = find(DataConfig(paths=(str(folder),), val_paths=(str(folder / "val.txt"),)), said.append)
    assert [Path(piece.file).name for piece in found.train] == ["a.txt", "b.txt", "same size.txt", "z.txt"]
    assert [piece.file for piece in found.val] == [str(folder / "val.txt")]
    assert said == [
        f"held out  {folder / name} too: it is the same file as {folder / 'val.txt'}"
        for name in ("copy.txt", "deep/also.md", "link.txt")
    ]


def test_no_copy_of_the_last_file_is_trained_on(folder: Path):
    (folder / "zz.txt").write_text((folder / "a.txt").read_text())
    found = find_sides(DataConfig(paths=(str(folder),), split="last_file"))
    assert [Path(piece.file).name for piece in found.val] == ["zz.txt"]
    assert "a.txt" not in [Path(piece.file).name for piece in found.train]


def names(pieces: Iterable[Piece]) -> list[str]:
    return [Path(piece.file).name for piece in pieces]


@pytest.mark.parametrize("find", [find_sides, find_text])
def test_the_test_is_a_file_of_its_own_and_its_copies_are_in_no_side(folder: Path, find: Callable):
    (folder / "link.txt").unlink()
    (folder / "zz.txt").write_text((folder / "z.txt").read_text())
    said: list[str] = []
    found = find(DataConfig(paths=(str(folder),), split="last_file", test_fraction=0.1), said.append)
    assert (names(found.test), names(found.val)) == (["zz.txt"], ["val.txt"])
    assert names(found.train) == ["a.txt", "b.txt", "same size.txt"]
    assert said[0] == f"held out  {folder / 'z.txt'} too: it is the same file as {folder / 'zz.txt'}"
    of_its_own = DataConfig(
        paths=(str(folder),), split="last_file", val_paths=(str(folder / "zz.txt"),), test_fraction=0.1
    )
    found = find(of_its_own)
    assert (names(found.val), names(found.test)) == (["zz.txt"], ["val.txt"])  # z.txt is a copy of what validates
    with pytest.raises(DataError, match="last_file needs three files or more"):
        find(DataConfig(paths=(str(folder / "a.txt"), str(folder / "b.txt")), split="last_file", test_fraction=0.1))


@pytest.mark.parametrize("find", [find_sides, find_text])
def test_to_validate_on_all_of_the_text_is_an_error(folder: Path, find: Callable):
    with pytest.raises(DataError, match=r"all of the text is held out \(.*text\), and none is left to train on; give"):
        find(DataConfig(paths=(str(folder),), val_paths=(str(folder),)))


def test_training_says_what_is_held_out_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["data", "prepare", str(folder), "--val", str(folder / "val.txt"), "--out", str(tmp_path / "o")]) == 1
    assert f"held out  {folder}/copy.txt too: it is the same file as {folder}/val.txt" in capsys.readouterr().out


# Text that cannot be used -------------------------------------------------------------------------------------------


def mostly_broken(folder: Path) -> Path:
    file = folder / "a.jsonl"
    file.write_text(json.dumps({"text": "good words " * 100}) + "\n" + "broken\n" * 30)
    return file


REFUSED = "a.jsonl, line 2: the first of 30 lines that are not a JSON object, of 31 in all; mend the text, or"
SAID = "problem   30 of 31 lines that are not a JSON object; skipped (first: {}, line 2)"


def test_mostly_broken_text_is_refused_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture):
    file, out = mostly_broken(tmp_path), tmp_path / "out"
    command = ["data", "prepare", str(file), "--out", str(out), "--tokenizer", "byte"]
    for more in ([], ["--split", "hash"]):
        assert main([*command, *more]) == 1
        assert REFUSED in capsys.readouterr().err
        assert not out.exists()
    assert main([*command, "--allow-broken"]) == 0
    assert SAID.format(file) in capsys.readouterr().out
    assert main(["data", "inspect", str(out)]) == 0
    assert SAID.format(file) in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert (manifest.problems, manifest.records) == ({"not JSON": 30}, 31)


@pytest.mark.parametrize("how", [[], ["--data.stream", "--data.val_fraction", "0"]])
def test_training_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture, how: list[str]):
    file = mostly_broken(tmp_path)
    settings = {**TINY, "data.paths": file, "tokenizer.kind": "byte", "train.steps": 1, "sample.max_tokens": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = ["train", "--out", str(tmp_path / "run"), *options, *how]
    assert main(command) == 1
    assert REFUSED in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--data.allow_broken"]) == 0
    assert SAID.format(file) in capsys.readouterr().out


def test_a_plan_counts_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = mostly_broken(tmp_path)
    command = ["plan", "--data", str(file), "--tokenizer.kind", "byte", "--no-measure", "--data.allow_broken"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["train_tokens"] + data["val_tokens"] == 1101  # 1,100 bytes and BOS
    assert main(command) == 0
    assert SAID.format(file).replace("problem   ", "problem    ") in capsys.readouterr().out
    assert main(command[:-1]) == 1
    assert REFUSED in capsys.readouterr().err


@pytest.mark.parametrize("column", [pa.array([None] * 3, pa.string()), pa.nulls(3)])
def test_a_column_of_nulls(tmp_path: Path, column: pa.Array):
    pq.write_table(pa.table({"text": column}), tmp_path / "0.parquet")
    data = DataConfig(paths=(str(tmp_path),), val_fraction=0)
    with pytest.raises(DataError, match=r"0\.parquet, row 1: the first of 3 rows whose text is null, of 3 in all"):
        prepare_text(data, BYTE, tmp_path / "out")
    pq.write_table(pa.table({"text": ["a text", "another", "one", "two"]}), tmp_path / "1.parquet")
    made = prepare_text(data, BYTE, tmp_path / "out").manifest
    assert (made.documents("train"), made.problems, made.records) == (4, {"null": 3}, 7)


def test_a_separator_that_never_occurs_is_mentioned(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n<|sep|>\ntwo")
    (tmp_path / "b.txt").write_text("three\n<|endoftext|>\nfour")
    data = DataConfig(paths=(str(tmp_path),), val_fraction=0, separator="<|endoftext|>")
    made = prepare_text(data, BYTE, tmp_path / "out").manifest
    assert (made.documents("train"), made.problems) == (3, {"no separator": 1})
    assert made.first == {"no separator": str(tmp_path / "a.txt")}


def test_an_older_manifest_keeps_its_meaning(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "a.txt").write_text("some text " * 50)
    out = tmp_path / "out"
    prepare_text(DataConfig(paths=(str(tmp_path / "a.txt"),)), BYTE, out)
    fingerprint = Manifest.load(out).fingerprint
    tree = json.loads((out / "manifest.json").read_text())
    del tree["first"], tree["records"]
    tree["problems"] = {"invalid UTF-8": 1, "not JSON": 2}
    (out / "manifest.json").write_text(json.dumps(tree))
    assert Manifest.load(out).fingerprint == fingerprint
    assert main(["data", "inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "problem   1 documents with bytes that are not UTF-8" in printed
    assert "problem   2 lines that are not a JSON object; skipped\n" in printed


def test_a_stream_counts_what_it_reads_later(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A problem that is not in what is read before the first step."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": f"{name} story. " * 400}) + "\n") * 200)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("broken\n")
    settings = {**TINY, "data.paths": tmp_path, "train.steps": 40, "train.batch_tokens": 65536, "sample.max_tokens": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    model = ["--model.layers", "1", "--model.width", "8", "--model.heads", "1", "--eval.every", "0"]
    stream = ["--data.stream", "--data.val_fraction", "0", "--data.order", "sequential", "--out", str(tmp_path / "run")]
    assert main(["train", *options, *model, *stream]) == 0
    printed = capsys.readouterr().out
    assert printed.count("problem ") == 1
    place = tmp_path / "b.jsonl"
    assert f"problem   1 of 401 lines that are not a JSON object; skipped (first: {place}, line 201), so far" in printed


def test_eval_and_tokenizers_refuse_mostly_broken_text_and_say_the_rest(text_file: Path, tmp_path: Path, capsys):
    file = mostly_broken(tmp_path)
    options = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    assert (
        main(["train", "--data", str(text_file), "--out", str(tmp_path / "run"), *options, "--train.steps", "1"]) == 0
    )
    capsys.readouterr()
    made = tmp_path / "t.json"
    for command in (
        ["eval", str(tmp_path / "run"), "--data", str(file)],
        ["tokenizer", "train", str(file), "--out", str(made), "--vocab-size", "257"],
        ["tokenizer", "show", "byte", "--file", str(file)],
    ):
        assert main(command) == 1
        assert REFUSED in capsys.readouterr().err
        assert made.exists() == (command[1] == "show")  # the one before made it when that was allowed
        assert main([*command, "--allow-broken"]) == 0
        assert "".join(capsys.readouterr()).count(SAID.format(file)) == 1
