"""The machine: which device and precision, how much memory, and what its hardware can do at most.

The peaks are the denominator of MFU (model FLOPs utilisation, arXiv 2204.02311): dense products of bf16 (fp16 where
there is no bf16) with fp32 sums, without structured sparsity, as the makers publish them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pretrain.errors import UsageError
from pretrain.io import cache_folder, write_atomically

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of ``train.device``; auto takes cuda, else mps, else cpu. A UsageError when it is not there."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, check in available.items() if check())
    if not available[name]():
        raise UsageError(f"train.device is {name}, but torch sees none on this machine; use --train.device auto")
    if (
        name == "mps" and "PYTORCH_ENABLE_MPS_FALLBACK" not in os.environ
    ):  # pretrain/__init__.py came too late to set it
        warnings.warn(
            "torch was imported before pretrain, so operations that MPS lacks will fail; import pretrain first",
            stacklevel=2,
        )
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on the CPU what the system says is available."""
    if device.type == "cuda":  # what torch keeps of freed tensors is free for others too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count anew for :func:`passing_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def passing_memory(device: torch.device) -> int:
    """Bytes of tensors at most since :func:`reset_peak_memory`, beyond those there now; 0: only CUDA counts."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that tensors free, for the next tensors, instead of returning them to the system.

    Each step on a CPU frees and takes the same blocks; fetching them again costs a page fault for every 4 kB, in total
    more than the computation on them. Does nothing with another C library.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


@dataclass(frozen=True)
class Precision:
    """Precision of activations and matrix products. Weights, optimizer state, loss and statistics stay fp32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return torch.float32 if self.name == "tf32" else DTYPES[self.name]

    def set_products(self) -> None:
        """Let a GPU multiply fp32 in TF32 from now on, or in full if this is no ``tf32``, whatever was set before."""
        if self.device.type == "cuda":
            # torch.compile fails after the newer torch.backends.cuda.matmul.fp32_precision (pytorch issue 166387).
            torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")


def has_tf32(device: torch.device) -> bool:
    """Whether a device can multiply in TF32: NVIDIA's from Ampere on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of ``train.precision``. auto: bf16 where it is clearly faster than fp32, else fp16 on old GPUs.

    tf32 is fp32 where there is none.
    """
    if name == "tf32" and not has_tf32(device):
        name = "fp32"
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif name == "auto" and device.type == "cpu":
        bf16, fp32 = (matmul_flops(device, dtype, 0.03) for dtype in (torch.bfloat16, torch.float32))
        name = "bf16" if bf16 > 1.3 * fp32 else "fp32"
    return Precision("fp32" if name == "auto" else name, device)


@dataclass(frozen=True)
class GPU:
    """Published numbers of a GPU."""

    title: str
    tflops: float
    """10**12 operations per second, dense bf16."""
    memory_gb: int
    link_gb: float
    """10**9 bytes per second that one GPU can send to the others of its machine."""
    network_gb: float
    """10**9 bytes per second for each GPU between machines, as they are usually sold in clusters; 0: not usual."""
    pattern: str
    """Matches what the driver calls it."""
    source: str


NVIDIA = "https://www.nvidia.com/en-us/data-center/"
GPUS = {
    "b200": GPU("NVIDIA B200", 2250, 180, 900, 50, r"\bG?B200\b", NVIDIA + "dgx-b200/"),
    "h200": GPU("NVIDIA H200 SXM", 989, 141, 450, 50, r"\bH200\b", NVIDIA + "h200/"),
    "h100-pcie": GPU("NVIDIA H100 PCIe", 756, 80, 64, 25, r"\bH100 PCIe\b", NVIDIA + "h100/"),
    "h100": GPU("NVIDIA H100 SXM", 989, 80, 450, 50, r"\bH100\b", NVIDIA + "h100/"),
    "a100": GPU("NVIDIA A100 80 GB", 312, 80, 300, 25, r"\bA100.*80 ?GB", NVIDIA + "a100/"),
    "a100-40": GPU("NVIDIA A100 40 GB", 312, 40, 300, 25, r"\bA100\b", NVIDIA + "a100/"),
    "l40s": GPU("NVIDIA L40S", 362, 48, 32, 12.5, r"\bL40S\b", NVIDIA + "l40s/"),
    "l4": GPU("NVIDIA L4", 121, 24, 32, 12.5, r"\bL4\b", NVIDIA + "l4/"),
    "v100": GPU("NVIDIA V100", 125, 32, 150, 12.5, r"\bV100\b", "https://www.nvidia.com/en-us/data-center/v100/"),
    "t4": GPU("NVIDIA T4", 65, 16, 16, 0, r"\bT4\b", "https://www.nvidia.com/en-us/data-center/tesla-t4/"),
    "rtx5090": GPU("GeForce RTX 5090", 209.5, 32, 64, 0, r"\bRTX 5090\b", "NVIDIA RTX Blackwell architecture, v1.1"),
    "rtx4090": GPU("GeForce RTX 4090", 165.2, 24, 32, 0, r"\bRTX 4090\b", "NVIDIA Ada architecture, v2.1, table 2"),
    "rtx3090": GPU("GeForce RTX 3090", 71, 24, 32, 0, r"\bRTX 3090\b", "NVIDIA GA102 architecture, v2, table 9"),
    "mi300x": GPU("AMD Instinct MI300X", 1307.4, 192, 448, 50, r"\bMI300X\b", "AMD Instinct MI300X data sheet"),
}
"""By the name of --gpu. More particular patterns stand before more general ones."""


def known_gpu(device_name: str) -> GPU | None:
    """The published numbers of what the driver calls ``device_name``; None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that this device can do at most: from the table, or measured once and remembered.

    What was measured is kept in the user's cache folder for this machine, its number of threads and version of torch.
    """
    if device.type == "cuda" and (gpu := known_gpu(torch.cuda.get_device_name(device))):
        return gpu.tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}"
    key = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    file = cache_folder() / "peak.json"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError, TypeError):  # not there yet, or damaged
        known = dict(json.loads(file.read_text(encoding="utf-8")))
    if key not in known:
        known[key] = matmul_flops(device, dtype)
        with suppress(OSError):  # a home that cannot be written to: measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(known, indent=2) + "\n")
    return known[key]


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of the best of some products of two square matrices, measured for about ``seconds``."""
    largest, size, best = 4096 if device.type == "cuda" else 1024, 256, 0.0
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        a = torch.full((size, size), 0.01, dtype=dtype, device=device)
        took = 0.0
        for _ in range(3):
            begin = time.perf_counter()
            torch.mm(a, a)
            synchronize(device)
            took = time.perf_counter() - begin
            best = max(best, 2 * size**3 / took)
        if took < seconds / 50:  # larger products come closer to the peak, where there is time for them
            size = min(largest, 2 * size)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def cpu_name() -> str:
    """What the processor calls itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    with suppress(OSError, subprocess.SubprocessError):  # macOS
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has; of a CPU what the machine, or the container's limit, allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total = psutil.virtual_memory().total
    return min(total, container_limit() or total)


def container_limit() -> int | None:
    """Bytes that the control group of this process may take, if it is limited."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limit = int(Path(file).read_text(encoding="ascii"))
            return limit if limit < 2**60 else None
    return None


def process_memory(device: torch.device) -> int:
    """Bytes that this process holds: on a GPU what torch has reserved there, else in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss
