import itertools
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from tests.model.test_transformer import build
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from pretrain.config import ModelConfig
from pretrain.model import attention
from pretrain.model.attention import BLOCK, attend_in_blocks, block_mask, kernel_problem, obstacle
from pretrain.model.cache import KVCache
from pretrain.model.packed import for_inference

KINDS = {
    "causal": {},
    "window": {"window": 100},
    "documents": {"documents": True},
    "both": {"window": 100, "documents": True},
}
HEADS = {"heads alone": (4, 4), "groups of heads": (4, 1)}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def documents_of(rows: int, T: int, length: int = 90) -> Tensor:
    """The number of each token's document, of about that length; the first row is one document."""
    starts = torch.rand(rows, T, generator=torch.Generator().manual_seed(0)) < 1 / length
    starts[0] = False
    return starts.cumsum(1)


def by_the_rules(T: int, window: int | None, documents: Tensor | None) -> Tensor:
    """Who may look at whom, (B, 1, T, T), written out."""
    query, key = torch.arange(T)[:, None], torch.arange(T)
    seen = (key <= query) & (key > query - (window or T))
    same = torch.ones(1, T, T, dtype=torch.bool) if documents is None else documents[:, :, None] == documents[:, None]
    return (seen & same)[:, None]


def inputs(heads: int, groups: int, T: int, D: int, **more: Any) -> list[Tensor]:
    """Queries, keys, values and the weights of their output in a loss."""
    generator = torch.Generator(more.get("device", "cpu")).manual_seed(1)
    shapes = [(2, count, T, D) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, **more).requires_grad_() for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in fp32 by its definition."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.mT * 0.2).masked_fill(~seen.to(q.device), -torch.inf)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("window", [None, 1, 2, 100, BLOCK, BLOCK + 1, 200, 2 * BLOCK + 1, 512, 1000])
@pytest.mark.parametrize("length", [0, 3, 90, 400])
def test_only_blocks_with_something_in_them_are_computed(window: int | None, length: int):
    """And only blocks seen as a whole are not asked for each pair."""
    T, documents = 512, documents_of(4, 512, length) if length else None
    mask = block_mask(T, window, documents, torch.device("cpu"))
    seen = by_the_rules(T, window, documents)
    blocks = seen.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4).flatten(4)  # (B, 1, N, N, pairs)
    whole, part = blocks.all(-1), blocks.any(-1) & ~blocks.all(-1)
    assert torch.equal(create_mask(mask.mask_mod, *seen.shape, device="cpu"), seen)
    for dense, counts, indices in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
        (part.mT, mask.q_num_blocks, mask.q_indices),
        (whole.mT, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert torch.equal(counts, dense.sum(-1))
        for row, count, order in zip(dense.flatten(0, 2), counts.flatten(), indices.flatten(0, 2), strict=True):
            assert order[:count].tolist() == row.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("heads", "D"), [*itertools.product(HEADS.values(), (64, 128))])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_a_mask_gives(kind: str, heads: tuple[int, int], D: int, monkeypatch):
    """Forward, and backward by PyTorch's reference of the operation, which it does not offer on a CPU otherwise."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    T, window = 256, KINDS[kind].get("window")
    documents = documents_of(2, T) if "documents" in KINDS[kind] else None
    q, k, v, weight = inputs(*heads, T, D)
    compiled = torch.compile(attend_in_blocks, backend="eager", dynamic=False, fullgraph=True)
    found = compiled(q, k, v, block_mask(T, window, documents, q.device), 0.2)
    wanted = exact(q, k, v, by_the_rules(T, window, documents))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weight) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_a_model_in_blocks_is_the_same_model(documents: bool):
    """Not with a cache nor on other lengths, which have masks, nor in a copy that is not compiled."""
    fields = {"layers": 3, "heads": 4, "kv_heads": 2, "width": 64, "context_length": 256, "window_pattern": "SL"}
    model = build(ModelConfig(**fields, window=100, document_mask=documents))
    tokens = torch.randint(0, 40, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens)
        model.in_blocks = True
        torch.testing.assert_close(model(tokens), wanted, atol=2e-5, rtol=1e-5)
        for cache in (None, KVCache(256)):
            assert torch.equal(model(tokens[:, :100], cache=cache), build_again(model)(tokens[:, :100]))
        torch.testing.assert_close(model(tokens, cache=KVCache(256)), wanted, atol=1e-5, rtol=1e-5)
    assert not for_inference(model).in_blocks


def build_again(model):
    again = build(model.config)
    assert not again.in_blocks
    return again


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"device": torch.device("cpu")}, "there is no kernel for cpu"),
        ({"device": torch.device("mps")}, "there is no kernel for mps"),
        ({"compiled": False}, "the model is not compiled"),
        ({"dropout": 0.1}, "model.dropout drops weights of attention"),
        ({"length": 1000}, "model.context_length is no multiple of 128"),
        ({"head_dim": 8}, "heads have fewer than 16 channels"),
    ],
)
def test_where_blocks_are_used(changes: dict[str, Any], problem: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usual = {"device": torch.device("cuda"), "compiled": True, "length": 1024, "head_dim": 64, "dropout": 0.0}
    assert obstacle(**usual | changes) == problem


def test_an_old_gpu_takes_masks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, problem in (((7, 5), "the GPU is older than Ampere"), ((8, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert obstacle(torch.device("cuda"), True, 1024, 64, 0.0) == problem


def test_a_kernel_that_fails_or_is_wrong_is_found_at_the_start(monkeypatch):
    """With PyTorch's reference in place of the kernel of a GPU."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: torch.compiler.disable(function))
    right = attend_by_mask

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nand more")

    differ = "its results differ from those of a mask"
    cases = {
        right: "",
        lambda q, k, v, mask, scale: right(q, k, v, mask, 1.1 * scale): differ,
        lambda q, k, v, mask, scale: right(q, k, v.detach(), mask, scale) + 0 * v.sum(): differ,  # in its gradient
        fails: "out of resource: shared memory",
    }
    for function, problem in cases.items():
        monkeypatch.setattr(attention, "attend_in_blocks", function)
        assert kernel_problem(torch.device("cpu"), torch.float32, 4, 2, 32) == problem


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    seen = create_mask(mask.mask_mod, 1, 1, q.shape[2], q.shape[2], device="cpu")
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "D"), [*zip(HEADS.values(), (64, 128), strict=True)])
@pytest.mark.parametrize("kind", ["window", "documents", "both"])
def test_the_kernels_of_a_gpu_give_what_a_mask_gives(kind: str, heads: tuple[int, int], D: int):
    """Forward and backward in bf16, against fp32 by definition; ``make gpu-check`` has more sizes."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    T, window = 1024, 257 if "window" in KINDS[kind] else None
    documents = documents_of(2, T).cuda() if "documents" in KINDS[kind] else None
    q, k, v, weight = inputs(heads[0], heads[1], T, D, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(attend_in_blocks, dynamic=False, fullgraph=True)
    found = compiled(q, k, v, block_mask(T, window, documents, q.device), 0.2)
    wanted = exact(q, k, v, by_the_rules(T, window, None if documents is None else documents.cpu()))
    pairs = zip(*((y, *torch.autograd.grad(y, (q, k, v), weight.to(y.dtype))) for y in (found, wanted)), strict=True)
    for a, b in pairs:
        assert (a.float() - b.float()).norm() < 0.015 * b.float().norm()  # bf16 rounds to 0.004


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_pass_their_trial_on_a_gpu(dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    assert kernel_problem(torch.device("cuda"), dtype, 4, 2, 128) == ""
