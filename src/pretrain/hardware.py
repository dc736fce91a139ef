"""What hardware can do at most: published peaks of GPUs, the measured peak of this CPU, memory and disk.

The peaks are the denominator of MFU (model FLOPs utilisation, arXiv 2204.02311): dense products of bf16 (fp16 where
there is no bf16) with fp32 sums, without structured sparsity, as the makers publish them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


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

PEAK_FILE = "peak.json"


def known_gpu(device_name: str) -> GPU | None:
    """The published numbers of what the driver calls ``device_name``; None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that this device can do at most: from the table, or measured once and remembered.

    Measuring takes less than a second; what was found is kept in the user's cache folder for this machine, its number
    of threads and version of torch.
    """
    if device.type == "cuda" and (gpu := known_gpu(torch.cuda.get_device_name(device))):
        return gpu.tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}"
    key = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    file = cache_folder() / PEAK_FILE
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(known, dict) and isinstance(known.get(key), float):
        return known[key]
    flops = matmul_flops(device, dtype)
    with suppress(OSError):  # a home that cannot be written to: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{PEAK_FILE}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**known, key: flops}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    return flops


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
            _synchronize(device)
            took = time.perf_counter() - begin
            best = max(best, 2 * size**3 / took)
        if took < seconds / 50:  # larger products come closer to the peak, where there is time for them
            size = min(largest, 2 * size)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def cache_folder() -> Path:
    """Where what was measured on this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pretrain")


def cpu_name() -> str:
    """What the processor calls itself."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has; of a CPU what the machine, or the container's limit, allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # not Linux: the most so far
    return peak if sys.platform == "darwin" else peak * 1024
