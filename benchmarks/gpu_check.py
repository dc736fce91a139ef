"""Whether this machine's GPUs compute, learn and resume as they should, and how fast: one command of ten minutes.

    python benchmarks/gpu_check.py [--out FILE] [--device cpu] [--only attention loss ...] [--minutes 10]

Each check runs in a process of its own, with a limit of time: one that breaks or hangs stops no other. Prints a table,
writes it to --out as JSON, and exits with 1 if anything failed. Without a GPU the checks that need none run in small,
and the rest says why it was skipped. Needs the test extras, whose helpers it uses.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pretrain  # noqa: F401 - before torch, for the variables that torch reads when it loads

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' helpers

import torch
import torch.distributed as dist
import torch.nn.functional as F
from chaos import differences
from common import training_state
from tests.conftest import TINY, made_up_text
from tests.training.test_loop import change, learned, new_run, raise_out_of_memory
from torch import Tensor, nn
from torch.cuda import nccl
from torch.profiler import ProfilerActivity, profile

from pretrain.config import Config, load_config
from pretrain.device import choose_device, choose_precision, free_memory, matmul_flops, peak_flops, synchronize
from pretrain.errors import DeviceMemoryError, Interrupted, PretrainError, UsageError
from pretrain.evaluation import core
from pretrain.io import read_jsonl
from pretrain.model import GPT, meta_model
from pretrain.model.attention import attend_in_blocks
from pretrain.model.loss import IGNORE
from pretrain.optim import alone, replicated, row_sharded
from pretrain.optim.distributed import Exchange, in_turns
from pretrain.optim.muon import orthogonalize
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.runs.environment import environment
from pretrain.sizing import flops_per_token, resolve, rows_that_fit
from pretrain.training import Callback, Console, train
from pretrain.training.parallel import compiler_problem, parallelize
from pretrain.training.setup import set_up
from pretrain.training.state import TrainState
from pretrain.training.step import BACKWARD, FORWARD, UPDATE, measured_step, train_step, train_step_with_oom_retry
from pretrain.training.world import World

FORK = multiprocessing.get_context("fork")
"""Processes that have torch imported already. Those that fork must not have used a GPU: the checks that start
trainings leave it to them."""


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in another process, so that this one has not used a GPU."""
    with FORK.Pool(1) as pool:
        return pool.apply(work, arguments)


# What a check finds ------------------------------------------------------------------------------------------------


class Skip(Exception):
    """A check, or a part of it, cannot be done here; its text says why."""


@dataclass
class Report:
    """What a check finds, written down at once: a check that is killed leaves what it had."""

    file: Path
    folder: Path
    device: torch.device
    deadline: float
    """``time.monotonic()`` after which it begins nothing new."""

    @property
    def cuda(self) -> bool:
        """Whether this is about a GPU."""
        return self.device.type == "cuda"

    def fact(self, name: str, value: Any) -> None:
        """Something that was measured."""
        self._write(fact=name, value=value)

    def expect(self, right: bool | Tensor, otherwise: str) -> None:
        """A failure, unless all is ``right``."""
        if not right:
            self._write(failure=otherwise)

    def skip(self, name: str, why: str) -> None:
        """Something that cannot be done here."""
        self._write(skipped=f"{name}: {why}")

    def done(self) -> None:
        """The check has come to its end."""
        self._write(done=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that may break without stopping those after it."""
        try:
            yield
        except Skip as reason:
            self.skip(name, str(reason))
        except Exception as error:
            traceback.print_exc()
            self.expect(False, f"{name}: {in_a_line(error)}")

    def _write(self, **line: Any) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            line = json.loads(json.dumps(line), parse_constant=str)  # JSON has no infinity
            out.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Check:
    """A check by its name, and how many seconds it may take."""

    name: str
    work: Callable[[Report], None]
    seconds: float


def in_a_line(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def needs_cuda(report: Report) -> None:
    if not report.cuda:
        raise Skip("needs a CUDA device")


# What the checks share ---------------------------------------------------------------------------------------------


def tiny(report: Report, **fields: Any) -> Config:
    """The tests' smallest run; on a GPU in shapes that its kernels take. Names of ``fields`` have __ for their dot."""
    text = report.folder / "text.txt"
    if not text.exists():
        text.write_text(made_up_text(), encoding="utf-8")
    larger = {"model.width": 128, "model.context_length": 128, "train.batch_tokens": 1024} if report.cuda else {}
    ours = {"data.paths": [str(text)], "train.device": report.device.type, "log.backends": ["none"]}
    return change(load_config("quickstart", **{**TINY, **larger, "train.compile": "off", **ours}), **fields)


def model_config(rows: int = 1, **fields: Any) -> Config:
    """A model by its fields; and a batch of so many rows."""
    named = {f"model.{name}": value for name, value in fields.items()}
    tokens = rows * fields.get("context_length", 128)
    return load_config("quickstart", **named, **{"train.batch_tokens": tokens, "train.compile": "off"})


def ready(config: Config, folder: Path, device: torch.device, steps: int = 0) -> TrainState:
    """The state of a new run after some steps, with its real batches."""
    state = set_up(new_run(config, folder), World(device), Console(quiet=True), started=time.monotonic()).state
    for _ in range(steps):
        train_step(state)
    return state


def apart(one: Run, other: Run) -> float:
    """The largest relative difference between the losses of two runs."""
    mine, theirs = learned(one), learned(other)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs], "not the same steps"
    names = ("train/loss", "val/loss", "val/part_loss", "train/eval_loss")
    pairs = [(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in names if name in b]
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)


def error(found: Tensor | None, wanted: Tensor | None) -> float:
    """The norm of the difference as a share of the norm."""
    assert found is not None
    assert wanted is not None
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """The median time of a call, after two to warm up."""
    taken = []
    for _ in range(times + 2):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


