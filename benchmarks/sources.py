"""Our trainings beside their sources' own code: the same initial weights, the same batches, fp32 on a CPU.

    python benchmarks/sources.py [RECIPE ...] [--nanogpt DIR] [--llms-from-scratch DIR] [--nanochat-2025 DIR]
                                 [--nanochat-2026 DIR] [--data FILE] [--verdict FILE] [--gpt2-vocabulary DIR]
                                 [--steps 20]

Each DIR is a checkout: github.com/karpathy/nanoGPT, github.com/rasbt/LLMs-from-scratch, github.com/karpathy/nanochat at
a09ac81 (October 2025) and at 92d63d4 (July 2026). What is given is compared, each recipe in a process of its own;
``--data`` is tinyshakespeare, ``--verdict`` the-verdict.txt, and ``--gpt2-vocabulary`` a folder with encoder.json and
vocab.bpe, without which tiktoken downloads them.

The source's model, optimizer, schedule and data reading are its own, imported, or for a script the statements cut out
of it; ours are the product's ``train_step`` with the recipe's values. Printed is a row of docs/recipes.md for each
recipe: the largest difference of the loss, the learning rate of any parameter and the gradient norm over the steps;
then the weights after them: the largest difference, and the length of all differences beside that of the way moved.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import math
import os
import runpy
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import common

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.config import Config
    from pretrain.model import GPT

Batch = tuple["Tensor", "Tensor"]


class Part(NamedTuple):
    """One of our parameters in the source's model: a parameter of its, or some rows; perhaps with other signs."""

    parameter: Tensor
    rows: slice = slice(None)
    signs: float | Tensor = 1.0

    @property
    def value(self) -> Tensor:
        """It as it is now."""
        return self.parameter.detach()[self.rows] * self.signs


@dataclass
class Step:
    """What a source did in a step."""

    batches: list[Batch]  # micro-batches
    loss: float
    norm: float  # of the gradient, before clipping
    rates: dict[int, float]  # by id of the parameter
    losses: tuple[float, ...] = ()  # of an evaluation after it


@dataclass
class Source:
    """A source's training, and ours to compare it with."""

    config: Config  # ours, resolved
    vocabulary: int
    parts: dict[str, Part]  # the source's parameters by our names
    train: Callable[[int], list[Step]]
    evaluate: Callable[[GPT], tuple[float, ...]] = lambda model: ()  # ours of the same losses


def rates(groups: Iterable[dict[str, Any]]) -> dict[int, float]:
    """The learning rate of each parameter of an optimizer's groups."""
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def compare(source: Source, steps: int) -> dict[str, float]:
    """Train both for some steps; the largest differences."""
    import torch

    from pretrain.training.step import train_step
    from pretrain.training.world import join_world

    with join_world("cpu", source.config.parallel) as world:
        state = common.training_state(source.config, source.vocabulary, world)
    ours = dict(state.model.named_parameters())
    assert ours.keys() == source.parts.keys(), ours.keys() ^ source.parts.keys()
    for name, parameter in ours.items():
        assert parameter.shape == source.parts[name].value.shape, name
        parameter.data.copy_(source.parts[name].value)
    first = {name: parameter.detach().clone() for name, parameter in ours.items()}
    largest = {"parameters": sum(p.numel() for p in ours.values())} | dict.fromkeys(("loss", "rate", "norm"), 0.0)

    def note(what: str, mine: float, theirs: float) -> None:
        assert math.isfinite(mine), (what, mine)
        assert math.isfinite(theirs), (what, theirs)
        relative = abs(theirs) if what in ("rate", "norm") and theirs else 1.0
        largest[what] = max(largest.get(what, 0.0), abs(mine - theirs) / relative)

    for number, step in enumerate(source.train(steps)):
        whole = tuple(torch.cat(parts) for parts in zip(*step.batches, strict=True))
        state.batches = cast(Any, types.SimpleNamespace(batch=lambda step, whole=whole: whole))
        state.progress.micro_rows = len(step.batches[0][0])
        torch.manual_seed(number)
        done = train_step(state)
        assert not done["train/skipped"].item(), number
        note("loss", done["train/loss"].item(), step.loss)
        note("norm", done["train/grad_norm"].item(), step.norm)
        mine = rates(group for optimizer in state.optimizers for group in optimizer.param_groups)
        for name, parameter in ours.items():
            note("rate", mine[id(parameter)], step.rates[id(source.parts[name].parameter)])
        if step.losses:
            for mine, theirs in zip(source.evaluate(state.model), step.losses, strict=True):
                note("evaluation", mine, theirs)
    apart = {name: (p.detach() - source.parts[name].value).double() for name, p in ours.items()}
    moved = sum((source.parts[name].value - first[name]).double().square().sum().item() for name in ours)
    largest["weights"] = max(each.abs().max().item() for each in apart.values())
    largest["way"] = math.sqrt(sum(each.square().sum().item() for each in apart.values()) / moved)
    return largest


