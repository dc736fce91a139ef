"""Nothing is ever lost: signals, disks, NaNs, hangs and second processes, against runs that nothing happened to."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from tests.evaluation.test_core import write_bundle
from tests.training.test_loop import assert_same_run, change, learned, weights

import pretrain.runs.checkpoint as checkpoint_module
from pretrain.config import Config, GuardConfig, ParallelConfig
from pretrain.errors import CheckpointError, DataError, Interrupted, TrainingError, UsageError
from pretrain.evaluation import GPTScorer
from pretrain.io import read_jsonl
from pretrain.model import GPT
from pretrain.optim import Optimizer
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.tokens import TrainingBatches
from pretrain.training import Callback, Console, callbacks, evaluator, state, train
from pretrain.training.guard import Guard, LossScale
from pretrain.training.heartbeat import Heartbeat
from pretrain.training.state import TrainState
from pretrain.training.step import train_step
from pretrain.training.world import World

FULL = OSError(errno.ENOSPC, "No space left on device")


def heard() -> tuple[Console, list[str]]:
    """A console, and what it says."""
    said: list[str] = []
    console = Console(quiet=True)
    console.say = said.append  # type: ignore[method-assign]
    return console, said


# ---------------------------------------------------------------- signals

PHASES = {
    "step": (GPT, "forward", 30),
    "update": (Optimizer, "set_step", 7),
    "validation": (evaluator, "evaluate_loss", 2),
    "sampling": (evaluator, "sample_text", 2),
    "CORE": (GPTScorer, "score", 3),
    "saving": (checkpoint_module, "save_checkpoint", 1),
    "waiting for data": (TrainingBatches, "batch", 7),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_any_phase_loses_nothing(
    tiny: Config, tmp_path: Path, monkeypatch, request, phase: str, number: int
):
    handler = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    request.addfinalizer(lambda: signal.signal(number, handler))
    config = change(tiny, train__micro_batch=2, model__dropout=0.1)
    if phase == "CORE":
        bundle = str(write_bundle(tmp_path / "bundle"))
        config = change(config, eval__core_every=5, eval__core_bundle=bundle, eval__core_max_per_task=3)
    if phase == "sampling":
        config = change(config, sample__prompts=("Ada", "the fox"), sample__every=3)
    undisturbed = train(config, tmp_path / "undisturbed")
    place, name, call = PHASES[phase]
    original, calls = getattr(place, name), []

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, with_signal)
        with pytest.raises(Interrupted, match=r"stopped after step \d+ of 12, all saved"):
            train(config, tmp_path / "run")
    assert signal.getsignal(number) == signal.SIG_DFL
    torch.manual_seed(5)
    assert_same_run(train(config, tmp_path / "run"), undisturbed)


def test_a_signal_while_a_step_is_saved_does_not_save_it_again(tiny: Config, tmp_path: Path, monkeypatch):
    """Replacing the checkpoint that was just committed would leave none for a moment."""
    save, steps = checkpoint_module.save_checkpoint, []

    def slowly(folder: Path, step: int, *rest):
        steps.append(step)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", slowly)
    with pytest.raises(Interrupted, match=r"stopped after step \d+ of 12, all saved"):
        train(tiny, tmp_path / "run")
    assert len(steps) == 1


def test_a_run_goes_on_on_another_type_of_device(tiny: Config, tmp_path: Path, monkeypatch):
    """Whose random state its checkpoint does not have."""
    train(change(tiny, train__steps=4), tmp_path / "run")
    states = state.random_state
    monkeypatch.setattr(
        state, "random_state", lambda rank, device: states(rank, device) | {f"random.cuda.{rank}": torch.zeros(16)}
    )
    assert train(tiny, tmp_path / "run").summary is not None


def run_command(config: Config, out: Path, prelude: str = "") -> subprocess.Popen:
    """A real process that trains, after some lines of Python."""
    script = out.parent / f"{out.name}.py"
    lines = [
        "import time",
        "from pretrain.training import evaluator, train",
        "from pretrain.config import *",
        "from pretrain.errors import Interrupted",
        prelude,
        "try:",
        f"    train({config!r}, {str(out)!r})",
        "except Interrupted:",
        "    raise SystemExit(130)",
    ]
    script.write_text("\n".join(lines))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.exists(), process.communicate()


STUCK = "from pathlib import Path\nevaluator.evaluate_loss = lambda *_: (Path({!r}).touch(), time.sleep(100))"


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(tiny: Config, tmp_path: Path):
    process = run_command(tiny, tmp_path / "run", STUCK.format(str(tmp_path / "stuck")))
    wait_for(tmp_path / "stuck", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # it still means to save
    process.send_signal(signal.SIGTERM)  # of the same request, as torchrun passes one on
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")] == [4]


@pytest.mark.slow
def test_after_the_grace_period_it_leaves_with_what_it_has(tiny: Config, tmp_path: Path):
    config = change(tiny, guard__grace_seconds=0.5)
    process = run_command(config, tmp_path / "run", STUCK.format(str(tmp_path / "stuck")))
    wait_for(tmp_path / "stuck", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    # A machine that is busy may have taken longer than half of that for the save before.
    assert re.search(r"not saved within (0\.[5-9]|[1-9]\S*) s of the signal; the last checkpoint is safe", errors)
    assert_same_run(train(config, tmp_path / "run"), train(config, tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_checkpoint_that_takes_longer_than_the_grace_period_is_saved(tiny: Config, tmp_path: Path):
    """The grace period is at least twice what the last save took."""
    config = change(tiny, guard__grace_seconds=0.5, train__steps=2000)
    slow = (
        "import pretrain.runs.checkpoint as c\nw = c._write_tensors\n"
        "c._write_tensors = lambda *a: (w(*a), time.sleep(2.0))[0]"
    )
    process = run_command(config, tmp_path / "run", slow)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000004" / "COMMIT", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "not saved within" not in errors
    done = len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")][-1] == done > 4


# ---------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_kill_nine_at_random_moments(tiny: Config, tmp_path: Path):
    """The short form of benchmarks/chaos.py: real processes, saves slowed down so that some die in them."""
    config = change(tiny, train__steps=150, checkpoint__every=3, eval__every=7, train__micro_batch=4)
    undisturbed = train(config, tmp_path / "undisturbed")
    draw = random.Random(4)
    slow = (
        "import pretrain.runs.checkpoint as c\nw = c._write_tensors\n"
        "c._write_tensors = lambda *a: (w(*a), time.sleep(0.05))[0]"
    )
    for _ in range(6):
        process = run_command(config, tmp_path / "run", slow)
        wait_for(tmp_path / "run" / "heartbeat.json", process)
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        process.communicate()
        (tmp_path / "run" / "heartbeat.json").unlink(missing_ok=True)
    assert_same_run(train(config, tmp_path / "run"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_stream_goes_on_exactly(tiny: Config, tmp_path: Path, packing: str):
    """Killed and interrupted, a run on a live stream ends with the same bits."""
    lines = Path(tiny.data.paths[0]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "text").mkdir()
    for number in range(3):
        rows = [json.dumps({"text": line * (1 + row % 9)}) for row, line in enumerate(lines[number::3])]
        (tmp_path / "text" / f"{number}.jsonl").write_text("\n".join(rows))
    config = change(
        tiny, data__paths=(str(tmp_path / "text"),), data__stream=True, data__split="hash", data__packing=packing,
        train__steps=150, checkpoint__every=20,
    )  # fmt: skip
    undisturbed = train(config, tmp_path / "undisturbed")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = run_command(config, tmp_path / "run")
        wait_for(tmp_path / "run" / "heartbeat.json", process)
        time.sleep(0.5)
        process.send_signal(number)
        process.communicate(timeout=60)
        (tmp_path / "run" / "heartbeat.json").unlink(missing_ok=True)
    assert_same_run(train(config, tmp_path / "run"), undisturbed)
    (tmp_path / "text" / "0.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(DataError, match=r"0\.jsonl has [\d,]+ bytes and had [\d,]+ since .* was made; restore it"):
        train(config, tmp_path / "run")


# ---------------------------------------------------------------- resume


def test_a_finished_run_can_be_made_longer(tiny: Config, tmp_path: Path):
    config = change(tiny, schedule__kind="constant")
    train(config, tmp_path / "run")
    console, said = heard()
    longer = change(config, train__steps=20)
    run = train(longer, tmp_path / "run", console)
    assert any("20 steps instead of 12" in line for line in said)
    assert [r["step"] for r in read_jsonl(run.metrics)] == list(range(1, 21))
    assert run.summary is not None
    assert run.summary["steps"] == 20
    a, b = weights(run.newest_checkpoint()), weights(train(longer, tmp_path / "at once").newest_checkpoint())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_unfinished_run_can_be_made_longer(tiny: Config, tmp_path: Path):
    config = change(tiny, schedule__kind="constant")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", callbacks=[StopAt(6)])
    longer = change(config, train__steps=20)
    run = train(longer, tmp_path / "run")
    assert [r["step"] for r in read_jsonl(run.metrics)] == list(range(1, 21))
    a, b = weights(run.newest_checkpoint()), weights(train(longer, tmp_path / "at once").newest_checkpoint())
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UsageError, match=r"train\.steps 20 → 12"):
        train(config, tmp_path / "run")


class StopAt(Callback):
    """Ends a run after a step, as a fault would."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, record):
        _ = 1 / (self.step - record["step"])


