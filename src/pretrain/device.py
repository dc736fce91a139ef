"""Which device and which arithmetic: chosen by looking and measuring, or forced by the configuration."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of ``train.device``; auto takes cuda, else mps, else cpu. A UsageError when it is not there."""
    # Read by torch when MPS first runs: operations that MPS lacks then run on the CPU instead of failing.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, check in available.items() if check())
    if not available[name]():
        raise UsageError(f"train.device is {name}, but torch sees none on this machine; use --train.device auto")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on the CPU what the system says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that tensors free, for the next tensors, instead of returning them to the system.

    Each step on a CPU frees and takes the same blocks; fetching them anew costs a page fault for every 4 kB, together
    more than the arithmetic on them. Does nothing where the C library is another.
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
    """The arithmetic of activations and matrix products. Weights, optimizer state, loss and statistics stay fp32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return DTYPES[self.name]


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of ``train.precision``. auto: bf16 where it is clearly faster than fp32, else fp16 on old GPUs."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        elif device.type == "cpu":
            name = "bf16" if _matmul_seconds(torch.bfloat16) * 1.3 < _matmul_seconds(torch.float32) else "fp32"
        else:
            name = "fp32"
    return Precision(name, device)


def _matmul_seconds(dtype: torch.dtype, size: int = 512) -> float:
    """Best of a few products of two square matrices on the CPU."""
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times)
