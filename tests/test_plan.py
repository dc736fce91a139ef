import dataclasses

import pytest

from pretrain.config import ModelConfig, load_config
from pretrain.errors import UsageError
from pretrain.plan import activation_bytes, count_parameters, flops_per_token, resolve, rows_that_fit


def test_nanochat_of_2025_at_depth_20():
    """As published: 560,988,160 parameters, 21,400 steps of 524,288 tokens."""
    config, _ = resolve(load_config("nanochat-d20"), 65536)
    assert (config.model.layers, config.model.width, config.model.heads) == (20, 1280, 10)
    assert sum(count_parameters(config.model, 65536).values()) == 560_988_160
    assert (config.train.steps, config.train.batch_tokens) == (21_400, 524_288)


@pytest.mark.parametrize(
    ("depth", "total", "scaling", "steps", "batch"),
    [(12, 286_261_730, 110_100_912, 2_520, 2**19), (20, 896_533_746, 435_160_240, 4_980, 2**20)],
)
def test_nanochat_of_2026(depth: int, total: int, scaling: int, steps: int, batch: int):
    """As its code counts at 32,768 tokens of vocabulary."""
    config, said = resolve(load_config("nanochat", **{"model.depth": depth}), 32768)
    counts = count_parameters(config.model, 32768)
    assert sum(counts.values()) == total
    assert counts["matrices"] + counts["head"] == scaling
    assert (config.train.steps, config.train.batch_tokens) == (steps, batch)
    assert config.optim.lr == pytest.approx(0.02 * (batch / 2**19) ** 0.5)
    assert f"train.steps = {steps:,}" in said
    assert resolve(config, 32768) == (config, [])  # what is resolved stays


def test_derived_numbers_can_be_overridden():
    config, _ = resolve(load_config("nanochat", **{"model.width": 512, "train.steps": 7}), 32768)
    assert (config.model.layers, config.model.width, config.model.heads) == (20, 512, 4)
    assert config.train.steps == 7
    with pytest.raises(UsageError, match=r"model.heads 3 does not divide model.width"):
        resolve(load_config("nanochat", **{"model.heads": 3}), 32768)


def test_a_horizon_in_flops():
    config = load_config("quickstart", **{"train.steps": 0, "train.target_flops": 1e12})
    resolved, _ = resolve(config, 4096)
    spent = resolved.train.steps * resolved.train.batch_tokens * flops_per_token(resolved.model, 4096)
    assert spent == pytest.approx(1e12, rel=0.1)


def test_flops_count_what_is_seen():
    config = ModelConfig(layers=2, heads=2, width=64, context_length=100)
    full = flops_per_token(config, 50)
    assert full == 6 * (2 * 12 * 64 * 64 + 50 * 64) + 12 * 2 * 64 * 100
    windowed = flops_per_token(dataclasses.replace(config, window_pattern="S", window=10), 50)
    assert full - windowed == 12 * 64 * 90


def test_rows_that_fit_divide_the_batch():
    config = load_config("quickstart", **{"train.batch_tokens": 128 * 12})
    row = activation_bytes(config, 2)
    expected = {100: 12, 17.2: 12, 17: 6, 8.6: 6, 8.5: 4, 1.5: 1, 0.1: 1}
    assert {rows: rows_that_fit(config, 2, int(rows * row) + 1) for rows in expected} == expected


def test_the_activation_estimate_is_near_what_a_pass_keeps():
    import torch

    from pretrain.model import GPT

    config = load_config("storybot", **{"model.layers": 3, "train.batch_tokens": 512})
    model = GPT(config.model, 300)
    model.init_weights(torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    assert sum(kept.values()) / 2 == pytest.approx(activation_bytes(config, 4), rel=0.35)
