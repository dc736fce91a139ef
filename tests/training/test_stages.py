"""Mixtures whose weights change over the course of a run."""

import json
from pathlib import Path

import pytest
from tests.conftest import TINY
from tests.hf.test_export import card_of, table
from tests.training.test_loop import assert_same_run, change, killed_at

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.errors import UsageError
from pretrain.tokens import TrainingBatches
from pretrain.training import train


@pytest.fixture
def letters(tmp_path: Path) -> list[str]:
    """Token folders of documents of one letter."""
    for letter, documents in (("a", 20), ("b", 30)):
        text = tmp_path / f"{letter}.jsonl"
        text.write_text("".join(json.dumps({"text": letter * (50 + n)}) + "\n" for n in range(documents)))
        arguments = ["--tokenizer", "byte", "--split", "hash", "--val-fraction", "0.2"]
        assert main(["data", "prepare", str(text), "--out", str(tmp_path / letter), *arguments]) == 0
    return [str(tmp_path / letter) for letter in "ab"]


@pytest.fixture
def staged(letters: list[str]) -> Config:
    """A run that reads only the first folder, and in its last third mostly the other."""
    mixture = {"data.weights": [1, 0], "data.stages": ["0.66: 0.2 0.8"], "eval.train_tokens": 320}
    return load_config("quickstart", **{**TINY, "data.paths": letters, **mixture})


def test_a_run_in_stages(staged: Config, tmp_path: Path, monkeypatch):
    read: dict[int, list[str]] = {}
    batch = TrainingBatches.batch

    def recorded(self, step: int):
        inputs, targets = batch(self, step)
        read[step] = [chr(row.mode().values) for row in targets]
        return inputs, targets

    monkeypatch.setattr(TrainingBatches, "batch", recorded)
    whole = train(staged, tmp_path / "whole")
    first, last = ([letter for step in steps for letter in read[step]] for steps in (range(8), range(8, 12)))
    assert set(first) == {"a"}
    assert 16 <= last.count("b") < len(last) == 32
    for killed in (7, 9):  # after the checkpoints of steps 4 and 8: before and after the stage begins
        undisturbed = dict(read)
        with killed_at(killed, monkeypatch):
            train(staged, tmp_path / f"killed-{killed}")
        assert_same_run(train(staged, tmp_path / f"killed-{killed}"), whole)
        assert read == undisturbed

    shares = [row[-1] for row in table(card_of(whole), str(tmp_path))]
    assert shares == [f"{(96 - last.count('b')) / 96:.1%}", f"{last.count('b') / 96:.1%}"]
    before = (whole.folder / "config.toml").read_bytes()
    longer = load_config(str(whole.folder / "config.toml"), **{"train.steps": 24})
    with pytest.raises(UsageError, match=r"train\.steps 12 → 24 would begin the stages of data\.stages.*another --out"):
        train(longer, whole.folder)
    assert (whole.folder / "config.toml").read_bytes() == before
    assert whole.summary is not None
    with pytest.raises(UsageError, match=r"train\.steps 3 are too few"):
        train(change(staged, train__steps=3, data__stages=("0.1: 0 1",)), tmp_path / "short")
    assert not (tmp_path / "short" / "config.toml").exists()


def test_the_plan_of_a_run_in_stages(staged: Config, letters: list[str], capsys):
    arguments = ["plan", "quickstart", "--data", *letters, "--data.weights", "1", "0", "--data.stages", "0.66: 0.2 0.8"]
    arguments += [word for name in TINY for word in (f"--{name}", str(TINY[name]))]
    capsys.readouterr()
    assert main([*arguments, "--no-measure", "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out)["data"]["mixture"]
    assert [one["path"], other["path"]] == letters
    assert (one["tokens"][0], other["tokens"][0]) == (8 * 256, 0)
    assert one["tokens"][1] + other["tokens"][1] == 4 * 256
    assert other["tokens"][1] > one["tokens"][1]
    assert main([*arguments, "--no-measure"]) == 0
    words = capsys.readouterr().out
    assert f"{letters[1]}: none, then " in words
    assert "micro-batches of 8\n" in words
