"""A run that begins in the middle of another goes on as one that was so from the start, or says what differs."""

import os
import shutil
from pathlib import Path

import pytest
import tomli_w
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run, learned

from pretrain.cli import main
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.runs.run import weights_id

STABLE = {"schedule.kind": "constant", "model.dropout": 0.1, "optim.ema": 0.9, "checkpoint.keep_last": 0}
"""Every part of the state matters; checkpoints of steps 4, 8 and 12."""


def pretrain(*words: object) -> int:
    return main([str(word) for word in words])


def recipe_of(folder: Path, text: Path, **fields: object) -> Path:
    tree: dict = {"data": {"paths": [str(text)]}}
    for name, value in {**TINY, **STABLE, **fields}.items():
        section, field = name.split(".")
        tree.setdefault(section, {})[field] = value
    file = folder / "stable.toml"
    file.write_text(tomli_w.dumps(tree))
    return file


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A recipe of a tiny run with a constant rate."""
    return recipe_of(tmp_path_factory.mktemp("recipe"), text_file)


@pytest.fixture(scope="module")
def stable(recipe: Path) -> Path:
    """The run of it, which nothing may change."""
    out = recipe.parent / "stable"
    assert pretrain("train", recipe, "--out", out) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("step", "share", "steps"), [(4, 0.2, 5), (8, 0.2, 10), (8, 0.5, 16)])
def test_endings_off_a_stable_run_are_those_of_runs_with_that_schedule(
    stable: Path, recipe: Path, tmp_path: Path, step: int, share: float, steps: int
):
    before, out, whole = contents(stable), tmp_path / "fork", tmp_path / "whole"
    assert pretrain("fork", stable, "--step", step, "--anneal", share, "--out", out) == 0
    assert contents(stable) == before
    linear = ("--schedule.kind", "linear", "--schedule.decay_fraction", share, "--train.steps", steps)
    assert pretrain("train", recipe, "--out", whole, *linear) == 0
    one, other = Run.open(out), Run.open(whole)
    assert one.config == other.config
    assert [record["step"] for record in learned(one)] == list(range(1, steps + 1))
    assert_same_run(one, other)


def test_the_same_command_goes_on_and_needs_the_parent_no_more(stable: Path, recipe: Path, tmp_path: Path):
    parent, out, whole = tmp_path / "parent", tmp_path / "fork", tmp_path / "whole"
    shutil.copytree(stable, parent)
    words = ("fork", parent, "--step", 4, "--train.grad_clip", 0.5, "--out", out)
    assert pretrain(*words, "--no-train") == 0
    assert [checkpoint.step for checkpoint in checkpoints(Run.open(out).checkpoints)] == [4]
    shutil.rmtree(parent)
    assert pretrain(*words) == 0
    assert pretrain("train", "--out", out) == 0  # finished: nothing left
    shutil.copytree(stable, parent)
    assert pretrain("fork", parent, "--step", 4, "--train.grad_clip", 0.5, "--out", whole) == 0
    assert_same_run(Run.open(out), Run.open(whole))
    assert pretrain(*words[:-2], "--optim.lr", 0.01, "--out", out) == 2
    assert pretrain("fork", parent, "--step", 8, "--out", out) == 2
    assert pretrain("fork", parent, "--out", parent) == 2


def test_the_family_is_recorded(stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    assert pretrain("fork", stable, "--step", 8, "--optim.lr", 0.01, "--out", child) == 0
    assert pretrain("fork", child, "--anneal", 0.5, "--out", grandchild, "--no-train") == 0
    said = capsys.readouterr().out
    assert f"fork      step 8 of {stable} → {child}" in said
    assert "differs   optim.lr 0.02 → 0.01" in said
    assert "rate      0.02 at step 8 of" in said
    assert f"rate      0.01 at step 12 of {child}, 0.01 at step 13 here" in said
    first, second = (Run.open(folder).fork for folder in (child, grandchild))
    assert first == {
        "parent": str(stable.resolve()),
        "relative": os.path.relpath(stable.resolve(), child.resolve()),
        "step": 8,
        "weights": weights_id(Run.open(stable).checkpoint(8)),
        "differences": ["optim.lr 0.02 → 0.01"],
        "ancestors": [],
    }
    assert second
    assert (second["step"], second["ancestors"]) == (12, [first])
    assert Run.open(grandchild).config.train.steps == 24


REFUSED = {
    "model.width 32 → 64": ("--model.width", 64),
    "model.depth 0 → 1": ("--model.depth", 1, "--model.bias"),
    "optim.kind 'muon' → 'adamw'": ("--optim.kind", "adamw"),
    "optim.normuon_beta2 0.0 → 0.9": ("--optim.normuon_beta2", 0.9),
    "guard.spike_sigma": ("--guard.spike_sigma", 6),
    "train.precision 'fp32' → 'fp16'": ("--train.precision", "fp16"),
    "leave --tokenizer.kind out": ("--tokenizer.kind", "char"),
    "leave --train.init_from out": ("--init-from", "elsewhere"),
    "give more --train.steps": ("--train.steps", 4),
    "give --train.steps": ("--train.minutes", 1),
    "both set the decay": ("--anneal", 0.2, "--schedule.kind", "cosine"),
    "no checkpoint of step 3; there are: 4, 8, 12": ("--step", 3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_kept_is_refused_and_leaves_nothing(
    stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
):
    words = REFUSED[message]
    step = () if "--step" in words else ("--step", 4)
    assert pretrain("fork", stable, *step, *words, "--out", tmp_path / "fork") != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
