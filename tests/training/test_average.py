"""The moving average of the weights, and the model that a finished run leaves."""

import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.test_loop import assert_same_run, change, killed_at, new_run, weights
from tests.training.test_reliability import heard, nan_in
from tests.training.test_validation import validations

from pretrain.cli import main
from pretrain.config import Config
from pretrain.errors import CheckpointError, Interrupted, UsageError
from pretrain.io import read_jsonl
from pretrain.model import meta_model
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.training import Callback, Console, evaluator, train
from pretrain.training.average import EVERY, WeightAverage
from pretrain.training.callbacks import Validation, overfitting
from pretrain.training.setup import set_up
from pretrain.training.state import TrainState
from pretrain.training.step import train_step
from pretrain.training.world import World


@pytest.fixture
def averaged(tiny: Config) -> Config:
    """Three updates of the average and a bit, with dropout, which draws from the random state of training."""
    return change(tiny, optim__ema=0.9, train__steps=17, checkpoint__keep_last=0, model__dropout=0.1)


class Snapshots(Callback):
    """The weights after every step, in float64."""

    def on_start(self, trainer):
        self.trainer, self.taken = trainer, {}

    def on_step(self, record):
        local = self.trainer.state.parameters.local
        self.taken[record["step"]] = {name: p.detach().double().clone() for name, p in local.items()}


def test_the_average_is_that_of_float64(averaged: Config, tmp_path: Path):
    seen = Snapshots()
    run = train(change(averaged, train__steps=32), tmp_path / "run", callbacks=[seen])
    saved, taken = weights(run.newest_checkpoint()), list(range(EVERY, 33, EVERY))
    assert len(taken) == 6
    # The mean of the first two; from then on each new one has 1 - 0.9 ** 5 of the whole.
    shares = np.array([0.5, 0.5])
    for _ in taken[2:]:
        shares = np.append(shares * 0.9**EVERY, 1 - 0.9**EVERY)
    assert shares.sum() == pytest.approx(1)
    for name in seen.taken[32]:
        expected = sum(share * seen.taken[step][name] for share, step in zip(shares, taken, strict=True))
        torch.testing.assert_close(saved[f"ema.{name}"].double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(saved[f"ema.{name}"], saved[f"model.{name}"])


def test_an_average_changes_nothing_of_training(averaged: Config, tmp_path: Path):
    plain, run = train(change(averaged, optim__ema=0.0), tmp_path / "plain"), train(averaged, tmp_path / "run")
    names = ("step", "train/loss", "train/grad_norm", "train/smoothed_loss")
    one, other = ([[r[name] for name in names] for r in read_jsonl(each.metrics)] for each in (plain, run))
    assert one == other
    a, b = weights(plain.newest_checkpoint()), weights(run.newest_checkpoint())
    assert all(torch.equal(a[name], b[name]) for name in a)
    of_weights = {name.removeprefix("model.") for name in a if name.startswith("model.")}
    assert b.keys() - a.keys() == {f"ema.{name}" for name in of_weights}


def loss_of(run: Run, step: int, prefix: str, windows: np.ndarray) -> float:
    """The mean loss of whole windows (N, T + 1), independent of evaluation/."""
    saved, tokenizer = weights(run.checkpoint(step)), run.tokenizer()
    model = meta_model(run.config.model, tokenizer.vocab_size, tokenizer.bos_id).to_empty(device="cpu").eval()
    model.load_state_dict({n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)})
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


