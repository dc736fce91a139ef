"""The plan: everything that is known of a run before it begins, as numbers.

config → data's tokens → resolved config → parameters, FLOPs → micro-batch, memory → speed → time
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from pretrain import device as machine
from pretrain.config import Config, ModelConfig
from pretrain.device import GPUS, Precision, free_memory
from pretrain.errors import UsageError
from pretrain.experiments.forecast import Forecast, Prediction, Size, measured_with
from pretrain.fitting import Machine, Text, fit_model, fit_steps, fit_text, look_at_text, settled, with_steps
from pretrain.optim import find_optimizer
from pretrain.plan.cluster import Layout, memory_parts, traffic, traffic_seconds
from pretrain.plan.data import DataFacts, look_at_data, mixture_read, windows_of
from pretrain.plan.memory import dry_run
from pretrain.plan.speed import assume_speed, assumed_utilisation
from pretrain.sizing import (
    Speed,
    count_parameters,
    flops_per_token,
    multiplied,
    parallelism_that_fits,
    resolve,
    rows_that_fit,
    tokens_read,
    validated_tokens,
)
from pretrain.tokens.datasets import is_tokens
from pretrain.training.speed import measure_machine, measure_speed
from pretrain.training.world import World

CPU_HEAP, GPU_CACHE = 0.4, 0.1
"""What an allocator holds beyond the tensors alive, as a share of all but weights and moments. On a CPU 0.19 to 0.53
was measured in five runs; on a GPU it is an assumption."""

PROCESS_BYTES, CUDA_BYTES = 480_000_000, 600_000_000
"""What Python with torch, and the driver on a GPU, take before any tensor."""

START_SECONDS = 6.0
"""About what 'pretrain train' takes to start, to prepare a small text and to measure, of train.minutes."""

WIDTHS = (256, 512, 1024)
"""Of models whose speed is assumed."""

WRITING = 2
"""Times a checkpoint's bytes lie in the machine's memory while it is written in the background: copied, and packed."""


SHOWN = (
    *("flops_per_token", "tokens", "micro_batch", "micro_steps", "checkpoint_bytes", "checkpoint_seconds"),
    *("step_seconds", "seconds", "speed", "tokens_per_second", "utilisation"),
    *("traffic_bytes_per_step", "traffic_seconds_per_step", "loader_bytes_per_second"),
)
"""What of a plan its JSON has as it is."""


@dataclass(frozen=True)
class Hardware:
    """Where a plan is for: this machine, or a GPU by name."""

    title: str
    precision: Precision
    """Of activations, and the device."""
    memory: int
    """Bytes of one device."""
    peak: float
    """FLOPs per second of one device at most."""
    gpu: machine.GPU | None
    """The published numbers of a GPU that is known."""
    here: bool
    """Whether it is this machine."""


@dataclass(frozen=True)
class Plan:
    """What a configuration needs. Bytes, seconds and tokens are plain numbers; ``memory`` is of each process."""

    config: Config
    derived: list[str]
    """What :func:`pretrain.sizing.resolve` filled in."""
    fitted: list[str]
    """What :mod:`pretrain.fitting` chose, and why."""
    data: DataFacts
    hardware: Hardware
    layout: Layout
    parameters: dict[str, int]
    flops_per_token: int
    micro_batch: int
    micro_steps: int
    memory: dict[str, int]
    """Bytes of the device by part."""
    host_memory: dict[str, int]
    """Bytes of the machine's own memory, beside a GPU's, by part; for a CPU all is in ``memory``."""
    checkpoint_bytes: int
    disk_rate: float
    """Bytes per second that each machine writes of a checkpoint, in the background."""
    traffic_bytes_per_step: dict[str, int]
    traffic_seconds_per_step: float
    step_seconds: float
    seconds: float
    """Of all steps and validations."""
    speed: str
    """How the speed is known, in words."""
    mixture: list[dict[str, Any]]
    """What is read of each data set, with ``data.weights``: :func:`pretrain.plan.data.mixture_read`."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.config.train.steps * self.config.train.batch_tokens

    @property
    def epochs(self) -> float:
        """Passes over the training tokens."""
        return self.tokens / max(1, self.data.train_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Of all processes together."""
        return self.config.train.batch_tokens / self.step_seconds

    @property
    def utilisation(self) -> float:
        """MFU: the share of the peak that training reaches."""
        return self.flops_per_token * self.tokens_per_second / (self.hardware.peak * self.layout.processes)

    @property
    def loader_bytes_per_second(self) -> float:
        """Of token shards, read by all processes together."""
        return self.tokens_per_second * (2 if self.data.vocab_size <= 2**16 else 4)

    @property
    def checkpoint_seconds(self) -> float:
        """To write a checkpoint."""
        return self.checkpoint_bytes / (self.disk_rate * self.layout.machines)

    def predicted(self, forecast: Forecast) -> Prediction:
        """Its held-out loss by a forecast. Raises UsageError if that says nothing of such a run."""
        forecast.check(measured_with(self.config, self.data.vocab_size), "this run")
        parameters = multiplied(self.config.model, self.parameters)
        return forecast.predict(Size(self.flops_per_token * self.tokens, parameters, self.tokens, self.epochs))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "hardware": self.hardware.title,
            "precision": self.hardware.precision.name,
            "processes": self.layout.processes,
            "parallel": self.layout.parallelism,
            "data": {**dataclasses.asdict(self.data), "epochs": self.epochs, "mixture": self.mixture},
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "flops": self.flops_per_token * self.tokens,
            "steps": self.config.train.steps,
            "batch_tokens": self.config.train.batch_tokens,
            "memory": {**self.memory, "total": sum(self.memory.values()), "limit": self.hardware.memory},
            "host_memory": {**self.host_memory, "total": sum(self.host_memory.values())},
            "peak_flops": self.hardware.peak,
            **{name: getattr(self, name) for name in SHOWN},
        }


def checkpoint_bytes(config: Config, counts: dict[str, int]) -> int:
    """Bytes of a checkpoint of a model with ``counts`` of parameters: weights, their average, moments."""
    return (8 if config.optim.ema else 4) * sum(counts.values()) + find_optimizer(config.optim).state_bytes(counts)


def make_plan(
    config: Config,
    gpu: str = "",
    gpus: int = 1,
    parallel: str = "auto",
    measure: bool = True,
    utilisation: float = 0.0,
    disk_rate: float = 1e9,
) -> Plan:
    """Plan a run.

    Args:
        config: from :func:`pretrain.load_config`.
        gpu: a name in ``device.GPUS``; ``none`` for this machine's CPU; empty for this machine's device.
        gpus: processes, each with a device of its own.
        parallel: ddp, fsdp, hsdp, or auto: as ``parallel.kind`` says, which may be auto too: what fits.
        measure: time a few steps on this machine.
        utilisation: the share of the peak to assume where nothing is measured; 0: ``speed.assumed_utilisation``.
        disk_rate: bytes per second that a machine can write.

    Raises:
        UsageError: there is no such GPU or optimizer, or the configuration contradicts itself.
        DataError: the data cannot be used.
    """
    find_optimizer(config.optim)  # refuses an unknown name before any work
    hardware = choose_hardware(config, gpu)
    precision, device = hardware.precision, hardware.precision.device
    measure = measure and hardware.here and gpus == 1
    text, fitted = Text(0), list[str]()
    if config.fit.fields and not is_tokens(config.data.paths):
        text = look_at_text(config.data)
        config, fitted = fit_text(config, text)
    data = look_at_data(config)
    vocab_size = data.vocab_size
    size = text.bytes or data.text_bytes or 4 * data.train_tokens
    tokens = {"train_tokens": data.train_tokens, "val_tokens": data.val_tokens, "test_tokens": data.test_tokens}
    text = replace(text, bytes=size, vocab_size=vocab_size, **tokens)
    timed = config.train.timed
    left = 60 * config.train.minutes - START_SECONDS if timed else 0.0
    if config.fit.fields:
        if config.tokenizer.kind == "bpe":
            config = replace(config, tokenizer=replace(config.tokenizer, vocab_size=vocab_size))
        if measure:
            there = measure_machine(config, vocab_size, precision, left, World(device))
        else:
            there = assume_machine(hardware, gpus, left, utilisation)
        config, said = fit_model(config, text, there)
        fitted += said
    unfinished = config
    if "model.context_length" in config.fit.fields:
        data = replace(data, windows=windows_of(config, data.train_tokens))
    config, derived = resolve(with_steps(config, 1) if timed else config, vocab_size, data.windows)
    counts, flops = count_parameters(config.model, vocab_size), flops_per_token(config.model, vocab_size)
    parallelism = config.parallel.kind if parallel == "auto" else parallel
    if parallelism == "auto":
        per_machine = Layout("none", gpus).per_machine
        parallelism = parallelism_that_fits(sum(counts.values()), hardware.memory, gpus, per_machine)
    layout = Layout(parallelism if gpus > 1 else "none", gpus)
    state = checkpoint_bytes(config, counts)

    rows_each = math.ceil(config.batch_rows / gpus)
    free = max(0, hardware.memory - state // layout.shards)
    fit = rows_that_fit(config, precision.dtype.itemsize, free, precision.device.type == "cpu")
    rows = min(config.train.micro_batch or fit, rows_each)
    while True:
        micro_steps = math.ceil(rows_each / rows)
        alone, _ = dry_run(config, vocab_size, rows, micro_steps, precision)
        parts = memory_parts(alone, config, vocab_size, layout, micro_steps, precision.dtype)
        saved_here = state // (gpus if layout.parallelism == "ddp" else layout.shards)
        memory, host_memory = with_surroundings(parts, device, saved_here)
        if rows == 1 or sum(memory.values()) <= hardware.memory:
            break
        rows //= 2  # as training does when memory runs out

    too_large = measure and sum(memory.values()) - PROCESS_BYTES > free_memory(device)
    if measure and not too_large:
        speed, known = measure_speed(config, vocab_size, rows, precision), "measured here"
    else:
        share = utilisation or assumed_utilisation(config.model, device.type != "cpu")
        speed = assume_speed(config, flops / (share * hardware.peak), rows)
        known = f"assumed {share:.0%} of the peak"
        known += " (the model does not fit in this device's memory)" if too_large else ""
    sent = traffic(config, vocab_size, layout, micro_steps, precision.dtype)
    waiting = traffic_seconds(sent, layout, hardware.gpu) if hardware.gpu else 0.0
    step_seconds = max(speed.step(micro_steps) * rows_each / (rows * micro_steps), waiting)
    if timed:
        steps, said = fit_steps(config, text, Speed(step_seconds, 0.0, speed.evaluation, speed.sample), 1, left, gpus)
        config, derived = resolve(with_steps(unfinished, steps), vocab_size, data.windows)
        fitted += said
    config = settled(config, text) if config.fit.fields else config
    measured = validated_tokens(config, data.val_tokens) + tokens_read(config, data.test_tokens)
    seconds = config.train.steps * step_seconds + speed.evaluation * measured / gpus
    return Plan(
        config, derived, fitted, data, hardware, layout, counts, flops, rows, micro_steps, memory, host_memory, state,
        disk_rate, sent, waiting, step_seconds, seconds, known, mixture_read(config, data.datasets),
    )  # fmt: skip


def assume_machine(hardware: Hardware, gpus: int, seconds: float, utilisation: float) -> Machine:
    """What models the hardware can train, by shares of its peak."""
    gpu = hardware.precision.device.type != "cpu"
    shares = {width: utilisation or assumed_utilisation(replace(ModelConfig(), width=width), gpu) for width in WIDTHS}
    flops = {width: share * hardware.peak * gpus for width, share in shares.items()}
    return Machine(flops, hardware.memory, seconds, gpu, hardware.precision.dtype.itemsize, gpus)


def choose_hardware(config: Config, gpu: str) -> Hardware:
    """A GPU by name, or the device of this machine. A UsageError when there is none of that name."""
    wanted = config.train.precision
    if gpu not in ("", "none"):
        if gpu not in GPUS:
            raise UsageError(f"--gpu {gpu} is not known; there are none (this machine's CPU), {', '.join(GPUS)}")
        known = GPUS[gpu]
        name = wanted if wanted != "auto" else "fp16" if gpu in ("v100", "t4") else "bf16"
        precision, memory = Precision(name, torch.device("cuda")), round(known.memory_gb * 1e9)
        return Hardware(known.title, precision, memory, known.tflops * 1e12, known, here=False)
    device = machine.choose_device("cpu" if gpu == "none" else config.train.device)
    precision, memory = machine.choose_precision(wanted, device), machine.total_memory(device)
    title, known = f"this machine's {device.type}", None
    if device.type == "cuda":
        title = torch.cuda.get_device_name(device)
        known = machine.known_gpu(title)
    else:
        memory = min(memory, free_memory(device))
    if device.type == "cpu":
        title += f" ({machine.cpu_name()}, {torch.get_num_threads()} threads)"
    return Hardware(title, precision, memory, machine.peak_flops(device, precision.dtype), known, here=True)


def with_surroundings(parts: dict[str, int], device: torch.device, state: int) -> tuple[dict[str, int], dict[str, int]]:
    """Add what the allocator, the process and saving take; gives the memory of the device and of the machine beside."""
    churned = sum(parts.values()) - parts["weights"] - parts["moments"] - parts.get("average", 0)
    around = {"process": PROCESS_BYTES, "checkpoint being saved": WRITING * state}
    if device.type == "cuda":
        return {**parts, "allocator": round(GPU_CACHE * churned), "CUDA itself": CUDA_BYTES}, around
    return {**parts, "allocator": round(CPU_HEAP * churned), **around}, {}
