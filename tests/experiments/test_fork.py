"""A run that begins in the middle of another goes on as one that was so from the start, or says what differs."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from tests.conftest import TINY
from tests.training.test_loop import assert_same_run, learned

from pretrain.cli import main
from pretrain.errors import CheckpointError
from pretrain.experiments import fork as fork_module
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints, copy_checkpoint
from pretrain.runs.run import weights_id
from pretrain.tokens import TrainingBatches

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
    assert pretrain("fork", child, "--anneal", 0.5, "--out", grandchild, "--no-train", "--json") == 0
    first, second = (Run.open(folder).fork for folder in (child, grandchild))
    assert json.loads(capsys.readouterr().out) == {"out": str(grandchild), **(second or {})}
    assert pretrain("fork", child, "--anneal", 0.5, "--out", grandchild, "--json") == 2
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


def test_the_report_draws_the_family(stable: Path, tmp_path: Path):
    for name in ("lost", "a", "b"):
        origin = stable if name == "lost" else tmp_path / "lost"
        words = ("--step", 8, "--optim.lr", {"lost": 0.01, "a": 0.005, "b": 0.03}[name], "--no-train")
        assert pretrain("fork", origin, *words, "--out", tmp_path / name) == 0
    shutil.rmtree(tmp_path / "lost")
    (other := tmp_path / "other").mkdir()
    (other / "fork.json").write_text("{}")
    loss = Run.open(stable).summary["val_loss"]  # type: ignore[index]
    parent, middle = f"stable, held-out loss {loss:.4f}", "lost, no longer there, from step 8: optim.lr 0.02 → 0.01"
    children = ["a, from step 8: optim.lr 0.01 → 0.005", "b, from step 8: optim.lr 0.01 → 0.03"]
    assert drawn(tmp_path / "a") == [parent, [middle, children]]
    assert drawn(tmp_path / "a", tmp_path / "b", stable) == [parent, [middle, children]]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(stable, moved / "stable")
    assert drawn(moved / "stable") == []


def drawn(*runs: Path) -> list:
    """The family on the page of runs as nested lists, those of the page checked to be bold."""
    page = runs[0] / "page.html"
    assert pretrain("report", *runs, "--out", page) == 0
    section = re.search(r'id="family-title">Family</h2>\s*(.*?)</section>', page.read_text(encoding="utf-8"), re.DOTALL)
    if not section:
        return []
    text = html.unescape(section[1])
    assert set(re.findall("<strong>(.*?)</strong>", text)) == {run.name for run in runs}
    levels: list[list] = [[]]
    for tag, words in re.findall(r"<(/?\w+)>([^<]*)", re.sub("</?(strong|code)>", "", text)):
        if tag == "ul":
            levels.append([])
        elif tag == "/ul":
            levels[-2].append(levels.pop())
        elif tag == "li":
            levels[-1].append(words.strip())
    return levels[0][0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[Path]:
    """Two data sets by one tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "other.txt").write_text(text_file.read_text(encoding="utf-8").upper(), encoding="utf-8")
    texts = {"a": text_file, "b": folder / "other.txt"}
    for name, text in texts.items():
        assert pretrain("data", "prepare", text, "--tokenizer", "byte", "--out", folder / name) == 0
    return [folder / name for name in texts]


def test_an_ending_with_another_mixture_is_that_of_a_run_in_stages(shards: list[Path], recipe: Path, tmp_path: Path):
    words = ("train", recipe, "--data", *shards, "--data.weights", 0.6, 0.4)
    ending = ("--data.stages", "0.8: 0.1 0.9")
    assert pretrain(*words, "--out", tmp_path / "stable") == 0
    assert pretrain(*words, *ending, "--train.steps", 10, "--out", tmp_path / "whole") == 0
    fork = ("fork", tmp_path / "stable", "--step", 8, *ending, "--train.steps", 10, "--out", tmp_path / "fork")
    assert pretrain(*fork) == 0
    assert_same_run(Run.open(tmp_path / "fork"), Run.open(tmp_path / "whole"))