def test_going_back_to_an_earlier_checkpoint(tiny: Config, tmp_path: Path):
    config = change(tiny, checkpoint__keep_last=0)
    undisturbed = train(config, tmp_path / "undisturbed")
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 4, 8, 12"):
        train(config, tmp_path / "run", resume_from=5)
    (tmp_path / "run" / "summary.json").unlink()
    run = train(config, tmp_path / "run", resume_from=4)
    assert_same_run(run, undisturbed)
    aside = run.folder / "set-aside"
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000008", "step-00000012"]
    assert [r["step"] for r in read_jsonl(aside / "metrics.jsonl")] == list(range(5, 13))
    train(config, tmp_path / "run", resume_from=4)  # the same command again: nothing is thrown away once more
    assert run.summary is not None
    assert [c.step for c in checkpoints(run.checkpoints)] == [4, 8, 12]


# ---------------------------------------------------------------- a step is all or nothing


def nan_in(calls: set[int], monkeypatch) -> None:
    """Make the loss of these micro-batches (counted from 1) NaN, gradients and all."""
    forward, count = GPT.forward, [0]

    def forward_with_nan(model, tokens, *args, **kwargs):
        result = forward(model, tokens, *args, **kwargs)
        if model.training and torch.is_grad_enabled():
            count[0] += 1
            if count[0] in calls:
                return result * torch.nan
        return result

    monkeypatch.setattr(GPT, "forward", forward_with_nan)


