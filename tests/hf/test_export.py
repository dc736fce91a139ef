"""The model card of an export, and an export measured like its run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import TINY
from tests.evaluation.test_core import write_bundle
from tests.evaluation.test_measure import train_on, two_folders, write_text  # noqa: F401 - a fixture
from tests.hf.test_convert import PLAIN

from pretrain.cli import main
from pretrain.errors import PretrainError
from pretrain.evaluation import read_tasks
from pretrain.evaluation.measure import EvalRequest, measure
from pretrain.hf.export import model_card
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens import Manifest


def card_of(run: Run) -> str:
    return model_card(run, run.newest_checkpoint(), "name")


def table(card: str, first: str) -> list[list[str]]:
    """The cells of the lines of the card that begin with a cell."""
    lines = (line for line in card.splitlines() if line.startswith(f"| {first}"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_card_of_a_text(tmp_path: Path, text_file: Path):
    bundle = write_bundle(tmp_path / "bundle")
    core = {"eval.core_every": 2, "eval.core_bundle": str(bundle), "eval.core_max_per_task": 3}
    run = train_on(tmp_path / "run", str(text_file), **core)
    manifest, card, last = Manifest.load(run.data), card_of(run), read_jsonl(run.metrics)[-1]
    ((_, train, documents, size, val, _, _),) = table(card, str(text_file))
    assert train == f"{manifest.tokens('train'):,}"
    assert documents == f"{manifest.documents('train'):,}"
    assert size == f"{sum(shard.text_bytes for shard in manifest.shards if shard.split == 'train'):,}"
    assert val == f"{manifest.tokens('val'):,}"
    assert f"Held-out loss: {last['val/loss']:.4f} nats per token, {last['val/bpb']:.4f} bits per byte" in card
    assert f"Training loss: {last['train/smoothed_loss']:.4f} nats per token (smoothed" in card
    assert f"Trained on {3 * TINY['train.batch_tokens']:,} tokens in 3 steps" in card
    assert f"CORE: {last['val/core']:.4f} after step 3, the mean of the tasks of {bundle}, 3 questions each" in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings["model"]["width"] == TINY["model.width"]

    measured = measure(str(run.folder), EvalRequest(core=read_tasks(bundle), max_per_task=4)).core
    assert measured is not None
    card = card_of(run)
    assert table(card, "copa") == [
        ["copa", f"{measured.tasks[0].accuracy:.4f}", f"{measured.tasks[0].centered:.4f}", "4"]
    ]
    assert table(card, "**CORE")[0][2] == f"**{measured.core:.4f}**"
    assert "a part of CORE" in card
    assert "the first 4 questions" in card
    assert "after step 3, the mean" not in card


def test_the_card_of_a_mixture(two_folders: list[str], tmp_path: Path):  # noqa: F811
    run = train_on(tmp_path / "run", *two_folders, **{"data.weights": [1, 3]})
    for folder, share in zip(two_folders, ("25.0%", "75.0%"), strict=True):
        manifest = Manifest.load(Path(folder))
        ((name, train, documents, _, _, held_out, _, weight),) = table(card_of(run), folder)
        assert name == f"{folder}, made from {folder}.jsonl"
        assert (train, weight) == (f"{manifest.tokens('train'):,}", share)
        assert (documents, held_out) == (f"{manifest.documents('train'):,}", f"{manifest.documents('val'):,}")
    Path(two_folders[1]).rename(tmp_path / "moved")
    assert f"{', '.join(two_folders)}; its tokens were no longer there, or others" in card_of(run)


def test_the_card_of_a_stream(tmp_path: Path):
    text = write_text(tmp_path / "text.jsonl", 3, 200)
    run = train_on(tmp_path / "run", str(text), **{"data.stream": True, "data.split": "hash", "data.val_fraction": 0.2})
    manifest = Manifest.load(run.data)
    ((_, train, _, _, val, documents, _),) = table(card_of(run), str(text))
    assert train == "tokenized while training"
    assert (val, documents) == (f"{manifest.tokens('val'):,}", f"{manifest.documents('val'):,}")


def test_the_card_of_tokens_of_another_program(tmp_path: Path):
    tokenizer = build_tokenizer("byte", 0, [])
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(0)).numpy().astype("<u2")
    (tmp_path / "data").mkdir()
    ids[:2000].tofile(tmp_path / "data/train.bin")
    ids[2000:].tofile(tmp_path / "data/val.bin")
    settings = {"tokenizer.kind": str(tmp_path / "tokenizer.json")}
    run = train_on(tmp_path / "run", str(tmp_path / "data"), **settings)
    assert table(card_of(run), str(tmp_path / "data"))[0][1:] == ["2,000", "", "", "1,000", "", ""]


def test_no_password_is_in_a_card(tmp_path: Path, text_file: Path):
    from dataclasses import replace

    run = train_on(tmp_path / "run", str(text_file))
    data = replace(run.config.data, paths=("https://ada:secret@example.com/a.txt",))
    card = card_of(Run(run.folder, replace(run.config, data=data)))
    assert "secret" not in card
    assert "example.com/a.txt" in card


EXPORTS = {
    "pretrain": {"model.smear": True, "model.bigram_rows": 64, "model.document_mask": True, "model.vocab_multiple": 64},
    "llama": {**PLAIN, "model.mlp": "swiglu"},
    "gpt2": {**PLAIN, "model.position": "learned", "model.norm": "layernorm"},
    "qwen3": {**PLAIN, "model.mlp": "swiglu", "model.qk_norm": True},
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_measured_as_its_run_without_any_code_of_it(
    kind: str, tmp_path: Path, text_file: Path, monkeypatch, capsys
):
    run, out = train_on(tmp_path / "run", str(text_file), **EXPORTS[kind]), tmp_path / "out"
    assert main(["export", str(run.folder), "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    for file in out.glob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.setitem(sys.modules, "transformers", None)  # nor is transformers needed
    capsys.readouterr()
    other = write_text(tmp_path / "other.jsonl", 5, 20)
    what = ["--data", str(other), "--core", str(write_bundle(tmp_path / "bundle")), "--max-per-task", "6", "--json"]
    assert main(["eval", str(run.folder), f"hf:{out}", *what]) == 0
    mine, theirs = map(json.loads, capsys.readouterr().out.splitlines())
    assert theirs["tokens"] == mine["tokens"] > 500
    assert theirs["data_loss"] == pytest.approx(mine["data_loss"], rel=1e-6)
    assert theirs["data_bpb"] == pytest.approx(mine["data_bpb"], rel=1e-6)
    assert theirs["core"]["core"] == mine["core"]["core"]


def test_a_damaged_export_says_so(tmp_path: Path, text_file: Path):
    run, out = train_on(tmp_path / "run", str(text_file), **EXPORTS["pretrain"]), tmp_path / "out"
    assert main(["export", str(run.folder), "--out", str(out)]) == 0
    (out / "model.safetensors").unlink()
    with pytest.raises(PretrainError, match=r"model\.safetensors cannot be read"):
        measure(f"hf:{out}", EvalRequest(data=[str(text_file)]))


def test_what_our_model_cannot_be_transformers_loads(tmp_path: Path, text_file: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer("byte", 0, [])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **small)
    ).eval()
    model.save_pretrained(tmp_path / "neox")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf).save_pretrained(tmp_path / "neox")
    numbers = measure(f"hf:{tmp_path / 'neox'}", EvalRequest(data=[str(text_file)])).numbers
    text = text_file.read_text(encoding="utf-8")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 64):
            window = torch.tensor(ids[start : start + 65])
            scores = model(window[None, :-1]).logits[0].double().log_softmax(-1)
            nats -= scores.gather(1, window[1:, None]).sum().item()
    assert numbers["tokens"] == len(ids) - 1
    assert numbers["bytes"] == len(text.encode())
    assert numbers["data_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
