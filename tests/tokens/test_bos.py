"""Documents without a BOS token between them: ``data.bos`` off, from the text to the numbers of a run."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.errors import UsageError
from pretrain.evaluation.measure import EvalRequest, measure
from pretrain.generation import encode_prompt
from pretrain.plan.data import look_at_data
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens import Manifest, prepare
from pretrain.training import train

TEXTS = [f"Ada sees Noël {number} times.\n" * (number % 7 + 1) for number in range(60)]
BYTES = "".join(TEXTS).encode()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return file


def settings(**more: object) -> dict[str, object]:
    return {**TINY, "data.bos": False, "train.steps": 3, "eval.every": 3, **more}


def test_documents_follow_one_another(lines: Path, tmp_path: Path, capsys):
    """Shards are the text and nothing else; what inspects, verifies and opens them knows that."""
    plain, marked = str(tmp_path / "plain"), str(tmp_path / "marked")
    options = [str(lines), "--tokenizer", "byte", "--val-fraction", "0", "--out"]
    assert main(["data", "prepare", *options, plain, "--no-bos"]) == 0
    assert main(["data", "prepare", *options, marked]) == 0
    assert Path(plain, "train-00000-000.bin").read_bytes() == np.frombuffer(BYTES, np.uint8).astype("<u2").tobytes()
    manifest = Manifest.load(Path(plain))
    assert (manifest.documents("train"), manifest.boundary) == (60, None)
    assert manifest.tokens("train") == len(BYTES) == Manifest.load(Path(marked)).tokens("train") - 60

    assert main(["data", "verify", plain]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", plain]) == 0
    shown = capsys.readouterr().out
    assert "60 documents, " in shown  # by the manifest
    assert "tokens on average" not in shown  # lengths are not known
    assert main(["data", "inspect", marked]) == 0
    assert "60 documents of " in capsys.readouterr().out

    # The same folder is not made anew in the other way; one of before this option is as it was.
    assert main(["data", "prepare", *options, plain]) == 2
    assert "of another plan (another bos)" in capsys.readouterr().err
    file = Path(marked, "plan.json")
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "bos"}))
    assert main(["data", "prepare", *options, marked]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main(["data", "prepare", *options, marked, "--no-bos"]) == 2

    # A run says how its shards are.
    run = [
        "--out",
        str(tmp_path / "run"),
        *(word for name, value in TINY.items() for word in (f"--{name}", str(value))),
    ]
    for folder, option, fix in (
        (plain, "--data.bos", "plain has no BOS token before each document; use --data.no-bos, or prepare it again"),
        (marked, "--data.no-bos", "marked has a BOS token before each document; use --data.bos, or prepare it again"),
    ):
        for command in (["train", *run], ["plan", "--no-measure"]):
            capsys.readouterr()
            given = ["--tokenizer.kind", "byte"] if command[0] == "plan" else []
            assert main([*command[:1], "--data", folder, option, *command[1:], *given]) == 2
            assert capsys.readouterr().err.endswith(fix + "\n")
    assert main(["train", "--data", plain, "--data.no-bos", *run]) == 0


def test_a_run_never_meets_the_bos_token(lines: Path, tmp_path: Path, capsys):
    """In its validation, other text, prompts, and a model that it exports."""
    run = train(load_config("quickstart", **settings(**{"data.paths": [str(lines)]})), tmp_path / "run")
    assert run.corpus().tokenizer.bos_id is run.tokenizer().bos_id is None
    assert pickle.loads(pickle.dumps(run.tokenizer())).bos_id is None
    assert run.tokenizer().vocab_size == 257
    for stream in map(run.corpus().stream, ("train", "val")):
        assert 256 not in stream.windows(np.array([0]), len(stream))[0]
    assert encode_prompt(run.tokenizer(), "Ada") == list(b"Ada")
    assert encode_prompt(run.tokenizer(), "") == [10]
    numbers = measure(str(run.folder), EvalRequest(data=[str(lines)])).numbers
    assert (numbers["tokens"], numbers["bytes"]) == (len(BYTES) - 1, len(BYTES) - 1)
    assert main(["sample", str(run.folder), "--max-tokens", "3"]) == 0

    assert main(["export", str(run.folder), "--out", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] is None
    assert measure(f"hf:{tmp_path / 'hf'}", EvalRequest(data=[str(lines)])).numbers == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_stream_has_none_either(lines: Path, tmp_path: Path, packing: str):
    from pretrain.tokens import LiveBatches, find_text

    stream = {"data.stream": True, "data.packing": packing, "data.order": "sequential", "data.readers": 1}
    fields = settings(**stream, **{"data.paths": [str(lines)], "data.split": "hash"})
    run = train(load_config("quickstart", **fields), tmp_path / "run")
    val = run.corpus().stream("val")
    assert 256 not in val.windows(np.array([0]), len(val))[0]
    batches = LiveBatches(find_text(run.config.data), run.tokenizer(), run.config.data, rows=8, length=32, seed=1)
    assert batches.bytes_per_token == 1
    rows = np.concatenate([np.concatenate((x[:, :1], y), axis=1) for x, y in map(batches.batch, range(20))])
    batches.close()
    assert 256 not in rows
    if packing == "concatenate":
        kept = b"".join(part.text.encode() for part in batches.text.training(batches.text.train))
        flat = np.concatenate([rows[0], *(row[1:] for row in rows[1:])])
        assert bytes(flat.astype(np.uint8)) == (kept * 5)[: len(flat)]


def test_characters_of_several_texts_have_no_bos(lines: Path, tmp_path: Path):
    """As where one program reads them all as one text: the vocabulary is that of nanoGPT's prepare.py."""
    fields = settings(**{"data.paths": [str(lines)], "tokenizer.kind": "char", "data.val_fraction": 0})
    config = load_config("quickstart", **fields)
    prepared = prepare(config, tmp_path / "data")
    characters = sorted(set("".join(TEXTS)))
    assert prepared.tokenizer.vocab_size == len(characters) == look_at_data(config).vocab_size
    ids = np.fromfile(tmp_path / "data" / "train-00000-000.bin", "<u2")
    assert "".join(characters[id] for id in ids) == "".join(TEXTS)


def test_a_document_mask_needs_it():
    with pytest.raises(
        UsageError, match=r"model\.document_mask finds documents by their BOS tokens, which data\.bos false"
    ):
        load_config("quickstart", **{"data.bos": False, "model.document_mask": True})


def test_a_tokenizer_without_bos_is_otherwise_the_same():
    tokenizer = build_tokenizer("byte", 0, [])
    plain = tokenizer.with_bos(False)
    assert (tokenizer.bos_id, plain.bos_id, plain.with_bos(True).bos_id) == (256, None, None)
    assert plain.special_ids == {256}
    assert plain.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    assert plain.fingerprint == tokenizer.fingerprint == Tokenizer(plain.to_json()).fingerprint
