"""The exact text that a step trained on, against what the step was given."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY
from tests.training.test_loop import change, killed_at
from tests.training.test_world import run_together

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.io import append_jsonl, read_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import remove
from pretrain.tokens import LiveBatches, TrainingBatches
from pretrain.tokens.prepare import find_records
from pretrain.training import train
from pretrain.training.guard import LossScale

Given = dict[int, list[list[int]]]
"""Rows of each batch, as training was given them."""


def write_documents(file: Path, seed: int, count: int = 120) -> str:
    """Documents of made-up words, some of several rows, some not ASCII, with a line that is skipped."""
    draw = random.Random(seed)
    words = ["ash", "Noël", "王さん", "elm", "oak", "yew", "fir", str(seed)]
    texts = [" ".join(draw.choices(words, k=draw.choice([2, 5, 9, 40]))) for _ in range(count)]
    lines = [json.dumps({"text": text}) for text in texts]
    file.write_text("\n".join([*lines[:3], '{"other": 1}', *lines[3:]]) + "\n")
    return str(file)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write_documents(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("abc")]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    rows: Given = {}
    for kind in (TrainingBatches, LiveBatches):

        def recorded(self, step: int, batch=kind.batch):
            inputs, targets = batch(self, step)
            rows[step] = [[*i.tolist(), t[-1].item()] for i, t in zip(inputs, targets, strict=True)]
            return inputs, targets

        monkeypatch.setattr(kind, "batch", recorded)
    return rows


def at(run: Run, capsys, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", "at", str(run.folder), "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def rows_at(run: Run, capsys, *arguments: object) -> list[list[int]]:
    return [row["tokens"] for row in at(run, capsys, *arguments)["rows"]]


def check_places(run: Run, batch: int, rows: int, capsys) -> None:
    """Each part of a row is, byte for byte, what the file has at the record and the byte that are told."""
    tokenizer = run.tokenizer()
    for number in range(rows):
        (row,) = at(run, capsys, "--batch", batch, "--row", number)["rows"]
        ends = [part["begin"] for part in row["parts"][1:]] + [len(row["tokens"])]
        assert row["parts"][0]["begin"] == 0
        for part, end in zip(row["parts"], ends, strict=True):
            lines = Path(part["file"]).read_bytes()[part["after"] :].splitlines()
            text = json.loads(lines[part["record"] - 1])["text"].encode()
            shown = tokenizer.decode_bytes(row["tokens"][part["begin"] : end])
            assert text[part.get("byte", 0) :].startswith(shown)
            assert shown or end - part["begin"] == 1  # a BOS token


OPTIONS = ["--split", "hash", "--tokenizer", "byte", "--val-fraction", "0.2"]


@pytest.mark.parametrize("own", [True, False])
def test_rows_of_shards(files: list[str], tmp_path: Path, given: Given, capsys, own: bool):
    data: dict[str, Any] = {"data.paths": files, "data.split": "hash", "data.val_fraction": 0.2}
    if not own:
        data = {
            "data.paths": [str(tmp_path / "ab"), str(tmp_path / "c")],
            "data.weights": [1, 1],
            "data.stages": [".5:1 3"],
        }
        for folder, texts in zip(data["data.paths"], (files[:2], files[2:]), strict=True):
            assert main(["data", "prepare", *texts, "--out", folder, *OPTIONS, "--shard-tokens", "1500"]) == 0
    run = train(load_config("quickstart", **{**TINY, **data}), tmp_path / "run")
    recorded = dict(given)
    for step in (1, 7, 12):
        assert rows_at(run, capsys, "--step", step) == recorded[step - 1]
    check_places(run, 6, 8, capsys)
    found = at(run, capsys, "--step", 7, "--row", 5)
    assert (found["step"], found["batch"], found["world"]) == (7, 6, 1)
    (row,) = found["rows"]
    assert (row["row"], row["rank"], row["tokens"]) == (5, 0, recorded[6][5])
    assert row["text"] == run.tokenizer().decode(row["tokens"], show_special=True)

    assert main(["data", "at", str(run.folder), "--step", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert lines[10].startswith(
        f"batch 6, row 5, rank 0: {row['parts'][0]['shard']}, token {row['parts'][0]['token']:,}"
    )
    assert main(["data", "at", str(run.folder), "--step", "7", "--row", "5"]) == 0
    words = capsys.readouterr().out
    assert words.endswith(f"\n\n{row['text']}\n")
    assert f", record {row['parts'][-1]['record']:,}" in words

    write_documents(Path(files[0]), seed=9)  # the text is another now, the shards are as they were
    for number in range(8):
        parts = at(run, capsys, "--step", 7, "--row", number)["rows"][0]["parts"]
        assert own or any("file" in part for part in parts) == parts[0]["shard"].startswith(str(tmp_path / "c"))
        assert not own or not any("file" in part for part in parts)
    assert rows_at(run, capsys, "--step", 7) == recorded[6]


def test_rows_of_a_plain_text(text_file: Path, tiny: Config, tmp_path: Path, given: Given, capsys):
    for name, changes in (("bytes", {}), ("char", {"tokenizer__kind": "char"})):
        run = train(change(tiny, **changes), tmp_path / name)
        assert rows_at(run, capsys, "--step", 3) == given[2]
        (row,) = at(run, capsys, "--step", 3, "--row", 2)["rows"]
        (part,) = row["parts"]
        assert part["file"] == str(text_file)
        assert text_file.read_bytes()[part["byte"] :].startswith(run.tokenizer().decode_bytes(row["tokens"]))


@pytest.mark.parametrize("data", [{}, {"data.stream": True}, {"data.stream": True, "data.packing": "best_fit"}])
def test_a_plain_text_in_pieces(tmp_path: Path, capsys, monkeypatch, data: dict[str, Any]):
    """Bytes are counted after a cut, which is at most CUT_WINDOW beyond the byte that the piece begins with."""
    for module, name, value in (
        ("text.pieces", "RANGE_BYTES", 5000), ("text.formats", "PART_CHARACTERS", 1500),
        ("text.formats", "CUT_WINDOW", 200), ("tokens.jobs", "JOB_BYTES", 5000), ("tokens.prepare", "SMALL_JOBS", 100),
    ):  # fmt: skip
        monkeypatch.setattr(sys.modules[f"pretrain.{module}"], name, value)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} is the number of this line, Noël.\n" for number in range(1000)))
    run = train(
        load_config(
            "quickstart", **{**TINY, "data.paths": [str(text)], **data, "data.readers": 2, "data.val_fraction": 0.2}
        ),
        tmp_path / "run",
    )
    cuts: dict[int, set[int]] = {}
    for row in range(8):
        (found,) = at(run, capsys, "--step", 11, "--row", row)["rows"]
        ends = [part["begin"] for part in found["parts"][1:]] + [len(found["tokens"])]
        for part, end in zip(found["parts"], ends, strict=True):
            shown = run.tokenizer().decode_bytes(found["tokens"][part["begin"] : end])
            if len(shown) > 20 and any(48 <= byte < 58 for byte in shown):  # it has the number of a line
                place = part.get("after", 0) + part["byte"]
                cuts.setdefault(part["after"], set()).add(text.read_bytes().index(shown, place) - place)
    assert len(cuts) > 1
    assert all(len(offsets) == 1 and max(offsets) < 200 for offsets in cuts.values())


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_of_a_stream(files: list[str], tmp_path: Path, given: Given, capsys, monkeypatch, packing: str):
    data = {"data.paths": files, "data.stream": True, "data.split": "hash", "data.packing": packing, "data.readers": 2}
    config = load_config("quickstart", **{**TINY, **data, "data.val_fraction": 0.2, "train.steps": 60, "eval.every": 0})
    with killed_at(7, monkeypatch):
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run")
    recorded = dict(given)
    assert run.newest_checkpoint().step == 60
    for step in (3, 6, 30, 58, 60):  # before all checkpoints that are left, and after one of them
        assert rows_at(run, capsys, "--step", step) == recorded[step - 1]
    check_places(run, 2, 8, capsys)
    check_places(run, 57, 8, capsys)  # of a later epoch
    (run.newest_checkpoint().folder / "state.json").write_text("{")  # damaged: another one is used
    assert rows_at(run, capsys, "--step", 60) == recorded[59]
    write_documents(Path(files[1]), seed=9)
    assert main(["data", "at", str(run.folder), "--step", "3"]) == 1
    assert "the text is not what the run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_after_a_roll_back(files: list[str], tmp_path: Path, given: Given, capsys, monkeypatch, stream: bool):
    guard = {"guard.spike_sigma": 20.0, "guard.spike_window": 4, "guard.spike_action": "roll_back"}
    data = {"data.paths": files, "data.split": "hash", "data.val_fraction": 0.2, "data.stream": stream}
    config = load_config("quickstart", **{**TINY, **data, **guard, "checkpoint.keep_last": 2})
    scaled = LossScale.scaled
    monkeypatch.setattr(LossScale, "scaled", lambda self, loss: scaled(self, loss) * (1000 if max(given) == 9 else 1))
    run = train(config, tmp_path / "run")  # the 10th batch is bad: back to step 8, and on with batch 10
    (event,) = read_jsonl(run.events)
    assert (event["step"], event["batch"]) == (8, 9)
    recorded = dict(given)
    for step, batch in ((8, 7), (9, 10), (12, 13)):
        found = at(run, capsys, "--step", step)
        assert found["batch"] == batch
        assert [row["tokens"] for row in found["rows"]] == recorded[batch]
    assert rows_at(run, capsys, "--batch", event["batch"]) == recorded[9]

    run.metrics.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "batch"}) + "\n" for r in read_jsonl(run.metrics))
    )
    run.events.unlink()
    append_jsonl(run.events, {k: v for k, v in event.items() if k != "batch"})  # as older versions wrote them
    assert main(["data", "at", str(run.folder), "--step", "9"]) == 2
    assert "did not note which batches it skipped before step 9; give --batch N" in capsys.readouterr().err
    assert rows_at(run, capsys, "--step", 8) == recorded[7]


def test_a_document_larger_than_a_shard(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pretrain.text.formats.PART_CHARACTERS", 3000)
    monkeypatch.setattr("pretrain.text.formats.CUT_WINDOW", 100)
    text = " ".join(random.Random(0).choices(["ash", "Noël", "elm"], k=4000))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": text}) + "\n")
    out = tmp_path / "tokens"
    options = ["--tokenizer", "byte", "--val-fraction", "0", "--shard-tokens", "2000"]
    assert main(["data", "prepare", str(tmp_path / "long.jsonl"), "--out", str(out), *options]) == 0
    shards = sorted(out.glob("train-*.bin"))
    assert len(shards) > 3
    place = {"file": str(tmp_path / "long.jsonl"), "after": 0}
    assert find_records(shards[0], range(1, 3)) == {0: place, 1: {**place, "record": 1}, 2: {**place, "record": 2}}
    for shard in shards[1:]:
        assert find_records(shard, range(2)) == {0: {**place, "record": 2}}


def test_rows_of_a_fork(tiny: Config, tmp_path: Path, given: Given, capsys):
    train(tiny, tmp_path / "run")
    arguments = ["--step", "8", "--out", str(tmp_path / "fork"), "--train.batch_tokens", "512", "--train.steps", "12"]
    given.clear()
    assert main(["fork", str(tmp_path / "run"), *arguments]) == 0
    run, recorded = Run.open(tmp_path / "fork"), dict(given)
    found = at(run, capsys, "--step", 9)
    assert (found["batch"], len(found["rows"])) == (4, 16)
    assert [row["tokens"] for row in found["rows"]] == recorded[4]
    assert main(["data", "at", str(run.folder), "--step", "8"]) == 2
    assert f"was trained before the fork: pretrain data at {tmp_path / 'run'}" in capsys.readouterr().err


def test_what_cannot_be_shown(tiny: Config, tmp_path: Path, capsys):
    run = train(tiny, tmp_path / "run")
    for arguments, said in (
        (["--step", "13"], "has done 12 steps"),
        ([], "give one of --step N and --batch N"),
        (["--step", "3", "--batch", "2"], "give one of --step N and --batch N"),
        (["--step", "3", "--row", "8"], "a batch has rows 0 to 7"),
        (["--step", "3", "--rank", "1"], "there is no such row"),
        (["--step", "3", "--rank", "1", "--world", "2", "--row", "2"], "there is no such row"),
        (["--batch", "3", "--rank", "1"], "add --world N"),
        (["--batch", "12"], "has read batches 0 to 11 so far"),
    ):
        assert main(["data", "at", str(run.folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    (shard,) = run.data.glob("train-*.bin")
    whole = shard.read_bytes()
    for break_it, said in ((lambda: shard.write_bytes(whole[:-2]), "bytes, not"), (shard.unlink, "is missing")):
        break_it()
        assert main(["data", "at", str(run.folder), "--step", "3"]) == 1
        assert said in capsys.readouterr().err


RECORD = """
import json, os
from pathlib import Path
from pretrain.tokens import LiveBatches, TrainingBatches
def record(kind):
    batch = kind.batch
    def recorded(self, step):
        inputs, targets = batch(self, step)
        rows = [[*i.tolist(), t[-1].item()] for i, t in zip(inputs, targets)]
        Path({folder!r}, f"{{step}}-{{os.environ['RANK']}}.json").write_text(json.dumps(rows))
        return inputs, targets
    kind.batch = recorded
