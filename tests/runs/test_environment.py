import json
import sys
from pathlib import Path

import pytest
import torch

from pretrain.runs import environment as module
from pretrain.runs.environment import ENVIRONMENT, environment, read_environment, write_environment


def test_each_start_is_noted_and_the_first_stays(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/pretrain", "train", "laptop"])
    monkeypatch.setattr(module, "STARTS", 3)
    assert read_environment(tmp_path) == []
    for step in range(5):
        write_environment(tmp_path, torch.device("cpu"), step=step, precision="fp32")
    starts = read_environment(tmp_path)
    assert [start["step"] for start in starts] == [0, 3, 4]
    first = starts[0]
    assert first["command"] == ["pretrain", "train", "laptop"]
    assert first["packages"]["torch"] == torch.__version__
    assert (first["device"], first["precision"], first["threads"]) == ("cpu", "fp32", torch.get_num_threads())
    assert first["memory_bytes"] > 2**20
    assert [file.name for file in tmp_path.iterdir()] == [ENVIRONMENT]


@pytest.mark.parametrize("text", ["", "{}", '"x"', "[1, 2]", "\x00\xff"])
def test_what_is_damaged_counts_as_nothing(tmp_path: Path, text: str):
    (tmp_path / ENVIRONMENT).write_bytes(text.encode("latin-1"))
    assert read_environment(tmp_path) == []
    write_environment(tmp_path, torch.device("cpu"))
    assert len(read_environment(tmp_path)) == 1


def test_a_disk_that_cannot_be_written_stops_nothing(tmp_path: Path):
    write_environment(tmp_path / "absent", torch.device("cpu"))


def test_no_git_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment(torch.device("cpu"))["commit"] == ""
    json.dumps(environment(torch.device("cpu")))
