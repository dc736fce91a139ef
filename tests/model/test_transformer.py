import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import ModelConfig
from pretrain.model import GPT, meta_model
from pretrain.model.cache import KVCache
from pretrain.model.transformer import PLAIN_ROWS, Block, attend, attend_plainly, dropout


def build(config: ModelConfig, vocab_size: int = 40, dtype: torch.dtype = torch.float32) -> GPT:
    model = meta_model(config, vocab_size, bos_id=0).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # no zeros: every path must matter
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.activation_dtype = dtype
    return model.to(dtype).eval()


GPT2 = dict(
    layers=12, heads=12, width=768, context_length=1024, position="learned", norm="layernorm", norm_weight=True,
    embedding_norm=False, qk_norm=False, bias=True, qkv_bias=True, mlp="gelu_tanh", logit_softcap=0.0,
)  # fmt: skip

SMALL = dict(layers=2, heads=4, width=32, context_length=16)
VARIANTS = {
    "default": {},
    "gpt2": dict(GPT2, **SMALL, tied_head=True),
    "llama": dict(SMALL, kv_heads=2, mlp="swiglu", norm_weight=True, qk_norm=False, logit_softcap=0.0),
    "one-kv-head": dict(kv_heads=1, mlp="gelu"),
    "wide-heads": dict(head_width=16, norm="layernorm"),
    "windows": dict(layers=3, window_pattern="SL", window=3),
    "documents": dict(document_mask=True),
    "windows and documents": dict(layers=3, window_pattern="S", document_mask=True),
    "nanochat": dict(
        value_embeddings=True, residual_scalars=True, smear=True, backout=True, attention_scale=0.2, vocab_multiple=64
    ),
    "pairs": dict(bigram_rows=64),
    "n-gram heads": dict(ngram_heads=3),
    "gates": dict(head_gates=True, kv_heads=1),
    "part of a head rotates": dict(rope_fraction=0.5),
    "no-position": dict(position="none", embedding_norm=False),
}


