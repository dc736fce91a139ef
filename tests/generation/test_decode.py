"""Decoding many rows with one cache, against a plain loop without any."""

import random

import pytest
import torch
from tests.model.test_transformer import SMALL, VARIANTS, build

from pretrain.config import ModelConfig
from pretrain.generation import SamplingOptions, generate
from pretrain.model import GPT
from pretrain.model.cache import KVCache
from pretrain.model.packed import for_inference

CONTEXT = SMALL["context_length"]
SPREAD = SamplingOptions(max_tokens=40, temperature=1.5, top_k=0)


def variant(name: str, dtype: torch.dtype = torch.float64) -> GPT:
    """In float64, so that no draw hangs on the order in which a product is summed."""
    return build(ModelConfig(**{**SMALL, **VARIANTS[name]}), dtype=dtype)


def rows_of(model: GPT, prompts: list[list[int]], options: SamplingOptions, **more) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in prompts]
    for row, token in generate(model, prompts, options, **more):
        made[row].append(token)
    return made


@torch.no_grad()
def plainly(model: GPT, prompt: list[int], options: SamplingOptions, seed: int) -> list[int]:
    """One row, by the rules: everything seen is computed anew for each token; a full context is cut to its half."""
    draw, seen, made = random.Random(seed), prompt[-CONTEXT:], []
    for _ in range(options.max_tokens):
        weights = (model(torch.tensor([seen]))[0, -1].double() / options.temperature).softmax(0)
        uniform = draw.getrandbits(24) / 2**24
        token = int((weights.cumsum(0) > uniform).nonzero()[0])
        made.append(token)
        seen = [*seen[-CONTEXT // 2 + 1 :], token] if len(seen) == CONTEXT else [*seen, token]
    return made


PROMPTS = [[5], [7, 0, 3, 9, 0, 2, 4, 8, 1, 6], [5], list(range(30)), [0, 1, 2], [3, 0, 5], list(range(16))]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_is_what_it_is_alone(name: str):
    """Ragged rows, equal rows, rows beyond the context: each as the plain loop makes it, past the context twice."""
    model = variant(name)
    together = rows_of(model, PROMPTS, SPREAD)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == plainly(model, prompt, SPREAD, seed=row), row


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_cached_logits_equal_uncached(name: str):
    """In fp32, to 1e-5: rows of lengths 3, 5 and 9 side by side, two of one origin, going on by several tokens."""
    model = variant(name, torch.float32)
    tokens = torch.randint(0, 40, (3, CONTEXT), generator=torch.Generator().manual_seed(4))
    parts = []
    for row, length in enumerate((3, 5, 9)):
        parts.append(KVCache(CONTEXT))
        model(tokens[row : row + 1, :length], cache=parts[-1])
    cache = KVCache.join(parts).select([2, 0, 1, 0])
    tokens = tokens[[2, 0, 1, 0]]
    tokens[3, 3:] = (tokens[3, 3:] + 1) % 40
    for size in (1, 1, 3, 2):
        at = cache.lengths
        new = torch.stack([tokens[row, at[row] : at[row] + size] for row in range(4)])
        logits = model(new, cache=cache)
        for row in range(4):
            whole = model(tokens[row : row + 1, : at[row] + size])[0, at[row] :]
            torch.testing.assert_close(logits[row], whole, atol=1e-5, rtol=1e-5)
    assert cache.lengths == [16, 10, 12, 10]


def test_the_order_and_company_of_rows_do_not_matter():
    model = variant("llama")
    forward = rows_of(model, PROMPTS, SPREAD)
    backward = rows_of(model, PROMPTS[::-1], SPREAD, seeds=list(range(len(PROMPTS)))[::-1])
    assert forward == backward[::-1]
    assert len({tuple(row) for row in forward}) == len(PROMPTS)  # equal prompts, other seeds, other texts


def test_one_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    model, shapes = variant("default"), []
    forward = GPT.forward

    def watched(self, tokens, *args, **more):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(GPT, "forward", watched)
    rows_of(model, [[1, 2, 3, 4]] * 5, SamplingOptions(max_tokens=4))
    assert shapes == [(1, 4), (5, 1), (5, 1), (5, 1)]


@pytest.mark.parametrize("name", ["default", "documents", "nanochat"])
def test_rows_that_end_leave_the_others_alone(name: str):
    """By the end token, and because the caller says so; neither costs a step more than it must."""
    model = variant(name)
    whole = rows_of(model, PROMPTS, SPREAD)
    end = whole[1][20]
    made = rows_of(model, PROMPTS, SPREAD, end=end)
    assert made == [row[: row.index(end)] if end in row else row for row in whole]
    ended: set[int] = set()
    cut: list[list[int]] = [[] for _ in PROMPTS]
    for row, token in generate(model, PROMPTS, SPREAD, ended=ended):
        cut[row].append(token)
        if len(cut[row]) == 3 * row + 1:
            ended.add(row)
    assert cut == [text[: 3 * row + 1] for row, text in enumerate(whole)]
    assert rows_of(model, [], SPREAD) == []
    assert rows_of(model, [[1]], SamplingOptions(max_tokens=0)) == [[]]


def test_a_longer_text_begins_like_a_shorter_one():
    model = variant("gpt2")
    short = rows_of(model, PROMPTS, SamplingOptions(max_tokens=7, temperature=1.5, top_k=0))
    assert short == [row[:7] for row in rows_of(model, PROMPTS, SPREAD)]


def test_repetition_penalty_sees_prompt_and_text_but_not_the_end():
    model = variant("default")
    options = SamplingOptions(max_tokens=10, temperature=0, repetition_penalty=1e6)
    for row, prompt in zip(rows_of(model, PROMPTS[:3], options), PROMPTS[:3], strict=True):
        assert len({*row, *prompt}) == len(row) + len({*prompt})  # nothing twice
    first = rows_of(model, [[5]], SamplingOptions(max_tokens=1, temperature=0))[0][0]
    assert rows_of(model, [[first, 5]], options, end=first) != rows_of(model, [[first, 5]], options)


def test_the_model_and_the_random_state_stay_as_they_are():
    model = build(ModelConfig(**SMALL, dropout=0.5)).train()
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    python_state = random.getstate()
    assert rows_of(model, [[5]], SPREAD) == rows_of(model, [[5]], SPREAD)  # no dropout
    assert model.training
    assert model.blocks[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_a_model_spread_over_processes_is_used_as_it_is_and_trains_on():
    """It cannot be copied; so its dropout is off while text is made, and on again afterwards."""
    model = build(ModelConfig(**SMALL, dropout=0.5))
    expected = rows_of(model, [[5]], SPREAD)
    model.reshard = lambda: None  # type: ignore[assignment]  # what such a model is known by
    assert for_inference(model) is model
    assert rows_of(model.train(), [[5]], SPREAD) == expected
    assert model.training
    assert model.blocks[0].training
    left = generate(model, [[5]], SPREAD)
    next(left)
    left.close()  # type: ignore[attr-defined]  # as when nobody reads on
    assert model.training


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 0.0)])
def test_made_ready_for_inference_it_gives_the_same_logits(name: str, dtype: torch.dtype, tolerance: float):
    """Weights cast and packed once, instead of cast at each product."""
    model = variant(name, torch.float64 if dtype == torch.float64 else torch.float32)
    model.activation_dtype = dtype
    tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(4))
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    light = for_inference(model)
    torch.testing.assert_close(light(tokens), model(tokens), atol=tolerance, rtol=tolerance)
    assert light.embedding.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_the_head_sees_only_the_last_token():
    model = variant("nanochat")
    tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(4))
    last = model(tokens, last_only=True)
    assert last.shape == (2, 1, 40)
    torch.testing.assert_close(last, model(tokens)[:, -1:])


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_greedy_is_transformers_greedy(kv_heads: int):
    from benchmarks.generate import transformers_generate

    config = ModelConfig(
        layers=2, heads=4, width=32, kv_heads=kv_heads, context_length=64, mlp="swiglu", norm_weight=True,
        qk_norm=False, embedding_norm=False, logit_softcap=0.0,
    )  # fmt: skip
    model = build(config)
    theirs = transformers_generate(model)
    assert theirs is not None
    prompts = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(4))
    ours = rows_of(model, prompts.tolist(), SamplingOptions(max_tokens=40, temperature=0))
    assert ours == theirs(model, prompts, 40)
    assert len({tuple(row) for row in ours}) == 3