record(LiveBatches)
record(TrainingBatches)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_two_processes_and_then_of_one(files: list[str], tmp_path: Path, given: Given, capsys, stream: bool):
    data: dict[str, Any] = {"data.paths": files, "data.stream": True, "data.split": "hash", "data.readers": 4}
    if not stream:
        data = {
            "data.paths": [str(tmp_path / "ab"), str(tmp_path / "c")],
            "data.weights": [1, 0],
            "data.stages": [".5:1 3"],
        }
        for folder, texts in zip(data["data.paths"], (files[:2], files[2:]), strict=True):
            assert main(["data", "prepare", *texts, "--out", folder, *OPTIONS]) == 0
    config = load_config("quickstart", **{**TINY, **data, "data.val_fraction": 0.2, "parallel.kind": "ddp"})
    run = run_together(config, tmp_path / "run", 2, RECORD.format(folder=str(tmp_path)))
    for step in (1, 7, 12):
        for rank in (0, 1):
            found = at(run, capsys, "--step", step, "--rank", rank)
            assert [row["row"] for row in found["rows"]] == list(range(rank, 8, 2))
            assert found["world"] == 2
            assert [row["tokens"] for row in found["rows"]] == json.loads(
                (tmp_path / f"{step - 1}-{rank}.json").read_text()
            )
    remove(run.checkpoint(12).folder)
    run.reopen()
    train(config, run.folder)  # from step 8 on, by one process
    for step, world in ((8, 2), (9, 1)):
        found = at(run, capsys, "--step", step)
        assert found["world"] == world
        assert {row["rank"] for row in found["rows"]} == set(range(world))
    assert rows_at(run, capsys, "--step", 9) == given[8]