def excerpt(script: Path, names: str, values: Mapping[str, Any], until: str = "") -> types.SimpleNamespace:
    """What a script defines, of it run only the statements that bind nothing but ``names``, or call a method of one.

    ``values`` holds what else they use. Without ``names`` all assignments, up to that of ``until``.
    """
    space = dict(values)
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if until in bound:
            break
        match node:
            case ast.FunctionDef(name=name) | ast.Expr(ast.Call(ast.Attribute(ast.Name(name)))):
                bound = {name}
        if bound and (bound <= set(names.split()) if names else isinstance(node, ast.Assign)):
            exec(compile(ast.Module([node], []), str(script), "exec"), space)
    return types.SimpleNamespace(**space)


def renamed(parameters: Iterable[tuple[str, Tensor]], names: Mapping[str, str]) -> dict[str, Part]:
    """A source's parameters by our names, made by replacing parts of theirs."""
    parts = {}
    for name, parameter in parameters:
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        parts[name] = Part(parameter)
    return parts


def source_module(name: str, file: Path, replace: Mapping[str, str]) -> types.ModuleType:
    """Import a file of a source with some of its text replaced; every replacement must be of use."""
    text = file.read_text(encoding="utf-8")
    for old, new in replace.items():
        assert old in text, (old, file)
        text = text.replace(old, new)
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    exec(compile(text, str(file), "exec"), vars(module))
    return module


