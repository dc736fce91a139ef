import errno
import io
from pathlib import Path

import pytest

from pretrain.config import Config
from pretrain.io import append_jsonl, read_jsonl
from pretrain.runs import Run
from pretrain.training.callbacks import RunFiles


def test_a_resume_drops_later_steps(tiny: Config, tmp_path: Path):
    run = Run(tmp_path, tiny)
    append_jsonl(run.metrics, *({"step": step} for step in range(1, 8)))
    files = RunFiles(run, 5, pytest.fail)
    files.on_step({"step": 6})
    assert [r["step"] for r in read_jsonl(run.metrics)] == [1, 2, 3, 4, 5, 6]
    files.on_rollback(3)
    assert [r["step"] for r in read_jsonl(run.metrics)] == [1, 2, 3]


def test_what_cannot_be_written_waits_and_leaves_no_half_line(tiny: Config, tmp_path: Path, monkeypatch):
    run, said = Run(tmp_path, tiny), []
    files = RunFiles(run, 0, said.append)
    files.on_step({"step": 1})

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:5])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode))
        for step in (2, 3):
            files.on_step({"step": step})
        with pytest.raises(OSError, match="No space"):
            files.on_save(3)
    assert said == [f"the log of step {step} is not written yet (No space left on device)" for step in (2, 3)]
    assert run.metrics.read_text() == '{"step": 1}\n'
    files.on_save(3)
    assert [r["step"] for r in read_jsonl(run.metrics)] == [1, 2, 3]