def start(config: Config, out: Path, rank: int = 0, size: int = 1, **variables: str) -> multiprocessing.Process:
    """A process that trains: one alone, or ``rank`` of ``size`` with what torchrun would put in its environment."""
    process = FORK.Process(target=train_here, args=(config, out, rank, size, variables))
    process.start()
    return process  # type: ignore[return-value]


def train_here(config: Config, out: Path, rank: int, size: int, variables: dict[str, str]) -> None:
    """What a process of :func:`start` does."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({**{name: str(value) for name, value in ours.items()}, **variables})
    repeatable(config.train.device)
    try:
        train(config, out, Console())
    except PretrainError as error:
        print(f"rank {rank}: {error}", flush=True)
        raise SystemExit(error.exit_code) from None


def repeatable(device_type: str) -> None:
    """Let a GPU take kernels that add in the same order each time."""
    if device_type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)


def train_together(config: Config, out: Path, size: int, **variables: str) -> list[multiprocessing.Process]:
    """As many processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(config, out, rank, size, **variables) for rank in range(size)]


def finished(processes: list[multiprocessing.Process], out: Path, seconds: float = 60) -> Run:
    """The run of processes that must come to their end."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode == 0, f"a training ended with {process.exitcode}"
    return Run.open(out)


def wait_for_checkpoint(out: Path, process: multiprocessing.Process) -> None:
    """Until a run that is going on has committed a checkpoint."""
    end = time.monotonic() + 60
    while not checkpoints(out / "checkpoints") and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert process.is_alive(), f"the training ended too early, with {process.exitcode}"


# The checks --------------------------------------------------------------------------------------------------------


def environment_facts(report: Report) -> None:
    """(1) What this machine is, and what of it torch will use."""
    device = report.device
    for name, value in environment(device).items():
        if name != "command":
            report.fact(name, value)
    report.fact("open files at most", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    there = {}
    for package in ("triton", "torchao", "kernels", "liger-kernel"):
        with suppress(importlib.metadata.PackageNotFoundError):
            there[package] = importlib.metadata.version(package)
    report.fact("optional packages", there)
    report.fact("precision", choose_precision("auto", device).name)
    report.fact("allocator", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    with report.part("attention kernels by priority"):
        from torch.nn.attention import _cur_sdpa_kernel_backends

        report.fact("attention kernels by priority", [b.name for b in _cur_sdpa_kernel_backends(with_priority=True)])
    if report.cuda:
        problem = compiler_problem(device)
        report.fact("torch.compile", problem or "works")
        report.expect(not problem, f"torch.compile does not work: {problem}")
        report.fact("gpus", torch.cuda.device_count())
        report.fact("capability", torch.cuda.get_device_capability(device))
        report.fact("free memory, GB", round(free_memory(device) / 1e9, 1))
        report.fact("cudnn", torch.backends.cudnn.version())
        report.fact("nccl", nccl.version())
        measured, published = matmul_flops(device, torch.bfloat16), peak_flops(device, torch.bfloat16)
        report.fact("bf16 products, TFLOP/s, measured and published", [measured / 1e12, published / 1e12])


KINDS = {"causal": ("L", False), "window": ("S", False), "documents": ("L", True), "both": ("S", True)}
"""Kinds of attention: the pattern of the layers, and whether documents are told apart."""


def attention(report: Report) -> None:
    """(2) Every kind of attention against its definition, and which kernel computes it.

    On a GPU windows and documents in blocks at the longer length, as a compiled model has them, else by masks.
    """
    compiled = torch.compile(attend_in_blocks, dynamic=False)
    with (
        mock.patch("pretrain.model.transformer.attend_in_blocks", compiled),
        torch._dynamo.config.patch(recompile_limit=100),
    ):
        all_kinds_of_attention(report)


def all_kinds_of_attention(report: Report) -> None:
    """What :func:`attention` does, where what attends in blocks is compiled by itself."""
    lengths, widths = ((2048, 1024), (128, 64)) if report.cuda else ((288, 48), (32, 16))
    dtype, limit = (torch.bfloat16, 0.02) if report.cuda else (torch.float32, 1e-5)
    if report.cuda:
        for kv_heads in (16, 4):
            with report.part(f"time of {kv_heads} key heads"):
                attention_times(report, kv_heads)
    cases = [*itertools.product(lengths, widths, (8, 2), KINDS)]
    for number, (length, width, kv_heads, kind) in enumerate(cases):
        if time.monotonic() > report.deadline:
            report.expect(False, f"no time was left for the last {len(cases) - number} of {len(cases)} cases")
            break
        name = f"{kind}, {kv_heads} of 8 key heads of {width}, {length} tokens"
        with report.part(name):
            found = attention_errors(report.device, dtype, kind, length, width, kv_heads)
            report.fact(name, found)
            worst = max(found["output"], *found["gradients"])
            report.expect(worst <= limit, f"{name}: off by {worst:.2g}, more than {limit:g}")
            writes = "attention_math" in found["kernels"] or (report.cuda and found["kernels"] == PLAIN)
            report.expect(not writes, f"{name}: by {found['kernels']}, which write out all scores")


def attention_model(
    device: torch.device, dtype: torch.dtype, kind: str, layers: int, length: int, heads: int, kv_heads: int, width: int
) -> GPT:
    """A model that is mostly attention: queries, keys and values of unit size, no positions in them."""
    pattern, documents = KINDS[kind]
    fields = {
        "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_width": width, "width": 256, "mlp_width": 64,
        "context_length": length, "window_pattern": pattern, "document_mask": documents, "position": "learned",
        "qk_norm": False, "attention_scale": 0.0,
    }  # fmt: skip
    config = model_config(**fields)
    model = meta_model(config.model, 512, bos_id=0).to_empty(device=device)
    model.activation_dtype, model.in_blocks = dtype, device.type == "cuda" and length == 2048
    generator = torch.Generator(device).manual_seed(0)
    model.init_weights(generator)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(0, layer.in_features**-0.5, generator=generator)
    return model


def documents_of(rows: int, length: int, device: torch.device) -> Tensor:
    """Random tokens (rows, length), of which token 0 begins about eight documents in a row."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 512, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < 8 / length, 0).to(device)


