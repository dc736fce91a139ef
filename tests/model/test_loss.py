import pytest
import torch
import torch.nn.functional as F

from pretrain.model.loss import IGNORE, ChunkLoss, linear_cross_entropy, softcap


def reference(x, weight, targets, cap, reduction):
    logits = softcap(x @ weight.T, cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


@pytest.fixture
def case():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 7))
    targets[1, 2:5] = IGNORE
    return x, weight, targets


@pytest.mark.parametrize("cap", [0.0, 15.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 1000])  # 4: a ragged last chunk; 1000: all at once
@pytest.mark.parametrize("compiled", [False, True])  # where other operations are used
def test_loss_and_gradients_equal_pytorch(case, cap: float, chunk: int, compiled: bool):
    x, weight, targets = case
    chunk_loss = ChunkLoss()
    if compiled:
        chunk_loss.compile(backend="aot_eager", dynamic=False)
    ours = linear_cross_entropy(x, weight, targets, cap, "sum", 50, chunk, chunk_loss)
    theirs = reference(x, weight, targets, cap, "sum")
    torch.testing.assert_close(ours, theirs)
    ours_gradients = torch.autograd.grad(3 * ours, (x, weight))
    for a, b in zip(ours_gradients, torch.autograd.grad(3 * theirs, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_loss_for_each_target(case):
    x, weight, targets = case
    ours = linear_cross_entropy(x, weight, targets, 15.0, "none", 50, 512)
    assert ours.shape == targets.shape
    torch.testing.assert_close(ours.flatten(), reference(x, weight, targets, 15.0, "none"))
    assert (ours[targets == IGNORE] == 0).all()


def test_a_target_whose_probability_underflows_has_its_loss():
    x, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [1000.0], [-500.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([2]), 0.0, "sum", 3, 512)
    assert loss.item() == 1500
    assert torch.autograd.grad(loss, x)[0].item() == 1500


def test_bf16_keeps_the_softmax_in_fp32(case):
    x, weight, targets = case
    ours = linear_cross_entropy(x.bfloat16(), weight, targets, 15.0, "sum", 50, 512)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference(x, weight, targets, 15.0, "sum"), rtol=1e-2, atol=0)
    gradient = torch.autograd.grad(ours, weight)[0]
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_padding_rows_are_as_if_absent(case, cap: float, compiled: bool):
    x, weight, targets = case
    padded = torch.cat((weight, 100 * torch.randn(14, 16)))
    chunk_loss = ChunkLoss()
    if compiled:
        chunk_loss.compile(backend="aot_eager", dynamic=False)
    ours = linear_cross_entropy(x, padded, targets, cap, "sum", 50, 512, chunk_loss)
    theirs = reference(x, weight, targets, cap, "sum")
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(theirs, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