def test_both_are_validated_and_the_better_one_is_used(text_file: Path, averaged: Config, tmp_path: Path, capsys):
    """With a rate that falls to 0 the last weights are the best at the end, with a constant one their average is."""
    found = set()
    for kind in ("linear", "constant"):
        config = change(
            averaged, schedule__kind=kind, train__steps=60, eval__every=4, eval__train_tokens=256, eval__tokens=256,
            optim__lr=0.05, optim__embedding_lr=0.1, model__dropout=0.0,
        )  # fmt: skip
        run = train(config, tmp_path / kind)
        records, stream = validations(run), run.corpus().stream("val")
        assert "val/weights" not in records[4]  # before the first update there is no average
        windows = stream.windows(np.arange(8) * 32, 33)
        for step in (8, 32, 60):
            record = records[step]
            if step < 60:
                assert record["val/last_loss"] == pytest.approx(loss_of(run, step, "model.", windows), rel=1e-5)
                assert record["val/average_loss"] == pytest.approx(loss_of(run, step, "ema.", windows), rel=1e-5)
            assert record["val/loss"] == min(record["val/last_loss"], record["val/average_loss"])
            better = "average" if record["val/average_loss"] < record["val/last_loss"] else "last"
            assert record["val/weights"] == better == run.weights(step)
            prefix = "ema." if better == "average" else "model."
            saved, model = weights(run.checkpoint(step)), run.load_model(checkpoint=run.checkpoint(step))
            assert all(torch.equal(p, saved[prefix + name]) for name, p in model.named_parameters())
            found.add(better)
        last = records[60]
        prefix = "ema." if last["val/weights"] == "average" else "model."
        assert last["val/part_loss"] == pytest.approx(loss_of(run, 60, prefix, windows), rel=1e-5)
        assert run.summary is not None
        assert (run.summary["model_weights"], run.summary["val_loss"]) == (last["val/weights"], last["val/loss"])
        assert main(["eval", str(run.folder), "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["val_loss"] == last["val/loss"]
        assert measured.get("weights", "last") == last["val/weights"]
        assert main(["export", str(run.folder), "--out", str(tmp_path / f"hf-{kind}")]) == 0
        averages = last["val/weights"] == "average"
        assert ("the average of the weights of step 60" in capsys.readouterr().out) == averages
        card = (tmp_path / f"hf-{kind}" / "README.md").read_text(encoding="utf-8")
        assert ("Weights: their exponential moving average (optim.ema 0.9)" in card) == averages
        assert f"Held-out loss: {last['val/loss']:.4f}" in card
    assert found == {"average", "last"}


def test_it_is_told_by_a_mark(averaged: Config, tmp_path: Path, capsys):
    run = train(change(averaged, schedule__kind="constant", optim__lr=0.05), tmp_path / "run", Console())
    printed = capsys.readouterr().out
    for step, record in validations(run).items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"step {step:5d}   train loss")]
        assert ("(average)" in line) == (record.get("val/weights") == "average")


def test_without_held_out_text_it_is_the_average(averaged: Config, tmp_path: Path):
    run = train(change(averaged, data__val_fraction=0.0), tmp_path / "run")
    assert read_jsonl(run.metrics)[-1]["val/weights"] == "average"
    assert (run.weights(17), run.weights(4)) == ("average", "last")
    saved, model = weights(run.newest_checkpoint()), run.load_model()
    assert all(torch.equal(p, saved[f"ema.{name}"]) for name, p in model.named_parameters())


@pytest.mark.parametrize("killed", [3, 9, 13])
def test_a_killed_run_ends_with_the_same_average(averaged: Config, tmp_path: Path, monkeypatch, killed: int):
    config = change(averaged, sample__every=3)  # also where the newest validation was of a job before
    undisturbed = train(config, tmp_path / "undisturbed")

    with killed_at(killed, monkeypatch):
        train(config, tmp_path / "run")
    assert_same_run(train(config, tmp_path / "run"), undisturbed)
    (tmp_path / "run" / "summary.json").unlink()
    assert_same_run(train(config, tmp_path / "run", resume_from=8), undisturbed)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signal_while_the_average_is_measured(averaged: Config, tmp_path: Path, monkeypatch, call: int):
    config = change(averaged, eval__train_tokens=256, checkpoint__at=(5,))
    undisturbed = train(config, tmp_path / "undisturbed")
    original, calls = evaluator.evaluate_loss, []

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate_loss", with_signal)
        with pytest.raises(Interrupted, match=r"stopped after step 5 of 17, all saved"):
            train(config, tmp_path / "run")
    stopped, before = (weights(Run.open(tmp_path / name).checkpoint(5)) for name in ("run", "undisturbed"))
    assert stopped.keys() == before.keys()
    assert all(torch.equal(stopped[name], before[name]) for name in before)
    assert_same_run(train(config, tmp_path / "run"), undisturbed)


def test_whatever_is_raised_the_weights_are_back(averaged: Config, tmp_path: Path, monkeypatch):
    run = new_run(averaged, tmp_path / "run")
    state = set_up(run, World(torch.device("cpu")), Console(quiet=True), started=0.0).state
    assert state.average is not None
    for _ in range(6):
        train_step(state)

    def bits() -> list[dict[str, bytes]]:
        of = (state.parameters.local, state.average.values if state.average else {})
        return [{name: t.detach().numpy().tobytes() for name, t in tensors.items()} for tensors in of]

    weights, average = bits()
    places = {name: p.data_ptr() for name, p in state.model.named_parameters()}
    with state.average.in_place():
        assert bits() == [average, weights]
        assert {name: p.data_ptr() for name, p in state.model.named_parameters()} == places
    assert bits() == [weights, average]
    with pytest.raises(ZeroDivisionError), state.average.in_place():
        _ = 1 / 0
    assert bits() == [weights, average]
    exchange, calls = WeightAverage._exchange, []

    def failing(self, name: str) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        exchange(self, name)

    monkeypatch.setattr(WeightAverage, "_exchange", failing)
    with pytest.raises(MemoryError), state.average.in_place():
        pass
    assert bits() == [weights, average]


def test_a_skipped_step_changes_no_bit_of_the_average(averaged: Config, tmp_path: Path, monkeypatch):
    nan_in({10}, monkeypatch)
    run = train(change(averaged, checkpoint__every=1), tmp_path / "run")
    assert [r["step"] for r in read_jsonl(run.metrics) if r["train/skipped"]] == [10]
    before, at, after = (weights(run.checkpoint(step)) for step in (9, 10, 15))
    for name in (name for name in at if name.startswith("ema.")):
        assert at[name].numpy().tobytes() == before[name].numpy().tobytes()
        assert not torch.equal(at[name], after[name])
    state = weights(run.checkpoint(5))
    assert all(torch.equal(state[f"ema.{n[6:]}"], state[n]) for n in state if n.startswith("model."))


def test_a_run_without_an_average_goes_on_without(tiny: Config, averaged: Config, tmp_path: Path):
    train(tiny, tmp_path / "run")
    with pytest.raises(UsageError, match=r"another configuration \(optim\.ema 0\.0 → 0\.9\); choose another --out"):
        train(change(tiny, optim__ema=0.9), tmp_path / "run")


# ---------------------------------------------------------------- the model that a run leaves