def attention_errors(
    device: torch.device, dtype: torch.dtype, kind: str, length: int, width: int, kv_heads: int
) -> dict[str, Any]:
    """How far the first layer's attention is from its definition in float64, forward and backward; its kernels."""
    model, tokens = attention_model(device, dtype, kind, 2, length, 8, kv_heads, width), documents_of(2, length, device)
    layer: Any = model.blocks[0].attention
    seen: dict[str, Any] = {}

    def keep(name: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        seen[name] = tensor

    hooks = [
        getattr(layer, module).register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in (("q", "q_norm"), ("k", "k_norm"), ("v", "v"))
    ]
    hooks.append(layer.out.register_forward_pre_hook(lambda _module, inputs: keep("y", inputs[0])))
    model.stream(tokens).float().square().sum().backward()
    for hook in hooks:
        hook.remove()
    exact = {
        name: seen[name].detach().double().view(*tokens.shape, -1, width).transpose(1, 2).requires_grad_()
        for name in "qkv"
    }
    positions = torch.arange(length, device=device)
    pattern, documents = KINDS[kind]
    allowed = positions <= positions[:, None]
    if pattern == "S":
        allowed = allowed & (positions > positions[:, None] - length // 4)
    if documents:
        numbers = (tokens == 0).cumsum(1)
        allowed = allowed & (numbers[:, None, :, None] == numbers[:, None, None, :])
    k, v = (exact[name].repeat_interleave(8 // kv_heads, dim=1) for name in "kv")
    scores = (exact["q"] @ k.mT * width**-0.5).masked_fill(~allowed, -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(seen["y"].shape)
    y.backward(seen["y"].grad.double())
    return {
        "output": error(seen["y"], y),
        "gradients": [
            error(seen[name].grad.reshape(*tokens.shape, -1, width).transpose(1, 2), exact[name].grad) for name in "qkv"
        ],
        "kernels": attention_kernels(partial(model.stream, tokens), device),
    }


PLAIN = "plain products"

ATTENTION = re.compile(r"attention|flash|fmha|flex|sdpa|triton_tem", re.IGNORECASE)
"""Names of kernels that compute attention, and of the operations that choose them."""


def attention_kernels(work: Callable[[], object], device: torch.device) -> str:
    """By what the attention in ``work`` is computed."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        work()
        synchronize(device)
    names = {event.key for event in found.key_averages() if ATTENTION.search(event.key)}
    chosen = {name.removeprefix("aten::_scaled_dot_product_") for name in names if "_scaled_dot_product_" in name}
    return ", ".join(sorted(chosen or names)) or PLAIN


def attention_times(report: Report, kv_heads: int) -> None:
    """What five layers of each kind take, beside plain causal ones."""
    device = report.device
    tokens = documents_of(8, 2048, device)
    taken = {}
    for kind in KINDS:
        model = attention_model(device, torch.bfloat16, kind, 5, 2048, 16, kv_heads, 128)
        taken[kind] = seconds_of(lambda model=model: model.stream(tokens).sum().backward(), device)
    report.fact(f"5 layers of 16 x 128 with {kv_heads} key heads, ms", {k: 1e3 * s for k, s in taken.items()})
    ratio = taken["window"] / taken["causal"]
    report.expect(ratio < 1.02, f"{kv_heads} key heads: windows of a quarter take {ratio:.2f} of what causal takes")


def loss(report: Report) -> None:
    """(3) The loss and its gradients against whole logits; its memory and time beside its products."""
    vocabulary, width, rows, length = (50257, 768, 4, 512) if report.cuda else (200, 32, 3, 25)
    for cap, name in itertools.product((0.0, 15.0), ("fp32", "bf16")):
        with report.part(f"{name}, softcap {cap:g}"):
            model, x, targets = loss_alone(report.device, name, "off", vocabulary, width, rows, length, cap)
            found = model(targets, targets)
            found.backward()
            weight = model.head.weight.detach().to(x.dtype).float().requires_grad_()
            hidden = x.detach().float().requires_grad_()
            logits = (model.norm(hidden).to(x.dtype).float() @ weight.T)[..., :vocabulary]
            logits = logits if not cap else cap * torch.tanh(logits / cap)
            whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            whole.backward()
            off = [error(found, whole), error(x.grad, hidden.grad), error(model.head.weight.grad, weight.grad)]
            report.fact(f"{name}, softcap {cap:g}: loss, gradients of states and of head", off)
            limits = (1e-5, 1e-4, 1e-4) if name == "fp32" else (1e-3, 0.02, 0.02)
            right = all(a <= b for a, b in zip(off, limits, strict=True))
            report.expect(right, f"{name}, softcap {cap:g}: off by {words(off)}, more than {words(limits)}")
    with report.part("time and memory"):
        needs_cuda(report)
        loss_cost(report, 50257, 768, 32, 1024)


def loss_alone(
    device: torch.device, precision: str, compile: str, vocabulary: int, width: int, rows: int, length: int, cap: float
) -> tuple[GPT, Tensor, Tensor]:
    """A model whose layers are replaced by hidden states (rows, length, width); these, and targets."""
    config = model_config(layers=1, width=width, heads=1, logit_softcap=cap, vocab_multiple=64)
    config = change(config, train__compile=compile)
    chosen, generator = choose_precision(precision, device), torch.Generator(device).manual_seed(0)
    model = meta_model(config.model, vocabulary)
    model.activation_dtype = chosen.dtype
    parallelize(model, "none", config, World(device), chosen, print)
    model.init_weights(generator)
    model.head.weight.data.normal_(0, width**-0.5, generator=generator)
    x = torch.randn(rows, length, width, generator=generator, device=device).to(chosen.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows, length), generator=generator, device=device)
    targets[:, -2:] = IGNORE
    model.stream = lambda tokens, cache=None, first=0: x
    return model, x, targets


def loss_cost(report: Report, vocabulary: int, width: int, rows: int, length: int) -> None:
    """Time and memory of the compiled loss in bf16 beside those of its three products and of whole logits."""
    device = report.device
    model, x, targets = loss_alone(device, "bf16", "auto", vocabulary, width, rows, length, 15.0)
    ours = seconds_of(lambda: model(targets, targets).backward(), device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(targets, targets).backward()
    peak = torch.cuda.max_memory_allocated(device) - before
    states, weight = x.detach().flatten(0, 1), model.head.weight.detach().to(x.dtype)
    logits = states @ weight.T
    products = seconds_of(lambda: (states @ weight.T, logits @ weight, logits.T @ states), device)
    whole = 4 * rows * length * vocabulary
    report.fact("loss, products alone, ms", [1e3 * ours, 1e3 * products])
    report.fact("memory of the loss, of whole logits, GB", [peak / 1e9, whole / 1e9])
    report.expect(ours <= 1.5 * products, f"the loss takes {ours / products:.2f} times its products, more than 1.5")
    report.expect(peak < whole / 2, f"the loss takes {peak / whole:.0%} of whole logits' memory, more than half")


class Graphs(Callback):
    """What torch.compile has made: after the first validation and samples, and at the end."""

    def __init__(self):
        self.first: dict[str, int] | None = None
        self.end: dict[str, int] = {}

    def on_start(self, trainer: Any) -> None:
        torch._dynamo.utils.counters.clear()

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        self.first = self.first or self.now()

    def on_end(self, interrupted: bool) -> None:
        self.end = self.now()

    @staticmethod
    def now() -> dict[str, int]:
        counters = torch._dynamo.utils.counters
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }


@contextmanager
def graphs_alone(report: Report) -> Iterator[None]:
    """Where there is no GPU, graphs are made all the same, and run as they are: compiling would take minutes."""
    compile = nn.Module.compile
    with ExitStack() as patches:
        if not report.cuda:
            patches.enter_context(mock.patch("pretrain.training.parallel.compiler_problem", return_value=""))
            eager = partial(compile, backend="eager")
            patches.enter_context(mock.patch.object(nn.Module, "compile", lambda module, **how: eager(module, **how)))
        yield


def compiles_once(report: Report) -> None:
    """(5) A compiled run learns what an eager one does; nothing in it breaks a graph or is compiled again."""
    # Blocks of three kinds, and more held-out tokens than one batch of validation takes.
    config = tiny(
        report, model__layers=3, model__window_pattern="SSL", model__window=8, model__value_embeddings=True,
        train__micro_batch=4, data__val_fraction=0.6, eval__tokens=10_000,
    )  # fmt: skip
    with graphs_alone(report):
        eager = train(config, report.folder / "eager")
        for checkpointing in (False, True):
            name = f"activation checkpointing {'on' if checkpointing else 'off'}"
            with report.part(name):
                torch.compiler.reset()
                compiled = change(config, train__compile="on", train__activation_checkpointing=checkpointing)
                graphs = Graphs()
                run = train(compiled, report.folder / name, callbacks=[graphs])
                off = apart(run, eager)
                report.fact(name, {**graphs.end, "apart from eager": off})
                report.expect(graphs.end["graphs"] > 0, f"{name}: nothing was compiled")
                report.expect(graphs.end["breaks"] == 0, f"{name}: {graphs.end['breaks']} breaks in graphs")
                report.expect(
                    graphs.end == graphs.first, f"{name}: compiled again, from {graphs.first} to {graphs.end}"
                )
                report.expect(off < (1e-3 if report.cuda else 1e-5), f"{name}: losses are {off:.2g} apart from eager")


def skipped_steps(report: Report) -> None:
    """(7) A step that is skipped changes no bit, also one that overflows in fp16; Muon's products in bf16."""
    for kind in ("muon", "adamw"):
        name = f"a NaN with {kind}"
        with report.part(name):
            state = ready(tiny(report, optim__kind=kind), report.folder / kind, report.device, steps=2)
            forward = state.forward
            state.forward = lambda *inputs, forward=forward: forward(*inputs) * math.nan
            changes_nothing(report, state, name)
            state.forward, before = forward, bits(state)
            train_step(state)
            report.expect(bits(state) != before, f"{name}: the step after it changes nothing")
    name = "an overflow in fp16"
    with report.part(name):
        state = ready(tiny(report, train__precision="fp16"), report.folder / "fp16", report.device, steps=2)
        state.loss_scale.scale.fill_(2.0**100)
        changes_nothing(report, state, name)
        report.expect(state.loss_scale.scale == 2.0**99, f"{name}: the loss scale is not halved")
    for kind in ("classic", "polar_express"):
        name = f"singular values by {kind} in bf16"
        with report.part(name):
            shape = (4, 1280, 5120) if report.cuda else (2, 64, 256)
            matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(report.device)
            values = torch.linalg.svdvals(orthogonalize(matrices.bfloat16(), kind, 5).float())
            low, high = float(values.min()), float(values.max())
            report.fact(name, [low, high])
            report.expect(low > 0.6 and high < 1.3, f"{name} are {low:.2f} to {high:.2f}, not about 1")


def bits(state: TrainState) -> dict[str, bytes]:
    """Every bit of weights and moments."""
    tensors = state.tensors().items()
    return {k: t.cpu().numpy().tobytes() for k, t in tensors if k.startswith(("model.", "optim."))}


def changes_nothing(report: Report, state: TrainState, name: str) -> None:
    """The next step must be skipped, without a trace."""
    before = bits(state)
    numbers = train_step(state)
    changed = [key for key, value in bits(state).items() if value != before[key]]
    report.expect(numbers["train/skipped"] > 0, f"{name}: the step is not skipped")
    report.expect(not changed, f"{name}: it changes {', '.join(changed[:3])}")
    report.fact(name, f"{len(before) - len(changed)} of {len(before)} tensors unchanged")


def runs_compared(report: Report) -> None:
    """(8) A run on the GPU learns what one on the CPU does, in each precision."""
    steps = 12
    base = tiny(report, train__steps=1, train__device="cpu")
    start_from = str(train(base, report.folder / "start").folder)  # devices draw different numbers
    config = change(base, train__steps=steps, train__init_from=start_from)
    wanted = train(config, report.folder / "fp32 on the CPU")
    cases = {
        "fp32": (1e-4, {}),
        "tf32": (5e-3, {}),  # it rounds what is multiplied to 10 bits, bf16 to 7
        "bf16": (2e-2, {}),
        "fp8": (5e-2, {"train__precision": "bf16", "train__fp8": True}),
    }
    for precision, (limit, fields) in cases.items():
        name = f"{precision} on the {'GPU' if report.cuda else 'CPU'}"
        with report.part(name):
            if "32" in precision:
                needs_cuda(report)
            fields = {"train__precision": precision, "train__device": report.device.type, **fields}
            try:
                off = apart(train(change(config, **fields), report.folder / precision), wanted)
            except UsageError as reason:
                raise Skip(str(reason)) from None
            report.fact(f"{name}, losses apart", off)
            report.expect(off <= limit, f"{name}: losses are {off:.2g} apart from fp32 on the CPU, more than {limit:g}")


class Sleepy:
    """Batches, each made and copied after its stream has slept for a while."""

    def __init__(self, batches: Any, draw: random.Random):
        self.batches, self.draw = batches, draw

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        sleep(self.draw)
        return self.batches.batch(step)


def sleep(draw: random.Random) -> None:
    """Let the current stream wait for up to about a millisecond, now and then longer."""
    torch.cuda._sleep(draw.choice([0, 10_000, 100_000, 1_000_000, 4_000_000]))


def batches(report: Report) -> None:
    """(4) What is copied ahead to the GPU is what the CPU reads, whichever stream is late."""
    for name, fields in {
        "token shards": {},
        "a live stream": {"data__stream": True, "data__split": "hash"},
    }.items():
        with report.part(name):
            needs_cuda(report)
            config = tiny(report, **fields)
            if config.data.stream:
                config = change(config, data__paths=(documents_file(report),))
            ahead: Any = ready(config, report.folder / name, report.device).batches
            plain = ready(config, report.folder / f"plain {name}", torch.device("cpu")).batches
            draw = random.Random(0)
            ahead.batches = Sleepy(ahead.batches, draw)
            steps, found = 500, []
            for step in range(steps):
                parts = ahead.batch(step)
                sleep(draw)
                found.append(torch.stack(parts))  # on this stream, after it has slept
            wrong = [
                step for step in range(steps) if not torch.equal(found[step].cpu(), torch.stack(plain.batch(step)))
            ]
            report.fact(f"{name}: wrong batches of {steps}", len(wrong))
            report.expect(
                not wrong, f"{name}: {len(wrong)} of {steps} batches are wrong, the first of step {wrong[:1]}"
            )


def documents_file(report: Report) -> str:
    """The text with a document in each line."""
    file = report.folder / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in made_up_text().splitlines()), encoding="utf-8")
    return str(file)


def no_waiting(report: Report) -> None:
    """(6) No step waits for the device."""
    needs_cuda(report)
    for kind, compile in itertools.product(("muon", "adamw"), ("off", "on")):
        name = f"{kind}, compile {compile}"
        with report.part(name):
            config = tiny(report, optim__kind=kind, train__compile=compile, guard__spike_sigma=6.0, model__dropout=0.1)
            state = ready(config, report.folder / name, report.device, steps=5)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(20):
                    train_step(state)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            report.fact(name, "20 steps without waiting")


def resumes(report: Report) -> None:
    """(9) Killed or asked to stop, a run with dropout ends with the same bits, and saves in time."""
    steps = 150 if report.cuda else 50
    fields = {"train__steps": steps, "checkpoint__every": steps // 5, "eval__every": steps // 3}
    config = tiny(report, model__dropout=0.1, train__micro_batch=4, **fields)

    def to_the_end(name: str) -> Run:
        return finished([start(config, report.folder / name)], report.folder / name)

    undisturbed = to_the_end("undisturbed")
    with report.part("the same run twice"):
        found = differences(undisturbed, to_the_end("again"))
        report.fact("the same run twice: differences", len(found))
        report.expect(not found, f"the same run twice: {len(found)} differences, such as {found[:2]}")
    for number in (signal.SIGKILL, signal.SIGTERM):
        with report.part(number.name):
            out = report.folder / number.name
            process = start(config, out)
            wait_for_checkpoint(out, process)
            os.kill(process.pid or 0, number)
            begin = time.monotonic()
            process.join(60)
            seconds = time.monotonic() - begin
            code = Interrupted.exit_code if number == signal.SIGTERM else -number
            report.expect(process.exitcode == code, f"{number.name}: ended with {process.exitcode}, not {code}")
            report.expect(not (out / "summary.json").exists(), f"{number.name}: came too late to test anything")
            report.expect(seconds < config.guard.grace_seconds, f"{number.name}: it took {seconds:.1f} s to end")
            step = checkpoints(out / "checkpoints")[-1].step
            found = differences(undisturbed, to_the_end(number.name))
            report.fact(number.name, {"resumed after step": step, "seconds": seconds, "differences": len(found)})
            report.expect(not found, f"{number.name}: {len(found)} differences, such as {found[:2]}")


def out_of_memory(report: Report) -> None:
    """(9) A pass that runs out of memory is done again with half the rows; an update is refused."""
    repeatable(report.device.type)
    config, halved = tiny(report, model__dropout=0.1, train__micro_batch=8), []
    with report.part("in the backward pass"):
        wanted = ready(change(config, train__micro_batch=4), report.folder / "wanted", report.device, steps=3)
        state = ready(config, report.folder / "halved", report.device)  # seeds dropout anew
        scaled, forward, rows = state.loss_scale.scaled, state.forward, [0]

        def noted(tokens: Tensor, targets: Tensor) -> Tensor:
            rows[0] = len(tokens)
            return forward(tokens, targets)

        state.forward = noted
        state.loss_scale.scaled = lambda loss: raise_out_of_memory() if rows[0] > 4 else scaled(loss)
        for _ in range(3):
            train_step_with_oom_retry(state, lambda phase: None, halved.append)
        same = bits(state) == bits(wanted)
        report.fact("in the backward pass", {"halved": len(halved), "rows": state.progress.micro_rows, "same": same})
        report.expect(len(halved) == 1 and state.progress.micro_rows == 4, "in the backward pass: not halved once")
        report.expect(same, "in the backward pass: the weights are not those of half the rows from the start")
    with report.part("updating"):
        state = ready(config, report.folder / "updating", report.device, steps=2)
        state.optimizers[-1].step = raise_out_of_memory  # type: ignore[method-assign]
        try:
            train_step_with_oom_retry(state, lambda phase: None, halved.append)
            report.expect(False, "updating: not refused")
        except DeviceMemoryError as refusal:
            report.fact("updating", str(refusal))
    with report.part("really"):
        needs_cuda(report)
        real_out_of_memory(report)


def real_out_of_memory(report: Report) -> None:
    """With less memory than the micro-batch needs, but enough for half of it."""
    rows, device, peaks = 64, report.device, []
    config = model_config(rows, layers=4, width=512, heads=4, context_length=1024)
    state = training_state(config, 4096, World(device))
    for fewer in (rows, rows // 2):
        state.progress.micro_rows = fewer
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        train_step(state)
        peaks.append(torch.cuda.max_memory_reserved(device))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total, device)
    state.progress.micro_rows, said = rows, []
    numbers = train_step_with_oom_retry(state, lambda phase: None, said.append)
    report.fact("really: peaks, GB", [peak / 1e9 for peak in peaks])
    report.expect(len(said) == 1 and state.progress.micro_rows == rows // 2, f"really: not halved once, but {said}")
    report.expect(bool(torch.isfinite(numbers["train/loss"])), "really: the loss is not finite")


def processes(report: Report) -> None:
    """(10) Several processes learn what one does, however they share the model; if one is killed, they can go on."""
    gpus = elsewhere(torch.cuda.device_count)
    if report.cuda and gpus < 2:
        report.skip("several GPUs", "there is one")
    else:
        size = 2 if not report.cuda else min(8, gpus) // 2 * 2
        several_processes(report, size)
    one_rank(report)


def several_processes(report: Report, size: int) -> None:
    """DDP, FSDP and HSDP in as many processes, compiled on GPUs, beside one that is not; from one kind to another; one
    that is killed; and CORE.
    """
    limit, folder = 1e-4 if report.cuda else 1e-5, report.folder
    base = tiny(report, sample__max_tokens=0, parallel__timeout_seconds=20.0, checkpoint__keep_last=0)
    wanted = finished([start(base, folder / "alone")], folder / "alone")

    def compare(name: str, run: Run) -> None:
        off = apart(run, wanted)
        report.fact(f"{name}, {size} processes: losses apart from one", off)
        report.expect(off <= limit, f"{name}: losses are {off:.2g} apart from those of one process")

    for kind in ("ddp", "fsdp", "hsdp"):
        with report.part(kind):
            variables = {"LOCAL_WORLD_SIZE": str(size // 2)} if kind == "hsdp" else {}  # as on two machines
            compile = "on" if report.cuda else "off"
            config, out = change(base, parallel__kind=kind, train__compile=compile), folder / kind
            compare(kind, finished(train_together(config, out, size, **variables), out))
    with report.part("from ddp to fsdp"):
        out = folder / "ddp"
        shutil.rmtree(out / "checkpoints" / "step-00000012")
        Run.open(out).reopen()
        compare("from ddp to fsdp", finished(train_together(change(base, parallel__kind="fsdp"), out, size), out))
    with report.part("a killed process"):
        steps = 60 if report.cuda else 24
        config, out = change(base, train__steps=steps, parallel__kind="ddp"), folder / "killed"
        everybody = train_together(config, out, size)
        wait_for_checkpoint(out, everybody[0])
        everybody[-1].kill()
        begin = time.monotonic()
        for process in everybody:
            process.join(60)
        seconds, codes = time.monotonic() - begin, [process.exitcode for process in everybody]
        report.expect(0 not in codes and None not in codes, f"a killed process: they ended with {codes}")
        step = checkpoints(out / "checkpoints")[-1].step
        run = finished(train_together(config, out, size), out)
        report.fact("a killed process", {"seconds until all have ended": seconds, "resumed after step": step})
        done = [record["step"] for record in learned(run)]
        report.expect(
            done == [*range(1, steps + 1)], f"a killed process: resumed from step {step}, it has steps {done}"
        )
    with report.part("a CORE longer than the timeout"):
        from tests.evaluation.test_core import write_bundle

        bundle, ask, asked = str(write_bundle(folder / "bundle")), core.prepare_questions, []

        def late(*arguments: Any) -> Any:
            asked.append(1)
            time.sleep(6 if os.environ["RANK"] == "1" and len(asked) == 1 else 0)
            return ask(*arguments)

        config = change(base, parallel__kind="ddp", parallel__timeout_seconds=4.0, eval__every=0)
        config = change(config, eval__core_every=config.train.steps, eval__core_bundle=bundle)
        with mock.patch.object(core, "prepare_questions", late):
            everybody = train_together(config, folder / "core", size)
        last = learned(finished(everybody, folder / "core"))[-1]
        report.fact("a CORE longer than the timeout", {name: last[name] for name in last if name.startswith("core/")})


def one_rank(report: Report) -> None:
    """What several processes exchange, in a group of this process alone: by NCCL on a GPU."""
    device, backend = (torch.device("cuda", 0), "nccl") if report.cuda else (report.device, "gloo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    config = tiny(report)
    losses = {}
    for kind in ("none", "ddp", "fsdp", "hsdp"):
        with report.part(f"{kind} alone by {backend}"):
            state = training_state(config, 257, World(device), kind)
            losses[kind] = [float(train_step(state)["train/loss"]) for _ in range(5)]
            off = max(abs(a - b) / b for a, b in zip(losses[kind], losses["none"], strict=True))
            report.fact(f"{kind} alone by {backend}: losses apart", off)
            report.expect(off <= 1e-5, f"{kind} alone by {backend}: losses are {off:.2g} apart from those without it")
    update = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(0)).to(device)
    ways = {
        "replicated": partial(replicated, group=None, inside=alone),
        "row_sharded": partial(row_sharded, group=None),
    }
    for name, exchange in ways.items():
        with report.part(f"{name} by {backend}"):
            wanted, found = (exchanged(update, way) for way in (alone, exchange))
            report.expect(torch.equal(found, wanted), f"{name} by {backend}: not what one process computes")
            report.fact(f"{name} by {backend}", "the same")
    dist.destroy_process_group()


def exchanged(update: Tensor, exchange: Exchange) -> Tensor:
    """Matrices (N, R, C) after work on them that knows their places."""
    found: list[Tensor] = []

    def steps() -> Iterator[None]:
        begin, work = lambda a, b: update[a:b].clone(), lambda stack, first: stack * 2 + first
        found.extend((yield from exchange(len(update), update.shape[1], 0, begin, work)))

    in_turns([steps()])
    return torch.stack(found)


VOCABULARY = {"gpt2-124m": 50257, "nanochat-d20": 65536, "nanochat": 32768}
"""Of the recipes whose speed is measured."""

SMALL = {
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.context_length": 64,
    "model.window": 17,
    "train.batch_tokens": 1024,
    "train.compile": "off",
}
"""What becomes of them without a GPU."""


def speed(recipe: str, report: Report) -> None:
    """(11) Tokens a second of a recipe, and where its time goes."""
    device, cuda = report.device, report.cuda
    vocabulary, config = (VOCABULARY[recipe], load_config(recipe)) if cuda else (512, load_config(recipe, **SMALL))
    config, _ = resolve(config, vocabulary)
    precision, whole = choose_precision(config.train.precision, device), config.batch_rows
    rows = rows_that_fit(config, precision.dtype.itemsize, free_memory(device))
    # As many rows as a few micro-batches have: the rest of the batch would take as long again.
    config = change(config, train__batch_tokens=min(4 * rows, whole) * config.model.context_length)
    state = training_state(config, vocabulary, World(device))
    state.progress.micro_rows = rows
    marks: list[tuple[str, Any]] = []

    def mark(phase: str) -> None:
        event: Any = time.perf_counter()
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        marks.append((phase, event))

    def step() -> dict[str, float]:
        """Seconds of each phase of a step."""
        marks.clear()
        train_step_with_oom_retry(state, mark, print)
        mark("end")
        synchronize(device)
        taken: dict[str, float] = dict.fromkeys((FORWARD, BACKWARD, UPDATE), 0.0)
        for (phase, a), (_, b) in itertools.pairwise(marks):
            taken[phase] += a.elapsed_time(b) / 1e3 if cuda else b - a
        return taken

    begin = time.monotonic()
    step()
    report.fact("first step, s", time.monotonic() - begin)
    fit = measured_step(state, lambda _: None, print)["micro_rows"]
    report.fact("rows of a micro-batch, estimated and as measured", [rows, fit])
    if fit > state.progress.micro_rows:
        state.progress.micro_rows = fit
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    taken = [step() for _ in range(3)]
    middle = {phase: statistics.median(each[phase] for each in taken) for phase in taken[0]}
    passes = (middle[FORWARD] + middle[BACKWARD]) * whole / config.batch_rows
    seconds = passes + middle[UPDATE]
    tokens = whole * config.model.context_length
    flops = flops_per_token(config.model, vocabulary) * tokens / seconds
    report.fact("tokens a second", round(tokens / seconds))
    report.fact("MFU", flops / peak_flops(device, precision.dtype))
    if cuda:
        report.fact("peak memory, GB", torch.cuda.max_memory_allocated(device) / 1e9)
    report.fact("rows of a micro-batch, of a batch", [state.progress.micro_rows, whole])
    report.fact("share of the optimizer", middle[UPDATE] / seconds)
    with report.part("kernels"):
        kernels = longest_kernels(step, device)
        total = sum(kernels.values())
        report.fact("share of attention", sum(s for name, s in kernels.items() if ATTENTION.search(name)) / total)
        longest = sorted(kernels, key=lambda name: -kernels[name])[:15]
        report.fact(
            "longest kernels, share of a step", [f"{kernels[name] / total:.1%} {name[:90]}" for name in longest]
        )
    with report.part("loss"):
        micro, model = state.progress.micro_rows, config.model
        del state.forward, state.model, state.parameters, state.optimizers
        each, _, targets = loss_alone(
            device,
            precision.name,
            config.train.compile,
            vocabulary,
            model.width,
            micro,
            model.context_length,
            model.logit_softcap,
        )
        by_itself = seconds_of(lambda: each(targets, targets).backward(), device, times=3)
        report.fact("share of the loss", by_itself * whole / micro / seconds)


def longest_kernels(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of each kernel (without a GPU: operation) in ``work``."""
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as found:
        work()
        synchronize(device)
    events = [event for event in found.key_averages() if not getattr(event, "is_user_annotation", False)]
    if device.type == "cuda":
        return {e.key: e.self_device_time_total / 1e6 for e in events if e.self_device_time_total}
    return {event.key: event.self_cpu_time_total / 1e6 for event in events}


def gpu_tests(report: Report) -> None:
    """The project's own tests that are marked gpu."""
    needs_cuda(report)
    import pytest

    tests = Path(__file__).parents[1] / "tests"
    marked = [str(file) for file in tests.rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid] = report.outcome

    outcomes: dict[str, str] = {}
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *marked], plugins=[Outcomes()])
    for name, outcome in outcomes.items():
        report.fact(name, outcome)
    report.expect(code == 0 and "passed" in outcomes.values(), f"pytest ended with {int(code)}: {outcomes}")


CHECKS = [
    Check("environment", environment_facts, 40),
    Check("attention", attention, 160),
    Check("loss", loss, 60),
    Check("compile", compiles_once, 100),
    Check("skipped steps", skipped_steps, 40),
    Check("runs compared", runs_compared, 50),
    Check("resume", resumes, 80),
    Check("out of memory", out_of_memory, 40),
    Check("batches", batches, 40),
    Check("no waiting", no_waiting, 60),
    Check("processes", processes, 180),
    Check("tests marked gpu", gpu_tests, 90),
    *(Check(f"speed of {recipe}", partial(speed, recipe), 180) for recipe in VOCABULARY),
]
"""In this order, so that what matters most comes first if the time is short; seconds are those on a GPU."""

PATIENCE = 5
"""How many times as long the checks may take without a GPU, on a machine that may be small and busy."""


# Running them ------------------------------------------------------------------------------------------------------


def examine(check: Check, device: str, folder: Path, end: float) -> dict[str, Any]:
    """What a check finds, run in a process of its own that ends in time."""
    begin = time.monotonic()
    limit = min(check.seconds * (1 if device == "cuda" else PATIENCE), end - begin)
    folder.mkdir()
    file, log = folder / "found.jsonl", folder / "log.txt"
    process = FORK.Process(target=work_on, args=(check, device, folder, file, log, begin + 0.8 * limit))
    process.start()
    process.join(max(1.0, limit))
    late = process.is_alive()
    with suppress(ProcessLookupError):  # with all that it has started
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    lines = read_jsonl(file)
    failures = [line["failure"] for line in lines if "failure" in line]
    if late:
        failures.append(f"not done after {max(0, limit):.0f} s")
    elif not any("done" in line for line in lines):
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
        failures.append(f"ended with {process.exitcode}: {' '.join(said)}")
    facts = {line["fact"]: line["value"] for line in lines if "fact" in line}
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    status = "failed" if failures else "passed" if facts else "skipped"
    seconds = round(time.monotonic() - begin, 1)
    found = {"name": check.name, "status": status, "seconds": seconds, "failures": failures, "skipped": skipped}
    return {**found, "facts": facts}


def work_on(check: Check, device: str, folder: Path, file: Path, log: Path, deadline: float) -> None:
    """What the process of a check does."""
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    report = Report(file, folder, torch.device(device), deadline)
    try:
        check.work(report)
    except Skip as reason:
        report.skip(check.name, str(reason))
    except BaseException as error:
        traceback.print_exc()
        report.expect(False, in_a_line(error))
    for child in multiprocessing.active_children():
        child.kill()
    report.done()


def device_type(name: str) -> str:
    """The type of the device to examine."""
    kind = choose_device(name).type
    return kind if kind == "cuda" else "cpu"


def words(value: Any) -> str:
    """A value of a fact in the table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(found: dict[str, Any]) -> str:
    """A check in a line."""
    return f"{found['status']:<8} {found['name']:<24} {found['seconds']:6.1f} s"


def show(found: dict[str, Any]) -> None:
    """What a check found."""
    print(line(found))
    for name, value in found["facts"].items():
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            print(f"         {name}:", *(f"             {each}" for each in value), sep="\n")
        else:
            print(f"         {name}: {words(value)}")
    for kind in ("skipped", "failures"):
        for each in found[kind]:
            print(f"         {'skipped' if kind == 'skipped' else 'FAILED'}: {each}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run the checks, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="names of checks, or their beginnings")
    parser.add_argument("--minutes", type=float, default=9.5, help="when to stop what is still running then")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    device = elsewhere(device_type, options.device)
    chosen = [check for check in CHECKS if not options.only or check.name.startswith(tuple(options.only))]
    if not chosen:
        parser.error(f"--only: there are {', '.join(check.name for check in CHECKS)}")
    results, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, check in enumerate(chosen):
            results.append(examine(check, device, Path(folder, str(number)), begin + 60 * options.minutes))
            show(results[-1])
            failed = [result["name"] for result in results if result["status"] == "failed"]
            whole = {"device": device, "failed": failed, "seconds": round(time.monotonic() - begin, 1)}
            options.out.write_text(json.dumps({**whole, "checks": results}, indent=1) + "\n", encoding="utf-8")
    counts = [f"{sum(r['status'] == status for r in results)} {status}" for status in ("passed", "failed", "skipped")]
    print("", *map(line, results), sep="\n")
    print(f"{', '.join(counts)} in {time.monotonic() - begin:.0f} s; {options.out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
