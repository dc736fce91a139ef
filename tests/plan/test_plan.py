import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.cli import main
from pretrain.config import Config, ModelConfig, load_config
from pretrain.device import GPUS, Precision
from pretrain.errors import UsageError
from pretrain.model import GPT
from pretrain.model.transformer import window_length
from pretrain.optim import build_optimizers, find_optimizer
from pretrain.plan import Plan, describe, make_plan, warnings
from pretrain.plan.cluster import Layout, groups_of, memory_parts, traffic, traffic_seconds
from pretrain.plan.data import look_at_data
from pretrain.plan.memory import dry_run
from pretrain.plan.words import rounded, size
from pretrain.sizing import (
    activation_bytes,
    count_parameters,
    flops_per_token,
    matrices,
    meta_model,
    resolve,
    rows_measured,
    rows_that_fit,
    validated_tokens,
)
from pretrain.text import embedded_documents
from pretrain.tokenizer import build_tokenizer
from pretrain.training.speed import measure_speed


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
    assert matrices(counts) + counts["head"] == scaling
    assert (config.train.steps, config.train.batch_tokens) == (steps, batch)
    root = (batch / 2**19) ** 0.5
    assert config.optim.lr == pytest.approx(0.02 * root)
    assert config.optim.weight_decay == pytest.approx(0.28 * root * 110_100_912 / scaling)
    assert config.model.window == 513  # (512, 0) in its code, and the token itself
    assert f"train.steps = {steps:,}" in said
    assert resolve(config, 32768) == (config, [])  # what is resolved stays


def test_rates_follow_a_given_batch_once():
    """As nanochat's --total-batch-size: by the root of the batch, decay also by the horizon; October knows no such."""
    for batch, root in ((2**19, 1.0), (2**17, 0.5)):
        config, _ = resolve(load_config("nanochat", **{"train.batch_tokens": batch, "optim.head_lr": 0.01}), 32768)
        rates = (config.optim.lr, config.optim.value_embedding_lr, config.optim.head_lr, config.optim.scalar_lr)
        assert rates == pytest.approx((0.02 * root, 0.15 * root, 0.01 * root, 0.5 * root))
        assert config.optim.weight_decay == pytest.approx(0.28 * root * 110_100_912 / 435_160_240)
        assert config.optim.groups["smear"].lr == 0.2  # not scaled there either
        assert not config.optim.batch_scaling
        assert resolve(config, 32768) == (config, [])
    october, _ = resolve(load_config("nanochat-d20", **{"train.batch_tokens": 2**17}), 65536)
    assert october.optim == load_config("nanochat-d20").optim
    hour = load_config("gpu-1h")
    assert resolve(hour, 32768)[0].optim == dataclasses.replace(hour.optim, batch_scaling=False)  # 2^19 is no change


@pytest.mark.parametrize(("depth", "width", "heads"), [(1, 128, 1), (5, 384, 3), (12, 768, 6), (13, 896, 7)])
def test_an_odd_depth_has_whole_heads(depth: int, width: int, heads: int):
    config, _ = resolve(load_config("nanochat", **{"model.depth": depth}), 32768)
    assert (config.model.layers, config.model.width, config.model.heads) == (depth, width, heads)


@pytest.mark.parametrize(("length", "window"), [(256, 129), (512, 129), (1024, 257), (1100, 385), (2048, 513)])
def test_the_dials_window(length: int, window: int):
    """A quarter of the context rounded up to a multiple of 128, and the token itself; without the dial the quarter."""
    settings = {"model.context_length": length, "train.batch_tokens": 8 * length}
    config, _ = resolve(load_config("nanochat", **settings), 32768)
    assert config.model.window == window
    old = dataclasses.replace(config, model=dataclasses.replace(config.model, window=0))  # a run of before
    assert resolve(old, 32768)[0] == old
    assert window_length(old.model) == length // 4


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


def test_rows_measured_are_at_least_twice_as_many_or_as_they_were():
    config = load_config("quickstart", **{"train.batch_tokens": 128 * 12})
    fit = {free: rows_measured(config, 2, 100, free) for free in (1000, 706, 700, 236, 235, 10)}
    assert fit == {1000: 12, 706: 12, 700: 6, 236: 4, 235: 2, 10: 2}  # 50 bytes a row; 85 % of what is free
    assert rows_measured(config, 2, 0, 1000) == 2  # not counted on this device


