import pytest
import torch

from pretrain.config import load_config
from pretrain.device import Precision
from pretrain.errors import UsageError
from pretrain.model import GPT
from pretrain.training.parallel import parallelize, use_fp8
from pretrain.training.world import World


def small_model() -> GPT:
    model = GPT(load_config("quickstart", **{"model.layers": 2}).model, 64)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.activation_dtype = torch.bfloat16
    return model


def test_fp8_is_near_bf16_and_keeps_every_name():
    """Emulated: the same numbers as on the hardware."""
    pytest.importorskip("torchao")
    model = small_model()
    tokens, targets = torch.randint(0, 64, (2, 4, 128)).unbind()
    names = [name for name, _ in model.named_parameters()]

    def loss_and_gradients() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients)

    loss, gradient = loss_and_gradients()
    use_fp8(model, emulate=True)
    loss_fp8, gradient_fp8 = loss_and_gradients()
    assert [name for name, _ in model.named_parameters()] == names
    assert loss_fp8 != loss
    assert loss_fp8 == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, gradient_fp8, dim=0) > 0.98


def test_fp8_without_the_hardware_is_refused():
    config = load_config("quickstart", **{"train.fp8": True})
    cpu = torch.device("cpu")
    with pytest.raises(UsageError, match=r"train.fp8 needs a GPU of compute capability 8\.9"):
        parallelize(small_model(), "none", config, World(cpu), Precision("bf16", cpu), print)
