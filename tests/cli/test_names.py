"""Files and folders whose names are not UTF-8, in the text and above it: such names are old, or of other systems."""

import io
import json
import os
import sys
import tomllib
from pathlib import Path

import pytest
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.runs import Run
from pretrain.tokens import Manifest

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their names are always Unicode")

OPTIONS = [text for name, value in {**TINY, "train.steps": 2}.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of text, given by a relative path; both its name and that of the folder we are in are Latin-1."""
    here = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"M\xe4rz")))
    folder = here / os.fsdecode(b"\xfcber St\xf6rche")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"a\xe9.txt")).write_bytes(b"The storks come back in March.\n" * 300 + b"\xff")
    (folder / os.fsdecode(b"b\xe9.jsonl")).write_text(json.dumps({"text": "One nests here. " * 9}) + "\nbroken\n")
    monkeypatch.chdir(here)
    return folder.name


@pytest.mark.parametrize("stream", [[], ["--data.stream", "--data.split", "last_file"]])
def test_such_names_work_from_training_to_report(text: str, stream: list[str], capsys: pytest.CaptureFixture):
    assert main(["train", "--data", text, "--out", "run", *OPTIONS, *stream]) == 0
    printed = capsys.readouterr()
    assert "failed" not in printed.out + printed.err
    assert Run.open("run").config.data.paths == (os.path.abspath(text),)
    with pytest.raises(UnicodeDecodeError):  # the bytes of the name as they are
        tomllib.loads(Path("run", "config.toml").read_text(encoding="utf-8"))
    longer = ["train", "--out", "run", "--train.steps", "3"]
    for command in (longer, ["eval", "run", "--csv", "x.csv"], ["eval", "run", "--data", text], ["report", "run"]):
        assert main(command) == 0
    assert main(["export", "run", "--out", "exported"]) == 0
    assert capsys.readouterr().out


def test_such_names_work_with_token_shards(text: str, capsys: pytest.CaptureFixture):
    assert main(["plan", "--data", text, "--tokenizer.kind", "byte", "--no-measure"]) == 0
    command = ["data", "prepare", text, "--out", text + " tokens", "--tokenizer", "byte", "--val", f"{text}/b*"]
    assert main(command) == 0
    assert main(command) == 0  # the plan of the folder is the same
    capsys.readouterr()
    for name in ("verify", "inspect"):
        assert main(["data", name, text + " tokens"]) == 0
    assert "(first: \\udcfcber St\\udcf6rche/a\\udce9.txt, line 301)" in capsys.readouterr().out
    first = Manifest.load(Path(text + " tokens")).first
    assert first["not JSON"] == "\\udcfcber St\\udcf6rche/b\\udce9.jsonl, line 2"
    assert main(["train", "--data", text + " tokens", "--out", "run", *OPTIONS]) == 0
    assert main(["report", "run"]) == 0


def test_a_parquet_file_of_such_a_name(text: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["A text of a row. " * 20]}), "x.parquet")
    os.rename("x.parquet", os.fsdecode(b"p\xe9.parquet"))
    assert main(["data", "prepare", os.fsdecode(b"p\xe9.parquet"), "--out", "tokens", "--tokenizer", "byte"]) == 0


def test_an_error_names_the_file(text: str, capsys: pytest.CaptureFixture):
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    Path(text, os.fsdecode(b"c\xe9.txt")).write_bytes(b"\x00" * 100)
    assert main(["data", "prepare", text, "--out", "tokens", "--tokenizer", "byte"]) == 1
    assert "c\\udce9.txt: this file is binary" in capsys.readouterr().err
