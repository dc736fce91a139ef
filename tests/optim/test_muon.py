import copy
import math

import pytest
import torch

from pretrain.config import Config, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from pretrain.model import GPT
from pretrain.optim import build_optimizers
from pretrain.optim.distributed import shares
from pretrain.optim.muon import Muon, orthogonalize, quintics


@pytest.mark.parametrize("kind", ["classic", "polar_express"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int], kind: str):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    coefficients = quintics(kind, 5)
    for matrix, result in zip(matrices, orthogonalize(matrices, coefficients), strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        singular = torch.linalg.svdvals(result)
        assert singular.max() < 1.3
        assert singular.median() > 0.6
        # Same singular vectors, the values mapped by the odd polynomials in turn: the float64 reference.
        values = (s / matrix.norm() / 1.01).double()
        for a, b, c in coefficients:
            values = a * values + b * values**3 + c * values**5
        expected = u.double() @ values.diag() @ v.double()
        torch.testing.assert_close(result.double(), expected, atol=1e-3, rtol=1e-3)


def test_fewer_rounds_of_polar_express_take_the_first_and_the_last():
    five = quintics("polar_express", 5)
    assert quintics("polar_express", 3) == [five[0], five[2], five[4]]
    assert quintics("polar_express", 2) == [five[0], five[4]]


def test_update_scales():
    """spectral: sqrt(max(1, rows / columns)); rms: 0.2 sqrt(max(rows, columns)), against a step of both."""
    for shape in ((64, 16), (16, 64)):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        moved = {}
        for scale in ("spectral", "rms"):
            p = torch.nn.Parameter(start.clone())
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            Muon([p], OptimConfig(lr=0.1, update_scale=scale)).step()
            moved[scale] = (p.detach() - start).norm()
        ratio = 0.2 * 64**0.5 / max(1, shape[0] / shape[1]) ** 0.5
        assert float(moved["rms"] / moved["spectral"]) == pytest.approx(ratio, rel=1e-4)


def test_cautious_decay_acts_only_where_the_update_shrinks_the_weight():
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 8, 8, generator=generator).unbind()

    def stepped(**settings) -> torch.Tensor:
        p = torch.nn.Parameter(start.clone())
        p.grad = gradient.clone()
        Muon([p], OptimConfig(lr=0.1, **settings)).step()
        return p.detach()

    plain, decayed, cautious = stepped(), stepped(weight_decay=0.5), stepped(weight_decay=0.5, cautious=True)
    shrinking = (plain - start) * start < 0
    assert shrinking.any()
    assert not shrinking.all()
    torch.testing.assert_close(cautious, torch.where(shrinking, decayed, plain))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_pytorchs(weight_decay: float):
    """To the rounding of torch.optim.Muon, which runs Newton-Schulz in bfloat16; a step moves entries by about 7e-3."""
    shapes = [(8, 8), (8, 8), (32, 8), (8, 32)]
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": weight_decay}
    a = Muon(ours, OptimConfig(**settings))
    b = torch.optim.Muon(theirs, **settings, nesterov=True, adjust_lr_fn="original")
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=0)


def small_model() -> GPT:
    model = GPT(ModelConfig(layers=2, heads=2, width=16, context_length=8, norm_weight=True, bias=True), 30)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_infinity_changes_nothing(kind: str):
    """A step with found_inf set leaves parameters and moments bit for bit, whatever the gradients hold."""
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(kind=kind, weight_decay=0.1))
    tokens, targets = torch.randint(0, 30, (2, 4, 8)).unbind()

    def step(found_inf: float, poison: float = 0.0) -> None:
        model(tokens, targets).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] += poison
        for optimizer in optimizers:
            optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    step(0.0)
    with torch.no_grad():
        model.head.weight[0, 0] = -0.0
        model.blocks[0].mlp.up.weight[0, 0] = -0.0  # type: ignore[union-attr,index]

    def bits() -> list[bytes]:
        states = [v for o in optimizers for state in o.state.values() for v in state.values()]
        return [t.detach().numpy().tobytes() for t in (*model.parameters(), *states)]

    before = bits()
    for poison in (math.nan, math.inf):
        step(1.0, poison)
        assert bits() == before
    step(0.0)
    assert bits() != before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_its_place(kind: str, tied: bool):
    model = GPT(ModelConfig(layers=2, heads=2, width=16, bias=True, norm_weight=True, tied_head=tied), 30)
    optimizers = build_optimizers(model, OptimConfig(kind=kind, lr=0.1, embedding_lr=0.2, head_lr=0.3, scalar_lr=0.4))
    rates = {p: group["peak_lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    expected = {"embedding": 0.2, "matrix": 0.1, "scalar": 0.4} if kind == "muon" else dict.fromkeys("ems", 0.1)
    if kind == "muon":
        assert rates[model.embedding.weight] == expected["embedding"]
        assert rates[model.blocks[0].mlp.up.weight] == expected["matrix"]  # type: ignore[union-attr,index]
        assert rates[model.norm.weight] == expected["scalar"]  # type: ignore[index]
        assert tied or rates[model.head.weight] == 0.3
    else:
        assert set(rates.values()) == {0.1}


def test_adamw_decays_matrices_only_unless_told():
    model = small_model()
    for decay_all in (False, True):
        (optimizer,) = build_optimizers(model, OptimConfig(kind="adamw", weight_decay=0.1, decay_all=decay_all))
        decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay[model.embedding.weight] == 0.1
        assert decay[model.norm.weight] == (0.1 if decay_all else 0.0)  # type: ignore[index]


def test_processes_share_stacks_evenly():
    """What does not divide goes round: over all stacks no process has more than one matrix more than another."""
    for size in (1, 2, 3, 8, 512):
        total, first = [0] * size, 0
        for count in (12, 7, 24, 1, 1, 36):
            owned = shares(count, size, first)
            assert sum(owned) == count
            assert max(owned) - min(owned) <= 1
            total, first = [a + b for a, b in zip(total, owned, strict=True)], first + count
        assert max(total) - min(total) <= 1


def test_what_follows_the_schedule():
    """Momentum rises, then falls with the linear decay; weight decay ends at 0; groups keep their own rates."""
    fields = {"momentum": 0.97, "momentum_warmup_steps": 40, "momentum_final": 0.9, "decay_to_zero": True}
    optim = OptimConfig(weight_decay=0.2, lr=0.1, embedding_lr=0.3, **fields)
    schedule = ScheduleConfig(kind="linear", warmup_steps=0, decay_fraction=0.5, final=0.2)
    config = Config(optim=optim, schedule=schedule, train=TrainConfig(steps=200))
    muon, adamw = build_optimizers(small_model(), optim)
    seen = {}
    for step in (0, 20, 100, 150, 200):
        muon.set_step(step, config)
        adamw.set_step(step, config)
        group = muon.param_groups[0]
        seen[step] = (group["momentum"], group["weight_decay"], group["lr"], adamw.param_groups[0]["lr"])
    expected = {
        0: (0.85, 0.2, 0.1, 0.3),
        20: (0.91, 0.1 * (1 + math.cos(math.pi / 10)), 0.1, 0.3),
        100: (0.97, 0.1, 0.1, 0.3),
        150: (0.935, 0.1 * (1 + math.cos(math.pi * 0.75)), 0.06, 0.18),
        200: (0.9, 0.0, 0.02, 0.06),
    }
    for step, values in expected.items():
        assert seen[step] == pytest.approx(values)
