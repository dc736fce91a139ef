import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config import Config, load_config
from pretrain.device import Precision
from pretrain.errors import CheckpointError, DataError, DeviceMemoryError, UsageError
from pretrain.io import read_jsonl
from pretrain.model import GPT
from pretrain.optim.adamw import AdamW
from pretrain.runs import Run
from pretrain.runs.checkpoint import Checkpoint, checkpoints
from pretrain.runs.metrics import fetch
from pretrain.training import Callback, Console, train
from pretrain.training.evaluator import Evaluator
from pretrain.training.setup import set_up
from pretrain.training.start import Draft, make_run, open_run
from pretrain.training.state import TrainState
from pretrain.training.step import train_step, train_step_with_oom_retry
from pretrain.training.world import World


def change(config: Config, **fields) -> Config:
    for name, value in fields.items():
        section, leaf = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})}
        )  # fmt: skip
    return config


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.folder.glob("*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # not a view of the file


def learned(run: Run) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [
        {k: v for k, v in r.items() if k not in ("time", "train/tokens_per_second")} for r in read_jsonl(run.metrics)
    ]


def new_run(config: Config, out: Path) -> Run:
    """A run that has not begun."""
    draft = open_run(config, out, Console(quiet=True))
    assert isinstance(draft, Draft)
    return make_run(draft, draft.config, print)


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is trained here ends after so many steps, as if something killed the process."""

    class Killed(Exception):
        pass

    def killed(state, *hooks):
        if state.progress.step == step:
            raise Killed
        return train_step(state, *hooks)

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.training.step.train_step", killed)
        with pytest.raises(Killed):
            yield


def assert_same_run(one: Run, other: Run) -> None:
    assert learned(one) == learned(other)
    assert read_jsonl(one.samples) == read_jsonl(other.samples)
    a, b = (weights(run.newest_checkpoint()) for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_what_it_promises(tiny: Config, tmp_path: Path):
    run = train(tiny, tmp_path / "run")
    records = read_jsonl(run.metrics)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if "val/bpb" in r] == [5, 10, 12]
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert {"step", "tokens", "time", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"} <= set(
        records[0]
    )
    assert [c.step for c in checkpoints(run.checkpoints)] == [8, 12]
    assert [r["step"] for r in read_jsonl(run.samples)] == [5, 10, 12]
    summary = run.summary
    assert summary is not None
    assert summary["val_loss"] == records[-1]["val/loss"]
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 256
    assert Run.open(run.folder).config == tiny
    assert run.tokenizer().vocab_size == 257
    assert train(tiny, run.folder).summary == summary  # finished: nothing is done again


RESUMED = {
    "plain": {},
    "accumulation and dropout": {"train__micro_batch": 2, "model__dropout": 0.2},
    "adamw and random order": {"optim__kind": "adamw", "data__order": "random"},
    "fp16": {"train__precision": "fp16"},
}


@pytest.mark.parametrize("name", [*RESUMED, pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_it_had_not_been(tiny: Config, tmp_path: Path, name: str, monkeypatch):
    compiled = {"train__compile": "on", "model__dropout": 0.2, "optim__ema": 0.9}
    config = change(tiny, **RESUMED.get(name, compiled))
    undisturbed = train(config, tmp_path / "undisturbed")

    class Killed(Exception):
        pass

    def die_at_step_10(state: TrainState, *hooks):
        if state.progress.step == 9:
            raise Killed
        return train_step(state, *hooks)

    monkeypatch.setattr("pretrain.training.step.train_step", die_at_step_10)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    monkeypatch.undo()
    torch.manual_seed(999)
    torch.compiler.reset()
    assert [r["step"] for r in learned(Run.open(tmp_path / "killed"))][-1] == 9  # one past the checkpoint of step 8
    assert_same_run(train(config, tmp_path / "killed"), undisturbed)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tiny: Config, text_file: Path, tmp_path: Path):
    """Real processes and a real SIGINT."""
    from tests.conftest import TINY

    overrides = {**TINY, "train.steps": 300, "eval.every": 50, "checkpoint.every": 0, "data.paths": str(text_file)}
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain", "train", "quickstart", "--out", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_jsonl(out / "metrics.jsonl")) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped_at = len(read_jsonl(out / "metrics.jsonl"))
    assert f"stopped after step {stopped_at} of 300" in errors
    assert f"pretrain train --out {out}" in errors
    assert len(errors.strip().splitlines()) == 1

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"resuming  after step {stopped_at}" in again.stdout
    config = load_config("quickstart", **{**overrides, "data.paths": [str(text_file)]})
    assert_same_run(Run.open(out), train(config, tmp_path / "undisturbed"))


def test_the_micro_batch_changes_nothing_but_rounding(tiny: Config, tmp_path: Path):
    whole = train(tiny, tmp_path / "whole")
    parts = train(change(tiny, train__micro_batch=1), tmp_path / "parts")
    for a, b in zip(learned(whole), learned(parts), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


def test_a_step_with_a_nan_changes_nothing(tiny: Config, tmp_path: Path, monkeypatch):
    run = new_run(tiny, tmp_path / "run")
    state = set_up(run, World(torch.device("cpu")), Console(quiet=True), started=0.0).state
    train_step(state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with monkeypatch.context() as patch:
        patch.setattr(state.loss_scale, "scaled", lambda loss: loss * torch.nan)
        norm = train_step(state)["train/grad_norm"]
    assert not torch.isfinite(norm)
    after = state.tensors()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
    train_step(state)
    assert not torch.equal(state.tensors()["model.head.weight"], before["model.head.weight"])


def test_listed_checkpoints_stay(tiny: Config, tmp_path: Path):
    run = train(change(tiny, checkpoint__at=(3,), checkpoint__keep_last=1), tmp_path / "run")
    assert [c.step for c in checkpoints(run.checkpoints)] == [3, 12]


def test_another_configuration_is_refused_by_name(tiny: Config, tmp_path: Path):
    short = change(tiny, train__steps=2)
    train(short, tmp_path / "run")
    with pytest.raises(UsageError, match=r"another configuration \(optim.lr 0.00625 → 0.1\)"):
        train(change(short, optim__lr=0.1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"another configuration \(train.steps 2 → 1\)"):
        train(change(tiny, train__steps=1), tmp_path / "run")
    train(change(short, eval__every=1), tmp_path / "run")


def test_damaged_checkpoints_are_passed_over(tiny: Config, tmp_path: Path):
    run = train(tiny, tmp_path / "run")
    expected = weights(run.newest_checkpoint())
    (run.folder / "summary.json").unlink()
    for checkpoint in checkpoints(run.checkpoints)[1:]:
        os.truncate(next(checkpoint.folder.glob("*.safetensors")), 100)
    assert run.newest_checkpoint().step == 8
    again = train(tiny, tmp_path / "run")
    for name, tensor in weights(again.newest_checkpoint()).items():
        assert torch.equal(tensor, expected[name]), name
    for checkpoint in checkpoints(run.checkpoints):
        (checkpoint.folder / "state.json").write_text("{}")
    (run.folder / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        train(tiny, tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(tiny: Config, tmp_path: Path):
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(UsageError, match="has files but is not a run"):
        train(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_nothing_held_out(tiny: Config, tmp_path: Path):
    run = train(change(tiny, data__val_fraction=0.0), tmp_path / "run")
    assert run.summary is not None
    assert run.summary["val_loss"] is None
    assert json.loads((run.folder / "summary.json").read_text())["train_loss"] > 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_out_of_memory_halves_the_micro_batch(tiny: Config, tmp_path: Path, monkeypatch, dropout: float):
    """The same global batch and the same draws, so the same result as with that micro-batch from the start."""
    config = change(tiny, model__dropout=dropout)
    expected = train(change(config, train__micro_batch=2), tmp_path / "expected")
    forward = GPT.forward

    def forward_of_few_rows(model, tokens, *args, **kwargs):
        result = forward(model, tokens, *args, **kwargs)
        if model.training and len(tokens) > 2:
            raise torch.OutOfMemoryError
        return result

    monkeypatch.setattr(GPT, "forward", forward_of_few_rows)
    assert_same_run(train(config, tmp_path / "run"), expected)

    monkeypatch.setattr(GPT, "forward", lambda *_args, **_kwargs: raise_out_of_memory())
    with pytest.raises(DeviceMemoryError, match="one row of 32 tokens does not fit"):
        train(config, tmp_path / "none")


def test_out_of_memory_in_an_update_is_not_retried(tiny: Config, tmp_path: Path, monkeypatch):
    """A part of the update is done by then: the run ends, and resumes from its last checkpoint as if nothing were."""
    config = change(tiny, checkpoint__every=2)
    expected = train(config, tmp_path / "expected")
    step = AdamW.step
    calls = 0

    def step_that_fails(optimizer, closure=None):  # after Muon's, which has changed the matrices
        nonlocal calls
        calls += 1
        return raise_out_of_memory() if calls == 4 else step(optimizer, closure)

    monkeypatch.setattr(AdamW, "step", step_that_fails)
    with pytest.raises(DeviceMemoryError, match="rank 0 is out of memory updating"):
        train(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 2
    assert_same_run(train(config, tmp_path / "run"), expected)


def raise_out_of_memory():
    raise torch.OutOfMemoryError


def test_full_fp32_is_said_where_a_gpu_has_tf32(tiny: Config, tmp_path: Path, monkeypatch, capsys):
    set_before = []
    monkeypatch.setattr("pretrain.training.setup.has_tf32", lambda _: True)
    monkeypatch.setattr(Precision, "set_products", lambda precision: set_before.append(precision.name))
    for name, said in (("fp32", 1), ("bf16", 0)):
        train(change(tiny, train__precision=name, train__steps=1), tmp_path / name, Console())
        assert capsys.readouterr().out.count("--train.precision tf32") == said
    assert set_before == ["fp32", "bf16"]


def counted_memory(monkeypatch: pytest.MonkeyPatch, rows: int, free: int, really: int = 0) -> None:
    """A device that counts memory: runs begin with ``rows``, a row takes 10 bytes, ``free`` are there.

    If ``really`` is not 0, only so many are in truth.
    """
    forward, peak = GPT.forward, 0

    def counted(model, tokens, *args, **kwargs):
        nonlocal peak
        if model.training:
            peak = max(peak, 10 * len(tokens))
            if 10 * len(tokens) > (really or free):
                raise torch.OutOfMemoryError
        return forward(model, tokens, *args, **kwargs)

    def reset(_device):
        nonlocal peak
        peak = 0

    monkeypatch.setattr(GPT, "forward", counted)
    monkeypatch.setattr("pretrain.training.setup.rows_that_fit", lambda *_: rows)
    monkeypatch.setattr("pretrain.training.step.reset_peak_memory", reset)
    monkeypatch.setattr("pretrain.training.step.passing_memory", lambda _device: peak)
    monkeypatch.setattr("pretrain.training.step.free_memory", lambda _device: free)
    monkeypatch.setattr("pretrain.training.loop.ENLARGING_FLOPS", 0)


def rows_of_steps(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[int]]:
    """A run, and the rows of its micro-batches by step."""
    rows = []

    def noted(state, *hooks):
        numbers = train_step(state, *hooks)
        rows.append(state.progress.micro_rows)
        return numbers

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.training.step.train_step", noted)
        return train(config, out), rows


def changed_at_2(config: Config, out: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose micro-batch is another from step 3 on, by what is given for it."""
    config = change(config, checkpoint__at=(2,))
    with killed_at(2, monkeypatch):
        train(change(config, train__micro_batch=before), out)
    return train(change(config, train__micro_batch=after), out)


@pytest.mark.parametrize(
    ("rows", "free", "really", "then"),
    [
        (2, 100, 0, 8),  # 85 bytes: 8 rows, the whole batch
        (1, 60, 0, 4),  # 51: of the 5 rows that fit, those that divide the batch
        (2, 100, 40, 4),  # 8 were promised: the step is done again with half
    ],
)
def test_a_micro_batch_is_enlarged_to_what_its_memory_shows(tiny, tmp_path, monkeypatch, rows, free, really, then):
    config = change(tiny, model__dropout=0.1)
    expected = changed_at_2(config, tmp_path / "expected", rows, then, monkeypatch)
    counted_memory(monkeypatch, rows, free, really)
    run, taken = rows_of_steps(config, tmp_path / "run", monkeypatch)
    assert taken == [rows] * 2 + [then] * 10
    assert_same_run(run, expected)
    enlarged, *halved = read_jsonl(run.folder / "events.jsonl")
    assert (enlarged["step"], enlarged["event"]) == (2, "micro_batch")
    assert len(halved) == bool(really)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resume_enlarges_the_micro_batch_where_the_run_would_have(tiny, tmp_path, monkeypatch, step: int):
    counted_memory(monkeypatch, rows=2, free=100)
    config = change(tiny, checkpoint__every=1)
    whole, _ = rows_of_steps(config, tmp_path / "whole", monkeypatch)
    with killed_at(step, monkeypatch):
        train(config, tmp_path / "run")
    run, taken = rows_of_steps(config, tmp_path / "run", monkeypatch)
    assert taken == [2] * (2 - step) + [8] * (10 if step < 3 else 9)
    assert_same_run(run, whole)


def test_a_micro_batch_stays_where_it_was_given_or_more_is_not_worth_it(tiny, tmp_path, monkeypatch):
    counted_memory(monkeypatch, rows=4, free=60)  # 5 rows
    assert rows_of_steps(tiny, tmp_path / "few", monkeypatch)[1] == [4] * 12
    counted_memory(monkeypatch, rows=1, free=1000)
    assert rows_of_steps(change(tiny, train__micro_batch=2), tmp_path / "given", monkeypatch)[1] == [2] * 12
    monkeypatch.setattr("pretrain.training.loop.ENLARGING_FLOPS", 5e17)
    assert rows_of_steps(tiny, tmp_path / "short", monkeypatch)[1] == [1] * 12


def test_activation_checkpointing_changes_no_bit(tiny: Config, tmp_path: Path):
    config = change(tiny, model__dropout=0.1)
    kept = train(config, tmp_path / "kept")
    again = train(change(config, train__activation_checkpointing=True), tmp_path / "again")
    assert_same_run(kept, again)


def test_without_a_compiler_training_goes_on(tiny: Config, tmp_path: Path, monkeypatch):
    def no_compiler(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    said: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "say", said.append)
    run = train(change(tiny, train__compile="on"), tmp_path / "run", console)
    assert run.summary is not None
    assert "torch.compile does not work here (no C++ compiler found); continuing without it" in said


def test_clipping_begins_where_it_should(tiny: Config, tmp_path: Path):
    """The book clips after the warmup only."""
    always = train(change(tiny, train__grad_clip=1e-3), tmp_path / "always")
    late = train(change(tiny, train__grad_clip=1e-3, train__grad_clip_from=6), tmp_path / "late")
    never = train(change(tiny, train__grad_clip=0.0), tmp_path / "never")
    norms = [[r["train/grad_norm"] for r in learned(run)] for run in (always, late, never)]
    assert norms[1][:7] == norms[2][:7]
    assert norms[1][7:] != norms[2][7:]
    assert norms[0][1:7] != norms[2][1:7]


@pytest.mark.parametrize("where", ["validate", "sample"])
def test_measuring_that_fails_at_the_last_step_loses_no_step(tiny: Config, tmp_path: Path, monkeypatch, where: str):
    config = change(tiny, checkpoint__every=0, eval__every=0)
    undisturbed = train(config, tmp_path / "undisturbed")

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Evaluator, where, fails)
    with pytest.raises(MemoryError):
        train(config, tmp_path / "run")
    monkeypatch.undo()

    class NoStep(Callback):
        def on_phase(self, step, phase, seconds=None):
            assert seconds is None, "a step was done again"

    assert_same_run(train(config, tmp_path / "run", callbacks=[NoStep()]), undisturbed)
    longer = train(change(config, train__steps=14), tmp_path / "run")  # measures step 12 no second time
    assert [r["step"] for r in read_jsonl(longer.metrics) if "val/loss" in r] == [12, 14]
    assert [r["step"] for r in read_jsonl(longer.samples)] == [12, 14]