def test_a_nan_in_one_micro_batch_skips_the_whole_step(tiny: Config, tmp_path: Path, monkeypatch):
    config = change(tiny, train__micro_batch=2, checkpoint__every=1, checkpoint__keep_last=0)
    nan_in({3 * 4 + 2}, monkeypatch)  # the second micro-batch of step 4
    console, said = heard()
    run = train(config, tmp_path / "run", console)
    before, after = (weights(run.checkpoint(step)) for step in (3, 4))
    for name in before:
        if name.startswith(("model.", "optim.")):
            assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name
    assert not torch.equal(weights(run.checkpoint(5))["model.head.weight"], after["model.head.weight"])
    assert [r["step"] for r in read_jsonl(run.metrics) if r["train/skipped"]] == [4]
    assert [r["train/smoothed_loss"] for r in read_jsonl(run.metrics)] == smoothed(run)
    assert run.summary is not None
    assert run.summary["train_loss"] == smoothed(run)[-1]
    (event,) = read_jsonl(run.events)
    assert (event["event"], event["step"], event["batch"]) == ("skipped", 4, 3)
    assert event["text"] in said


def test_skips_are_bounded(tiny: Config, tmp_path: Path, monkeypatch):
    config = change(tiny, guard__max_skips=3, checkpoint__every=2)
    nan_in({3, 5, 6, 7}, monkeypatch)
    with pytest.raises(
        TrainingError, match=r"3 steps in a row were skipped up to step 7.*the last checkpoint is of step 6"
    ):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert train(config, tmp_path / "run").summary is not None


def test_poisoned_weights_are_not_saved(tiny: Config, tmp_path: Path, monkeypatch):
    def poison(state: TrainState, *hooks):
        numbers = train_step(state, *hooks)
        if state.progress.step == 7:
            with torch.no_grad():
                state.model.head.weight[0, 0] = torch.inf
        return numbers

    monkeypatch.setattr("pretrain.training.step.train_step", poison)
    with pytest.raises(TrainingError, match=r"(head.weight is not finite after step 8.*the last|in a row)"):
        train(change(tiny, guard__max_skips=100), tmp_path / "run")
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")] == [4]


def test_the_guard_knows_spikes_from_the_statistics_of_good_steps():
    guard = Guard(GuardConfig(spike_sigma=4.0, spike_window=8), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def judge(loss: float, norm: float = 1.0) -> tuple[bool, bool]:
        noise = torch.rand((), generator=generator) / 10
        not_finite, spike = guard.judge(torch.tensor(loss) + noise, torch.tensor(norm) + noise)
        return bool(not_finite), bool(spike)

    assert judge(50.0) == (False, False)  # too few to know
    for _ in range(8):
        assert judge(3.0) == (False, False)
    window = guard.window.clone()
    assert judge(6.0) == (False, True)
    assert judge(3.0, norm=9.0) == (False, True)
    assert judge(torch.nan) == (True, False)
    assert judge(3.0, norm=torch.inf) == (True, False)
    assert torch.equal(guard.window, window)  # none of them entered
    assert judge(3.05) == (False, False)
    assert not torch.equal(guard.window, window)


def smoothed(run: Run) -> list[float]:
    """nanochat's smoothing of the losses of a run, with the skipped steps left out."""
    means, kept = [], []
    for record in read_jsonl(run.metrics):
        kept += [] if record["train/skipped"] else [record["train/loss"]]
        total = 0.0
        for loss in kept:
            total = 0.9 * total + (1 - 0.9) * loss
        means.append(total / (1 - 0.9 ** len(kept)))
    return means


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_a_spike_is_skipped_or_rolled_back(tiny: Config, tmp_path: Path, monkeypatch, action: str):
    """A bad batch, the 10th, whose gradients are a thousand times as large."""
    config = change(
        tiny, guard__spike_sigma=20.0, guard__spike_window=4, guard__spike_action=action, checkpoint__keep_last=0
    )
    used: list[int] = []
    batch, scaled = TrainingBatches.batch, LossScale.scaled

    def remember(batches: TrainingBatches, step: int):
        used.append(step)
        return batch(batches, step)

    monkeypatch.setattr(TrainingBatches, "batch", remember)
    monkeypatch.setattr(LossScale, "scaled", lambda self, loss: scaled(self, loss) * (1000 if used[-1] == 9 else 1))
    run = train(config, tmp_path / "run")
    assert [r["step"] for r in read_jsonl(run.metrics)] == list(range(1, 13))
    skipped = [r["step"] for r in read_jsonl(run.metrics) if r["train/skipped"]]
    assert [r["train/smoothed_loss"] for r in read_jsonl(run.metrics)] == smoothed(run)
    events = {e["event"] for e in read_jsonl(run.events)}
    if action == "skip":
        assert used == list(range(12))
        assert skipped == [10]
        assert events == {"skipped"}
    else:  # back to the checkpoint of step 8; batches 8 and 9 are left out
        assert used == [*range(10), *range(10, 14)]
        assert skipped == []
        assert events == {"roll_back"}
        shutil.rmtree(run.checkpoint(12).folder)
        run.reopen()
        before = learned(run)
        assert learned(train(config, tmp_path / "run")) == before  # a resume leaves the same batches out
        # After --resume-from the run still knows, whatever was rolled back, and the same command does nothing again.
        train(config, tmp_path / "run", resume_from=4)
        used.clear()
        train(config, tmp_path / "run", resume_from=4)
        assert used == []


# ---------------------------------------------------------------- resources


def test_a_full_disk_at_one_save_is_told_and_the_next_one_works(tiny: Config, tmp_path: Path, monkeypatch):
    save, count = checkpoint_module.save_checkpoint, [0]

    def full_at_first(*args):
        count[0] += 1
        if count[0] == 2:
            raise FULL
        return save(*args)

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", full_at_first)
    console, said = heard()
    run = train(change(tiny, checkpoint__keep_last=0), tmp_path / "run", console)
    assert [c.step for c in checkpoints(run.checkpoints)] == [4, 12]
    (line,) = [line for line in said if "failed" in line]
    assert "No space left on device" in line
    assert "the last checkpoint is of step 4; training continues" in line

    count[0] = 0
    with pytest.raises(
        CheckpointError, match=r"failed \(No space left on device\); the last checkpoint is of step 4; free"
    ):
        train(change(tiny, checkpoint__on_error="stop"), tmp_path / "stop")


def test_logs_that_cannot_be_written_wait(tiny: Config, tmp_path: Path, monkeypatch):
    append, full = callbacks.append_jsonl, [True]

    def append_when_there_is_room(file: Path, *records):
        if file.name == "metrics.jsonl" and full[0] and any(r["step"] in (2, 3) for r in records):
            if any(r["step"] == 3 for r in records):
                full[0] = False
            raise FULL
        append(file, *records)

    monkeypatch.setattr("pretrain.training.callbacks.append_jsonl", append_when_there_is_room)
    console, said = heard()
    run = train(tiny, tmp_path / "run", console)
    assert [r["step"] for r in read_jsonl(run.metrics)] == list(range(1, 13))
    assert "the log of step 2 is not written yet (No space left on device)" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_really_full_disk(tiny: Config, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(CheckpointError, match=r"No space left on device.*free some space, then resume with"):
            train(change(tiny, checkpoint__keep_last=0, checkpoint__every=1, checkpoint__on_error="stop"), disk / "run")
        run = Run.open(disk / "run")
        kept = checkpoints(run.checkpoints)
        assert kept
        assert all(not c.broken() for c in kept)
        shutil.copytree(run.folder, tmp_path / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    config = change(tiny, checkpoint__keep_last=0, checkpoint__every=1)
    assert_same_run(train(config, tmp_path / "run"), train(config, tmp_path / "undisturbed"))


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tiny: Config, tmp_path: Path):
    folder = tmp_path / "run"
    train(tiny, folder)
    with FileLock(folder / "lock"):
        (folder / "heartbeat.json").write_text(json.dumps({"pid": 12, "host": "moon", "step": 7}))
        with pytest.raises(CheckpointError, match=r"another process is training in .*process 12 on moon, at step 7"):
            train(tiny, folder)
    train(tiny, folder)


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tiny: Config, tmp_path: Path):
    process = run_command(tiny, tmp_path / "run", STUCK.format(str(tmp_path / "stuck")))
    wait_for(tmp_path / "stuck", process)
    with pytest.raises(CheckpointError, match=f"another process is training in .*process {process.pid} "):
        train(tiny, tmp_path / "run")
    process.kill()
    process.communicate()
    assert train(tiny, tmp_path / "run").summary is not None


# ---------------------------------------------------------------- heartbeat


@pytest.fixture
def hangs() -> list[str]:
    """What is reported."""
    return []


@pytest.fixture
def watch(tmp_path: Path, hangs: list[str]) -> Iterator[Callable[..., Heartbeat]]:
    """Begin to watch: a heartbeat for these settings of the guard and the world."""
    begun: list[Heartbeat] = []

    def begin(timeout_seconds: float = 120.0, processes: int = 1, **guard: float) -> Heartbeat:
        config = Config(guard=GuardConfig(**guard), parallel=ParallelConfig(timeout_seconds=timeout_seconds))
        begun.append(Heartbeat(tmp_path, config, World(torch.device("cpu"), size=processes)))
        trainer: Any = SimpleNamespace(event=lambda kind, text: hangs.append(text), first=0)
        begun[0].on_start(trainer)
        return begun[0]

    yield begin
    begun[0].on_end(False)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_hang_is_told_with_every_stack(tmp_path: Path, watch: Callable[..., Heartbeat], hangs: list[str]):
    def stuck_here() -> None:
        watch(hang_seconds=0.2).on_phase(3, "training", 0.01)
        wait_until(lambda: hangs)

    stuck_here()
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (3, "training", os.getpid())
    assert len(hangs) == 1
    assert "while training after step 3" in hangs[0]
    assert "stuck_here" in (tmp_path / "hang.txt").read_text()


def test_slow_steps_are_no_hang(watch: Callable[..., Heartbeat], hangs: list[str]):
    heartbeat = watch(hang_seconds=0.05, hang_factor=100)
    for _ in range(3):
        heartbeat.on_phase(1, "training", 1.0)
    time.sleep(0.3)
    assert heartbeat.limit == 100.0
    assert hangs == []


def test_others_time_out_earlier_but_not_while_saving_or_measuring(watch: Callable[..., Heartbeat], hangs: list[str]):
    heartbeat = watch(timeout_seconds=0.3 / 0.7, processes=2, hang_seconds=0.4, hang_factor=1000)
    heartbeat.on_phase(1, "saving", 1.0)
    time.sleep(0.6)
    assert not hangs
    heartbeat.on_phase(1, "validating")  # in which some have more to do than others
    assert heartbeat.limit == 1000
    heartbeat.on_phase(0, "in a forward pass")  # which compiles
    assert heartbeat.limit == 1000
    for _ in range(6):
        heartbeat.on_phase(1, "waiting for data")
        time.sleep(0.1)
    assert not hangs
    wait_until(lambda: hangs)
    assert "while waiting for data after step 1" in hangs[0]
