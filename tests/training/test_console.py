import dataclasses
import io
from typing import Any

import pytest
import rich.console
import torch

from pretrain.config import Config
from pretrain.device import Precision
from pretrain.io import read_jsonl
from pretrain.training import Console, train
from pretrain.training.console import Panel


def record(step: int, loss: float | None = 4.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 2.0 * step,
        "train/loss": loss,
        "train/smoothed_loss": 4.25,
        "train/lr": 0.001,
        "train/grad_norm": 0.5,
        "train/tokens_per_second": 12_000,
        **more,
    }


NOW = [100.0]


@pytest.fixture
def panel() -> Panel:
    terminal = rich.console.Console(file=io.StringIO(), width=120, get_time=lambda: NOW[0])
    return Panel(terminal, Precision("bf16", torch.device("cpu")), share=1e-5, done=0, steps=200)


def shown(panel: Panel) -> str:
    with panel.live.console.capture() as capture:
        panel.live.console.print(panel.draw())
    return capture.get()


def test_what_the_panel_shows(panel: Panel):
    assert "first step" in shown(panel)
    for step in range(1, 51):
        panel.record = record(step, 4.0)
        panel.draw()
        NOW[0] += 2.0
    text = shown(panel)
    assert "step 50/200" in text
    assert "25%" in text
    assert "05:00 left" in text
    panel.validation = record(50, 4.0, **{"val/loss": 4.4, "val/bpb": 1.7})
    text = shown(panel)
    assert "loss 4.250 (last 4.000)" in text
    assert "validation 1.700 bits per byte at step 50" in text
    assert "lr 1.00e-03" in text
    assert "gradient norm 0.5" in text
    assert "12,000 tokens/s" in text
    assert "12% of peak bf16" in text
    assert "no checkpoint yet" in text
    panel.saved = 40
    assert "checkpoint of step 40" in shown(panel)
    console = Console(quiet=True)
    console._panel = panel
    console.on_evaluation(record(60, 4.0, **{"val/loss": None, "val/bpb": None}))  # kept: the last finite one
    console.on_step(record(61, None, **{"train/grad_norm": None}))
    text = shown(panel)
    assert "validation 1.700" in text
    assert "(last none)" in text
    assert "gradient norm none" in text


def run_on(console: Console, config: Config, out: Any, terminal: bool) -> str:
    """What a run prints on a terminal, or into a pipe."""
    buffer = io.StringIO()
    console._console = rich.console.Console(
        file=buffer, force_terminal=terminal, width=120, highlight=False, soft_wrap=True
    )
    train(config, out, console)
    return buffer.getvalue()


def test_piped_output_is_plain_lines(tiny: Config, tmp_path):
    text = run_on(Console(), tiny, tmp_path / "run", terminal=False)
    assert "\x1b" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in steps] == list(range(1, 13))
    assert all("bits per byte" in steps[i - 1] for i in (5, 10, 12))
    assert "of peak" not in text


def test_piped_output_at_an_interval(tiny: Config, tmp_path):
    """Of the smoothed loss, not of the last step's alone."""
    config = dataclasses.replace(tiny, log=dataclasses.replace(tiny.log, every=3))
    text = run_on(Console(), config, tmp_path / "run", terminal=False)
    shown = {int(line.split()[1]): line.split()[4] for line in text.splitlines() if line.startswith("step ")}
    assert list(shown) == [3, 5, 6, 9, 10, 12]  # and the validations
    records = {record["step"]: record for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    assert shown == {step: f"{records[step]['train/smoothed_loss']:.3f}" for step in shown}
    assert shown[9] != f"{records[9]['train/loss']:.3f}"


@pytest.mark.parametrize("every", [1, 5])
def test_nothing_held_out_prints_each_line_once(tiny: Config, tmp_path, every: int):
    changes = {"data": {"val_fraction": 0.0}, "log": {"every": every}}
    config = dataclasses.replace(tiny, **{n: dataclasses.replace(getattr(tiny, n), **c) for n, c in changes.items()})
    text = run_on(Console(), config, tmp_path / "run", terminal=False)
    shown = [int(line.split()[1]) for line in text.splitlines() if line.startswith("step ")]
    assert shown == (list(range(1, 13)) if every == 1 else [5, 10, 12])


def test_a_terminal_has_a_panel_and_events_above_it(tiny: Config, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.training.console.peak_flops", lambda device, dtype: 1e12)
    text = run_on(Console(), tiny, tmp_path / "run", terminal=True)
    assert "step 12/12" in text
    assert "tokens/s" in text
    assert "of peak fp32" in text
    assert "[bold]" not in text
    assert text.count("bits per byte   ") == 3  # the lines of three validations


def test_a_quiet_console_shows_and_measures_nothing(tiny: Config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.training.console.peak_flops", lambda *_: pytest.fail("measured"))
    train(tiny, tmp_path / "run", Console(quiet=True))
    assert capsys.readouterr().out == ""
