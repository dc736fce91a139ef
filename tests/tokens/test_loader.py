import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.model.loss import IGNORE
from pretrain.tokens import (
    Batches,
    BatchesAhead,
    DataOrder,
    MixedOrder,
    TokenStream,
    TrainingBatches,
    prepare,
    prepared_dataset,
    validation_batches,
)
from pretrain.tokens.order import mixture_shares
from pretrain.tokens.windows import TokenFile


@pytest.fixture
def counting(tmp_path: Path):
    """Makes a stream in which token i is i, in several files."""

    def make(tokens: int, files: int = 3) -> TokenStream:
        parts = []
        for number, part in enumerate(np.array_split(np.arange(tokens, dtype=np.uint16), files)):
            path = tmp_path / f"{tokens}-{number}.bin"
            path.write_bytes(part.tobytes())
            parts.append(TokenFile(path, len(part), "uint16"))
        return TokenStream(parts)

    return make


@pytest.mark.parametrize("rows", [1, 4, 5000])
def test_a_batch_depends_on_its_step_alone(counting, rows: int):
    stream = counting(2001)
    order = DataOrder(2001, 10, "shuffled", 0, seed=1)
    read_on = TrainingBatches(stream, order, rows)
    for step in (0, 1, 2, 40, 3, 1500, 1499):
        inputs, targets = read_on.batch(step)
        fresh, _ = TrainingBatches(stream, order, rows).batch(step)
        assert torch.equal(inputs, fresh)
        assert torch.equal(targets, inputs + 1)
        assert inputs[:, 0].tolist() == order.starts(step * rows, rows).tolist()
        assert inputs.shape == (rows, 10)
        assert inputs.dtype == targets.dtype == torch.int64


def mixed() -> MixedOrder:
    orders = (DataOrder(1201, 10, "shuffled", 0, seed=1), DataOrder(800, 10, "shuffled", 0, seed=2))
    return MixedOrder(orders, mixture_shares([0.7, 0.3], "ab"), seed=3)


@pytest.mark.parametrize("order", [DataOrder(2001, 10, "shuffled", 0, seed=1), mixed()], ids=["one", "mixture"])
@pytest.mark.parametrize(("rows", "world"), [(12, 2), (12, 3), (12, 12), (7, 4), (2, 3)])
def test_any_number_of_processes_makes_the_same_global_batch(counting, order, rows: int, world: int):
    stream = counting(2001)
    alone = TrainingBatches(stream, order, rows)
    ranks = [TrainingBatches(stream, order, rows, rank, world) for rank in range(world)]
    for step in (0, 1, 700, 3):
        whole = torch.full((rows, 10), -7)
        for rank, batches in enumerate(ranks):
            whole[rank::world] = batches.batch(step)[0]
            assert batches.epoch(step) == alone.epoch(step)
        assert torch.equal(whole, alone.batch(step)[0])


def test_micro_batches_are_parts_of_the_same_rows(counting):
    batches = TrainingBatches(counting(2001), DataOrder(2001, 10, "shuffled", 0, seed=1), 12)
    inputs, targets = batches.batch(5)
    for size in (1, 4, 6):
        assert torch.equal(torch.cat(inputs.split(size)), inputs)
        assert torch.equal(torch.cat(targets.split(size)), targets)


def test_a_batch_stands_while_the_next_is_made(counting):
    batches = TrainingBatches(counting(2001), DataOrder(2001, 10, "shuffled", 0, seed=1), 4)
    inputs, targets = batches.batch(0)
    kept = inputs.clone(), targets.clone()
    following, _ = batches.batch(1)
    assert torch.equal(inputs, kept[0])
    assert torch.equal(targets, kept[1])
    assert not torch.equal(following, inputs)
    again, _ = batches.batch(2)
    assert again.data_ptr() == inputs.data_ptr()  # memory does not grow with the steps