@pytest.mark.parametrize("recipe", ["storybot", "quickstart", "gpu-1h"])
def test_the_activation_estimate_is_near_what_a_pass_keeps(recipe: str):
    config = load_config(
        recipe,
        **{
            "model.layers": 3,
            "model.context_length": 256,
            "train.batch_tokens": 512,
            "model.depth": 0,
            "model.width": 256,
            "model.heads": 2,
        },
    )
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
    assert sum(kept.values()) / 2 == pytest.approx(activation_bytes(config, 4, on_cpu=True), rel=0.35)


def test_the_estimate_has_the_weights_of_attention_on_a_cpu():
    fields = {"model.layers": 2, "model.width": 64, "model.heads": 16, "model.kv_heads": 16}
    config = load_config("gpt2-124m", **fields, **{"train.batch_tokens": 1024})
    model = GPT(config.model, 300)
    model.init_weights(torch.Generator().manual_seed(0))
    model.activation_dtype = torch.bfloat16
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.stream(torch.zeros(1, 1024, dtype=torch.long))
    assert sum(kept.values()) == pytest.approx(activation_bytes(config, 2, on_cpu=True), rel=0.2)


LLAMA_7B = {
    "model.layers": 32,
    "model.width": 4096,
    "model.heads": 32,
    "model.mlp": "swiglu",
    "model.mlp_width": 11008,
    "model.norm_weight": True,
    "model.embedding_norm": False,
    "model.qk_norm": False,
    "model.smear": False,
    "model.residual_scalars": False,
    "model.context_length": 4096,
    "train.batch_tokens": 4096 * 1024,
    "optim.kind": "adamw",
    "optim.lr": 3e-4,
}
"""Llama 2 with 7 billion parameters (arXiv 2307.09288)."""


def test_published_models_by_part():
    with_biases = {"model.bias": True, "model.qkv_bias": True, "model.vocab_multiple": 1}
    gpt2 = count_parameters(load_config("gpt2-124m", **with_biases).model, 50257)
    assert gpt2 == {
        "embedding": 50257 * 768,
        "value_embeddings": 0,
        "bigram_embedding": 0,
        "attention": 12 * 4 * 768**2,
        "mlp": 12 * 8 * 768**2,
        "head": 0,
        "other": 1024 * 768 + 12 * (4 * 768 + 9 * 768) + 2 * 768,
    }
    assert sum(gpt2.values()) == 124_439_808
    llama = count_parameters(load_config("quickstart", **LLAMA_7B).model, 32000)
    assert sum(llama.values()) == 6_738_415_616
    assert (llama["embedding"], llama["head"]) == (32000 * 4096,) * 2
    assert (llama["attention"], llama["mlp"]) == (32 * 4 * 4096**2, 32 * 3 * 4096 * 11008)


EVERYTHING = {"model.value_embeddings": True, "model.backout": True, "model.norm_weight": True, "model.bias": True}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_those_of_real_optimizers(kind: str):
    config = load_config("quickstart", **{**EVERYTHING, "model.layers": 2, "optim.kind": kind})
    model = GPT(config.model, 300)
    model.init_weights(torch.Generator().manual_seed(0))
    held = 0
    for optimizer in build_optimizers(model, config.optim):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    # AdamW's moments of single numbers were left out with its step counters, which are no moments.
    single = sum(p.numel() == 1 for p in model.parameters())
    assert find_optimizer(config.optim).state_bytes(count_parameters(config.model, 300)) == held + 8 * single


FP32, BF16 = (Precision(name, torch.device("cpu")) for name in ("fp32", "bf16"))
SMALL = {"model.layers": 2, "model.width": 64, "model.heads": 2, "train.batch_tokens": 1024}


