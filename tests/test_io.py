import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.io import append_jsonl, duration, keep_steps, read_jsonl, without_secrets, write_atomically


def test_steps_are_dropped_and_a_torn_line_with_them(tmp_path: Path):
    file = tmp_path / "m.jsonl"
    append_jsonl(file, *({"step": step} for step in range(1, 8)))
    with file.open("a") as out:
        out.write('{"step": 8, "tr')
    keep_steps(file, 5)
    append_jsonl(file, {"step": 6})
    assert [r["step"] for r in read_jsonl(file)] == [1, 2, 3, 4, 5, 6]
    keep_steps(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_not_finite_is_null(tmp_path: Path):
    append_jsonl(tmp_path / "m.jsonl", {"step": 1, "train/loss": math.nan, "x": math.inf})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "train/loss": None, "x": None}]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"


def test_durations():
    seconds = (3.14, 42, 90, 130, 5400, 9000, 200_000)
    assert duration(9.7) == "10 s"
    assert [duration(each) for each in seconds] == ["3 s", "42 s", "90 s", "2.2 min", "90.0 min", "2.5 h", "2.3 days"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("--data.paths 'https://u:pw@h/x?sig=1'", "--data.paths 'https://h/x'"),
        ("--data.paths=https://u:pw@h/x?sig=1", "--data.paths=https://h/x"),
        ("cannot read (https://u:pw@h/x): gone", "cannot read (https://h/x): gone"),
        ("skipped 'https://u:pw@h/x', broken", "skipped 'https://h/x', broken"),
        ("https://u:pw@h/x,https://u:pw@h/y", "https://h/x,https://h/y"),
        ("s3://u:p(w,@h/x, http://h/b@c", "s3://h/x, http://h/b@c"),
        ("https://h?sig=a@b", "https://h"),
        ("https://h/a,b(1).txt?sig=1", "https://h/a,b(1).txt"),
        ("cannot read https://h/o'b.txt?sig=AB,CD: gone", "cannot read https://h/o'b.txt: gone"),
        ("no URL: a@b", "no URL: a@b"),
    ],
)
def test_no_secret_of_a_url_stays_wherever_it_stands(text: str, clean: str):
    assert without_secrets({"a": [text]}) == {"a": [clean]}


def test_every_character_of_a_line_comes_back(tmp_path: Path):
    records = [{"step": 1, "text": "a\u2028b\u2029c\x85d\x0ce"}, {"step": 2}]
    append_jsonl(tmp_path / "m.jsonl", *records)
    assert read_jsonl(tmp_path / "m.jsonl") == records


@pytest.mark.skipif(sys.platform == "win32", reason="Unix has such limits")
def test_the_limit_of_open_files_is_raised_as_far_as_needed_and_possible():
    script = """
import resource
from pretrain.io import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1000))
for processes in (8, 8, 500):
    print(*allow_open_files(processes), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["288 200 288 288 1000", "288 288 288 288 1000", "2256 288 1000 1000 1000"]
