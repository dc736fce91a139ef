"""``pretrain doctor``: what this machine can do, what is missing, and the command that fixes it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from pretrain.cli.parsing import Command

OK, WARN, BAD = "ok", "warn", "bad"

NVIDIA = Path("/dev/nvidia0")
"""There if the system shows an NVIDIA GPU, whatever torch can do."""

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
    ("torchao", "fp8", "fp8 on Hopper and later GPUs"),
)
"""Optional packages, the extra that installs each, and what it is for."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """ok, warn (something is slower or not possible) or bad (training is impossible)."""
    text: str
    fix: str = ""


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
        for found in examine(self.quick):
            findings.append(found)
            if not self.json:
                print(f"{found.status:<5} {found.name:<13} {found.text}{found.fix and f'; {found.fix}'}", flush=True)
        if self.json:
            print(json.dumps({"findings": [asdict(found) for found in findings]}))
        return int(any(found.status == BAD for found in findings))


def examine(quick: bool) -> Iterator[Finding]:
    """All findings, each as soon as it is known."""
    text = f"{platform.python_version()} ({platform.system()} {platform.machine()}) at {sys.executable}"
    yield Finding("python", OK, text)
    yield _disk()
    for package, extra, purpose in EXTRAS:
        try:
            yield Finding(package, OK, f"{metadata.version(package)}, for {purpose}")
        except metadata.PackageNotFoundError:
            yield Finding(package, WARN, f"not installed; it is for {purpose}", f"pip install 'pretrain[{extra}]'")
    try:
        import torch

        from pretrain import device as machine
    except Exception as error:  # missing, or a library that it needs
        yield Finding("torch", BAD, f"cannot be imported ({str(error).splitlines()[0]})", "pip install torch")
        return
    yield Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads on {machine.cpu_name()}")
    total = machine.total_memory(torch.device("cpu"))
    free = min(machine.free_memory(torch.device("cpu")), total)
    text, fix = (
        f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB",
        "stop other programs; the smallest run takes about 1 GB",
    )
    yield _unless("memory", free > 2e9, text, fix)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        fix = "several processes need more; in a container: docker run --shm-size 8g"
        yield _unless("shared memory", free > 512e6, f"{free / 1e9:.1f} GB free in /dev/shm", fix)
    for check in (_gpu,) if quick else (_gpu, _precision, _compiler):
        try:
            yield check()
        except Exception as error:  # such as a driver that fails: the other checks tell more
            yield Finding(check.__name__[1:], WARN, f"could not be examined ({str(error).splitlines()[0]})")


def _unless(name: str, good: bool, text: str, fix: str) -> Finding:
    return Finding(name, OK, text) if good else Finding(name, WARN, text, fix)


def _disk() -> Finding:
    usage = shutil.disk_usage(".")
    text = f"{usage.free / 1e9:,.1f} GB free of {usage.total / 1e9:,.0f} GB in {Path.cwd()}"
    if not os.access(".", os.W_OK | os.X_OK):
        return Finding(
            "disk", BAD, f"{text}, which is not writable", "go to a folder of yours, or give train --out one"
        )
    if usage.free > 5e9:
        return Finding("disk", OK, text)
    fix = "free some space, or give train --out a folder elsewhere; a run takes 200 MB to many GB"
    return Finding("disk", WARN if usage.free > 200e6 else BAD, text, fix)


def _gpu() -> Finding:
    import torch

    if torch.backends.mps.is_available():
        return Finding("gpu", OK, f"Apple's, with {torch.mps.recommended_max_memory() / 1e9:.0f} GB")
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = "; ".join(
            f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, capability {gpu.major}.{gpu.minor}" for gpu in gpus
        )
        new = min(gpu.major for gpu in gpus) >= 7
        return _unless("gpu", new, text, "too old for torch.compile: use --train.compile off")
    if NVIDIA.exists():
        fix = "install a newer NVIDIA driver" if torch.version.cuda else "pip install --force-reinstall torch"
        return Finding("gpu", WARN, "torch cannot use the NVIDIA GPU of this machine", fix)
    return Finding("gpu", WARN, "none; small models train on the CPU, larger ones take long")


def _precision() -> Finding:
    from pretrain.device import DTYPES, choose_device, choose_precision, matmul_flops

    device = choose_device("auto")
    speeds = [f"{name} {matmul_flops(device, dtype, 0.2) / 1e9:,.0f} GFLOP/s" for name, dtype in DTYPES.items()]
    taken = choose_precision("auto", device).name
    return Finding("precision", OK, f"{', '.join(speeds)} on {device.type}; training uses {taken}")


def _compiler() -> Finding:
    from pretrain.device import choose_device
    from pretrain.training.parallel import compiler_problem

    if not (problem := compiler_problem(choose_device("auto"))):
        return Finding("compiler", OK, "torch.compile works")
    fix = "install a C++ compiler and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev)"
    return Finding("compiler", WARN, f"torch.compile fails ({problem}); training on a GPU is slower without it", fix)
