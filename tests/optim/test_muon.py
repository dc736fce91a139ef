import copy
import functools
import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import Config, GroupConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from pretrain.errors import UsageError
from pretrain.model import GPT
from pretrain.optim import alone, build_optimizers, distributed, replicated, row_sharded
from pretrain.optim.distributed import shares
from pretrain.optim.muon import Muon, orthogonalize, quintics
from pretrain.plan.memory import Holding


@pytest.mark.parametrize("kind", ["classic", "polar_express"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int], kind: str):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    limit = {"classic": 1.0, "polar_express": 1.01}[kind]
    for matrix, result in zip(matrices, orthogonalize(matrices, kind, 5), strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        singular = torch.linalg.svdvals(result)
        assert singular.max() < 1.3
        assert singular.median() > 0.6
        # Same singular vectors, the values mapped by the odd polynomials in turn: the float64 reference.
        values = (s / matrix.norm() / limit).double()
        for a, b, c in quintics(kind, 5):
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


NANOCHAT = {
    "newton_schulz": "polar_express",
    "cautious": True,
    "nanochat_decay": True,
    "row_equilibration": True,
    "renormalize": True,
    "normuon_beta2": 0.9,
}


@pytest.mark.parametrize(("kind", "options"), [("adamw", {}), ("muon", {}), ("muon", NANOCHAT)])
def test_infinity_changes_nothing(kind: str, options: dict):
    """A step with found_inf set leaves parameters and moments bit for bit, whatever the gradients hold."""
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(kind=kind, weight_decay=0.1, **options))
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
    shape = {"layers": 2, "heads": 2, "width": 16, "bias": True, "norm_weight": True, "bigram_rows": 8}
    model = GPT(ModelConfig(**shape, tied_head=tied), 30)
    rates = {"lr": 0.1, "embedding_lr": 0.2, "head_lr": 0.3, "scalar_lr": 0.4, "bigram_lr": 0.5}
    optimizers = build_optimizers(model, OptimConfig(kind=kind, **rates))
    rates = {p: group["peak_lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    expected = {"embedding": 0.2, "matrix": 0.1, "scalar": 0.4} if kind == "muon" else dict.fromkeys("ems", 0.1)
    if kind == "muon":
        assert rates[model.embedding.weight] == expected["embedding"]
        assert rates[model.bigram_embedding.weight] == 0.5  # type: ignore[union-attr]
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


GROUPS = {
    "head": {"lr": 0.5, "weight_decay": 0.25},
    "embedding": {"lr_factor": 0.5, "betas": (0.5, 0.75)},
    "embedding_scale": {"betas": (0.96, 0.95)},
    "blocks": {"weight_decay": 0.125},
    "blocks.1.mlp_norm": {"lr_factor": 3.0},
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_have_rates_betas_and_decay_of_their_own(kind: str):
    """The name of a parameter or module, whole; the longest that fits; what is absent is as for the rest."""
    shape = {"layers": 2, "heads": 2, "width": 16, "norm_weight": True, "residual_scalars": True}
    model = GPT(ModelConfig(**shape), 30)
    groups = {name: GroupConfig(**values) for name, values in GROUPS.items()}
    rates = {"lr": 0.1, "embedding_lr": 0.2, "head_lr": 0.3, "scalar_lr": 0.4, "width_scaling": True}
    decay = 0.1 if kind == "adamw" else 0.0
    optimizers = build_optimizers(
        model, OptimConfig(kind=kind, betas=(0.8, 0.95), weight_decay=decay, groups=groups, **rates)
    )
    found = {
        p: (group["peak_lr"], group["betas"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if "betas" in group
    }
    scalars, width = (0.4, 1 / math.sqrt(16 / 768)) if kind == "muon" else (0.1, 1.0)
    embedding = 0.2 * width if kind == "muon" else 0.1
    expected = {
        "head.weight": (0.5, (0.8, 0.95), 0.25),  # a rate of its own is not scaled
        "embedding.weight": (0.5 * embedding, (0.5, 0.75), decay),
        "embedding_scale": (scalars, (0.96, 0.95), 0.0),  # not a part of embedding
        "stream_scale": (scalars, (0.8, 0.95), 0.0),
        "blocks.1.attention_norm.weight": (scalars, (0.8, 0.95), 0.125),
        "blocks.1.mlp_norm.weight": (3 * scalars, (0.8, 0.95), 0.0),
    }
    for name, values in expected.items():
        rate, *rest = found[model.get_parameter(name)]
        assert rate == pytest.approx(values[0]), name
        assert tuple(rest) == values[1:], name


@pytest.mark.parametrize(
    ("key", "hint"), [("heads", "; did you mean 'head'"), ("emb", ""), ("blocks.1", "; there are ")]
)
def test_a_group_of_no_parameter_is_refused(key: str, hint: str):
    """blocks.1 has only matrices, which Muon updates."""
    model = GPT(ModelConfig(layers=2, heads=2, width=16), 30)
    message = f"optim.groups.{key} names no parameter of this model that AdamW updates{hint}"
    with pytest.raises(UsageError, match=re.escape(message)):
        build_optimizers(model, OptimConfig(kind="muon", groups={key: GroupConfig(lr=0.1)}))


def reference_of_2026(weights: list, gradients: list[list], lr: float, decay: float, momentum: float, beta2: float):
    """The published formulas in float64, one matrix and one step after the other; orthogonalised through the SVD.

    MuonEq (arXiv 2603.28254), Polar Express (2505.16932), Muon+ (2602.21545), NorMuon (2510.05491), then cautious
    decay (2510.12402) with the update's scale.
    """
    results = []
    for index, start in enumerate(weights):
        w, buffer, second = start.double(), torch.zeros_like(start, dtype=torch.float64), 0.0
        rows, columns = w.shape
        neurons = 1 if rows >= columns else 0  # the dimension over which a neuron's mean square is taken
        for step in gradients:
            g = step[index].double()
            buffer = momentum * buffer + (1 - momentum) * g
            direction = momentum * buffer + (1 - momentum) * g
            norms = direction.square().sum(1).sqrt()
            direction = direction / norms[:, None] * norms.square().mean().sqrt()
            u, s, v = torch.linalg.svd(direction, full_matrices=False)
            s = s / (1.01 * direction.square().sum().sqrt())
            for a, b, c in quintics("polar_express", 5):
                s = a * s + b * s**3 + c * s**5
            x = (u * s) @ v
            x = x * math.sqrt(min(rows, columns)) / x.square().sum().sqrt()
            mean = x.square().mean(neurons, keepdim=True)
            second = beta2 * second + (1 - beta2) * mean
            normalized = x / second.sqrt()
            x = normalized * x.square().sum().sqrt() / normalized.square().sum().sqrt()
            rate = lr * math.sqrt(max(1.0, rows / columns))
            w = w - rate * x - rate * decay * w * (x * w >= 0)
        results.append(w)
    return results


def test_nanochats_muon_follows_the_formulas():
    """Ten steps of tall, wide and square matrices, against float64; the weights move by about 0.1."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 8), (32, 8), (8, 32), (12, 5)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(10)]
    ours = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = Muon(ours, OptimConfig(lr=0.02, momentum=0.9, weight_decay=0.3, **NANOCHAT))
    for step in gradients:
        for p, g in zip(ours, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, w in zip(ours, reference_of_2026(start, gradients, 0.02, 0.3, 0.9, 0.9), strict=True):
        torch.testing.assert_close(p.detach().double(), w, atol=2e-5, rtol=0)


def test_nanochats_decay_acts_also_where_the_update_is_0():
    """As before the first step, when output projections of 0 let no gradient through."""
    for options, expected in (({}, 1.0), ({"nanochat_decay": True}, 1 - 0.1 * 2 * 0.5)):
        p = torch.nn.Parameter(torch.ones(16, 4))
        p.grad = torch.zeros(16, 4)
        Muon([p], OptimConfig(lr=0.1, weight_decay=0.5, cautious=True, **options)).step()
        torch.testing.assert_close(p.detach(), torch.full((16, 4), expected))  # scale sqrt(16 / 4) = 2


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


def matrices_of(*shapes: tuple[int, int]) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def test_an_update_holds_one_stack_at_a_time():
    """Of 600 million parameters less than a byte for each beside what stays; all shapes at once would take 14."""
    with FakeTensorMode(), Holding() as holding:
        parameters = [
            torch.nn.Parameter(torch.empty(shape)) for shape in ((1280, 1280), (5120, 1280)) for _ in range(72)
        ]
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer = Muon(parameters, OptimConfig(weight_decay=0.1), torch.bfloat16)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        holding.peak = before = holding.live
        optimizer.step()
    assert 0 < holding.peak - before < sum(p.numel() for p in parameters)


def test_the_size_of_a_stack_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    shapes = [(16, 16)] * 5 + [(32, 16)] * 3
    whole, parts = matrices_of(*shapes), matrices_of(*shapes)
    config = OptimConfig(lr=0.02, weight_decay=0.3, **NANOCHAT)
    Muon(whole, config).step()
    monkeypatch.setattr("pretrain.optim.muon.STACK", 2 * 16 * 16)
    Muon(parts, config).step()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, NANOCHAT], ids=["classic", "nanochat"])
def test_a_compiled_update_is_the_same_and_compiled_once(options: dict, monkeypatch: pytest.MonkeyPatch):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    shapes = [(16, 16)] * 3 + [(32, 16)] * 2
    eager, compiled = matrices_of(*shapes), matrices_of(*shapes)
    config = OptimConfig(lr=0.02, weight_decay=0.3, **{"cautious": True, **options})
    optimizers = Muon(eager, config), Muon(compiled, config)
    optimizers[1].compile()
    counts = []
    for step in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(lr=0.02 - 0.004 * step, momentum=0.9 + 0.01 * step)
            optimizer.found_inf = torch.tensor(float(step == 2))  # skipped
            optimizer.step()
        counts.append(len(graphs))
    assert counts == [counts[0]] * 4
    assert counts[0] == 2 * (5 if options else 2)  # for each shape
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        buffers = (optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*buffers, atol=1e-6, rtol=1e-5)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a step sends, waits for and works on, in order, in a group of 3 processes of which this one alone exists."""
    events: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def send(*_: Any, async_op: bool, **__: Any) -> Any:
            assert async_op
            events.append(name)
            return types.SimpleNamespace(wait=lambda: events.append(f"wait for {name}"))

        return send

    def orthogonal(matrices: torch.Tensor, *_: Any) -> torch.Tensor:
        events.append("work")
        return matrices

    monkeypatch.setattr(dist, "all_to_all_single", recorded("rows"))
    monkeypatch.setattr(distributed, "all_gather", recorded("results"))
    monkeypatch.setattr("pretrain.optim.muon.orthogonalize", orthogonal)
    monkeypatch.setattr("pretrain.optim.muon.STACK", 16 * 16)  # a matrix for each process
    yield events
    dist.destroy_process_group()


def test_all_rows_are_sent_before_any_product(sent: list[str]):
    """FSDP: then each stack is worked on as its rows arrive, while results travel; they are waited for in the end."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    parameters = matrices_of(*[(16, 16)] * 4, *[(16, 8)] * 3)  # 16 rows of 46, and of 48
    optimizer = Muon(parameters, OptimConfig())
    whole = {p: torch.Size((46 if p.shape[1] == 16 else 48, p.shape[1])) for p in parameters}
    optimizer.share(functools.partial(row_sharded, group=None), whole)
    optimizer.step()
    stack = ["wait for rows", "work", "rows"]
    assert sent == ["rows"] * 3 + stack + ["wait for rows", "rows"] + stack + ["wait for rows"] * 3


@pytest.mark.parametrize("rank", range(3))
def test_a_process_has_the_momentum_of_its_own_matrices(sent: list[str], rank: int):
    """DDP: results are waited for when all have been sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    parameters = matrices_of(*[(16, 16)] * 4, *[(16, 8)] * 3)
    optimizer = Muon(parameters, OptimConfig())
    optimizer.share(functools.partial(replicated, group=None, inside=alone), {})
    optimizer.step()
    held = [i for i, p in enumerate(parameters) if p in optimizer.state]
    assert held == [[0, 3, 4], [1, 5], [2, 6]][rank]
    fourth = ["work", "results"] if rank == 0 else ["results"]
    assert sent == ["work", "results", *fourth, "work", "results"] + ["wait for results"] * 3


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