def test_a_function_of_the_step_has_no_state(counting):
    batches: Batches = TrainingBatches(counting(2001), DataOrder(2001, 10, "shuffled", 0, seed=1), 4)
    before = batches.batch(3)[0].clone()
    state = json.loads(json.dumps(batches.state(3)))
    assert state == {}
    batches.restore(state)
    assert torch.equal(batches.batch(3)[0], before)


@pytest.mark.gpu
def test_batches_ahead_on_a_gpu_are_the_same(counting):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    order = DataOrder(2001, 10, "shuffled", 0, seed=1)
    device = torch.device("cuda")
    plain, copied = TrainingBatches(counting(2001), order, 64), TrainingBatches(counting(2001), order, 64)
    on_device = BatchesAhead(copied, device)
    kept = []
    for step in (0, 1, 2, 3, 40, 41, 5, 6, 6, 7):
        inputs, targets = on_device.batch(step)
        assert inputs.device.type == targets.device.type == "cuda"
        kept.append((step, inputs, targets, inputs.sum()))
    for step, inputs, targets, total in kept:
        expected, wanted = plain.batch(step)
        assert torch.equal(inputs.cpu(), expected)
        assert torch.equal(targets.cpu(), wanted)
        assert int(total) == int(expected.sum())


@pytest.mark.parametrize("tokens", [11, 12, 100, 101, 119])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_validation_counts_every_target_once(counting, tokens: int, rows: int):
    seen = []
    for inputs, targets in validation_batches(counting(tokens), 10, rows):
        assert inputs.shape[1] == 10
        assert len(inputs) <= rows
        counted = targets != IGNORE
        assert torch.equal(targets[counted], inputs[counted] + 1)
        seen += targets[counted].tolist()
    assert seen == list(range(1, tokens))


@pytest.mark.parametrize("tokens", [2, 5, 11, 12, 100, 101, 119])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_validate_every_target_once_between_them(counting, tokens: int, rows: int, world: int):
    stream = counting(tokens, files=2)
    ranks = [list(validation_batches(stream, 10, rows, rank=rank, world=world)) for rank in range(world)]
    seen = []
    for together in zip(*ranks, strict=True):  # as many batches on each rank
        assert len({inputs.shape for inputs, _ in together}) == 1
        for inputs, targets in together:
            assert len(inputs) <= rows
            counted = targets != IGNORE
            assert torch.equal(targets[counted], inputs[counted] + 1)
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, tokens))


@pytest.mark.parametrize("tokens", [2, 5, 11, 12, 14, 15, 100, 101, 119])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_windows_that_overlap_count_every_target_once_after_enough_tokens(counting, tokens: int, rows: int, world: int):
    stream = counting(tokens, files=2)
    ranks = [list(validation_batches(stream, 10, rows, rank=rank, world=world, stride=4)) for rank in range(world)]
    seen = []
    for together in zip(*ranks, strict=True):
        assert len({inputs.shape for inputs, _ in together}) == 1
        for inputs, targets in together:
            counted = targets != IGNORE
            assert torch.equal(targets[counted], inputs[counted] + 1)
            before = torch.arange(1, 11).expand_as(targets)[counted]  # tokens that a target is predicted from
            assert torch.all(before >= targets[counted].clamp(max=7))
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, tokens))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_validation_of_a_part(counting, world: int):
    stream = counting(1000)
    batches = [b for rank in range(world) for b in validation_batches(stream, 10, 4, 95, rank, world)]
    seen = sorted(target for _, targets in batches for target in targets[targets != IGNORE].tolist())
    assert seen == list(range(1, 91))


def test_shards_feed_batches_of_any_length(tiny, tmp_path: Path):
    prepared = prepare(tiny, tmp_path / "data")
    stream = prepared_dataset(prepared.folder).stream("train")
    for length in (8, 32, 100):
        order = DataOrder(len(stream), length, "shuffled", 0, seed=3)
        inputs, targets = TrainingBatches(stream, order, 8).batch(5)
        assert inputs.shape == (8, length)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        # text, cut at most inside two characters
        assert prepared.tokenizer.decode(inputs[0].tolist()).count("�") <= 6
