"""The horizon in epochs, and the warmup and the clipping that follow from it."""

import json
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.io import read_jsonl
from pretrain.runs import Run

TEXT = "".join(f"{number} sheep sleep.\n" for number in range(40))
WINDOWS = len(range(0, int(0.9 * len(TEXT)) - 16, 16))  # as the book cuts a text: a window and its target fit
SMALL = [
    *("--tokenizer.kind", "char", "--model.layers", "1", "--model.heads", "2", "--model.width", "16"),
    *(
        "--model.context-length",
        "16",
        "--train.batch-tokens",
        "32",
        "--train.device",
        "cpu",
        "--train.precision",
        "fp32",
    ),
    *("--eval.every", "0", "--sample.max-tokens", "0", "--log.backends", "none"),
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "sheep.txt"
    file.write_text(TEXT)
    return str(file)


def test_epochs_become_steps(text: str, tmp_path: Path, capsys):
    out = tmp_path / "run"
    command = ["train", "verdict", "--data", text, *SMALL, "--data.stride", "16", "--out", str(out)]
    assert main(command) == 0
    steps = 15 * WINDOWS // 2
    warmup = int(0.2 * steps)
    said = capsys.readouterr().out
    derived = [line.strip() for line in said.splitlines() if line.startswith("derived")]
    assert derived == [
        f"derived   train.steps = {steps}",
        f"derived   schedule.warmup_steps = {warmup}",
        f"derived   train.grad_clip_from = {warmup}",
    ]
    config = Run.open(out).config
    assert (config.train.steps, config.train.epochs, config.train.grad_clip_from) == (steps, 0, warmup)
    assert (config.schedule.warmup_steps, config.schedule.warmup_fraction) == (warmup, 0)
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == list(range(1, steps + 1))

    assert main(["plan", *command[1:-2], "--no-measure", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"] == steps
    assert planned["data"]["windows"] == WINDOWS

    assert main(command) == 0  # the same again
    assert "is finished" in capsys.readouterr().out
    assert main(["train", "--out", str(out), "--train.steps", "0", "--train.epochs", "16"]) == 0
    assert Run.open(out).config.train.steps == 16 * WINDOWS // 2


@pytest.mark.parametrize("epochs", [0.5, 0.001])
def test_windows_at_every_position(text: str, tmp_path: Path, epochs: float):
    """As step 3's --epochs; of less than a step there is one."""
    out = tmp_path / "run"
    options = ["--train.steps", "0", "--train.epochs", str(epochs), "--schedule.warmup_steps", "3"]
    assert main(["train", "step3", "--data", text, *SMALL, *options, "--out", str(out)]) == 0
    windows = int(0.9 * len(TEXT)) - 16
    assert Run.open(out).config.train.steps == max(1, int(epochs * windows / 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.epochs", "3"], "train.steps 450 and train.epochs 3 both set the horizon; give 0 for one of them"),
        (
            ["--train.steps", "0", "--train.epochs", "3", "--train.target_flops", "1e9"],
            "train.target_flops 1e+09 and train.epochs 3 both set the horizon; give 0 for one of them",
        ),
        (["--train.steps", "0", "--train.epochs", "3", "--data.stream"], "which a stream (data.stream) has not"),
        (
            ["--schedule.warmup_fraction", "0.2"],
            "schedule.warmup_steps 20 and schedule.warmup_fraction 0.2 both set the warmup; give 0 for one of them",
        ),
    ],
)
def test_two_that_contradict_are_refused(options: list[str], said: str, tmp_path: Path, capsys):
    assert main(["train", "quickstart", *options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
