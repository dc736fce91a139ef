"""The recipe of docs/design.md, "Adding an optimizer", followed to the letter: its file, and its line."""

import re
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TINY

from pretrain.config import load_config
from pretrain.errors import UsageError
from pretrain.io import read_jsonl
from pretrain.optim.build import OPTIMIZERS
from pretrain.plan import make_plan
from pretrain.runs import Run
from pretrain.training import train

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


@pytest.fixture
def signum(monkeypatch: pytest.MonkeyPatch) -> None:
    section = DESIGN.read_text(encoding="utf-8").partition("## Adding an optimizer\n")[2].partition("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    module = types.ModuleType("signum")
    exec(file, module.__dict__)
    table = eval(line.partition(" = ")[2], {**OPTIMIZERS, "signum": module})
    assert table == {**OPTIMIZERS, "signum": module}
    monkeypatch.setitem(OPTIMIZERS, "signum", table["signum"])


@pytest.mark.usefixtures("signum")
def test_a_new_optimizer_trains_and_resumes_bit_for_bit(text_file: Path, tmp_path: Path):
    settings = {**TINY, "data.paths": [str(text_file)], "optim.kind": "signum", "optim.lr": 0.003}
    config = load_config("quickstart", **settings)
    run = train(config, tmp_path / "run")
    losses = [record["train/loss"] for record in read_jsonl(run.metrics)]
    assert losses[-1] < losses[0] - 0.1
    before = tensors(run)
    assert sum(name.endswith(".momentum_buffer") for name in before) == len(before) // 2

    again = train(config, tmp_path / "run", resume_from=8)
    assert [record["train/loss"] for record in read_jsonl(again.metrics)] == losses
    after = tensors(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def tensors(run: Run) -> dict[str, torch.Tensor]:
    (file,) = run.newest_checkpoint().folder.glob("*.safetensors")
    found = {name: tensor.clone() for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if name.startswith(("model.", "optim."))}


@pytest.mark.usefixtures("signum")
def test_the_plan_knows_a_new_optimizer():
    config = load_config("quickstart", **{**TINY, "optim.kind": "signum"})
    plan = make_plan(config, measure=False)
    assert plan.memory["moments"] == pytest.approx(plan.memory["weights"], rel=1e-3)
    assert plan.checkpoint_bytes == 8 * sum(plan.parameters.values())


def test_an_unknown_optimizer_is_refused_before_any_work(text_file: Path, tmp_path: Path):
    config = load_config("quickstart", **{**TINY, "data.paths": [str(text_file)], "optim.kind": "adam"})
    message = r"optim.kind must be one of adamw, muon, not 'adam'; did you mean 'adamw'\?"
    with pytest.raises(UsageError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=message):
        make_plan(config, measure=False)
