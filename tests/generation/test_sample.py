import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.generation import generate, sample_text
from pretrain.generation.sample import pick
from pretrain.model import GPT
from pretrain.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(ModelConfig(layers=2, heads=2, width=32, context_length=16), 257)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def test_greedy_takes_the_likeliest_token(model: GPT):
    tokens = [5]
    for token in generate(model, [5], 15, temperature=0):
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 16


def test_it_goes_on_past_the_context(model: GPT):
    """By the stated rule: when the context is full, from its newest half."""
    made = list(generate(model, [5], 40, temperature=0))
    assert len(made) == 40
    context = [5, *made[:15]]  # the prompt and 15 tokens fill the context of 16; the 16th was still made from all
    assert int(model(torch.tensor([context]))[0, -1].argmax()) == made[15]
    assert int(model(torch.tensor([[*context, made[15]][-8:]]))[0, -1].argmax()) == made[16]
    assert len(list(generate(model, list(range(100)), 3))) == 3


def test_the_seed_fixes_the_text_and_nothing_else(model: GPT):
    state = torch.get_rng_state()
    first, second, other = (list(generate(model, [5], 20, seed=seed)) for seed in (3, 3, 4))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_and_temperature():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(logits, 1.0, 2, generator) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    assert drawn.count(1) / 2000 == pytest.approx(torch.tensor([3.0, 2.0]).softmax(0)[0].item(), abs=0.03)
    cold = [pick(logits, 0.5, 0, generator) for _ in range(2000)]
    assert cold.count(1) / 2000 == pytest.approx((logits / 0.5).softmax(0)[1].item(), abs=0.03)
    assert pick(logits, 0, 0, generator) == 1
    assert logits.tolist() == [1.0, 3.0, 2.0, 0.0]


def test_it_stops_at_the_end_of_a_document(model: GPT):
    made = list(generate(model, [5], 16, seed=1))
    assert list(generate(model, [5], 16, seed=1, stop=made[4])) == made[: made.index(made[4])]


def test_text_is_whole_characters(model: GPT):
    tokenizer = build_tokenizer("byte", 0, [])
    pieces = list(sample_text(model, tokenizer, "né", 60, temperature=2.0, top_k=0, seed=2))
    "".join(pieces).encode()  # no lone surrogates
    assert "".join(pieces) == "".join(sample_text(model, tokenizer, "né", 60, temperature=2.0, top_k=0, seed=2))
    assert list(sample_text(model, tokenizer, "", 5))