def nanogpt(args: argparse.Namespace, recipe: str) -> Source:
    """The train.py of nanoGPT with its configuration for one of the three recipes."""
    import numpy as np
    import torch

    from pretrain.config import load_config
    from pretrain.tokens import prepare, prepared_dataset

    folder, data = Path(args.nanogpt), Path(tempfile.mkdtemp())
    sys.path.insert(0, args.nanogpt)
    model_file = importlib.import_module("model")
    script = folder / "train.py"
    values = vars(excerpt(script, "", {"torch": torch}, until="config_keys"))
    fields: dict[str, Any] = {"train.device": "cpu", "train.compile": "off", "train.precision": "fp32"}
    if recipe == "gpt2-124m":
        exec((folder / "config" / "train_gpt2.py").read_text(encoding="utf-8"), values)
        values |= {"n_layer": 2, "block_size": 256, "batch_size": 2, "gradient_accumulation_steps": 2}
        vocabulary = 50304  # the source has no other size; ours leaves the tokens from 50,257 on out of the softmax
        config = load_config(
            recipe,
            **fields,
            **{"model.layers": 2, "model.context_length": 256, "train.batch_tokens": 4 * 256},
        )
        rng = np.random.default_rng(0)  # tokens as rare as those of a text
        (50256 * rng.random(100_000) ** 4).astype(np.uint16).tofile(data / "train.bin")
    else:
        exec((folder / "config" / "train_shakespeare_char.py").read_text(encoding="utf-8"), values)
        small = {"block_size": 64, "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0}
        cpu = {**small, "max_iters": 2000, "lr_decay_iters": 2000}  # the README's options for a CPU
        values |= cpu if recipe == "shakespeare-char-cpu" else {"batch_size": 8}
        tokens = values["batch_size"] * values["block_size"]
        config = load_config(recipe, **fields, **{"train.batch_tokens": tokens, "data.paths": [args.data]})
        # Its own prepare.py, in a folder where it finds the text.
        shutil.copy(folder / "data" / "shakespeare_char" / "prepare.py", data)
        shutil.copy(args.data, data / "input.txt")
        runpy.run_path(str(data / "prepare.py"))
        prepared = prepare(config, data / "ours")
        vocabulary = prepared.tokenizer.vocab_size
        for split in ("train", "val"):
            theirs = np.fromfile(data / f"{split}.bin", dtype=np.uint16)
            stream = prepared_dataset(prepared.folder).stream(split)
            assert np.array_equal(stream.windows(np.array([0]), len(stream))[0], theirs), f"{split}.bin differs"
    values |= {"data_dir": str(data), "device": "cpu", "device_type": "cpu", "os": os, "np": np, "math": math}
    train = excerpt(script, "get_batch get_lr", values)
    shape = {name: values[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    torch.manual_seed(1337)
    model = model_file.GPT(model_file.GPTConfig(vocab_size=vocabulary, **shape))
    betas = (values["beta1"], values["beta2"])
    optimizer = model.configure_optimizers(values["weight_decay"], values["learning_rate"], betas, "cpu")
    names = {
        "transformer.wte": "embedding", "transformer.wpe": "position_embedding", "transformer.h.": "blocks.",
        ".ln_1": ".attention_norm", ".ln_2": ".mlp_norm", "transformer.ln_f": "norm", ".attn.c_proj": ".attention.out",
        ".mlp.c_fc": ".mlp.up", ".mlp.c_proj": ".mlp.down",
    }  # fmt: skip
    parts = renamed(model.named_parameters(), names)
    width = values["n_embd"]
    for name in [name for name in parts if ".attn.c_attn" in name]:
        whole = parts.pop(name).parameter
        for number, letter in enumerate("qkv"):
            rows = slice(number * width, (number + 1) * width)
            parts[name.replace(".attn.c_attn", f".attention.{letter}")] = Part(whole, rows)

    def step(number: int) -> Step:
        count = values["gradient_accumulation_steps"]
        batches = [train.get_batch("train") for _ in range(count)]
        for group in optimizer.param_groups:
            group["lr"] = train.get_lr(number)
        total = 0.0
        torch.manual_seed(number)  # for dropout
        for inputs, targets in batches:
            loss = model(inputs, targets)[1] / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), values["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(batches, total, norm.item(), rates(optimizer.param_groups))

    return Source(config, vocabulary, parts, lambda steps: [step(number) for number in range(steps)])


def verdict(args: argparse.Namespace, recipe: str) -> Source:
    """Appendix D: its train_model as it is, with its functions made to note what they do."""
    import tiktoken
    import torch

    from pretrain.config import load_config
    from pretrain.evaluation import evaluate_loss
    from pretrain.sizing import resolve
    from pretrain.tokens import TrainingBatches, open_corpus, prepare, training_order, validation_batches

    sys.path.insert(0, str(Path(args.llms_from_scratch) / "pkg"))
    appendix = importlib.import_module("llms_from_scratch.appendix_d")
    chapter2, chapter4 = (importlib.import_module(f"llms_from_scratch.ch0{n}") for n in (2, 4))
    if args.gpt2_vocabulary:
        files = [str(Path(args.gpt2_vocabulary, name)) for name in ("vocab.bpe", "encoder.json")]
        public = importlib.import_module("tiktoken_ext.openai_public")
        loaded = importlib.import_module("tiktoken.load").data_gym_to_mergeable_bpe_ranks(*files)
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=loaded, special_tokens={"<|endoftext|>": 50256}
        )
        tiktoken.get_encoding = lambda name: encoding
    text = Path(args.verdict).read_text(encoding="utf-8")
    split = int(0.90 * len(text))
    shape = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    loader = partial(chapter2.create_dataloader_v1, batch_size=2, max_length=256, stride=256)
    torch.manual_seed(123)
    train_loader = loader(text[:split], drop_last=True, shuffle=True)
    val_loader = loader(text[split:], drop_last=False, shuffle=False)
    torch.manual_seed(123)
    model = chapter4.GPTModel({**shape, "drop_rate": 0.1, "qkv_bias": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.1)
    names = {
        "tok_emb": "embedding", "pos_emb": "position_embedding", "trf_blocks.": "blocks.", "final_norm": "norm",
        "out_head": "head", ".att.W_query": ".attention.q", ".att.W_key": ".attention.k",
        ".att.W_value": ".attention.v", ".att.out_proj": ".attention.out", ".ff.layers.0": ".mlp.up",
        ".ff.layers.2": ".mlp.down", "norm1": "attention_norm", "norm2": "mlp_norm", ".scale": ".weight",
        ".shift": ".bias",
    }  # fmt: skip
    fields = {"train.device": "cpu", "train.compile": "off", "train.precision": "fp32", "data.paths": [args.verdict]}
    config = load_config(recipe, **fields, **{"model.layers": shape["n_layers"]})

    # Our batches: each epoch the same windows as in its loader, and the same held-out targets.
    folder = tempfile.mkdtemp()
    prepare(config, Path(folder, "data"))
    corpus = open_corpus([str(Path(folder, "data"))])
    order = training_order(corpus, config)
    config, _ = resolve(config, shape["vocab_size"], order.windows)
    ours = TrainingBatches(corpus.stream("train"), order, config.batch_rows)
    theirs = {tuple(row.tolist()) for inputs, targets in train_loader for row in torch.cat((inputs, targets), 1)}
    steps = len(train_loader)
    for epoch in range(15):
        batches = [torch.cat(ours.batch(epoch * steps + number), 1) for number in range(steps)]
        windows = [tuple(row.tolist()) for batch in batches for row in batch]
        assert len(windows) == len(set(windows)) == 18
        assert set(windows) == theirs, "our windows are not its windows"
    token_bytes = corpus.tokenizer.token_bytes()

    def evaluate(model: GPT) -> tuple[float, ...]:
        both = (corpus.stream("train"), steps * 2 * 256), (corpus.stream("val"), config.eval.tokens)
        batches = [validation_batches(stream, 256, 2, tokens) for stream, tokens in both]
        return tuple(evaluate_loss(model, each, token_bytes).loss for each in batches)

    def train(count: int) -> list[Step]:
        done: list[Step] = []
        clip, loss_of, losses_of = torch.nn.utils.clip_grad_norm_, appendix.calc_loss_batch, appendix.evaluate_model

        def noting_loss(inputs: Tensor, targets: Tensor, *more: Any) -> Tensor:
            torch.manual_seed(len(done))  # for dropout
            loss = loss_of(inputs, targets, *more)
            done.append(Step([(inputs, targets)], loss.item(), math.nan, {}))
            return loss

        def noting_clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
            done[-1].norm = clip(parameters, max_norm).item()
            return torch.tensor(done[-1].norm)

        def noting_losses(model: Any, train_loader: Any, val_loader: Any, device: Any, batches: int) -> Any:
            done[-1].losses = losses_of(model, train_loader, val_loader, device, None)  # None: of all batches
            return done[-1].losses

        def before(optimizer: Any, *_: Any) -> None:
            done[-1].rates = rates(optimizer.param_groups)
            if math.isnan(done[-1].norm):  # it does not clip during the warmup
                done[-1].norm = clip(model.parameters(), math.inf).item()

        def after(*_: Any) -> None:
            if len(done) == count:
                raise Enough

        vars(appendix).update(calc_loss_batch=noting_loss, evaluate_model=noting_losses)
        torch.nn.utils.clip_grad_norm_ = noting_clip  # type: ignore[assignment]
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        # The values of the notebook's last cells.
        try:
            appendix.train_model(
                model, train_loader, val_loader, optimizer, "cpu", n_epochs=15, eval_freq=5, eval_iter=1,
                start_context="Every effort moves you", tokenizer=tiktoken.get_encoding("gpt2"),
                warmup_steps=int(0.2 * 15 * steps), initial_lr=1e-5, min_lr=1e-5,
            )  # fmt: skip
        except Enough:
            pass
        finally:
            torch.nn.utils.clip_grad_norm_ = clip
        return done

    parts = renamed(model.named_parameters(), names)
    return Source(config, shape["vocab_size"], parts, train, evaluate)


class Enough(Exception):
    """The steps to be compared are done."""


def nanochat_parts(model: Any) -> dict[str, Part]:
    """The parameters of either nanochat."""
    import torch

    names = {
        "transformer.wte": "embedding", "transformer.h.": "blocks.", "lm_head": "head", ".attn.c_q": ".attention.q",
        ".attn.c_k": ".attention.k", ".attn.c_v": ".attention.v", ".attn.c_proj": ".attention.out",
        ".attn.ve_gate": ".attention.value_gate", ".mlp.c_fc": ".mlp.up", ".mlp.c_proj": ".mlp.down",
        "resid_lambdas": "stream_scale", "x0_lambdas": "embedding_scale", "smear_lambda": "smear",
        "backout_lambda": "backout", "value_embeds": "value_embeddings",
    }  # fmt: skip
    parts = renamed(model.named_parameters(), names)
    # It turns queries and keys the other way round by position, which is the same with half of their channels negated.
    half = torch.ones(HEAD // 2, 1)
    signs = torch.cat((half, -half)).repeat(model.config.n_head, 1)
    for name, part in parts.items():
        if name.endswith(("attention.q.weight", "attention.k.weight")):
            parts[name] = Part(part.parameter, signs=signs)
    return parts


DEPTH, LENGTH, ROWS, HEAD = 4, 256, 8, 128
"""nanochat's size here: width 256, 2 heads; two micro-batches of 4 rows."""


def nanochat_config(recipe: str, vocabulary: int) -> Config:
    """Ours at that size."""
    from pretrain.config import load_config
    from pretrain.sizing import resolve

    fields = {"train.device": "cpu", "train.compile": "off", "train.precision": "fp32", "model.depth": DEPTH}
    sizes = {"model.context_length": LENGTH, "train.batch_tokens": ROWS * LENGTH}
    return resolve(load_config(recipe, **fields, **sizes), vocabulary)[0]


def backward(model: Any, batches: list[Batch]) -> float:
    """Add up the gradients of the mean loss over batches; returns it."""
    total = 0.0
    for inputs, targets in batches:
        loss = model(inputs, targets) / len(batches)
        loss.backward()
        total += loss.item()
    return total


def embedded_batches(number: int) -> list[Batch]:
    """Micro-batches of the bytes of the embedded corpus, for a step."""
    import torch

    from pretrain.text.embedded import embedded_documents

    if not TEXT:
        TEXT.append("\n".join(document.text for document in embedded_documents()).encode())
    text = torch.frombuffer(bytearray(TEXT[0]), dtype=torch.uint8)
    begin = number * ROWS * (LENGTH + 1)
    rows = text[begin : begin + ROWS * (LENGTH + 1)].view(ROWS, -1).long()
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(ROWS // 2)]


TEXT: list[bytes] = []


def nanochat_2025(args: argparse.Namespace, recipe: str) -> Source:
    """October's scripts/base_train.py; its rotary angles and Newton-Schulz, which it casts to bf16, in fp32."""
    import torch

    folder, vocabulary = Path(args.nanochat_2025), 300
    sys.path.insert(0, args.nanochat_2025)
    source_module("nanochat.muon", folder / "nanochat" / "muon.py", {"G.bfloat16()": "G.float()"})
    casts = {"cos.bfloat16(), sin.bfloat16()": "cos, sin", "self.cos.dtype == torch.bfloat16": "True"}
    gpt = source_module("nanochat.gpt", folder / "nanochat" / "gpt.py", casts)
    script = folder / "scripts" / "base_train.py"
    values = vars(excerpt(script, "", {}, until="config_keys"))
    values |= {"depth": DEPTH, "max_seq_len": LENGTH, "total_batch_size": ROWS * LENGTH, "device_batch_size": ROWS // 2}
    values |= {"torch": torch, "GPT": gpt.GPT, "GPTConfig": gpt.GPTConfig, "device": "cpu", "vocab_size": vocabulary}
    values["print0"] = lambda *_: None
    names = (
        "num_layers model_dim num_heads num_kv_heads model_config_kwargs model_config model orig_model num_params p"
        " num_flops_per_token target_tokens num_iterations optimizers adamw_optimizer muon_optimizer opt group"
        " warmup_ratio warmdown_ratio final_lr_frac get_lr_multiplier get_muon_momentum"
    )
    torch.manual_seed(42)
    its = excerpt(script, names, values)
    config = nanochat_config(recipe, vocabulary)
    assert config.train.steps == its.num_iterations, (config.train.steps, its.num_iterations)

    def step(number: int) -> Step:
        batches = embedded_batches(number)
        total = backward(its.model, batches)
        norm = torch.nn.utils.clip_grad_norm_(its.orig_model.parameters(), its.grad_clip).item()
        for optimizer in its.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * its.get_lr_multiplier(number)
        for group in its.muon_optimizer.param_groups:
            group["momentum"] = its.get_muon_momentum(number)
        groups = [group for optimizer in its.optimizers for group in optimizer.param_groups]
        for optimizer in its.optimizers:
            optimizer.step()
        its.model.zero_grad(set_to_none=True)
        return Step(batches, total, norm, rates(groups))

    parts = nanochat_parts(its.orig_model)
    return Source(config, vocabulary, parts, lambda steps: [step(number) for number in range(steps)])


def nanochat_2026(args: argparse.Namespace, recipe: str) -> Source:
    """July's scripts/base_train.py, whose dtype on a CPU is fp32."""
    import torch

    folder, vocabulary = Path(args.nanochat_2026), 300
    sys.path.insert(0, args.nanochat_2026)
    gpt = importlib.import_module("nanochat.gpt")
    script = folder / "scripts" / "base_train.py"
    given = [f"--depth={DEPTH}", f"--max-seq-len={LENGTH}", f"--total-batch-size={ROWS * LENGTH}"]
    parser = excerpt(script, "parser", {"argparse": argparse}).parser
    values = {"args": parser.parse_args([*given, f"--device-batch-size={ROWS // 2}"]), "vocab_size": vocabulary}
    values |= {"torch": torch, "math": math, "GPT": gpt.GPT, "GPTConfig": gpt.GPTConfig, "device": "cpu"}
    values |= {"asdict": dataclasses.asdict, "json": json, "print0": lambda *_: None, "resuming": False}
    names = (
        "build_model_meta model model_config orig_model param_counts num_params num_flops_per_token get_scaling_params"
        " num_scaling_params target_tokens d12_ref D_REF B_REF total_batch_size batch_size_ratio predicted_batch_size"
        " batch_lr_scale batch_ratio weight_decay_scaled optimizer num_iterations get_lr_multiplier get_muon_momentum"
        " get_weight_decay"
    )
    torch.manual_seed(42)
    its = excerpt(script, names, values)
    # At its own start the blocks add nothing, and the gradients of backout and of the residual scalars are rounding
    # alone, of which Adam with eps 1e-10 makes whole steps: hence numbers where it has zeros.
    with torch.no_grad():
        for parameter in its.orig_model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    config = nanochat_config(recipe, vocabulary)
    assert config.train.steps == its.num_iterations, (config.train.steps, its.num_iterations)

    def step(number: int) -> Step:
        batches = embedded_batches(number)
        total = backward(its.model, batches)
        norm = torch.nn.utils.clip_grad_norm_(its.orig_model.parameters(), math.inf).item()  # it does not clip
        for group in its.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * its.get_lr_multiplier(number)
            if group["kind"] == "muon":
                group["momentum"] = its.get_muon_momentum(number)
                group["weight_decay"] = its.get_weight_decay(number)
        its.optimizer.step()
        its.model.zero_grad(set_to_none=True)
        return Step(batches, total, norm, rates(its.optimizer.param_groups))

    parts = nanochat_parts(its.orig_model)
    return Source(config, vocabulary, parts, lambda steps: [step(number) for number in range(steps)])


SOURCES: dict[str, tuple[Callable[[argparse.Namespace, str], Source], tuple[str, ...], str]] = {
    "verdict": (verdict, ("llms_from_scratch", "verdict"), "whole, dropout with the same random numbers"),
    "shakespeare-char": (nanogpt, ("nanogpt", "data"), "8 rows of 64, dropout with the same random numbers"),
    "shakespeare-char-cpu": (nanogpt, ("nanogpt", "data"), "whole"),
    "gpt2-124m": (nanogpt, ("nanogpt",), "2 layers, T=256, 2 micro-batches of 2 rows, vocabulary 50,304"),
    "nanochat-d20": (nanochat_2025, ("nanochat_2025",), "d4, T=256, 2 micro-batches of 4 rows, bytes"),
    "nanochat": (nanochat_2026, ("nanochat_2026",), "d4, T=256, 2 micro-batches of 4 rows, bytes"),
}
"""What each recipe is compared by, the options it needs, and at which size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(SOURCES)}; all by default")
    parser.add_argument("--nanogpt", default="")
    parser.add_argument("--llms-from-scratch", default="")
    parser.add_argument("--nanochat-2025", default="")
    parser.add_argument("--nanochat-2026", default="")
    parser.add_argument("--data", default="", help="tinyshakespeare as a text file")
    parser.add_argument("--verdict", default="", help="the-verdict.txt")
    parser.add_argument("--gpt2-vocabulary", default="", help="a folder with encoder.json and vocab.bpe")
    parser.add_argument("--steps", type=int, default=20)
    given = sys.argv[2:] if sys.argv[1:2] == ["worker"] else sys.argv[1:]
    args = parser.parse_args(given)
    if unknown := set(args.recipes) - SOURCES.keys():
        parser.error(f"no comparison for {', '.join(unknown)}")
    if sys.argv[1:2] == ["worker"]:
        (recipe,) = args.recipes
        import torch.nn.functional as F

        from pretrain.model import transformer

        transformer.dropout = F.dropout  # the sources' random numbers in place of our faster ones
        with redirect_stdout(sys.stderr):
            result = compare(SOURCES[recipe][0](args, recipe), args.steps)
        print(json.dumps(result))
        return
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "NANOCHAT_DTYPE": "float32"}  # its compiled functions, as written
    paths = {name: os.path.abspath(value) for name, value in vars(args).items() if isinstance(value, str) and value}
    options = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    print("| recipe | size | steps | loss | rates | norm | weights | of the way | evaluation |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for recipe, (_, needed, size) in SOURCES.items():
        if recipe in (args.recipes or SOURCES) and all(name in paths for name in needed):
            found = common.worker(__file__, recipe, f"--steps={args.steps}", *options)
            print(row(recipe, size, args.steps, found), flush=True)


def row(recipe: str, size: str, steps: int, found: Mapping[str, float]) -> str:
    """A recipe's line in the table."""
    numbers = [f"{found[name]:.1e}" for name in ("loss", "rate", "norm", "weights", "way")]
    evaluation = f"{found['evaluation']:.1e}" if "evaluation" in found else ""
    return f"| `{recipe}` | {size} | {steps} | {' | '.join(numbers)} | {evaluation} |"


if __name__ == "__main__":
    main()
