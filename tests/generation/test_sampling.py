"""The filters, against a plain float64 reference."""

import math

import pytest
import torch

from pretrain.generation import SamplingOptions
from pretrain.generation.sampling import choose, penalize_repetition

OPEN = dict(temperature=1.0, top_k=0)
SETTINGS = {
    "open": OPEN,
    "cold": dict(OPEN, temperature=0.3),
    "almost greedy": dict(OPEN, temperature=1e-9),
    "hot": dict(OPEN, temperature=3.0),
    "top_k": dict(temperature=1.0, top_k=5),
    "top_k of one": dict(temperature=1.0, top_k=1),
    "top_k beyond the vocabulary": dict(temperature=1.0, top_k=500),
    "top_p": dict(OPEN, top_p=0.6),
    "top_p of the likeliest only": dict(OPEN, top_p=1e-9),
    "min_p": dict(OPEN, min_p=0.1),
    "top_k and top_p": dict(temperature=1.0, top_k=6, top_p=0.5),
    "all": dict(temperature=1.5, top_k=12, top_p=0.9, min_p=0.2),
}


def reference(logits: list[float], options: SamplingOptions) -> dict[int, float]:
    """Token → probability, by the definitions, in float64."""
    largest = max(logits)
    weights = {token: math.exp((logit - largest) / options.temperature) for token, logit in enumerate(logits)}
    likeliest_first = sorted(weights, key=lambda token: -weights[token])
    if options.top_k:
        likeliest_first = likeliest_first[: options.top_k]
    total, kept, sum_so_far = sum(weights[token] for token in likeliest_first), [], 0.0
    for token in likeliest_first:
        kept.append(token)
        sum_so_far += weights[token] / total
        if sum_so_far >= options.top_p and options.top_p < 1:
            break
    kept = [token for token in kept if weights[token] >= options.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_definition(name: str):
    """Evenly spread numbers must fall on each token in proportion to its probability, to within one number."""
    options, count = SamplingOptions(**SETTINGS[name]), 4096
    rows = 2.0 * torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    uniform = (torch.arange(count) / count)[:, None]
    for logits in rows:
        before = logits.clone()
        drawn = choose(logits.expand(count, -1), options, uniform).flatten().bincount(minlength=40) / count
        expected = reference(logits.double().tolist(), options)
        assert set(drawn.nonzero().flatten().tolist()) <= set(expected)
        for token in range(40):
            assert drawn[token].item() == pytest.approx(expected.get(token, 0.0), abs=1.01 / count), token
        assert torch.equal(logits, before)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_does_not_see_its_neighbours(name: str):
    options = SamplingOptions(**SETTINGS[name])
    generator = torch.Generator().manual_seed(6)
    logits, uniform = 2.0 * torch.randn(16, 40, generator=generator), torch.rand(16, 1, generator=generator)
    alone = [choose(logits[i : i + 1], options, uniform[i : i + 1]) for i in range(16)]
    assert torch.equal(choose(logits, options, uniform), torch.cat(alone))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_distribution(uniform: float):
    """The smallest and largest numbers choose tokens that are possible, in a large vocabulary too."""
    logits = torch.randn(1, 5_000, generator=torch.Generator().manual_seed(7))
    for settings in SETTINGS.values():
        options = SamplingOptions(**settings)
        token = choose(logits, options, torch.tensor([[uniform]])).item()
        assert token in reference(logits[0].double().tolist(), options)


def test_temperature_0_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    assert choose(logits, SamplingOptions(temperature=0), torch.zeros(2, 1)).tolist() == [[1], [0]]


def test_repetition_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(8)
    logits, text = torch.randn(3, 20, generator=generator), torch.randint(0, 20, (3, 7), generator=generator)
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter(1, text, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(text, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.7), expected)
    assert (expected[seen] < logits[seen]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_tokens=-1), dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1), dict(seed=-1),
        dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.1), dict(repetition_penalty=0.0),
        dict(stop=("a", "")),
    ],
)  # fmt: skip
def test_impossible_options_are_named(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
