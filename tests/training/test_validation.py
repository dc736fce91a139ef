"""What is validated when: before the first step, at an offset, on both splits, on windows drawn at random, and last."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run, change, killed_at, learned, weights

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.errors import Interrupted
from pretrain.io import read_jsonl
from pretrain.report.curves import Curves
from pretrain.report.facts import held_out, newest_held_out
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.tokens import TokenStream, TrainingBatches, training_order, window_batches
from pretrain.training import evaluator, train

EVALS = {
    "eval__at_start": True,
    "eval__offset": 1,
    "eval__order": "random",
    "eval__tokens": 256,
    "eval__train_tokens": 512,
}


@pytest.fixture
def measured(tiny: Config) -> Config:
    """A run that measures all there is, with dropout, which draws from the random state of training."""
    return change(tiny, **EVALS, model__dropout=0.1)


def validations(run: Run) -> dict[int, dict]:
    """The records of validations, by step."""
    return {record["step"]: record for record in learned(run) if "val/loss" in record}


def loss_of(run: Run, windows: np.ndarray, step: int) -> float:
    """The mean loss of whole windows (N, T + 1) under the checkpoint of a step: independent of evaluation/."""
    model = run.load_model(checkpoint=run.checkpoint(step))
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


def test_before_the_first_step_and_at_an_offset_by_the_command(text_file: Path, tmp_path: Path, capsys):
    settings = {**TINY, "data.paths": str(text_file), "eval.offset": 1, "eval.train_tokens": 512}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert main(["train", "quickstart", "--out", str(out), *options, "--eval.at-start", "--checkpoint.keep-best"]) == 0
    run, printed = Run.open(out), capsys.readouterr().out
    records = validations(run)
    assert list(records) == [0, 1, 6, 11, 12]
    assert [record["step"] for record in learned(run)] == list(range(13))
    assert set(records[0]) == {"step", "tokens", "val/loss", "val/bpb", "train/eval_loss"}
    assert records[0]["val/loss"] == pytest.approx(np.log(257), abs=0.05)  # it knows nothing yet
    assert re.search(
        r"^step     0   train eval loss 5\.\d+   val loss 5\.\d+   \d\.\d+ bits per byte   \d+ s$", printed, re.M
    )
    assert re.search(r"^step     6   train loss \S+   train eval loss \S+   val loss ", printed, re.M)
    assert all(checkpoint.step for checkpoint in checkpoints(run.checkpoints))
    assert run.summary is not None
    assert run.summary["steps"] == 12
    assert main(["report", str(out)]) == 0
    assert main(["train", "--out", str(out), *options]) == 0  # finished
    assert list(validations(run)) == [0, 1, 6, 11, 12]


def test_measuring_changes_nothing_of_training(tiny: Config, measured: Config, tmp_path: Path):
    plain = train(change(tiny, model__dropout=0.1), tmp_path / "plain")
    run = train(measured, tmp_path / "measured")
    names = ("step", "train/loss", "train/grad_norm", "train/smoothed_loss")
    one, other = ([tuple(r[name] for name in names) for r in learned(each) if r["step"]] for each in (plain, run))
    assert one == other
    a, b = (weights(each.newest_checkpoint()) for each in (plain, run))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("killed", [2, 9])  # before the first checkpoint, and after the second
def test_a_killed_run_has_every_validation_once(measured: Config, tmp_path: Path, monkeypatch, killed: int):
    undisturbed = train(measured, tmp_path / "undisturbed")

    with killed_at(killed, monkeypatch):
        train(measured, tmp_path / "killed")
    assert 0 in validations(Run.open(tmp_path / "killed"))
    assert_same_run(train(measured, tmp_path / "killed"), undisturbed)


def test_a_signal_before_the_first_step(measured: Config, tmp_path: Path, monkeypatch):
    undisturbed = train(measured, tmp_path / "undisturbed")
    original = evaluator.evaluate_loss

    def with_signal(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate_loss", with_signal)
        with pytest.raises(Interrupted, match="stopped after step 0 of 12"):
            train(measured, tmp_path / "run")
    assert_same_run(train(measured, tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("order", ["shuffled", "random", "sequential"])
def test_the_loss_on_training_text_is_that_of_the_windows_drawn(tiny: Config, tmp_path: Path, order: str):
    config = change(tiny, data__order=order, eval__train_tokens=520, checkpoint__every=5, checkpoint__keep_last=0)
    run = train(config, tmp_path / "run")
    again = train(change(config, train__micro_batch=2), tmp_path / "again")
    stream, windows = run.corpus().stream("train"), {}
    for step in (5, 10):
        starts = training_order(run.corpus(), config).estimate(step).starts(0, 16)
        windows[step] = stream.windows(starts, 33)
        loss = validations(run)[step]["train/eval_loss"]
        assert loss == pytest.approx(loss_of(run, windows[step], step), rel=1e-5)
        assert loss == pytest.approx(validations(again)[step]["train/eval_loss"], rel=1e-4)  # other rounding
    assert not np.array_equal(windows[5], windows[10])
    trained = training_order(run.corpus(), config).starts(0, 12 * 8 + 1)
    assert not np.array_equal(windows[5], stream.windows(trained[:16], 33))


def test_estimates_take_windows_where_training_has_them(text_file: Path, tiny: Config, tmp_path: Path):
    """With a stride a model has learned windows at these places: others it would know less well."""
    run = train(change(tiny, data__stride=32, train__steps=1), tmp_path / "run")
    order = training_order(run.corpus(), run.config)
    starts = order.estimate(5).starts(0, order.windows)
    assert sorted(starts.tolist()) == sorted(order.starts(0, order.windows).tolist())
    sequential = dataclasses.replace(order, kind="sequential", stride=0)
    assert set(sequential.estimate(5).starts(0, 20).tolist()) < set(range(0, 32 * 10_000, 32))
    assert not np.array_equal(starts, order.estimate(6).starts(0, order.windows))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 7, 12])
def test_ranks_share_windows_in_equal_shapes(world: int, count: int, tmp_path: Path, tiny: Config):
    stream = train(change(tiny, train__steps=1, train__batch_tokens=32), tmp_path / "run").corpus().stream("train")
    starts = np.arange(count) * 7
    shares = [list(window_batches(stream, starts, 8, 2, rank, world)) for rank in range(world)]
    assert len({tuple(inputs.shape for inputs, _ in share) for share in shares}) == 1
    seen = [
        (x.tolist(), y.tolist())
        for share in shares
        for inputs, targets in share
        for x, y in zip(inputs, targets, strict=True)
        if y[0] >= 0
    ]
    windows = stream.windows(starts, 9)
    assert sorted(seen) == sorted((row[:-1].tolist(), row[1:].tolist()) for row in windows)


def test_random_held_out_windows_are_drawn_anew_each_time(tiny: Config, tmp_path: Path, monkeypatch):
    config = change(tiny, eval__order="random", checkpoint__every=5, checkpoint__keep_last=0)
    taken: list[np.ndarray] = []
    windows = TokenStream.windows

    def noted(stream, starts, *rest):
        found = windows(stream, starts, *rest)
        taken.append(found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "windows", noted)
        patch.setattr(
            TrainingBatches, "batch", lambda *_: (torch.zeros(8, 32, dtype=int), torch.zeros(8, 32, dtype=int))
        )
        run = train(config, tmp_path / "run")
    again = train(config, tmp_path / "again")
    by_step = dict(zip((5, 10, 12, 12), taken, strict=True))  # the last: all, and a part
    assert by_step[5].shape == by_step[12].shape == (8, 33)
    assert not np.array_equal(by_step[5], by_step[10])
    assert not np.array_equal(by_step[10], by_step[12])
    for step in (5, 10):
        assert validations(run)[step]["val/loss"] == pytest.approx(loss_of(run, by_step[step], step), rel=1e-5)
    assert validations(run)[12]["val/part_loss"] == pytest.approx(loss_of(run, by_step[12], 12), rel=1e-5)
    held = {step: validations(again)[step]["val/loss"] for step in (5, 10)}
    assert held == {step: validations(train(config, tmp_path / "third"))[step]["val/loss"] for step in (5, 10)}


def test_windows_that_overlap(tiny: Config, tmp_path: Path, capsys):
    """Each token after at least the rest of a window: as one window at a time says it, and as ``pretrain eval``."""
    run = train(change(tiny, eval__stride=12, data__test_fraction=0.1), tmp_path / "run")
    length, model, summary = run.config.model.context_length, run.load_model(), run.summary or {}
    for split in ("val", "test"):
        stream, losses = run.corpus().stream(split), []
        tokens = torch.from_numpy(stream.windows(np.array([0]), len(stream))[0])
        for start in range(0, len(tokens) - 1, 12):
            window = tokens[start : start + length + 1]
            with torch.no_grad():
                each = torch.nn.functional.cross_entropy(
                    model(window[None, :-1])[0].double(), window[1:], reduction="none"
                )
            losses.append(each if not start else each[length - 12 :])
            if start + length + 1 >= len(tokens):
                break
        losses = torch.cat(losses)
        assert len(losses) == len(tokens) - 1
        assert summary[f"{split}_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
        capsys.readouterr()
        assert main(["eval", str(run.folder), "--json", "--device", "cpu", "--split", split]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result[f"{split}_loss"] == pytest.approx(summary[f"{split}_loss"], abs=1e-6)
        assert result["caution"] == "windows overlap (eval.stride 12): compare with runs of the same stride"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"eval__stride": 10_000}, "eval.stride 10000 is more than model.context_length"),
        ({"eval__stride": 8, "eval__order": "random"}, "eval.stride needs windows one after the other"),
    ],
)
def test_strides_that_cannot_be(tiny: Config, settings: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        change(tiny, **settings)


def test_the_last_validation_says_both(tiny: Config, text_file: Path, tmp_path: Path, capsys):
    settings = {**TINY, "data.paths": str(text_file), "checkpoint.keep_last": 0, "checkpoint.every": 5}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["train", "quickstart", "--out", str(tmp_path / "run"), *options]) == 0
    run, printed = Run.open(tmp_path / "run"), capsys.readouterr().out
    records, stream = validations(run), run.corpus().stream("val")
    assert len(stream) > 257
    first = stream.windows(np.arange(8) * 32, 33)  # the first 256 targets
    for step, name in ((5, "val/loss"), (10, "val/loss"), (12, "val/part_loss")):
        assert records[step][name] == pytest.approx(loss_of(run, first, step), rel=1e-5)
        assert ("val/part_loss" in records[step]) == (step == 12)
    assert records[12]["val/part_bpb"] == pytest.approx(records[12]["val/part_loss"] / np.log(2), rel=1e-3)
    assert main(["eval", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == records[12]["val/loss"]
    (last,) = (line for line in printed.splitlines() if line.startswith("step    12"))
    whole, part = (records[12][name] for name in ("val/loss", "val/part_loss"))
    assert f"val loss {whole:.3f}" in last
    assert f"all held-out text; eval.tokens of it, as before: {part:.3f}," in last
    curves = Curves(run.metrics)
    assert [loss for _, loss, _ in held_out(curves)] == [records[5]["val/loss"], records[10]["val/loss"], part]
    assert newest_held_out(curves) == (12, whole, records[12]["val/bpb"])
    assert curves.val.column("val/loss of all")[-1] == whole


def test_the_test_is_measured_once_at_the_end(text_file: Path, tmp_path: Path, capsys):
    settings = {**TINY, "data.paths": str(text_file), "data.test_fraction": 0.1}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["train", "quickstart", "--out", str(tmp_path / "run"), *options, "--checkpoint.keep-best"]) == 0
    run, printed = Run.open(tmp_path / "run"), capsys.readouterr().out
    text = text_file.read_text(encoding="utf-8")
    corpus, characters = run.corpus(), len(text)
    sides = {side: corpus.stream(side) for side in ("train", "val", "test")}
    decoded = {side: corpus.tokenizer.decode(s.windows([0], len(s))[0].tolist()) for side, s in sides.items()}
    assert "".join(decoded.values()) == text
    assert len(decoded["test"]) == characters - int(0.9 * characters)
    assert len(decoded["train"]) == int(0.85 * characters)

    records = {record["step"]: record for record in learned(run)}
    assert [step for step, record in records.items() if "test/loss" in record] == [12]
    last, whole = records[12], (len(sides["test"]) - 1) // 32
    starts = np.arange(whole) * 32
    rest = sides["test"].windows(np.array([whole * 32]), len(sides["test"]) - whole * 32)
    parts = [(loss_of(run, sides["test"].windows(starts, 33), 12), whole * 32), (loss_of(run, rest, 12), rest.size - 1)]
    loss = sum(mean * count for mean, count in parts) / sum(count for _, count in parts)
    assert last["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert run.summary is not None
    assert (run.summary["test_loss"], run.summary["test_bpb"]) == (last["test/loss"], last["test/bpb"])

    assert f"{len(sides['test']):,} for the test" in printed
    assert f"test loss {loss:.3f}   {last['test/bpb']:.3f} bits per byte" in printed
    said = f"On the test text, by which nothing was chosen, it is {loss:.3f}, {last['test/bpb']:.3f} bits per byte; the"
    assert f"{said} best step was chosen on the held-out text." in printed
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert said in page
    assert "on text that nothing was chosen by" in page
    assert main(["eval", str(run.folder), "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_loss"] == last["test/loss"]


def test_without_a_test_nothing_is_said_of_one(tiny: Config, tmp_path: Path, capsys):
    run = train(tiny, tmp_path / "run")
    assert not [name for record in learned(run) for name in record if name.startswith("test")]
    assert run.summary is not None
    assert "test_loss" not in run.summary
    assert main(["report", str(run.folder)]) == 0
    assert "test text" not in (run.folder / "report.html").read_text(encoding="utf-8")
    assert main(["eval", str(run.folder), "--split", "test"]) == 2
    assert "holds no text out for a test; measure on other text with --data" in capsys.readouterr().err


def test_tokens_bring_their_own_test(text_file: Path, tmp_path: Path, capsys):
    shards, options = (
        str(tmp_path / "shards"),
        [text for name, value in TINY.items() for text in (f"--{name}", str(value))],
    )
    assert (
        main(["data", "prepare", str(text_file), "--out", shards, "--tokenizer", "byte", "--test-fraction", ".1"]) == 0
    )
    assert re.search(r"^test      1 documents, \d", capsys.readouterr().out, re.M)
    assert main(["data", "inspect", shards]) == 0
    assert re.search(r"^test: [\d,]+ tokens", capsys.readouterr().out, re.M)
    options = options[2:]  # the tokenizer is that of the shards
    refused = ["train", "--data", shards, *options, "--data.test_fraction", "0.1", "--out", str(tmp_path / "run")]
    assert main(refused) == 2
    assert "hold a test out when they are made: pretrain data prepare --test-fraction 0.1" in capsys.readouterr().err
    assert main(["plan", "quickstart", "--data", shards, "--data.test_fraction", "0.1", "--no-measure"]) == 2
    assert main(["train", "quickstart", "--data", shards, *options, "--out", str(tmp_path / "run")]) == 0
    summary = Run.open(tmp_path / "run").summary
    assert summary is not None
    assert 0 < summary["test_loss"] < 6
    capsys.readouterr()
    assert main(["plan", "quickstart", "--data", shards, "--no-measure", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)["data"]
    command = ["plan", "quickstart", "--data", str(text_file), "--tokenizer.kind", "byte", "--no-measure", "--json"]
    assert main([*command, "--data.test_fraction", "0.1"]) == 0
    estimated = json.loads(capsys.readouterr().out)["data"]
    for side in ("train_tokens", "val_tokens", "test_tokens"):
        assert estimated[side] == pytest.approx(exact[side], rel=0.01)


def test_shares_that_leave_nothing_are_refused(text_file: Path, tmp_path: Path, capsys):
    fractions = ["--data.val_fraction", "0.5", "--data.test_fraction", "0.5"]
    assert main(["train", "--data", str(text_file), *fractions, "--out", str(tmp_path / "run")]) == 2
    assert "data.val_fraction 0.5 and data.test_fraction 0.5 leave nothing to train on" in capsys.readouterr().err


def test_a_validation_of_everything_says_one_number(tiny: Config, tmp_path: Path):
    for tokens in (0, 10**6):
        last = validations(train(change(tiny, eval__tokens=tokens), tmp_path / f"run{tokens}"))[12]
        assert not [name for name in last if "part" in name]


def test_the_best_is_the_lowest_of_what_compares(tiny: Config, tmp_path: Path, monkeypatch):
    """After the last step all held-out text may be easier than the part before it: that is no improvement."""

    def losses(self, step, *rest):
        part = {"val/part_loss": 3.2, "val/part_bpb": 3.2} if step == 12 else {}
        return {"val/loss": {5: 3.0, 10: 3.1, 12: 2.0}[step], "val/bpb": 3.0, **part}

    monkeypatch.setattr(evaluator.Evaluator, "validate", losses)
    run = train(
        change(tiny, checkpoint__keep_best=True, checkpoint__every=0, checkpoint__keep_last=1), tmp_path / "run"
    )
    assert [checkpoint.step for checkpoint in checkpoints(run.checkpoints)] == [5, 12]


def test_old_lines_are_read_as_before(tmp_path: Path):
    """Of a run that was made before there were parts: its last validation goes on with the curve."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 3.0, "val/loss": 3.0 - step / 10, "val/bpb": 2.0} for step in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_out(Curves(file)) == [(1, 2.9, 2.0), (2, 2.8, 2.0)]
    assert newest_held_out(Curves(file)) == (2, 2.8, 2.0)