def test_a_run_killed_before_its_summary_still_gets_it(tiny: Config, tmp_path: Path):
    run = train(tiny, tmp_path / "run")
    before = run.summary
    assert before is not None
    (run.folder / "summary.json").unlink()
    after = train(tiny, run.folder).summary
    assert after is not None
    clock = ("seconds", "tokens_per_second")
    assert {k: v for k, v in after.items() if k not in clock} == {k: v for k, v in before.items() if k not in clock}


def test_making_room_for_moments_leaves_the_loss_scale(tiny: Config, tmp_path: Path):
    run = new_run(change(tiny, train__precision="fp16"), tmp_path / "run")
    state = set_up(run, World(torch.device("cpu")), Console(quiet=True), started=0.0).state
    assert float(state.loss_scale.scale) == 2.0**16


def test_callbacks_hear_of_steps_validations_and_checkpoints(tiny: Config, tmp_path: Path):
    heard: list[tuple] = []

    class Listener(Callback):
        def on_step(self, record):
            heard.append(("step", record["step"]))

        def on_evaluation(self, record):
            heard.append(("evaluation", record["step"], record["val/loss"] > 0))

        def on_sample(self, step, prompt, text):
            assert heard[-1] == ("evaluation", step, True)
            heard.append(("sample", step, prompt, text))

        def on_checkpoint(self, path):
            assert (path / "COMMIT").exists()
            heard.append(("checkpoint", path.name))

    run = train(tiny, tmp_path / "run", callbacks=[Listener()])
    samples = [event[1:] for event in heard if event[0] == "sample"]
    assert samples == [tuple(line.values()) for line in read_jsonl(run.samples)]
    assert [event[1] for event in heard if event[0] == "step"] == list(range(1, 13))
    assert [event[1:] for event in heard if event[0] == "evaluation"] == [(5, True), (10, True), (12, True)]
    assert [event[1] for event in heard if event[0] == "checkpoint"] == [f"step-{n:08d}" for n in (4, 8, 12)]


def test_several_prompts_at_an_interval_of_their_own(tiny: Config, tmp_path: Path, monkeypatch):
    prompts = ("Ada", "", "the fox hears")
    config = change(tiny, sample__prompts=prompts, sample__every=4, log__every=100)
    console = Console(quiet=True)
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    lines = read_jsonl(train(config, tmp_path / "run", console).samples)
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, p) for step in (4, 8, 12) for p in prompts]
    assert all(line["text"].startswith(line["prompt"]) and line["text"] != line["prompt"] for line in lines)
    shown = said[said.index("step     8   sampled") + 1 :]
    assert shown[:3] == [f"      “{' '.join(line['text'].split())}”" for line in lines[3:6]]
    alone = train(change(config, sample__prompts=prompts[2:]), tmp_path / "alone")
    assert read_jsonl(alone.samples) == lines[2::3]


def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_first_step(tiny: Config, tmp_path: Path):
    (tmp_path / "dna.txt").write_text("ACGTTGCA" * 1000)
    config = change(tiny, data__paths=(str(tmp_path / "dna.txt"),), tokenizer__kind="char")
    with pytest.raises(DataError, match=r"sample.prompts: 'Ada' cannot be sampled from \(the character 'd' "):
        train(change(config, sample__prompts=("AC", "Ada")), tmp_path / "refused")
    run = train(config, tmp_path / "run")  # with the empty prompt: it begins with no line end either
    assert [set(line["text"]) <= set("ACGT") for line in read_jsonl(run.samples)] == [True] * 3


