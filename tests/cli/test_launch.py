"""``pretrain train --nproc``: real processes, and how the command ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.cli.test_cli import options

from pretrain.cli import main
from pretrain.cli.launch import count_processes
from pretrain.errors import UsageError
from pretrain.io import read_jsonl

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_ADDR2LINE": "1"}


def start(*args: str, program: tuple[str, ...] = ("-m", "pretrain")) -> subprocess.Popen:
    command = [sys.executable, *program, "train", *args]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(errors: str) -> list[str]:
    """The lines of ours on standard error."""
    assert "Traceback" not in errors, errors
    return [line for line in errors.splitlines() if line.startswith("pretrain: ")]


def wait_for_steps(out: Path, process: subprocess.Popen, steps: int = 3) -> None:
    deadline = time.monotonic() + 120
    while len(read_jsonl(out / "metrics.jsonl")) < steps and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)


def long_run(text: Path, out: Path) -> subprocess.Popen:
    settings = options(train__steps=50000, eval__every=0, checkpoint__every=0)
    process = start("--data", str(text), "--out", str(out), *settings, "--nproc", "2")
    wait_for_steps(out, process)
    return process


@pytest.mark.slow
def test_processes_train_and_one_speaks(text_file: Path, tmp_path: Path):
    process = start("--data", str(text_file), "--out", str(tmp_path / "run"), *options(), "--nproc", "2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert output.count("processes 2 (ddp), 4 rows of the batch each") == 1
    assert output.count("Next, let it write") == 1
    assert said(errors) == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: Path):
    missing = tmp_path / "missing.txt"
    process = start("--data", str(missing), "--out", str(tmp_path / "run"), "--nproc", "2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (output, said(errors)) == ("", [f"pretrain: {missing}: no such file or folder"])
    assert errors.count("\n") == 1, errors


@pytest.mark.slow
def test_a_wrong_option_under_torchrun_is_said_once(tmp_path: Path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain")
    process = start("--out", str(tmp_path / "run"), "--model.layrs", "3", program=torchrun)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0, errors
    assert errors.count("no option --model.layrs; did you mean '--model.layers'?") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_stopped_it_saves_and_says_how_to_go_on(text_file: Path, tmp_path: Path, name: str):
    out = tmp_path / "run"
    process = long_run(text_file, out)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    done = len(read_jsonl(out / "metrics.jsonl"))
    assert process.returncode == 130, errors
    command = f"pretrain train --out {out} --nproc 2"
    assert said(errors) == [f"pretrain: stopped after step {done} of 50000, all saved; resume with: {command}"]
    assert (out / "checkpoints" / f"step-{done:08d}" / "COMMIT").exists()


@pytest.mark.slow
def test_a_killed_process_is_named(text_file: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = long_run(text_file, out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{pid}/environ").read_bytes().split(b"\0LOCAL_RANK=")[1][:1]: int(pid) for pid in children}
    os.kill(ranks[b"1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"pretrain: process {ranks[b'1']} (local rank 1) was killed by SIGKILL, often the system's" in errors
    assert errors.endswith(f"resume with: pretrain train --out {out} --nproc 2\n")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """A machine of four GPUs, as far as counting goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("gpus")
def test_counting_on_gpus():
    assert [count_processes(n, "auto") for n in ("gpu", "auto", "3")] == [4, 4, 3]
    assert count_processes("6", "cpu") == 6
    with pytest.raises(UsageError, match="--nproc 5, but there are 4 GPUs here"):
        count_processes("5", "auto")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("nproc", "launched"), [("", 0), ("1", 0), ("gpu", 4)])
def test_unused_gpus_are_told(nproc: str, launched: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    import pretrain.cli.train
    import pretrain.report
    import pretrain.training

    started = []
    monkeypatch.setattr(
        pretrain.cli.train, "launch", lambda arguments, count, grace, command: started.append(count) or 0
    )
    monkeypatch.setattr(pretrain.training, "train", lambda *_, **_named: None)
    monkeypatch.setattr(pretrain.report, "plot_run", lambda _run: None)
    monkeypatch.setattr(pretrain.report, "explain", lambda *_: "")
    assert main(["train", "--out", str(tmp_path / "run"), *(["--nproc", nproc] if nproc else [])]) == 0
    assert started == ([launched] if launched else [])
    assert ("1 of 4 will train; all of them with: --nproc gpu" in capsys.readouterr().out) == (nproc == "")


def test_counting_without_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [count_processes(n, "cpu") for n in ("auto", "3")] == [1, 3]
    with pytest.raises(UsageError, match="--nproc gpu, but torch sees no CUDA GPU"):
        count_processes("gpu", "auto")


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_processes(nproc: str, capsys):
    assert main(["train", f"--nproc={nproc}"]) == 2
    assert f"--nproc must be a number of processes, gpu or auto, not '{nproc}'" in capsys.readouterr().err