@pytest.mark.parametrize(
    ("changes", "vocab_size", "count"),
    [
        (dict(tied_head=True), 50257, 124_439_808),  # GPT-2, as published
        (dict(qkv_bias=False), 50257, 163_009_536),  # LLMs-from-scratch at context 1024, untied
        (dict(qkv_bias=False, context_length=256), 50257, 162_419_712),  # and at 256
        (dict(bias=False, qkv_bias=False, tied_head=True, layers=6, heads=6, width=384, context_length=256), 65,
         10_745_088),  # nanoGPT's shakespeare-char
    ],
)  # fmt: skip
def test_parameter_counts_are_as_published(changes: dict, vocab_size: int, count: int):
    model = meta_model(ModelConfig(**{**GPT2, **changes}), vocab_size)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_is_not_seen(name: str):
    model = build(ModelConfig(**{**SMALL, **VARIANTS[name]}))
    tokens = torch.randint(1, 39, (2, 16), generator=torch.Generator().manual_seed(4))  # one document: no BOS, 0
    changed = tokens.clone()
    changed[:, 9] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_uncached(name: str):
    model = build(ModelConfig(**{**SMALL, **VARIANTS[name]}))
    tokens = torch.randint(0, 40, (2, 16))
    whole = model(tokens)
    cache = KVCache(16)
    parts = [model(part, cache=cache) for part in tokens.split([5, 1, 1, 6, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_layer_can_be_left_out_where_nobody_looks(name: str, layers: int):
    model = build(ModelConfig(**{**SMALL, **VARIANTS[name], "layers": layers}))
    tokens = torch.randint(0, 40, (2, 16))
    whole, computed = model.stream(tokens), []
    last = model.blocks[-1]
    assert isinstance(last, Block)
    last.mlp.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    for first in (0, 1, 9, 15):
        torch.testing.assert_close(model.stream(tokens, first=first), whole[:, first:], atol=1e-5, rtol=1e-5)
    cache = KVCache(16)
    model.stream(tokens[:, :7], cache, first=6)
    torch.testing.assert_close(model.stream(tokens[:, 7:], cache, first=4), whole[:, 11:], atol=1e-5, rtol=1e-5)
    assert computed == [16, 15, 7, 1, 1, 5]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_paths_of_other_devices_compute_the_same(name: str):
    """Attention by PyTorch's kernel instead of plain products, and the loss in other chunks."""
    tokens, targets = torch.randint(0, 40, (2, 3, 16)).unbind()
    losses = []
    for device_type in ("cpu", "cuda"):
        model = build(ModelConfig(**{**SMALL, **VARIANTS[name]}))
        model.compute_as_on(device_type)
        losses.append(model(tokens, targets))
        losses[-1].backward()
        losses.append(model.embedding.weight.grad)
    torch.testing.assert_close(losses[:2], losses[2:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_finite_differences(name: str):
    """Of the whole model in float64, along random directions."""
    model = build(ModelConfig(**{**SMALL, **VARIANTS[name]}), dtype=torch.float64)
    tokens, targets = torch.randint(0, 40, (2, 2, 16)).unbind()
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        logits = model.head(hidden(model, tokens))
        cap = model.config.logit_softcap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        torch.testing.assert_close(
            (gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-5, atol=1e-6
        )  # fmt: skip


def hidden(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """What the head sees: the forward pass hands it to the loss in fp32, which float64 checks cannot use."""
    seen = []
    hook = model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(tokens)
    hook.remove()
    return seen[0]


def test_targets_give_the_loss_of_the_logits():
    model = build(ModelConfig(**SMALL))
    tokens, targets = torch.randint(0, 40, (2, 3, 16)).unbind()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model(tokens, targets), expected.sum())
    torch.testing.assert_close(model(tokens, targets, reduction="none").flatten(), expected)


def test_rope_sees_only_distances():
    """Attention scores of rotated queries and keys depend on how far apart they are, not where."""
    from pretrain.model.transformer import rotary, rotate

    config = ModelConfig(**SMALL)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def score(i: int, j: int) -> float:
        def turn(x: torch.Tensor, position: int) -> torch.Tensor:
            return rotate(x, *rotary(config, torch.tensor([position]), torch.float32))

        return float((turn(q, i) * turn(k, j)).sum())

    assert score(3, 1) == pytest.approx(score(14, 12), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_dropout_acts_in_training_only():
    model = build(ModelConfig(**SMALL, dropout=0.5))
    tokens = torch.randint(0, 40, (2, 16))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("document_mask", [False, True])
def test_ngram_heads_see_what_followed_the_same_tokens(document_mask: bool):
    """Against the definition, one pair of positions after the other."""
    orders, T, bos = 3, 24, 0
    model = build(ModelConfig(**SMALL | {"context_length": T}, ngram_heads=orders, document_mask=document_mask))
    model.bos_id = bos
    tokens = torch.randint(0, 3, (4, T), generator=torch.Generator().manual_seed(1))
    documents = (tokens == bos).cumsum(1)
    found = model._matches(tokens, torch.arange(T), documents if document_mask else None, None, torch.float32)
    wanted = torch.zeros(4, orders, T, T)
    for row, n, query in itertools.product(range(4), range(1, orders + 1), range(T)):
        for key in range(n, query + 1):
            places = [(key - back, query + 1 - back) for back in range(1, n + 1)]
            same = query + 1 >= n and all(tokens[row, a] == tokens[row, b] for a, b in places)
            one_document = len({int(documents[row, place]) for pair in (*places, (key, query)) for place in pair}) == 1
            wanted[row, n - 1, query, key] = same and (one_document or not document_mask)
    assert wanted.sum((0, 2, 3)).min() > 0
    torch.testing.assert_close(found, wanted / wanted.sum(-1, keepdim=True).clamp(min=1))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_value_alone(p: float):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=torch.float64, requires_grad=True)
    y = dropout(x, p, training=True)
    dropped = (y == 0).double()
    assert set(y.unique().tolist()) == {0.0, 2**16 / (2**16 - round(p * 2**16))}
    spread = math.sqrt(p * (1 - p) / x.numel())
    assert dropped.mean().item() == pytest.approx(p, abs=4 * spread)
    flat = dropped.flatten() - p
    for step in (1, 2, 3, 4, 999):  # of 64 random bits, four neighbours take 16 each
        assert (flat[step:] * flat[:-step]).mean().item() == pytest.approx(0, abs=4 * p * (1 - p) / 1000)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)  # of ones
    assert dropout(x, p, training=False) is x


def test_dropout_draws_the_same_where_it_is_compiled():
    def twice(x: torch.Tensor) -> torch.Tensor:
        return dropout(x, 0.3, True) + 10 * dropout(x, 0.5, True)

    x, found = torch.ones(33, 7), []
    for function in (twice, torch.compile(twice, backend="aot_eager", dynamic=False)):
        torch.manual_seed(0)
        found += [function(x), function(x)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_the_seed_fixes_the_weights():
    config = ModelConfig(**SMALL)
    models = [GPT(config, 40) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    for (name, a), b, c in zip(
        models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not a.any() or not torch.equal(a, c), name


INITS = ["zero", "gpt2", "torch", "nanochat_2025", "nanochat_2026"]


@pytest.mark.parametrize("init", INITS)
def test_a_new_model_knows_nothing(init):
    """Its loss on random tokens is near the logarithm of the vocabulary."""
    config = ModelConfig(**{**SMALL, **VARIANTS["gpt2"], "init": init, "tied_head": False})
    model = GPT(config, 40)
    model.init_weights(torch.Generator().manual_seed(1))
    tokens, targets = torch.randint(0, 40, (2, 20, 16)).unbind()
    loss = float(model(tokens, targets).detach() / targets.numel())
    tolerance = 0.3 if init in ("gpt2", "torch") else 0.05
    assert loss == pytest.approx(torch.log(torch.tensor(40.0)).item(), abs=tolerance)


def test_every_parameter_is_initialised():
    for changes, init in itertools.product(VARIANTS.values(), INITS):
        model = GPT(ModelConfig(**{**SMALL, **changes, "init": init}), 40)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.init_weights(torch.Generator().manual_seed(1))
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), f"{name} of {changes}"


def test_nanochats_initialisations():
    """Normal in October 2025, uniform in July 2026, with the published deviations; what adds to the stream is 0."""
    width, nanochat = 256, VARIANTS["nanochat"] | {"layers": 3, "width": 256, "heads": 2, "context_length": 16}
    found = {}
    for init in ("nanochat_2025", "nanochat_2026"):
        model = GPT(ModelConfig(**nanochat, init=init), 1000)
        model.init_weights(torch.Generator().manual_seed(1))
        values = {name: p.detach() for name, p in model.named_parameters() if p.numel() > 1}
        found[init] = {name: (float(p.std()), float(p.abs().max())) for name, p in values.items()}
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                assert not p.any(), name
    unit = width**-0.5
    of_2025, of_2026 = found["nanochat_2025"], found["nanochat_2026"]
    for name in ("blocks.0.attention.q.weight", "blocks.1.attention.v.weight", "blocks.2.mlp.up.weight"):
        assert of_2025[name][0] == pytest.approx(unit, rel=0.02)  # more outputs than inputs count as as many
        assert of_2025[name][1] > 3.5 * unit  # normal
        factor = 0.4 if "up" in name else 1.0
        assert of_2026[name][0] == pytest.approx(factor * unit, rel=0.02)
        assert of_2026[name][1] == pytest.approx(factor * 3**0.5 * unit, rel=0.01)  # uniform
    assert of_2025["head.weight"] == (0.0, 0.0)
    assert of_2025["embedding.weight"][0] == pytest.approx(1.0, rel=0.02)
    assert of_2026["head.weight"][0] == pytest.approx(0.001, rel=0.02)
    assert of_2026["embedding.weight"][0] == pytest.approx(0.8, rel=0.02)
    assert of_2026["value_embeddings.0.weight"][0] == pytest.approx(unit, rel=0.02)
    assert of_2026["value_embeddings.0.weight"][1] == pytest.approx(3**0.5 * unit, rel=0.01)


@pytest.mark.parametrize("T", [8, PLAIN_ROWS, PLAIN_ROWS + 44])
@pytest.mark.parametrize("kind", ["causal", "window", "rows"])
def test_plain_attention_on_a_cpu_equals_pytorch_in_float64(T: int, kind: str):
    generator = torch.Generator().manual_seed(0)
    S = T + 5 if kind == "rows" else T
    q, k, v, weight = (
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, length in ((4, T), (2, S), (2, S), (4, T))
    )
    last = torch.arange(T)[None, :, None] + (torch.tensor([5, 2])[:, None, None] if kind == "rows" else 0)
    mask = torch.arange(S) <= last  # of rows of different lengths, as while decoding, the shorter one has empty slots
    if kind == "window":
        mask &= torch.arange(S) > last - 3
    mask = mask[:, None] if kind == "rows" else mask[0]
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    wanted = theirs, *torch.autograd.grad(theirs, (q, k, v), weight)
    given = None if kind == "causal" else mask
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        inputs = a, b, c = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        ours = attend_plainly(a, b, c, given, 0.3, 0.0)
        for a, b in zip((ours, *torch.autograd.grad(ours, inputs, weight.to(dtype))), wanted, strict=True):
            assert (a.double() - b).norm() < error * b.norm()


def test_a_gpu_is_not_given_a_mask_and_groups_together(monkeypatch):
    """No kernel of its own takes both; the result is that of the CPU."""
    asked, kernel = [], F.scaled_dot_product_attention

    def noted(q, k, v, mask, *rest, enable_gqa, **more):
        asked.append((mask is not None, enable_gqa))
        return kernel(q, k, v, mask, *rest, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k, v = (torch.randn(2, heads, 8, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    mask = torch.ones(8, 8, dtype=torch.bool).tril().triu(-2)
    for given in (None, mask):
        on_gpu, on_cpu = (attend(q, k, v, given, 0.25, 0.0, device) for device in ("cuda", "cpu"))
        assert torch.allclose(on_gpu, on_cpu, atol=1e-6)
    assert asked == [(False, True), (True, False)]
