"""Forecasts: known coefficients come back, ladders that cannot tell are refused, and the commands around it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import Config, config_to_dict, load_config
from pretrain.errors import UsageError
from pretrain.experiments.forecast import Forecast, Size, fit, forecast, losses, size_of
from pretrain.runs import Run
from pretrain.training import train

TRUE = [0.9, 30.0, 0.35, 60.0, 0.32]
"""E, A, alpha, B, beta, as of a small model of bytes."""
GRID = [(n, d) for n in (60e3, 120e3, 250e3, 420e3, 620e3) for d in (250e3, 500e3, 1e6, 2e6)]
LARGER = np.log([[820e3, 3.8e6]])


def test_the_fit_recovers_the_coefficients_of_losses_without_noise():
    x = np.log(GRID)
    assert fit(x, losses(TRUE, x)) == pytest.approx(TRUE, rel=1e-3)
    assert fit(x[:, :1], losses(TRUE[:3], x[:, :1])) == pytest.approx(TRUE[:3], rel=1e-3)


def test_the_fit_predicts_a_larger_run_through_noise_and_an_outlier():
    x, truth = np.log(GRID), losses(TRUE, LARGER)[0]
    off = []
    for seed in range(5):
        measured = losses(TRUE, x) * np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(x)))
        measured[3] *= 1.2  # a run that went wrong
        off.append(losses(fit(x, measured), LARGER)[0] / truth - 1)
    assert np.abs(off).max() < 0.02
    assert np.sqrt(np.mean(np.square(off))) < 0.012


def test_the_fit_agrees_with_a_search_over_all_exponents():
    """The minimum that L-BFGS finds is not above that of an exhaustive search of the same objective."""
    x = np.log(GRID)
    measured = losses(TRUE, x) * np.exp(0.004 * np.random.default_rng(3).standard_normal(len(x)))

    def objective(coefficients) -> float:
        off = np.abs(np.log(losses(coefficients, x) / measured)) / 1e-3
        return np.where(off <= 1, off**2 / 2, off - 0.5).sum()

    found = objective(fit(x, measured))
    for alpha in np.arange(0.1, 1.2, 0.1):
        for beta in np.arange(0.1, 1.2, 0.1):
            terms = np.column_stack([np.ones(len(x)), np.exp(-alpha * x[:, 0]), np.exp(-beta * x[:, 1])])
            e, a, b = np.linalg.lstsq(terms / measured[:, None], np.ones(len(x)), rcond=None)[0]
            if min(e, a, b) > 0:
                assert found <= objective([e, a, alpha, b, beta]) + 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Run:
    """A finished run, whose copies become ladders."""
    out = tmp_path_factory.mktemp("forecast") / "run"
    config = load_config("quickstart", **{**TINY, "data.paths": [str(text_file)], "log.backends": ["none"]})
    train(config, out)
    shutil.rmtree(out / "checkpoints")
    return Run.open(out)


def made(trained: Run, folder: Path, width: int, tokens: float, loss: float | None = None, seed: int = 0, **eval: int):
    """A run of a ladder: of that width and so many tokens, with the loss that TRUE says, on a text of a billion."""
    shutil.copytree(trained.folder, folder)
    config = trained.config
    config = replace(config, model=replace(config.model, width=width), eval=replace(config.eval, **eval))
    config = replace(config, data=replace(config.data, stream=True))  # its epochs are not known
    run = Run.create(folder, config)
    size = size_of(run)
    noise = math.exp(0.002 * np.random.default_rng([width, int(tokens), seed]).standard_normal())
    loss = loss or float(losses(TRUE, np.log([[size.parameters, tokens]]))[0]) * noise
    summary = {**(trained.summary or {}), "tokens": int(tokens), "val_loss": loss, "val_bpb": loss / math.log(2)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return Run.open(folder)


def ladder(trained: Run, folder: Path) -> Path:
    """Three widths, three amounts of tokens."""
    for width in (32, 48, 64):
        for tokens in (1e5, 4e5, 16e5):
            made(trained, folder / f"{width}-{tokens:.0f}", width, tokens)
    return folder


def test_a_ladder_predicts_a_larger_run_and_the_commands_show_it(trained, tmp_path, capsys):
    place, big = ladder(trained, tmp_path / "ladder"), made(trained, tmp_path / "big", 128, 4e6, 0.001)
    truth = float(losses(TRUE, np.log([[size_of(big).parameters, 4e6]]))[0])
    assert main(["forecast", str(place), "--for", str(big.folder)]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("L = ", "The largest size, predicted from the others", "Best for these FLOPs"))
    assert (place / "forecast.png").stat().st_size > 1000

    kept = Forecast.load(str(place))
    assert kept == forecast([str(place)])  # the bootstrap is seeded, and JSON keeps all
    predicted = kept.predict(size_of(big))
    assert predicted.loss == pytest.approx(truth, rel=0.05)
    assert predicted.low < truth < predicted.high
    assert predicted.bits_per_byte == pytest.approx(predicted.loss / math.log(2))
    best, low, high = kept.best(predicted.size.flops)
    assert best.flops == pytest.approx(predicted.size.flops)
    for other in (0.9, 1.1):  # at the same FLOPs no other size is better
        assert kept.loss(best) < kept.loss(kept.size(best.parameters * other, best.tokens / other))
    assert low < best.parameters < high

    for far in ("1e-300", "1e300", "inf"):
        assert main(["forecast", str(place), "--flops", far]) == 2
        assert "a forecast is for 1e6 to 1e40 FLOPs" in capsys.readouterr().err
    assert main(["forecast", str(place), str(big.folder), "--for", str(big.folder), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["target"]["loss"] == predicted.loss  # the target is left out of its ladder
    assert len(tree["points"]) == 9
    assert tree["measured"] == 0.001

    assert main(["report", str(big.folder), "--forecast", str(place)]) == 0
    page = (big.folder / "report.html").read_text()
    assert f"Forecast: loss {predicted.loss:.4f}" in page
    assert "Measured 0.0010" in page
    assert "predicted loss" in page
    capsys.readouterr()
    assert main(["report", str(place / "32-100000"), "--forecast", str(place)]) == 2
    assert "is of the ladder" in capsys.readouterr().err

    options = [f"--{name}={value}" for name, value in TINY.items() if name not in ("train.steps", "model.width")]
    options += ["--model.width=128", "--train.steps=100", "--no-measure", "--forecast", str(place)]
    assert main(["plan", *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["forecast"]
    assert planned["size"]["parameters"] == size_of(big).parameters
    assert planned["loss"] == pytest.approx(kept.loss(Size(1, size_of(big).parameters, 25600)))
    assert main(["plan", *options]) == 0
    assert f"forecast   loss {planned['loss']:.4f}" in capsys.readouterr().out
    assert main(["plan", *options, "--tokenizer.kind=bpe"]) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert main(["plan", "--forecast", str(tmp_path)]) == 2
    assert "forecast.json" in capsys.readouterr().err


def test_seeds_are_points_and_unfinished_runs_are_left_out(trained, tmp_path):
    place = ladder(trained, tmp_path / "ladder")
    made(trained, place / "again", 32, 1e5, seed=1)
    unfinished = made(trained, place / "unfinished", 64, 4e6)
    (unfinished.folder / "summary.json").unlink()
    found = forecast([str(place)])
    assert len(found.points) == 10
    assert any("unfinished is not finished" in note for note in found.notes)


def test_where_parameters_and_tokens_vary_together_the_fit_is_over_flops(trained, tmp_path):
    for width in (16, 24, 32, 48, 64):
        tokens = 20 * size_of(made(trained, tmp_path / "probe" / str(width), width, 1e5)).parameters
        made(trained, tmp_path / "ladder" / f"{width:03}", width, tokens)
    found = forecast([str(tmp_path / "ladder")])
    assert not found.separable
    assert any("vary together" in note for note in found.notes)
    x = np.log([[point.size.flops] for point in found.points])
    assert np.abs(losses(found.coefficients, x) / [point.loss for point in found.points] - 1).max() < 0.01
    big = size_of(made(trained, tmp_path / "big", 128, 1e6))
    right = replace(big, tokens=20 * big.parameters, flops=big.flops * 20 * big.parameters / big.tokens)
    truth = losses(TRUE, np.log([[right.parameters, right.tokens]]))[0]
    assert found.predict(right).loss == pytest.approx(truth, rel=0.05)
    with pytest.raises(UsageError, match="do not tell parameters from tokens"):
        found.predict(replace(right, tokens=4 * right.tokens))
    assert main(["forecast", str(tmp_path / "ladder"), "--flops", "1e13"]) == 0


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ([(32, 1e5), (48, 4e5), (64, 16e5), (32, 4e5), (48, 1e5)], "6 sizes.*has 5 sizes"),
        ([(width, tokens) for width in (32, 64) for tokens in (1e5, 4e5, 16e5)], "three different.*2 and 3"),
        ([(32, 1e5), (32, 2e5), (32, 4e5)], "4 sizes.*FLOPs.*has 3 sizes"),
    ],
)
def test_too_few_sizes_are_refused(trained, tmp_path, sizes, why):
    for width, tokens in sizes:
        made(trained, tmp_path / f"{width}-{tokens:.0f}", width, tokens)
    with pytest.raises(UsageError, match=why):
        forecast([str(tmp_path)])


def test_losses_that_do_not_compare_are_refused(trained, tmp_path, text_file):
    place = ladder(trained, tmp_path / "ladder")
    made(trained, place / "strided", 32, 2e5, stride=16)
    with pytest.raises(UsageError, match=r"strided has another eval\.stride"):
        forecast([str(place)])
    shutil.rmtree(place / "strided")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    config = replace(trained.config, data=replace(trained.config.data, paths=(str(other),)))
    train(config, place / "zz")
    with pytest.raises(UsageError, match="zz has another held-out text"):
        forecast([str(place)])


def test_repeated_text_is_said(tiny: Config, trained, tmp_path):
    place = ladder(trained, tmp_path / "ladder")
    again = made(trained, place / "again", 32, 2e5)
    tree = config_to_dict(again.config)
    assert tree["data"]["stream"]
    Run.create(again.folder, replace(again.config, data=replace(again.config.data, stream=False)))
    notes = forecast([str(place)]).notes
    assert any("again: " in note and "epochs" in note for note in notes)


def test_real_runs_of_different_lengths(tiny: Config, tmp_path, capsys):
    for steps in (4, 8, 16, 32):
        train(replace(tiny, train=replace(tiny.train, steps=steps)), tmp_path / "ladder" / f"{steps:02}")
    assert main(["forecast", str(tmp_path / "ladder"), "--flops", "1e11"]) == 0
    said = capsys.readouterr().out
    assert "L = " in said
    assert "Parameters and tokens vary together" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--parameters", "5"], "go together"),
        (["--flops", "5", "--for", "quickstart"], "give one of them"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_use(options, why, tmp_path, capsys):
    assert main(["forecast", *([] if options[0] == "nowhere" else [str(tmp_path)]), *options]) in (1, 2)
    assert why in capsys.readouterr().err
