import errno
import io
import math
from pathlib import Path

import pytest
import torch

from pretrain.io import append_jsonl, keep_steps, read_jsonl
from pretrain.runs.metrics import Metrics


def test_numbers_arrive_some_steps_at_a_time(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0, every=3)
    for step in range(1, 6):
        metrics.add({"step": step, "train/loss": torch.tensor(float(step)), "time": 0.5})
        if metrics.due:
            assert [r["step"] for r in metrics.write()] == [1, 2, 3]
    assert [r["step"] for r in read_jsonl(tmp_path / "m.jsonl")] == [1, 2, 3]
    metrics.write()
    assert [r["train/loss"] for r in read_jsonl(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5]
    assert metrics.last == {"step": 5, "train/loss": 5.0, "time": 0.5}


def test_a_resume_drops_later_steps_and_a_torn_line(tmp_path):
    file = tmp_path / "m.jsonl"
    append_jsonl(file, *({"step": step} for step in range(1, 8)))
    with file.open("a") as out:
        out.write('{"step": 8, "tr')
    metrics = Metrics(file, 5, every=1)
    metrics.add({"step": 6})
    metrics.write()
    assert [r["step"] for r in read_jsonl(file)] == [1, 2, 3, 4, 5, 6]
    keep_steps(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0, every=1)
    metrics.add({"step": 1, "train/loss": torch.tensor(math.nan), "x": math.inf})
    metrics.write()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "train/loss": None, "x": None}]


def test_what_cannot_be_written_waits_and_leaves_no_half_line(tmp_path, monkeypatch):
    file = tmp_path / "m.jsonl"
    metrics = Metrics(file, 0, every=1)
    metrics.add({"step": 1})
    metrics.write()

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:5])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode))
        for step in (2, 3):
            metrics.add({"step": step})
            with pytest.raises(OSError, match="No space"):
                metrics.write()
    assert file.read_text() == '{"step": 1}\n'
    metrics.write()
    assert [r["step"] for r in read_jsonl(file)] == [1, 2, 3]
