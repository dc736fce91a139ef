"""A run that begins in the middle of another goes on exactly as one that was so from the start, or says what differs."""

import json
import shutil
from pathlib import Path

import pytest
import tomli_w
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run, learned

from pretrain.cli import main
from pretrain.io import read_jsonl
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
