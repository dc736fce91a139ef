"""The plan: everything that is known of a run before it begins, as numbers.

config → data's tokens → resolved config → parameters, FLOPs → micro-batch, memory → speed → time
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.config import Config
from pretrain.device import (
    GPU,
    GPUS,
    Precision,
    choose_device,
    choose_precision,
    cpu_name,
    free_memory,
    known_gpu,
    peak_flops,
    total_memory,
)
from pretrain.errors import UsageError
from pretrain.optim import find_optimizer
from pretrain.plan.cluster import Layout, memory_parts, traffic, traffic_seconds
from pretrain.plan.data import DataFacts, look_at_data
from pretrain.plan.memory import dry_run
from pretrain.plan.speed import assume_speed, assumed_utilisation, measure_speed
from pretrain.sizing import count_parameters, flops_per_token, kind_that_fits, resolve, rows_that_fit

CPU_HEAP, GPU_CACHE = 0.4, 0.1
"""What an allocator holds beyond the tensors alive, as a share of all but weights and moments. On a CPU 0.19 to 0.53
was measured in five runs; on a GPU it is an assumption."""

PROCESS_BYTES, CUDA_BYTES = 480_000_000, 600_000_000
"""What Python with torch, and the driver on a GPU, take before any tensor."""

WRITING = 2
"""Times a checkpoint's bytes lie in the machine's memory while it is written in the background: copied, and packed."""


@dataclass(frozen=True)
class Hardware:
    """Where a plan is for: this machine, or a GPU by name."""

    title: str
    precision: Precision
    """Of activations, and the device."""
    memory: int
    """Bytes of one device."""
    gpu: GPU | None
    """The published numbers of a GPU that is known."""
    here: bool
    """Whether it is this machine."""


@dataclass(frozen=True)
class Plan:
    """What a configuration needs. Bytes, seconds and tokens are plain numbers; ``memory`` is of each process."""

    config: Config
    data: DataFacts
    derived: list[str]
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
    checkpoint_seconds: float
    """To write one at ``disk_rate`` for each machine, in the background."""
    disk_rate: float
    step_seconds: float
    seconds: float
    """Of all steps and validations."""
    traffic: dict[str, int]
    traffic_seconds: float
    peak: float
    """Operations per second of one device at most."""
    speed: str
    """How the speed is known, in words."""

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
        return self.flops_per_token * self.tokens_per_second / (self.peak * self.layout.processes)

    @property
    def loader_rate(self) -> float:
        """Bytes of token shards read a second, of all processes together."""
        return self.tokens_per_second * (2 if self.data.vocab_size <= 2**16 else 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        config, data = self.config, dataclasses.asdict(self.data)
        return {
            "hardware": self.hardware.title,
            "precision": self.hardware.precision.name,
            "processes": self.layout.processes,
            "parallel": self.layout.kind,
            "data": {**data, "epochs": self.epochs},
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "flops_per_token": self.flops_per_token,
            "flops": self.flops_per_token * self.tokens,
            "steps": config.train.steps,
            "batch_tokens": config.train.batch_tokens,
            "tokens": self.tokens,
            "micro_batch": self.micro_batch,
            "micro_steps": self.micro_steps,
            "memory": {**self.memory, "total": sum(self.memory.values()), "limit": self.hardware.memory},
            "host_memory": {**self.host_memory, "total": sum(self.host_memory.values())},
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": self.checkpoint_seconds,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.utilisation,
            "peak_flops": self.peak,
            "traffic_bytes_per_step": self.traffic,
            "traffic_seconds_per_step": self.traffic_seconds,
            "loader_bytes_per_second": self.loader_rate,
            "speed": self.speed,
        }


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
        parallel: ddp, fsdp, hsdp, or auto: as ``parallel.kind`` says, or ddp where the whole model fits.
        measure: time a few steps on this machine.
        utilisation: the share of the peak to assume where nothing is measured; 0: ``speed.assumed_utilisation``.
        disk_rate: bytes per second that a machine can write.

    Raises:
        UsageError: there is no such GPU or optimizer, or the configuration contradicts itself.
        DataError: the data cannot be used.
    """
    optimizer, hardware = find_optimizer(config.optim), choose_hardware(config, gpu)
    precision, device = hardware.precision, hardware.precision.device
    data = look_at_data(config)
    config, derived = resolve(config, data.vocab_size)
    counts, flops = count_parameters(config.model, data.vocab_size), flops_per_token(config.model, data.vocab_size)
    kind = config.parallel.kind if parallel == "auto" else parallel
    if kind == "auto":
        kind = kind_that_fits(sum(counts.values()), hardware.memory)
    where = Layout(kind if gpus > 1 else "none", gpus)
    state = 4 * sum(counts.values()) + optimizer.state_bytes(counts)

    mine = math.ceil(config.batch_rows / gpus)
    free = hardware.memory - state // where.shards
    rows = min(config.train.micro_batch or rows_that_fit(config, precision.dtype.itemsize, max(0, free)), mine)
    while True:
        micro_steps = math.ceil(mine / rows)
        alone, _ = dry_run(config, data.vocab_size, rows, micro_steps, precision)
        parts = memory_parts(alone, config, data.vocab_size, where, micro_steps, precision.dtype)
        memory, host = with_surroundings(parts, hardware, state // where.shards)
        if rows == 1 or sum(memory.values()) <= hardware.memory:
            break
        rows //= 2  # as training does when memory runs out

    peak = hardware.gpu.tflops * 1e12 if hardware.gpu else peak_flops(device, precision.dtype)
    measure = measure and hardware.here and gpus == 1
    too_large = measure and sum(memory.values()) - PROCESS_BYTES > free_memory(device)
    if measure and not too_large:
        speed, how = measure_speed(config, data.vocab_size, rows, precision), "measured here"
    else:
        share = utilisation or assumed_utilisation(config.model, device.type != "cpu")
        speed = assume_speed(config, flops / (share * peak), rows)
        how = f"assumed {share:.0%} of the peak"
        how += " (the model does not fit in this device's memory)" if too_large else ""
    sent = traffic(config, data.vocab_size, where, micro_steps, precision.dtype)
    waiting = traffic_seconds(sent, where, hardware.gpu) if hardware.gpu else 0.0
    step_seconds = max(speed.step(micro_steps) * mine / (rows * micro_steps), waiting)
    validated = (config.train.steps - 1) // config.eval.every if config.eval.every else 0
    each = min(config.eval.tokens or data.val_tokens, data.val_tokens)
    evaluation = speed.evaluation * (validated * each + data.val_tokens) / gpus
    return Plan(
        config, data, derived, hardware, where, counts, flops, rows, micro_steps, memory, host, state,
        state / (disk_rate * where.machines), disk_rate, step_seconds,
        config.train.steps * step_seconds + evaluation, sent, waiting, peak, how,
    )  # fmt: skip


def choose_hardware(config: Config, gpu: str) -> Hardware:
    """A GPU by name, or the device of this machine. A UsageError when there is none of that name."""
    wanted = config.train.precision
    if gpu not in ("", "none"):
        if gpu not in GPUS:
            raise UsageError(f"--gpu {gpu} is not known; there are none (this machine's CPU), {', '.join(GPUS)}")
        known = GPUS[gpu]
        name = wanted if wanted != "auto" else "fp16" if gpu in ("v100", "t4") else "bf16"
        return Hardware(known.title, Precision(name, torch.device("cuda")), round(known.memory_gb * 1e9), known, False)
    device = choose_device("cpu" if gpu == "none" else config.train.device)
    precision = choose_precision(wanted, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Hardware(name, precision, total_memory(device), known_gpu(name), True)
    title = f"this machine's {device.type}"
    if device.type == "cpu":
        title += f" ({cpu_name()}, {torch.get_num_threads()} threads)"
    return Hardware(title, precision, min(total_memory(device), free_memory(device)), None, True)


def with_surroundings(parts: dict[str, int], hardware: Hardware, state: int) -> tuple[dict[str, int], dict[str, int]]:
    """Add what the allocator, the process and saving take; gives the memory of the device and of the machine beside."""
    churned = sum(parts.values()) - parts["weights"] - parts["moments"]
    around = {"process": PROCESS_BYTES, "checkpoint being saved": WRITING * state}
    if hardware.precision.device.type == "cuda":
        return {**parts, "allocator": round(GPU_CACHE * churned), "CUDA itself": CUDA_BYTES}, around
    return {**parts, "allocator": round(CPU_HEAP * churned), **around}, {}