def test_a_stream_keeps_no_training_text(text_file: Path, tmp_path: Path, capsys):
    options = ["--data", str(text_file), "--data.stream", "--eval.train_tokens", "64", "--out", str(tmp_path / "run")]
    assert main(["train", *options]) == 2
    errors = capsys.readouterr().err
    assert "a stream (data.stream) keeps no training text to measure on; set --eval.train_tokens 0" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_the_sources_validate():
    """NanoGPT's eval_iters batches of each split; appendix D's batch of each; S0's and appendix D's i % n == 0."""
    for name, batches, rows in (
        ("shakespeare-char", 200, 64),
        ("shakespeare-char-cpu", 20, 12),
        ("gpt2-124m", 200, 12),
        ("gpt-6x384", 100, 16),
    ):
        config = load_config(name)
        tokens = batches * rows * config.model.context_length
        assert (config.eval.tokens, config.eval.train_tokens, config.eval.order) == (tokens, tokens, "random")
        assert config.eval.at_start == (name != "gpt-6x384")
    verdict, storybot = load_config("verdict"), load_config("storybot")
    assert (verdict.eval.every, verdict.eval.offset, verdict.eval.tokens, verdict.eval.train_tokens) == (5, 1, 512, 512)
    assert (storybot.eval.every, storybot.eval.offset, storybot.eval.tokens) == (500, 1, 0)
    assert storybot.checkpoint.at == (501, 5001)
    for name, tokens in (("nanochat", 80 * 524288), ("nanochat-d20", 20 * 524288)):
        chat = load_config(name).eval
        assert (chat.every, chat.at_start, chat.tokens, chat.order, chat.offset) == (250, True, tokens, "sequential", 0)


def test_two_runs_with_and_without_show_side_by_side(measured: Config, tiny: Config, tmp_path: Path, capsys):
    runs = [train(measured, tmp_path / "measured"), train(tiny, tmp_path / "tiny")]
    assert main(["report", *(str(run.folder) for run in runs), "--out", str(tmp_path / "both.html"), "--png"]) == 0
    assert (tmp_path / "loss.png").exists()
    assert "all held-out text" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert read_jsonl(runs[0].metrics)[0]["step"] == 0
