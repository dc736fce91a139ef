"""``pretrain doctor``: what this machine can do, what is missing, and the command that fixes it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from pretrain.cli.parsing import Command

EXTRAS = (
    ("pyarrow", "data", "Parquet files"),
    ("aiohttp", "data", "text from https://"),
    ("s3fs", "s3", "text from s3://"),
    ("gcsfs", "gs", "text from gs://"),
    ("ray", "ray", "preparing data on a cluster"),
    ("gigatoken", "fast", "faster tokenizing"),
    ("tensorboard", "tensorboard", "TensorBoard's curves of each run"),
    ("wandb", "wandb", "Weights & Biases"),
    ("trackio", "trackio", "trackio"),
    ("lm_eval", "lm-eval", "pretrain eval --tasks"),
    ("gguf", "gguf", "pretrain export --format gguf"),
    ("pyppmd", "ppmd", "PPMd in a report's baselines"),
    ("torchao", "fp8", "fp8 on Hopper and later GPUs"),
)
"""Optional packages, the extra that installs each, and what it is for."""

NVIDIA = Path("/dev/nvidia0")
"""There if the system shows an NVIDIA GPU, whatever torch can do."""


class Finding(NamedTuple):
    """What was found, with a fix unless all is well; ``bad`` if training is impossible."""

    name: str
    text: str
    fix: str = ""
    bad: bool = False


@dataclass
class Doctor(Command):
    """What this machine can do, what is missing, and the command that fixes it.

    Exits with 1 if something makes training impossible.
    """

    quick: bool = False
    """Leave out what takes seconds: the compiler, and the speed of each precision."""
    json: bool = False
    """Print one JSON object: a list of findings, each with name, status (ok, warn, bad), text and fix."""

    def __call__(self) -> int:
        findings = []
        for name, text, fix, bad in examine(self.quick):
            status = "bad" if bad else "warn" if fix else "ok"
            findings.append({"name": name, "status": status, "text": text, "fix": fix})
            if not self.json:
                print(f"{status:<5} {name:<13} {text}{fix and f'; {fix}'}", flush=True)
        if self.json:
            print(json.dumps({"findings": findings}))
        return int(any(found["status"] == "bad" for found in findings))


def examine(quick: bool) -> Iterator[Finding]:
    """All findings, each as soon as it is known."""
    yield Finding("python", f"{platform.python_version()} ({platform.system()} {platform.machine()}), {sys.executable}")
    free, fix, writable = shutil.disk_usage(".").free, "", os.access(".", os.W_OK | os.X_OK)
    if not writable:
        fix = "it is not writable: go to a folder of yours, or give train --out one"
    elif free < 5e9:
        fix = "free some space, or give train --out a folder elsewhere; a run takes 200 MB to many GB"
    yield Finding("disk", f"{free / 1e9:,.1f} GB free in {Path.cwd()}", fix, bad=free < 200e6 or not writable)
    for package, extra, purpose in EXTRAS:
        try:
            yield Finding(package, f"{metadata.version(package)}, for {purpose}")
        except metadata.PackageNotFoundError:
            yield Finding(package, f"not installed; it is for {purpose}", f"pip install 'pretrain[{extra}]'")
    try:
        import torch
    except Exception as error:  # missing, or a library that it needs
        yield Finding("torch", f"cannot be imported ({str(error).splitlines()[0]})", "pip install torch", bad=True)
        return
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    for check in (_memory, _gpu) if quick else (_memory, _gpu, _precision, _compiler):
        name = check.__name__[1:]
        try:
            yield Finding(name, *check())
        except Exception as error:  # such as a driver that fails: the other checks tell more
            yield Finding(name, "could not be examined", (str(error) or repr(error)).splitlines()[0])


def _memory() -> tuple[str, str]:
    import torch

    from pretrain.device import free_memory, total_memory

    cpu = torch.device("cpu")
    total = total_memory(cpu)
    free = min(free_memory(cpu), total)
    fix = "stop other programs; the smallest run takes about 1 GB" if free < 2e9 else ""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < 512e6:
        fix = "/dev/shm is too small for several processes; in a container: docker run --shm-size 8g"
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB", fix


def _gpu() -> tuple[str, str]:
    import torch

    if torch.backends.mps.is_available():
        return f"Apple's, with {torch.mps.recommended_max_memory() / 1e9:.0f} GB", ""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        old = min(each.major for each in gpus) < 7
        fix = "too old for torch.compile: use --train.compile off" if old else ""
        return "; ".join(f"{each.name}, {each.total_memory / 1e9:.0f} GB" for each in gpus), fix
    if NVIDIA.exists():
        fix = "install a newer NVIDIA driver" if torch.version.cuda else "pip install --force-reinstall torch"
        return "torch cannot use the NVIDIA GPU of this machine", fix
    return "none", "small models train on the CPU, larger ones take long"


def _precision() -> tuple[str, str]:
    from pretrain.device import DTYPES, choose_device, choose_precision, matmul_flops

    device = choose_device("auto")
    speeds = [f"{name} {matmul_flops(device, dtype, 0.2) / 1e9:,.0f} GFLOP/s" for name, dtype in DTYPES.items()]
    return f"{', '.join(speeds)} on {device.type}; training uses {choose_precision('auto', device).name}", ""


def _compiler() -> tuple[str, str]:
    from pretrain.device import choose_device
    from pretrain.training.parallel import compiler_problem

    if not (problem := compiler_problem(choose_device("auto"))):
        return "torch.compile works", ""
    fix = "install a C++ compiler and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev)"
    return f"torch.compile fails ({problem}); training on a GPU is slower without it", fix