def batches_of(monkeypatch: pytest.MonkeyPatch, *words: object) -> list[int]:
    """The numbers of the batches that a command trains on."""
    read: list[int] = []
    batch = TrainingBatches.batch
    monkeypatch.setattr(TrainingBatches, "batch", lambda self, step: read.append(step) or batch(self, step))
    assert pretrain(*words) == 0
    return read


def test_other_text_begins_at_its_beginning_and_its_losses_alone_count(
    stable: Path, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for place in (shards[1], shards[1].parent / "other.txt"):
        out = tmp_path / place.name
        words = ("--data", place, "--checkpoint.keep_best", "--train.steps", 11)
        assert batches_of(monkeypatch, "fork", stable, "--step", 8, *words, "--out", out) == [0, 1, 2]
        records = read_jsonl(out / "metrics.jsonl")
        assert [record["step"] for record in records if "train/loss" in record] == list(range(1, 12))
        assert [record["step"] for record in records if "val/loss" in record] == [10, 11]
        assert [record["step"] for record in read_jsonl(stable / "metrics.jsonl") if "val/loss" in record] == [
            5,
            10,
            12,
        ]
        assert Run.open(out).summary["model_step"] in (10, 11)  # type: ignore[index]


def test_other_shards_need_the_same_tokenizer(
    stable: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ("--tokenizer", "bpe", "--vocab_size", 300, "--out", tmp_path / "bpe")
    assert pretrain("data", "prepare", text_file, *words) == 0
    assert pretrain("fork", stable, "--step", 4, "--data", tmp_path / "bpe", "--out", tmp_path / "fork") == 2
    assert f"make it with: pretrain data prepare --tokenizer {stable / 'tokenizer.json'}\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bpe"]


def test_larger_batches_go_on_where_the_data_was(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("fork", stable, "--step", 8, "--train.batch_tokens", 512, "--train.steps", 10, "--out", tmp_path / "fork")
    assert batches_of(monkeypatch, *words) == [4, 5]
    tokens = [record["tokens"] for record in read_jsonl(tmp_path / "fork" / "metrics.jsonl")]
    assert tokens == [256 * step for step in range(1, 9)] + [2048 + 512, 2048 + 1024]
    smaller = ("fork", tmp_path / "fork", "--train.batch_tokens", 64, "--train.steps", 12, "--out", tmp_path / "small")
    assert batches_of(monkeypatch, *smaller)[:2] == [48, 49]
    assert Run.open(tmp_path / "small").summary["tokens"] == 2048 + 1024 + 128  # type: ignore[index]


def test_a_stream_goes_on_at_its_cursors_or_begins_anew_aloud(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
):
    lines = text_file.read_text(encoding="utf-8").splitlines()
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    recipe = recipe_of(tmp_path, text, **{"data.stream": True, "data.split": "hash"})
    assert pretrain("train", recipe, "--out", tmp_path / "stable") == 0
    schedule = ("--schedule.kind", "linear", "--schedule.decay_fraction", 0.2, "--train.steps", 10)
    assert pretrain("train", recipe, *schedule, "--out", tmp_path / "whole") == 0
    fork = ("fork", tmp_path / "stable", "--step", 8)
    assert pretrain(*fork, "--anneal", 0.2, "--out", tmp_path / "fork") == 0
    assert_same_run(Run.open(tmp_path / "fork"), Run.open(tmp_path / "whole"))
    assert "begins anew" not in capsys.readouterr().out
    assert pretrain(*fork, "--train.seed", 5, "--out", tmp_path / "seed") == 0
    assert "data      begins anew, at the beginning of its text" in capsys.readouterr().out


def test_the_model_is_none_of_the_checkpoints_that_stay_with_the_parent(stable: Path, tmp_path: Path):
    parent, out = tmp_path / "parent", tmp_path / "fork"
    shutil.copytree(stable, parent)
    records = read_jsonl(parent / "metrics.jsonl")
    for record in records:
        if record["step"] == 5:
            record["val/loss"] = 0.1
    (parent / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert pretrain("fork", parent, "--step", 8, "--checkpoint.keep_best", "--out", out) == 0
    run = Run.open(out)
    assert run.summary["model_step"] in (10, 12)  # type: ignore[index]
    assert run.model_checkpoint().step == run.summary["model_step"]  # type: ignore[index]


def test_a_fork_without_its_checkpoint_does_not_begin_at_step_0(
    stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "fork"
    assert pretrain("fork", stable, "--step", 8, "--train.steps", 20, "--out", out, "--no-train") == 0
    shutil.rmtree(out / "checkpoints")
    assert pretrain("train", "--out", out) == 1
    assert f"has no checkpoint, and it begins with step 8 of {stable}" in capsys.readouterr().err


class Killed(BaseException):
    """The end of the process, as far as what is on the disk shows it."""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_run_and_the_same_command_makes_it(
    stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ("fork", stable, "--step", 8, "--anneal", 0.2, "--no-train", "--out")
    assert pretrain(*words, tmp_path / "whole") == 0
    whole, out = contents(tmp_path / "whole"), tmp_path / "fork"
    left = {"events": 0}

    def strike(event: str, _: object) -> None:
        if left["events"] and event in ("open", "os.link", "os.rename", "os.mkdir", "os.remove"):
            left["events"] -= 1
            if not left["events"]:
                raise Killed

    sys.addaudithook(strike)
    number, done = 0, 0
    for number in itertools.count(3, 5):
        monkeypatch.setattr(fork_module, "clear_run", clear_once(fork_module.clear_run))
        left["events"] = number
        try:
            pretrain(*words, out)
        except Killed:
            assert not out.exists() or contents(out).keys() == whole.keys()
        finally:
            monkeypatch.undo()
        if done := left["events"]:
            left["events"] = 0
            break
        if number % 2:  # now and then it goes on at once, and else it is killed again
            continue
        assert pretrain(*words, out) == 0
        assert contents(out).keys() == whole.keys()
        shutil.rmtree(out)
    assert done
    assert number > 60
    made = contents(out)
    different = {name for name in whole.keys() | made.keys() if whole.get(name) != made.get(name)}
    assert different <= {"fork.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "fork"}


def clear_once(clear: Callable[[Path], None]) -> Callable[[Path], None]:
    """At the beginning only, as nothing clears after a kill."""
    calls = iter([clear])
    return lambda folder: next(calls, lambda _: None)(folder)


def test_a_checkpoint_that_is_damaged_or_pruned_meanwhile_is_not_copied(stable: Path, tmp_path: Path):
    shutil.copytree(stable / "checkpoints", tmp_path / "checkpoints")
    checkpoint = checkpoints(tmp_path / "checkpoints")[0]
    (file,) = checkpoint.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is not what was written"):
        copy_checkpoint(checkpoint, tmp_path / "one", {})
    file.unlink()
    with pytest.raises(CheckpointError, match="was pruned meanwhile"):
        copy_checkpoint(checkpoint, tmp_path / "two", {})
    assert not checkpoints(tmp_path / "one") + checkpoints(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_end_as_two_from_the_start(recipe: Path, tmp_path: Path):
    def together(*words: object) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_ADDR2LINE": "1"}
        command = [sys.executable, "-m", "pretrain", *map(str, words), "--nproc", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    schedule = ("--schedule.kind", "linear", "--schedule.decay_fraction", 0.2, "--train.steps", 10)
    together("train", recipe, "--out", tmp_path / "stable")
    together("train", recipe, *schedule, "--out", tmp_path / "whole")
    together("fork", tmp_path / "stable", "--step", 8, "--anneal", 0.2, "--out", tmp_path / "fork")
    one, other = Run.open(tmp_path / "fork"), Run.open(tmp_path / "whole")
    assert learned(one) == learned(other)
    for ours, theirs in zip(
        *(sorted(run.checkpoint(10).folder.glob("*.safetensors")) for run in (one, other)), strict=True
    ):
        a, b = load_file(ours), load_file(theirs)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
