"""Sweeps: which runs there are, that each is an ordinary one, and that nothing is lost however a sweep ends."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run

from pretrain import plan
from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.errors import PretrainError
from pretrain.experiments import sweep
from pretrain.fitting import with_steps
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.training import train

OPTIONS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def command(text_file: Path, tmp_path: Path) -> list[str]:
    """A sweep of tiny runs on a text of its own."""
    shutil.copy(text_file, tmp_path / "text.txt")
    return ["sweep", "quickstart", "--data", str(tmp_path / "text.txt"), *OPTIONS, "--out", str(tmp_path / "out")]


class Done:
    """A process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs train in this process, and no speed is measured; gives the folders of those that were started."""
    started = []

    def launch(arguments: Sequence[str], log: Path, **_: str) -> Done:
        log.parent.mkdir(exist_ok=True)
        verb, recipe, option, out = arguments
        assert (verb, option) == ("train", "--out")
        started.append(out)
        try:
            train(load_config(recipe), out)
        except PretrainError as error:
            log.write_text(f"pretrain: {error}\n")
            return Done(error.exit_code)
        return Done(0)

    monkeypatch.setattr(sweep, "launch", launch)
    monkeypatch.setattr(plan, "make_plan", partial(plan.make_plan, measure=False))
    return started


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs here and in processes of their own have the same bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def swept(command: Sequence[str], capsys: pytest.CaptureFixture, code: int = 0) -> dict[str, Any]:
    """What a sweep prints as JSON."""
    capsys.readouterr()
    assert main([*command, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def names(out: Path) -> set[str]:
    return {folder.name for folder in out.iterdir() if Run.exists(folder)}


def test_all_combinations_with_all_seeds_are_ordinary_runs(command: list[str], tmp_path: Path, in_process, capsys):
    grid = ["--over", "optim.lr=0.003,0.01", "--over", "model.layers=1,2", "--seeds", "2", "--train.seed", "5"]
    found = swept([*command, *grid], capsys)
    expected = {
        f"lr={lr},layers={layers},seed={seed}" for lr in ("0.003", "0.01") for layers in (1, 2) for seed in (5, 6)
    }
    assert names(tmp_path / "out") == expected
    assert {Path(run["run"]).name: run["state"] for run in found["runs"]} == dict.fromkeys(expected, "finished")

    # The same bits as a run that is trained by hand, though its tokens were made for another.
    by_hand = ["train", *command[1:-1], str(tmp_path / "by hand"), "--optim.lr", "0.01", "--model.layers", "1"]
    assert main([*by_hand, "--train.seed", "6"]) == 0
    ours = Run.open(tmp_path / "out" / "lr=0.01,layers=1,seed=6")
    assert_same_run(ours, Run.open(tmp_path / "by hand"))
    assert (ours.data / "train-00000-000.bin").stat().st_nlink == 8

    # The table: a line for each setting, the best first.
    losses = {run["run"]: run["val_loss"] for run in found["runs"]}
    for group in found["groups"]:
        layers, lr = (part.split()[-1] for part in group["name"].split(", "))
        runs = [str(tmp_path / "out" / f"lr={lr},layers={layers},seed={seed}") for seed in (5, 6)]
        assert group["runs"] == runs
        assert group["loss"]["mean"] == pytest.approx(sum(losses[run] for run in runs) / 2)
    means = [group["bits_per_byte"]["mean"] for group in found["groups"]]
    assert len(means) == 4
    assert means == sorted(means)


def test_a_sweep_is_extended_and_finished_runs_are_left(command: list[str], tmp_path: Path, in_process, capsys):
    swept([*command, "--over", "optim.lr=0.003"], capsys)
    summary = tmp_path / "out" / "lr=0.003,seed=1337" / "summary.json"
    before = summary.stat().st_mtime_ns
    found = swept([*command, "--over", "optim.lr=3e-3,0.01", "--seeds", "2", "--log.every", "3"], capsys)
    assert names(tmp_path / "out") == {f"lr={lr},seed={seed}" for lr in ("0.003", "0.01") for seed in (1337, 1338)}
    assert len(found["runs"]) == len(in_process) == 4
    assert summary.stat().st_mtime_ns == before
    assert main([*command, "--over", "optim.lr=0.01"]) == 0  # all is there
    printed = capsys.readouterr().out
    assert len(in_process) == 4
    assert "optim.lr 0.003      2  " in printed
    assert "(paired t of 2 seeds)" in printed


def test_what_fits_is_chosen_once_for_all_runs(command: list[str], tmp_path: Path, in_process, monkeypatch, capsys):
    """Also for those that are added when the machine is faster."""
    make_plan = plan.make_plan

    def few_steps(config: Config) -> plan.Plan:
        made = make_plan(config)
        return replace(made, config=with_steps(made.config, made.config.train.steps if config.train.steps else 5))

    monkeypatch.setattr(plan, "make_plan", few_steps)
    text, out = command[3], tmp_path / "out"
    fit = ["sweep", "--data", text, "--out", str(out), "--train.minutes", "0.16", "--train.batch_tokens", "2048"]
    small = ["--model.layers", "1", "--model.heads", "1", "--model.width", "32"]
    swept([*fit, *small, "--over", "optim.lr=0.003,0.006"], capsys)
    asked = json.loads((out / "sweep.json").read_text())
    assert asked["given"]["train"]["steps"] == 0
    asked["base"]["train"]["steps"] = 3
    (out / "sweep.json").write_text(json.dumps(asked))
    swept([*fit, *small, "--over", "optim.lr=0.006", "--seeds", "2"], capsys)
    configs = [Run.open(out / name).config for name in sorted(names(out))]
    assert [config.optim.lr for config in configs] == [0.003, 0.006, 0.006]
    assert all(config.fit.fields == () and config.model.layers == 1 for config in configs)
    assert len({(config.tokenizer, config.model) for config in configs}) == 1
    assert configs[0].train.steps == configs[1].train.steps == 5
    assert configs[2].train.steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--over model.heads=2,3", "--over model.heads=3: model.heads 3 does not divide model.width 32"),
        ("--over optim.rate=1", "--over optim.rate=1: unknown field 'optim.rate'"),
        ("--over lr=1", "unknown field 'lr': fields are written SECTION.NAME"),
        ("--over model.layers.x=1", "--over model.layers.x=1: unknown field 'model.layers.x'"),
        ("--over model.layers=2,x", "--over model.layers=x: model.layers must be int, not 'x'"),
        ("--over optim.kind=muon,moun", "optim.kind must be one of adamw, muon"),
        ("--over optim.lr=0.01..0.1", "optim.lr is a range: draw from it with --random N or --search N"),
        ("--over optim.lr=0.1..0.01 --random 2", "a range goes from a lower to a higher number"),
        ("--over optim.lr", "--over is FIELD=VALUE,VALUE,... or FIELD=LOW..HIGH, not 'optim.lr'"),
        ("--over train.seed=1,2", "give --seeds N instead"),
        ("--over optim.lr=1 --over optim.lr=2", "--over names a field twice"),
        ("--random 1 --search 1", "--random and --search both choose"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything(
    command: list[str], tmp_path: Path, in_process, capsys, options, message
):
    assert main([*command, *options.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_sweep_and_other_folders_are_refused(command: list[str], tmp_path: Path, in_process, capsys):
    swept([*command, "--over", "optim.lr=0.003"], capsys)
    for options, message in {
        "--over optim.lr=0.01 --train.steps 13": "train.steps 12 → 13",
        "--over optim.lr=0.01 --eval.tokens 0": "eval.tokens 256 → 0",
        "--over model.layers=1": "over optim.lr → model.layers",
    }.items():
        assert main([*command, *options.split()]) == 2
        assert f"was begun otherwise ({message}); choose another --out" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path), "--over", "optim.lr=1"]) == 2
    assert "has files but is not a sweep" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "More.\n")
    assert main([*command, "--over", "optim.lr=0.01"]) == 1
    assert "text.txt has 18,989 bytes and had 18,983" in capsys.readouterr().err
    assert len(in_process) == 1


def test_a_run_that_fails_is_named_and_the_others_go_on(command: list[str], tmp_path: Path, in_process, capsys):
    over = ["--over", "optim.lr=1e30,0.003", "--optim.kind", "adamw", "--guard.max_skips", "2"]
    found = swept([*command, *over], capsys, code=1)
    assert {Path(run["run"]).name: run["state"] for run in found["runs"]} == {
        "lr=1e+30,seed=1337": "failed",
        "lr=0.003,seed=1337": "finished",
    }
    assert main([*command, *over]) == 1  # it is tried again
    assert len(in_process) == 3
    folder = tmp_path / "out" / "lr=1e+30,seed=1337"
    again = f"pretrain train {tmp_path / 'out' / 'recipes' / folder.name}.toml --out {folder}"
    error = capsys.readouterr().err
    assert "1 of 2 runs failed, first lr=1e+30,seed=1337 (" in error
    assert again in error
    assert error.count("\n") == 1


RANGES = ["--over", "optim.lr=0.001..0.1", "--over", "model.layers=1..3", "--over", "model.mlp=gelu,swiglu"]


@pytest.mark.parametrize("how", ["--random", "--search"])
def test_combinations_that_are_drawn(command: list[str], tmp_path: Path, in_process, monkeypatch, capsys, how: str):
    pytest.importorskip("optuna")
    few = [*command, *RANGES, "--train.steps", "2", "--schedule.warmup_steps", "1"]
    found = swept([*few, how, "5"], capsys)
    for run in found["runs"]:
        assert 0.001 <= run["values"]["optim.lr"] <= 0.1
        assert run["values"]["model.layers"] in (1, 2, 3)
        assert run["values"]["model.mlp"] in ("gelu", "swiglu")
    assert len({tuple(run["values"].values()) for run in found["runs"]}) == len(found["runs"]) == 5

    # Another is stopped, goes on and is extended: it draws the same.
    launch = sweep.launch

    def stopped(*arguments: Any, **options: Any) -> Any:
        if len(in_process) == 7:
            raise KeyboardInterrupt
        return launch(*arguments, **options)

    other = [*few[: few.index("--out") + 1], str(tmp_path / "other"), *few[few.index("--out") + 2 :]]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "launch", stopped)
        assert main([*other, how, "3"]) == 130
    assert "stopped: 2 of 3 runs are finished; resume with: pretrain sweep quickstart" in capsys.readouterr().err
    assert main([*other, how, "5"]) == 0
    assert names(tmp_path / "other") == names(tmp_path / "out")
    assert len(in_process) == 10


def test_the_search_learns(tmp_path: Path, monkeypatch):
    """On a loss that is known, it comes closer than chance does."""
    pytest.importorskip("optuna")
    axes, sums = {"optim.lr": (0.0001, 1.0), "model.layers": (1, 30)}, {False: 0.0, True: 0.0}
    for learn, seed in itertools.product(sums, range(3)):
        asked = sweep.Sweep.open(tmp_path / "out", load_config("quickstart"), list(axes))

        def summary(name: str, asked=asked) -> dict[str, float]:
            values = asked.runs[name][0]
            return {"val_bpb": abs(values["model.layers"] - 20) / 30 + abs(values["optim.lr"] - 0.02)}

        monkeypatch.setattr(asked, "summary", summary)
        found = list(sweep.draw(asked, axes, [seed], 40, learn))
        assert len(set(found)) == 40
        sums[learn] += sum(summary(name)["val_bpb"] for name in found[20:])
    assert sums[True] < 0.75 * sums[False]


# Real processes ------------------------------------------------------------------------------------------------------


def start(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def until(condition: Any, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition(), process.communicate()


def trained(out: Path) -> int:
    """Steps of all runs together."""
    return sum(len(read_jsonl(file)) for file in out.glob("*/metrics.jsonl"))


def processes(out: Path) -> list[int]:
    """Those that train in the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"pretrain.cli.sweep" in file.read_bytes() and str(out).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to find the processes")