@pytest.fixture
def noise(tiny: Config, tmp_path: Path) -> Config:
    """A run that learns random letters by heart, of which nothing holds for others."""
    draw = random.Random(5)
    (tmp_path / "noise.txt").write_text("".join(draw.choices("abcdefghijklmnopqrstuvwxyz012345", k=600)))
    return change(
        tiny, data__paths=(str(tmp_path / "noise.txt"),), data__val_fraction=0.2, train__steps=40, eval__every=5,
        eval__tokens=0, checkpoint__every=17, checkpoint__keep_best=True, checkpoint__keep_last=1, optim__lr=0.2,
        optim__embedding_lr=0.1, optim__head_lr=0.1, schedule__kind="constant", train__batch_tokens=128,
    )  # fmt: skip


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_overfits_leaves_its_best(noise: Config, tmp_path: Path, capsys, ema: float):
    config = change(noise, optim__ema=ema)
    console, said = heard()
    run = train(config, tmp_path / "run", console)
    losses = {step: record["val/loss"] for step, record in validations(run).items()}
    best = min(losses, key=lambda step: losses[step])
    assert losses[40] > losses[best] + 1  # as it must, to show anything
    assert [checkpoint.step for checkpoint in checkpoints(run.checkpoints)] == [best, 40]
    summary = run.summary
    assert summary is not None
    assert summary["val_loss"] == losses[best]
    assert summary["val_bpb"] == validations(run)[best]["val/bpb"]
    assert (summary["steps"], summary["model_step"], summary["last_val_loss"]) == (40, best, losses[40])
    assert summary["model_weights"] == validations(run)[best].get("val/weights", "last")
    words = f"best at step {best} (val loss {losses[best]:.3f}), which sample, eval and export use; the last, of step"
    assert said[-1] == f"{words} 40, has {losses[40]:.3f}"

    assert main(["eval", str(run.folder), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["step"], measured["val_loss"]) == (best, losses[best])
    assert main(["eval", str(run.folder), "--json", "--step", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == losses[40]
    assert main(["export", str(run.folder), "--out", str(tmp_path / "hf")]) == 0
    assert f"weights of step {best}" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"Held-out loss: {losses[best]:.4f}" in card
    assert f"(after step {best})" in card
    assert main(["report", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert f"<dt>model</dt><dd>of step {best}" in page
    assert f"That is the model of step {best}, the best, which sample, eval and export use." in page
    assert f"<dt>held-out loss</dt><dd>{losses[best]:.4f}</dd>" in page
    texts = []
    for options in ([], ["--step", str(best)], ["--step", "40"]):
        assert main(["sample", str(run.folder), "--prompt", "abc", "--temperature", "0", *options]) == 0
        printed = capsys.readouterr()
        texts.append(printed.out.splitlines()[-1])
        assert (f"of step {best}, the lowest validation loss" in printed.err) == (not options)
    assert texts[0] == texts[1] != texts[2]

    # Killed before its summary, and longer: from the newest, as if there had been no best.
    (run.folder / "summary.json").unlink()
    again = train(config, run.folder).summary
    assert again is not None
    clock = ("seconds", "tokens_per_second")
    assert {k: v for k, v in again.items() if k not in clock} == {k: v for k, v in summary.items() if k not in clock}
    longer = change(config, train__steps=42)
    at_once = train(longer, tmp_path / "at once")
    one, other = (weights(each.newest_checkpoint()) for each in (train(longer, run.folder), at_once))
    assert all(torch.equal(one[name], other[name]) for name in other)
    shutil.rmtree(run.checkpoint(best).folder)
    with pytest.raises(CheckpointError, match=rf"no checkpoint of step {best}; there are: 42"):
        run.load_model()


def test_the_best_of_a_part_is_measured_on_all(noise: Config, tmp_path: Path, monkeypatch):
    config = change(noise, eval__tokens=64, data__test_fraction=0.2, optim__ema=0.5)
    run = train(config, tmp_path / "run")
    records, summary = validations(run), run.summary
    assert summary is not None
    best = summary["model_step"]
    prefix = {"average": "ema.", "last": "model."}[summary["model_weights"]]
    assert records[best]["val/loss"] == min(
        record.get("val/part_loss", record["val/loss"]) for record in records.values()
    )
    for side in ("val", "test"):
        stream = run.corpus().stream(side)
        full, rest = divmod(len(stream) - 1, 32)
        windows = stream.windows(np.arange(full) * 32, 33), stream.windows(np.array([full * 32]), rest + 1)
        whole, short = (loss_of(run, best, prefix, each) for each in windows)
        expected = (whole * full * 32 + short * rest) / (len(stream) - 1)
        assert summary[f"{side}_loss"] == pytest.approx(expected, rel=1e-5)
    assert summary["test_loss"] < read_jsonl(run.metrics)[-1]["test/loss"]
    assert summary["val_loss"] != records[best]["val/loss"]
    assert summary["val_loss"] < summary["last_val_loss"] == records[40]["val/loss"]

    # Where all of it says that the last one is better after all, it is.
    (run.folder / "summary.json").unlink()
    lines = read_jsonl(run.metrics)
    lines[-1]["val/loss"] = 1.0
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = train(config, run.folder).summary
    assert summary is not None
    assert (summary["model_step"], summary["val_loss"]) == (40, 1.0)


def test_a_signal_while_the_best_is_measured(noise: Config, tmp_path: Path, monkeypatch):
    undisturbed = train(noise, tmp_path / "undisturbed")
    original, calls = evaluator.evaluate_loss, []

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # after eight validations
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate_loss", with_signal)
        with pytest.raises(Interrupted, match="stopped after step 40 of 40, all saved"):
            train(noise, tmp_path / "run")
    again = train(noise, tmp_path / "run")
    assert_same_run(again, undisturbed)
    assert again.summary is not None
    assert undisturbed.summary is not None
    assert again.summary["model_step"] == undisturbed.summary["model_step"] < 40


def test_without_keep_best_it_is_the_last(noise: Config, tmp_path: Path):
    run = train(change(noise, checkpoint__keep_best=False), tmp_path / "run")
    assert run.summary is not None
    assert run.summary["model_step"] == 40
    assert run.summary["val_loss"] == run.summary["last_val_loss"] == validations(run)[40]["val/loss"]
    summary = {k: v for k, v in run.summary.items() if k not in ("model_step", "model_weights", "last_val_loss")}
    (run.folder / "summary.json").write_text(json.dumps(summary))  # of a run from before these fields
    assert run.model_checkpoint().step == 40


# ---------------------------------------------------------------- what is said in words


def test_what_is_wrong_is_said_once(noise: Config, tmp_path: Path, monkeypatch):
    console, said = heard()
    run = train(noise, tmp_path / "run", console)
    records, events = validations(run), {event["event"]: event for event in read_jsonl(run.events)}
    assert sorted(events) == ["knows_nothing", "overfitting"] == sorted(e["event"] for e in read_jsonl(run.events))
    best = min(records, key=lambda step: records[step]["val/loss"])
    event = events["overfitting"]
    assert event["step"] == best + 10
    assert event["text"] == (
        f"overfitting: the validation loss was lowest, {records[best]['val/loss']:.3f}, after step {best} and has risen"
        f" to {records[best + 10]['val/loss']:.3f}, while the training loss fell; fewer steps, more text or dropout"
        f" help; checkpoint.keep_best keeps the weights of the lowest"
    )
    event = events["knows_nothing"]
    assert event["step"] == min(step for step in records if records[step]["val/loss"] > math.log(257))
    assert "is above 5.549, that of knowing nothing: a guess among all 257 tokens" in event["text"]
    assert all(event["text"] in said for event in events.values())

    def die(state: TrainState, *hooks):
        if state.progress.step == 38:
            raise ZeroDivisionError
        return train_step(state, *hooks)

    with monkeypatch.context() as patch:  # not again after a resume
        patch.setattr("pretrain.training.step.train_step", die)
        with pytest.raises(ZeroDivisionError):
            train(noise, tmp_path / "killed")
    assert [e["text"] for e in read_jsonl(train(noise, tmp_path / "killed").events)] == [
        e["text"] for e in read_jsonl(run.events)
    ]


def test_a_run_that_learns_is_not_warned(tiny: Config, tmp_path: Path):
    run = train(change(tiny, train__steps=40, eval__at_start=True), tmp_path / "run")
    assert read_jsonl(run.events) == []


@pytest.mark.parametrize(
    ("losses", "train_losses", "warned"),
    [
        ([3.0, 2.5, 2.6, 2.7], [3, 2, 1.5, 1.2], True),
        ([3.0, 2.5, 2.6], [3, 2, 1.5], False),  # once may be chance
        ([3.0, 2.5, 2.51, 2.6], [3, 2, 1.5, 1.2], False),
        ([3.0, 2.5, 2.6, 2.7], [3, 2, 2.5, 2.1], False),  # the training loss rises too: it diverges
        ([3.0, 2.9, 2.8], [3, 2, 1], False),
        ([5.5, 5.7, 5.9], [math.inf, 5, 4], True),  # the best was before the first step
    ],
)
def test_when_a_run_overfits(losses: list[float], train_losses: list[float], warned: bool):
    validations = [Validation(n, *pair) for n, pair in enumerate(zip(losses, train_losses, strict=True))]
    assert bool(overfitting(validations)) == warned
