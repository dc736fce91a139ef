import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import Config
from pretrain.evaluation import evaluate_loss
from pretrain.tokens import TokenStream, prepare, validation_batches
from pretrain.training.run import empty_model


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_loss_and_bits_per_byte_equal_a_float64_sum(tiny: Config, tmp_path: Path, rows: int):
    prepared = prepare(tiny, tmp_path / "data")
    model = empty_model(tiny, prepared.tokenizer, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(5))
    stream = TokenStream(prepared.folder, "train")
    result = evaluate_loss(
        model, validation_batches(stream, 32, rows, tokens=0), prepared.tokenizer.token_bytes()
    )  # fmt: skip

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
    model = empty_model(tiny, prepared.tokenizer, torch.device("cpu")).train()
    model.init_weights(torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    evaluate_loss(
        model,
        validation_batches(TokenStream(prepared.folder, "val"), 32, 4),
        prepared.tokenizer.token_bytes(),
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