@pytest.mark.usefixtures("one_thread", "in_process")
def test_a_sweep_killed_twice_ends_as_one_that_was_not(command: list[str], tmp_path: Path):
    options = ["--over", "optim.lr=0.003,0.01", "--seeds", "2", "--train.steps", "200", "--eval.every", "100"]
    out = tmp_path / "out"
    process = start([*command, *options, "--jobs", "2"])
    until(lambda: trained(out) > 60, process)
    for pid in (process.pid, *processes(out)):  # all at once
        os.kill(pid, signal.SIGKILL)
    process.wait()
    until_gone(out)

    process = start([*command, *options, "--jobs", "2"])  # the sweep alone: its runs save and stop by themselves
    until(lambda: trained(out) > 300, process)
    process.kill()
    process.wait()
    left = processes(out)
    assert left
    process = start([*command, *options, "--jobs", "2"])
    time.sleep(1)
    process.send_signal(signal.SIGTERM)  # in the middle of the plan, or of what follows
    assert process.wait(60) == 130, process.communicate()
    until_gone(out)

    assert main([*command, *options]) == 0
    undisturbed = [*command[:-1], str(tmp_path / "undisturbed")]
    assert main([*undisturbed, *options]) == 0
    for name in names(tmp_path / "undisturbed"):
        assert_same_run(Run.open(out / name), Run.open(tmp_path / "undisturbed" / name))