def test_a_logger_that_fails_never_stops_training(tiny: Config, tmp_path: Path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk of the logger is gone")

    monkeypatch.setattr("pretrain.training.loggers.feed_tensorboard", fail)
    monkeypatch.setattr("pretrain.training.loggers.installed", lambda _: True)
    said: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "say", said.append)
    assert train(change(tiny, log__backends=("tensorboard",)), tmp_path / "run", console).summary is not None
    assert len([line for line in said if "the disk of the logger is gone" in line]) == 1


def test_the_speed_of_a_device_that_computes_later(tiny: Config, tmp_path: Path, monkeypatch):
    """A GPU is given a step in 0.01 s and computes it in 1 s; validation takes 50 s, and a save 20 s."""
    now, done = [0.0], [0.0]  # the host's clock; when the device will have computed what it was given
    monkeypatch.setattr("pretrain.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(*arguments):
        now[0] += 0.01
        done[0] = max(done[0], now[0]) + 0.99
        return train_step_with_oom_retry(*arguments)

    def wait(records):
        if any(isinstance(value, torch.Tensor) for record in records for value in record.values()):
            now[0] = max(now[0], done[0])
        return fetch(records)

    def validate(*arguments):
        now[0] += 50
        return validated(*arguments)

    def save(*arguments):
        now[0] += 20
        return saved(*arguments)

    validated, saved = Evaluator.validate, TrainState.state_dict
    monkeypatch.setattr("pretrain.training.loop.train_step_with_oom_retry", step)
    monkeypatch.setattr("pretrain.training.loop.fetch", wait)
    monkeypatch.setattr(Evaluator, "validate", validate)
    monkeypatch.setattr(TrainState, "state_dict", save)
    config = change(tiny, train__steps=30, eval__every=11, checkpoint__every=13)
    run = new_run(config, tmp_path / "run")
    trainer = set_up(run, World(torch.device("cpu")), Console(quiet=True), started=0.0)
    trainer.fetch_every = 4
    trainer.fit()
    records = read_jsonl(run.metrics)
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["train/tokens_per_second"] for record in records] == pytest.approx([256] * 30, rel=0.02)
