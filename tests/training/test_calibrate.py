"""The temperature of the head that suits the held-out text (eval.calibrate): found, kept, and part of the model."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.training.test_average import noise, validations  # noqa: F401 (a fixture)
from tests.training.test_loop import assert_same_run, change, killed_at

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.errors import UsageError
from pretrain.evaluation.loss import LossResult
from pretrain.fitting import CALIBRATIONS
from pretrain.io import read_jsonl
from pretrain.runs.checkpoint import name_in_checkpoint
from pretrain.training import train
from pretrain.training.evaluator import TEMPERATURE_STEP, Evaluator


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_is_too_sure_is_calibrated(noise: Config, tmp_path: Path, capsys, ema: float):  # noqa: F811
    config = change(noise, optim__ema=ema, checkpoint__keep_best=False)
    plain = train(config, tmp_path / "plain")
    run = train(change(config, eval__calibrate=True), tmp_path / "run")
    losses = {step: record["val/loss"] for step, record in validations(plain).items()}
    for step, record in validations(run).items():
        assert record["val/loss"] <= losses[step]
    last, summary = validations(run)[config.train.steps], run.summary or {}
    assert last["val/temperature"] > 1.2
    assert last["val/loss"] < losses[config.train.steps] - 0.05
    assert (summary["val_loss"], summary["model_temperature"]) == (last["val/loss"], last["val/temperature"])

    # Training, and what is saved of it, is as without; the model that is loaded has the head divided.
    a, b = (made.newest_checkpoint() for made in (plain, run))
    model, weights = run.load_model(), run.weights(config.train.steps)
    for name, p in model.named_parameters():
        saved = torch.empty_like(p)
        b.load({name_in_checkpoint(name, weights): saved})
        torch.testing.assert_close(p * (last["val/temperature"] if name == "head.weight" else 1), saved)
    for name, p in plain.load_model(checkpoint=a).named_parameters():
        saved = torch.empty_like(p)
        b.load({name_in_checkpoint(name, plain.weights(config.train.steps)): saved})
        assert torch.equal(p, saved)
    assert main(["eval", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(last["val/loss"], abs=1e-6)
    assert main(["export", str(run.folder), "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"divided by the temperature {last['val/temperature']:.2f}" in card


def test_a_killed_run_ends_with_the_same_temperature(noise: Config, tmp_path: Path, monkeypatch):  # noqa: F811
    config = change(noise, eval__calibrate=True, optim__ema=0.9)
    undisturbed = train(config, tmp_path / "undisturbed")
    with killed_at(config.train.steps // 2 + 3, monkeypatch):
        train(config, tmp_path / "killed")
    run = train(config, tmp_path / "killed")
    assert_same_run(run, undisturbed)
    temperatures = [[r.get("val/temperature") for r in read_jsonl(made.metrics)] for made in (run, undisturbed)]
    assert temperatures[0] == temperatures[1]


def test_a_head_that_is_shared_is_refused():
    with pytest.raises(UsageError, match=r"calibrate divides the head, which model.tied_head shares"):
        load_config("quickstart", **{"eval.calibrate": True, "model.tied_head": True})


@pytest.mark.parametrize("moves", [0, 1])
def test_a_validation_tries_as_many_temperatures_as_its_time_is_estimated_with(moves: int):
    best, tried = TEMPERATURE_STEP**moves, []
    evaluator = SimpleNamespace(temperature=1.0, better_weights=nullcontext)

    def measure() -> dict[str, LossResult]:
        return {"text": result(evaluator.temperature)}

    def result(temperature: float) -> LossResult:
        tried.append(temperature)
        return LossResult(nats=1 + abs(math.log(temperature / best)), tokens=1, text_nats=1.0, text_bytes=1)

    first = measure()
    Evaluator.calibrated(evaluator, first, measure)  # type: ignore[arg-type]
    assert evaluator.temperature == pytest.approx(best)
    assert len(tried) == 1 + CALIBRATIONS
