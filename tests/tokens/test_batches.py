from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.tokens import IGNORE, DataOrder, TokenStream, TrainingBatches, validation_batches


class CountingStream(TokenStream):
    """Token i is i."""

    def __init__(self, tokens: int):
        self.arrays = [np.arange(tokens, dtype=np.uint16)]
        self.ends = np.array([tokens])
        self.tokens = tokens


@pytest.mark.parametrize("rows", [1, 4, 5000])
def test_a_batch_depends_on_its_step_alone(rows: int):
    stream = CountingStream(2001)
    order = DataOrder(2001, 10, "shuffled", 0, seed=1)
    read_on = TrainingBatches(stream, order, rows)
    for step in (0, 1, 2, 40, 3, 1500, 1499):
        inputs, targets = read_on.batch(step)
        fresh, _ = TrainingBatches(stream, order, rows).batch(step)
        assert torch.equal(inputs, fresh)
        assert torch.equal(targets, inputs + 1)
        assert inputs[:, 0].tolist() == order.starts(step * rows, rows).tolist()
        assert inputs.shape == (rows, 10)


@pytest.mark.parametrize("tokens", [11, 12, 100, 101, 119])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_validation_counts_every_target_once(tokens: int, rows: int):
    seen = []
    for inputs, targets in validation_batches(CountingStream(tokens), 10, rows):
        assert inputs.shape[1] == 10
        assert len(inputs) <= rows
        counted = targets != IGNORE
        assert torch.equal(targets[counted], inputs[counted] + 1)
        seen += targets[counted].tolist()
    assert seen == list(range(1, tokens))


def test_validation_of_a_part():
    batches = list(validation_batches(CountingStream(1000), 10, 4, tokens=95))
    assert sum(int((targets != IGNORE).sum()) for _, targets in batches) == 90


def test_shards_feed_batches(tiny, tmp_path: Path):
    from pretrain.tokens import prepare

    prepared = prepare(tiny, tmp_path / "data")
    stream = TokenStream(prepared.folder, "train")
    order = DataOrder(len(stream), 32, "shuffled", 0, seed=3)
    inputs, targets = TrainingBatches(stream, order, 8).batch(5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert prepared.tokenizer.decode(inputs[0].tolist()).count("�") <= 6  # text, cut at most inside two characters