def real_peak(config: Config, rows: int, dtype: torch.dtype) -> int:
    """Bytes that torch's own profiler sees allocated at most in two training steps."""
    from torch.profiler import ProfilerActivity, profile

    def steps() -> None:
        model = GPT(config.model, 300, 0)
        model.init_weights(torch.Generator().manual_seed(0))
        model.activation_dtype = dtype
        optimizers = build_optimizers(model, config.optim)
        for _ in range(2):
            tokens = torch.zeros(rows, config.model.context_length, dtype=torch.long)
            model(tokens, tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
                optimizer.step()
            model.zero_grad(set_to_none=True)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        (FP32, {}),
        (BF16, {"model.context_length": 512}),  # another attention than for short contexts
        (FP32, {"optim.kind": "adamw", "model.dropout": 0.1}),
    ],
)
def test_a_dry_run_holds_what_a_real_step_holds(precision: Precision, fields: dict[str, Any]):
    config = load_config("quickstart", **{**SMALL, **fields})
    rows = config.batch_rows
    _, peak = dry_run(config, 300, rows, 1, precision)
    assert peak == pytest.approx(real_peak(config, rows, precision.dtype), rel=1e-3)


def test_what_a_dry_run_tells_apart():
    config = load_config("quickstart", **SMALL)
    counts = count_parameters(config.model, 300)
    (small, _), (large, peak) = (dry_run(config, 300, rows, 1, BF16) for rows in (4, 8))
    assert small["weights"] == small["gradients"] == 4 * sum(counts.values())
    assert small["moments"] == pytest.approx(find_optimizer(config.optim).state_bytes(counts), rel=1e-2)
    averaged, peak_averaged = dry_run(load_config("quickstart", **SMALL, **{"optim.ema": 0.9}), 300, 8, 1, BF16)
    assert averaged == {**large, "average": 4 * sum(counts.values())}
    assert peak_averaged == peak + 4 * sum(counts.values())
    assert small["weight copies"] == 2 * matrices(counts)
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.05)
    _, peak_again = dry_run(config, 300, 8, 2, BF16)  # its gradients lie beside the next activations
    assert peak + 0.9 * large["gradients"] < peak_again
    checkpointed = dataclasses.replace(config, train=dataclasses.replace(config.train, activation_checkpointing=True))
    recomputed, _ = dry_run(checkpointed, 300, 8, 1, BF16)
    assert recomputed["activations"] < 0.5 * large["activations"]
    on_gpu, _ = dry_run(config, 300, 8, 1, Precision("bf16", torch.device("cuda")))  # never holds attention's scores
    assert on_gpu["activations"] < large["activations"]


def test_a_gpu_holds_no_masks_unless_it_must():
    """With torch.compile, windows and documents take the memory of plain attention, and otherwise that of masks."""
    groups = {"model.context_length": 128, "model.kv_heads": 1}
    hidden = groups | {"model.window_pattern": "SL", "model.document_mask": True}
    on_gpu = Precision("bf16", torch.device("cuda"))
    for change in ({}, {"train.compile": "off"}, {"model.context_length": 120, "train.batch_tokens": 960}):
        configs = (load_config("quickstart", **SMALL | fields | change) for fields in (hidden, groups))
        with_masks, without = (dry_run(config, 300, 8, 1, on_gpu)[0]["activations"] for config in configs)
        assert with_masks - without > 8 * 120 * 120 if change else with_masks == without


def test_a_dry_run_needs_neither_a_compiler_nor_fp8():
    config = load_config("quickstart", **SMALL, **{"train.compile": "on", "train.fp8": True})
    without = load_config("quickstart", **SMALL)
    on_gpu = Precision("bf16", torch.device("cuda"))
    assert dry_run(config, 300, 4, 1, on_gpu) == dry_run(without, 300, 4, 1, on_gpu)


ALONE = {
    "weights": 4000,
    "gradients": 4000,
    "moments": 8000,
    "weight copies": 1000,
    "activations": 500,
    "logits chunk": 100,
    "temporary": 400,
}
"""What one process holds."""


def test_memory_of_processes():
    config = load_config("quickstart", **{"optim.kind": "adamw", "model.layers": 3})
    assert memory_parts(ALONE, config, 300, Layout("none", 1), 1, torch.bfloat16) == ALONE
    assert memory_parts(ALONE, config, 300, Layout("ddp", 8), 1, torch.bfloat16) == ALONE
    fsdp = memory_parts(ALONE, config, 300, Layout("fsdp", 16), 1, torch.bfloat16)
    hsdp = memory_parts(ALONE, config, 300, Layout("hsdp", 16), 1, torch.bfloat16)
    assert fsdp["moments"] == pytest.approx(8000 / 16, rel=0.01)
    assert hsdp["moments"] == pytest.approx(8000 / 8, rel=0.01)
    groups = groups_of(meta_model(config.model, 300))
    assert 3 * groups.block == groups.blocks
    assert groups.tables == groups.table == groups.head == 300 * 256
    assert groups.rest == config.model.smear * (1 + 24) + 2 * 3  # gates, scalars
    tied = groups_of(meta_model(dataclasses.replace(config.model, tied_head=True), 300))
    assert (tied.head, tied.tables, tied.rest) == (0, 0, groups.rest + 300 * 256)
    assert memory_parts(ALONE, config, 300, Layout("fsdp", 16), 2, torch.bfloat16) == fsdp
    config = load_config("quickstart", **{"optim.kind": "adamw", "model.layers": 3, "parallel.reshard": False})
    waiting = memory_parts(ALONE, config, 300, Layout("fsdp", 16), 2, torch.bfloat16)
    whole = sum(count_parameters(config.model, 300).values())
    assert waiting["whole gradients"] == 4 * whole > fsdp["whole gradients"]


def test_shards_are_those_of_a_dry_run_on_many_processes():
    """7 billion parameters on 512 processes: fully_shard itself, on a process group that sends nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = load_config("quickstart", **LLAMA_7B)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    try:
        with torch.device("meta"):
            model = GPT(config.model, 32000)
        mesh = init_device_mesh("cpu", (512,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    finally:
        dist.destroy_process_group()
    whole = 4 * sum(count_parameters(config.model, 32000).values())
    alone = {"weights": whole, "gradients": whole, "moments": 2 * whole, "temporary": 0}
    planned = memory_parts(alone, config, 32000, Layout("fsdp", 512), 1, torch.bfloat16)
    assert planned["weights"] == planned["gradients"] == local
    assert planned["moments"] == pytest.approx(2 * local, abs=1)


def test_traffic_of_a_step():
    config = load_config("quickstart", **{"optim.kind": "adamw"})
    groups = groups_of(meta_model(config.model, 4096))
    blocks, P = groups.blocks, sum(count_parameters(config.model, 4096).values())
    assert traffic(config, 4096, Layout("none", 1), 1, torch.bfloat16) == {"inside": 0, "between": 0}
    ddp = traffic(config, 4096, Layout("ddp", 8), 4, torch.bfloat16)
    assert ddp == {"inside": 2 * round(P * 4 * 7 / 8), "between": 0}  # once a step, however many micro-batches
    fsdp = traffic(config, 4096, Layout("fsdp", 16), 3, torch.bfloat16)
    gathers = 3 * (4 * (groups.tables + groups.rest) + 2 * (groups.head + 2 * blocks)) * 15 / 16
    scatter = 3 * 4 * P * 15 / 16
    assert fsdp["inside"] == pytest.approx(gathers + scatter, abs=4)
    assert fsdp["between"] == fsdp["inside"] // 8  # eight rings, each with its own network
    hsdp = traffic(config, 4096, Layout("hsdp", 16), 3, torch.bfloat16)
    assert hsdp["between"] == pytest.approx(2 * 4 * P / 8 / 2, abs=4)
    assert hsdp["inside"] == pytest.approx((gathers + scatter) / (15 / 16) * 7 / 8, abs=4)
    muon = traffic(load_config("quickstart"), 4096, Layout("ddp", 8), 1, torch.bfloat16)
    assert muon["inside"] - ddp["inside"] == 2 * blocks * 7 / 8
    muon = traffic(load_config("quickstart"), 4096, Layout("hsdp", 16), 3, torch.bfloat16)
    assert muon["inside"] - hsdp["inside"] == pytest.approx(2 * 2 * blocks / 8 / 2 * 7 / 8, abs=4)
    assert muon["between"] - hsdp["between"] == pytest.approx(2 * blocks / 8 / 2, abs=4)

    h100 = GPUS["h100"]
    assert traffic_seconds({"inside": 450e9, "between": 0}, Layout("ddp", 8), h100) == 1.0
    assert traffic_seconds({"inside": 50e9, "between": 50e9}, Layout("fsdp", 16), h100) == 1.0
    assert traffic_seconds({"inside": 450e9, "between": 50e9}, Layout("hsdp", 16), h100) == 2.0


@pytest.mark.parametrize(
    ("layers", "gpus", "kind"),
    [(32, 1, "none"), (4, 16, "ddp"), (32, 8, "fsdp"), (32, 16, "hsdp"), (32, 12, "fsdp"), (600, 512, "fsdp")],
)
def test_several_machines_share_a_model_that_fits_on_each(layers: int, gpus: int, kind: str):
    """Of 80 GB 60 % for 20 bytes of each parameter: 2.4 billion on a GPU, 19 on eight; 12 GPUs fill no two machines."""
    config = load_config("quickstart", **LLAMA_7B | {"model.layers": layers, "tokenizer.kind": "byte"})
    assert make_plan(config, gpu="h100", gpus=gpus, measure=False).layout.parallelism == kind


def test_data_is_counted_or_estimated(tmp_path: Path):
    assert main(["data", "prepare", "--out", str(tmp_path / "tokens")]) == 0
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    counted = {
        split: sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == split)
        for split in ("train", "val")
    }
    exact = look_at_data(load_config("quickstart", **{"data.paths": [str(tmp_path / "tokens")]}))
    assert (exact.exact, exact.train_tokens, exact.val_tokens) == (True, counted["train"], counted["val"])
    assert exact.vocab_size == 4096
    estimate = look_at_data(load_config("quickstart"))
    assert not estimate.exact
    assert estimate.train_tokens == pytest.approx(exact.train_tokens, rel=0.05)
    assert estimate.val_tokens == pytest.approx(exact.val_tokens, rel=0.05)


def test_estimates_of_other_vocabularies(text_file: Path):
    text = text_file.read_text(encoding="utf-8")
    for kind, vocabulary in (("byte", 257), ("char", len(set(text)))):
        config = load_config("quickstart", **{"data.paths": [str(text_file)], "tokenizer.kind": kind})
        facts = look_at_data(config)
        tokens = len(build_tokenizer(kind, 0, [text]).encode(text))
        assert facts.vocab_size == vocabulary
        assert facts.train_tokens + facts.val_tokens == pytest.approx(tokens, rel=0.01)
    config = load_config("quickstart", **{"data.paths": [str(text_file)], "tokenizer.vocab_size": 50000})
    facts = look_at_data(config)
    assert facts.vocab_size == 50000
    assert "too small for tokenizer.vocab_size 50000" in facts.problem


def tiny_plan(text_file: Path, **fields: Any) -> Plan:
    given = {**SMALL, "data.paths": [str(text_file)], "tokenizer.kind": "byte", "train.steps": 1000, **fields}
    hardware = {name: given.pop(name) for name in ("gpu", "gpus", "parallel") if name in given}
    return make_plan(load_config("quickstart", **given), measure=False, **{"gpu": "h100", **hardware})


def test_a_plan_adds_up(text_file: Path):
    plan = tiny_plan(text_file, **{"train.micro_batch": 4})
    assert plan.tokens == 1024 * 1000
    assert plan.epochs == plan.tokens / plan.data.train_tokens
    assert (plan.micro_batch, plan.micro_steps) == (4, 2)
    assert plan.step_seconds == pytest.approx(1024 * plan.flops_per_token / (0.1 * 989e12))
    assert plan.utilisation == pytest.approx(0.1)
    again = tiny_plan(text_file, **{"train.micro_batch": 4, "train.activation_checkpointing": True})
    assert again.step_seconds == pytest.approx(4 / 3 * plan.step_seconds)
    # 6 validations before the last, which all take the whole of the held-out text, forward only
    validated = 7 * plan.data.val_tokens * plan.step_seconds / 1024 / 3
    assert plan.seconds == pytest.approx(1000 * plan.step_seconds + validated)
    state = 4 * sum(plan.parameters.values()) + find_optimizer(plan.config.optim).state_bytes(plan.parameters)
    assert plan.checkpoint_bytes == state
    shown = json.loads(json.dumps(plan.as_dict()))
    assert shown["parameters"]["total"] == sum(plan.parameters.values())
    assert shown["memory"]["limit"] == 80e9
    words = describe(plan, ["Too few tokens."])
    assert words.endswith("\nwarning    Too few tokens.")
    assert f"{sum(plan.parameters.values()):,} parameters" in words
    assert "assumed 10% of the peak" in words


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"every": 0}, 1000),
        ({"every": 30}, 4 * 1000),  # after 30, 60, 90 and 100
        ({"every": 50, "at_start": True}, 3 * 1000),  # before the first step, after 50 and 100
        ({"every": 33, "offset": 1}, 4 * 1000),  # after 1, 34, 67 and 100
        ({"every": 50, "tokens": 300}, 300 + 1000 + 300),  # the last: all, and as before
        ({"every": 50, "tokens": 3000}, 1000 + 1000),
        ({"every": 50, "tokens": 3000, "order": "random"}, 3000 + 1000 + 3000),
        ({"every": 50, "train_tokens": 200}, 1200 + 1200),
    ],
)
def test_tokens_of_all_validations(fields: dict[str, Any], tokens: int):
    settings = {f"eval.{name}": value for name, value in fields.items()}
    config = load_config("quickstart", **{"train.steps": 100, **settings})
    assert validated_tokens(config, 1000) == tokens


def test_a_plan_of_many_gpus(text_file: Path):
    one = tiny_plan(text_file, **{"train.batch_tokens": 128 * 64})
    many = tiny_plan(text_file, gpus=16, parallel="fsdp", **{"train.batch_tokens": 128 * 64})
    assert (many.layout, many.micro_batch) == (Layout("fsdp", 16), 4)
    assert many.memory["weights"] == pytest.approx(one.memory["weights"] / 16, rel=0.02)
    assert many.step_seconds == max(one.step_seconds / 16, many.traffic_seconds_per_step)
    assert tiny_plan(text_file, gpus=16).layout.parallelism == "ddp"  # so small a model fits everywhere
    words = describe(many, [])
    assert "16 x NVIDIA H100 SXM" in words
    assert "between machines" in words


def test_a_micro_batch_is_made_to_fit(text_file: Path):
    fields = {"model.width": 4096, "train.batch_tokens": 128 * 2048, "train.micro_batch": 2048}
    plan = tiny_plan(text_file, gpu="rtx3090", **fields)
    assert plan.micro_batch < 2048
    assert sum(plan.memory.values()) <= 24e9


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"train.steps": 1000}, "epochs: beyond about 4"),
    "tokens": (
        {"train.steps": 50, "train.batch_tokens": 128, "model.width": 4, "model.layers": 1, "model.heads": 1},
        "tokens per parameter: with about 20",
    ),
    "vocabulary": ({"model.width": 4, "model.layers": 1, "model.heads": 1}, "of the parameters are tables"),
    "seldom": ({"tokenizer.kind": "gpt2"}, "A vocabulary of 50,257"),
    "refused": ({"tokenizer.kind": "bpe", "tokenizer.vocab_size": 30000}, "Training will refuse this"),
    "large batch": ({"train.batch_tokens": 2**22, "train.steps": 60}, "tokens is large"),
    "few steps": ({"train.steps": 10}, "hardly a training"),
    "small batch": ({"train.batch_tokens": 128, "train.steps": 10**8}, "tokens is small"),
    "rate": ({"optim.kind": "adamw", "optim.lr": 0.5}, "optim.lr 0.5 is unusual"),
    "short": ({"model.context_length": 32768, "train.batch_tokens": 32768}, "fewer than one context"),
    "saves": ({"train.steps": 10**9, "checkpoint.every": 0}, "a crash may cost"),
    "memory": ({"gpu": "t4", "model.width": 16384, "train.batch_tokens": 128}, "does not fit in memory"),
    "idle": ({"gpus": 16}, "8 have nothing to do"),
    "uneven": ({"gpus": 3}, "do not divide among 3 GPUs"),
    "network": ({"gpus": 8}, "The network is the bottleneck"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(name: str, text_file: Path):
    fields, expected = WARNINGS[name]
    assert any(expected in warning for warning in warnings(tiny_plan(text_file, **fields)))


@pytest.mark.parametrize("steps", [60, 1000])
def test_a_model_larger_than_the_text_is_not_warned_of(text_file: Path, steps: int):
    """As it learns more of the text than a smaller one, if it is regularised; that is said where text is repeated."""
    plan = tiny_plan(text_file, **{"train.steps": steps})
    assert plan.tokens < 20 * sum(plan.parameters.values())
    said = warnings(plan)
    assert not any("parameter" in warning for warning in said)
    helps = "repeated, --model.dropout 0.1, --optim.weight_decay, --optim.ema and --checkpoint.keep_best help."
    assert any(helps in warning for warning in said) == (steps == 1000)
    given = {"model.dropout": 0.2, "optim.weight_decay": 0.1, "optim.ema": 0.99, "train.steps": 1000}
    (epochs,) = (warning for warning in warnings(tiny_plan(text_file, **given)) if "epochs" in warning)
    assert epochs.endswith("; where text is repeated, --checkpoint.keep_best helps.")


def test_a_sound_plan_has_no_warnings(tmp_path: Path):
    """A fifth of a nanochat of depth 12 on text enough: 20 tokens a parameter, an epoch."""
    text = "\n".join(document.text for document in embedded_documents())
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(text[:2_000_000])
    fields = {"model.width": 32, "model.heads": 1, "model.layers": 4, "tokenizer.vocab_size": 512}
    config = load_config("quickstart", **fields, **{"data.paths": [str(tmp_path)], "train.steps": 1500})
    assert warnings(make_plan(config, gpu="h100", measure=False)) == []


def test_a_recipe_without_its_text_is_told_once():
    config = load_config(
        "nanochat-d20", **{"model.depth": 2, "train.micro_batch": 2, "train.tokens_per_parameter": 200.0}
    )
    found = warnings(make_plan(config, gpu="h100", measure=False))
    assert found[0].startswith("No text is given, and the embedded corpus would be ")
    assert not any("vocabulary" in warning.lower() for warning in found)


def test_speed_is_measured_with_real_steps():
    config = load_config("quickstart", **SMALL)
    random_state = torch.get_rng_state()
    speed = measure_speed(config, 300, 4, FP32, seconds=0.05)
    assert min(speed.micro_step, speed.update, speed.evaluation, speed.sample) > 0
    assert speed.step(3) == 3 * speed.micro_step + speed.update
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_model_that_does_not_fit_is_not_measured(text_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.plan.plan.free_memory", lambda device: 1_000_000)
    config = load_config("quickstart", **SMALL, **{"data.paths": [str(text_file)], "tokenizer.kind": "byte"})
    plan = make_plan(config, gpu="none")
    assert plan.speed == "assumed 35% of the peak (the model does not fit in this device's memory)"
    assert any("does not fit in memory" in warning for warning in warnings(plan))


def test_the_command(capsys, text_file: Path):
    given = [text for name, value in {**SMALL, "tokenizer.kind": "byte"}.items() for text in (f"--{name}", str(value))]
    assert main(["plan", "quickstart", "--data", str(text_file), *given, "--gpu", "h100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["hardware"] == "NVIDIA H100 SXM"
    assert any("epochs: beyond about 4" in warning for warning in shown["warnings"])
    assert main(["plan", "--data", str(text_file), *given, "--gpu", "a100", "--mfu", "0.5"]) == 0
    assert "assumed 50% of the peak" in capsys.readouterr().out
    for wrong, expected in (
        (["--gpu", "h1000"], "--gpu h1000 is not known"),
        (["--gpus", "8"], "--gpus 8 needs --gpu"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--mfu", "40"], "--mfu must be at most 1.0, not 40.0"),
        (["--data", "/nowhere.txt"], "/nowhere.txt"),
    ):
        assert main(["plan", *given, *wrong]) in (1, 2)
        assert expected in capsys.readouterr().err


def test_the_published_rates_are_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for name, gpu in GPUS.items():
        assert f"| `{name}` | {gpu.title} | {gpu.tflops:g} | {gpu.memory_gb} | {gpu.link_gb:g} |" in text


def test_numbers_for_people():
    assert [size(n) for n in (1234, 20_971_652, 1.5e9, 81e12)] == ["1.23 kB", "21 MB", "1.5 GB", "81 TB"]
    assert [rounded(n) for n in (990, 1_060_000, 2.95e11)] == ["990", "1.06 million", "295 billion"]