def until_gone(out: Path) -> None:
    deadline = time.monotonic() + 60
    while processes(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(out)


@pytest.mark.slow
def test_runs_as_tasks_of_ray(command: list[str], tmp_path: Path):
    """They are stopped in order by a signal, and resumed."""
    pytest.importorskip("ray")
    out, options = tmp_path / "out", ["--over", "optim.lr=0.003,0.01", "--jobs", "2", "--engine", "ray"]
    process = start([*command, *options, "--train.steps", "2000", "--checkpoint.every", "0"])
    until(lambda: trained(out) > 100, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "stopped: 0 of 2 runs are finished" in error
    for name in names(out):
        run = Run.open(out / name)
        ahead = run.newest_checkpoint().step - read_jsonl(run.metrics)[-1]["step"]
        assert ahead in (0, 1)  # a step cut short before its measurements is logged on resume
    process = start([*command, *options, "--train.steps", "2000", "--checkpoint.every", "0"])
    assert process.wait(500) == 0, process.communicate()
    assert trained(out) == 4000


@pytest.mark.slow
def test_a_signal_stops_the_runs_in_order(command: list[str], tmp_path: Path):
    out = tmp_path / "out"
    options = ["--over", "optim.lr=0.003,0.01", "--train.steps", "100000", "--jobs", "2", "--checkpoint.every", "0"]
    process = start([*command, *options])
    until(lambda: len(list(out.glob("*/metrics.jsonl"))) == 2 and trained(out) > 20, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: 0 of 2 runs are finished; resume with: pretrain sweep quickstart" in error
    for name in names(out):
        run = Run.open(out / name)
        ahead = run.newest_checkpoint().step - read_jsonl(run.metrics)[-1]["step"]
        assert ahead in (0, 1)  # a step cut short before its measurements is logged on resume
