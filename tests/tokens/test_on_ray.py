"""``--engine ray``: a real Ray of two workers on this machine, one of which is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.errors import UsageError
from pretrain.tokens.on_ray import _perform

pytest.importorskip("ray")
if not Path("/proc/self/task").is_dir():
    pytest.skip("needs /proc to find Ray's workers", allow_module_level=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So much that each of its jobs takes a while."""
    file = tmp_path_factory.mktemp("ray") / "text.jsonl"
    lines = [json.dumps({"text": f"document {n} " * (n % 50)}) for n in range(60_000)]
    for part in range(3):
        file.with_name(f"{part}.jsonl").write_text("\n".join(lines[part::3]) + "\n")
    return file.parent


def descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        found += children + [grandchild for child in children for grandchild in descendants(child)]
    return found


def working(pid: int) -> list[int]:
    """Ray's processes below this one that are at one of our tasks."""
    found = []
    for each in descendants(pid):
        try:
            if Path(f"/proc/{each}/cmdline").read_bytes().startswith(b"ray::_perform"):
                found.append(each)
        except OSError:
            pass
    return found


def test_the_same_bytes_though_a_worker_is_killed(text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(text.parent)  # paths may be relative
    options = "--vocab-size 300 --shard-tokens 400000 --split hash --val-fraction 0.1 --workers 2"
    options = [text.name, *options.split()]
    assert main(["data", "prepare", *options, "--out", str(tmp_path / "local")]) == 0
    command = [sys.executable, "-m", "pretrain", "data", "prepare", *options, "--out", str(tmp_path / "ray")]
    process = subprocess.Popen([*command, "--engine", "ray"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = 0
    while process.poll() is None and not killed:
        if any((tmp_path / "ray").glob("*.bin")) and (busy := working(process.pid)):
            os.kill(busy[0], signal.SIGKILL)
            killed += 1
        time.sleep(0.002)
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert killed, printed
    local, ray = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "plan.json"}
        for name in ("local", "ray")
    )
    assert ray == local
    assert len(local) > 6


def test_a_folder_that_is_not_shared_is_said(tmp_path: Path):
    error, *_ = _perform(print, (1,), str(tmp_path), str(tmp_path / "absent"))
    assert type(error) is UsageError
    assert "--out must be on shared storage" in str(error)
