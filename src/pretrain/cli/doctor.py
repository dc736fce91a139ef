"""``pretrain doctor``: what this machine can do, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.cli.parsing import parse

OK, WARN, BAD = "ok", "warn", "bad"

MINIMUM_PYTHON = (3, 11)
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
"""Optional modules, the extra that installs each, and what it is for."""
REINSTALL = "pip install --force-reinstall torch"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """ok, warn (something is slower or not possible) or bad (training is impossible)."""
    text: str
    fix: str = ""


@dataclass
class DoctorArguments:
    """What this machine can do, what is missing, and the command that fixes it.

    Exits with 1 if something makes training impossible.
    """

    quick: bool = False
    """Leave out what takes seconds: the compiler, and the speed of each precision."""
    json: bool = False
    """Print one JSON object: a list of findings, each with name, status (ok, warn, bad), text and fix."""


def doctor(args: list[str]) -> int:
    """What this machine can do, what is missing, and the command that fixes it."""
    a = parse(DoctorArguments, args, "doctor")
    findings = []
    for found in examine(a.quick):
        findings.append(found)
        if not a.json:
            print(f"{found.status:<5} {found.name:<13} {'; '.join(filter(None, (found.text, found.fix)))}", flush=True)
    if a.json:
        print(json.dumps({"findings": [asdict(found) for found in findings]}))
    return int(any(found.status == BAD for found in findings))


def examine(quick: bool) -> Iterator[Finding]:
    """All findings, one after another."""
    text = f"{platform.python_version()} ({platform.system()} {platform.machine()}) at {sys.executable}"
    needed = f"pretrain needs Python {'.'.join(map(str, MINIMUM_PYTHON))} or newer"
    yield _finding("python", BAD if sys.version_info < MINIMUM_PYTHON else OK, text, needed)
    yield (torch_found := check_torch())
    checks = [check_disk, check_limits, check_extras]
    if torch_found.status != BAD:
        slow = [] if quick else [check_precision, check_compiler]
        checks = [check_devices, check_memory, *slow, check_distributed, *checks]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # one failing check must not hide the others
            name = check.__name__.removeprefix("check_")
            yield Finding(name, WARN, f"could not be examined ({(str(error) or type(error).__name__).splitlines()[0]})")


def _finding(name: str, status: str, text: str, fix: str) -> Finding:
    return Finding(name, status, text, "" if status == OK else fix)


def check_torch() -> Finding:
    """PyTorch, and what it was built for."""
    try:
        import torch
    except Exception as error:  # missing, or a library that it needs
        return Finding("torch", BAD, f"cannot be imported ({str(error).splitlines()[0]})", "pip install torch")
    cuda, rocm = torch.version.cuda, getattr(torch.version, "hip", None)
    text = f"{torch.__version__}, built for {f'ROCm {rocm}' if rocm else f'CUDA {cuda}' if cuda else 'CPU'}"
    if has_nvidia_gpu() and not torch.cuda.is_available():
        fix = "install a newer NVIDIA driver" if cuda else REINSTALL
        return Finding("torch", WARN, f"{text}; this machine has an NVIDIA GPU that it cannot use", fix)
    return Finding("torch", OK, text)


def has_nvidia_gpu() -> bool:
    """Whether the system shows one, whatever torch can do."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def check_devices() -> Iterator[Finding]:
    """Processor and GPUs."""
    import torch

    from pretrain.device import cpu_name, known_gpu

    yield Finding("cpu", OK, f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, capability {gpu.major}.{gpu.minor}"
        text += f", peak {known.tflops:g} TFLOP/s" if (known := known_gpu(gpu.name)) else ""
        fix = "too old for torch.compile: use --train.compile off"
        yield _finding(f"cuda:{index}", WARN if gpu.major < 7 else OK, text, fix)
    if torch.backends.mps.is_available():
        yield Finding("mps", OK, f"{torch.mps.recommended_max_memory() / 1e9:.0f} GB for the GPU")
    elif not torch.cuda.is_available():
        yield Finding("gpu", WARN, "none; small models train on the CPU, larger ones take long")


def check_memory() -> Iterator[Finding]:
    """Memory of the machine, or of its container."""
    import torch

    from pretrain.device import container_limit, free_memory, total_memory

    total = total_memory(torch.device("cpu"))
    free = min(free_memory(torch.device("cpu")), total)
    text = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    text += " (this container's limit)" if container_limit() == total else ""
    fix = "stop other programs; the smallest run takes about 1 GB"
    yield _finding("memory", WARN if free < 2e9 else OK, text, fix)


def check_precision() -> Iterator[Finding]:
    """The speed of matrix products in each precision, and which of them training uses."""
    from pretrain.device import DTYPES, choose_device, choose_precision, matmul_flops

    device = choose_device("auto")
    rates = []
    for name, dtype in DTYPES.items():
        try:
            rates.append(f"{name} {matmul_flops(device, dtype, 0.2) / 1e9:,.0f} GFLOP/s")
        except RuntimeError:
            rates.append(f"{name} not possible")
    taken = choose_precision("auto", device).name
    yield Finding("precision", OK, f"{', '.join(rates)} on {device.type}; training uses {taken}")


def check_compiler() -> Iterator[Finding]:
    """torch.compile, tried."""
    from pretrain.device import choose_device
    from pretrain.training.parallel import compiler_problem

    device = choose_device("auto")
    begin = time.perf_counter()
    if not (problem := compiler_problem(device)):
        took = time.perf_counter() - begin
        yield Finding("compiler", OK, f"torch.compile works ({took:.0f} s for the smallest program)")
        return
    fix = "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
    if not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        fix = "install a C++ compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)"
    without = "training is slower without it" if device.type == "cuda" else "on a CPU it is used only if asked for"
    yield Finding("compiler", WARN, f"torch.compile fails ({problem}); {without}", fix)


def check_distributed() -> Iterator[Finding]:
    """What several processes need: backends."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    backends = [name for name in ("gloo", "nccl") if dist.is_available() and getattr(dist, f"is_{name}_available")()]
    needed = "nccl" if gpus > 1 else "gloo"
    text = f"backends {', '.join(backends) or 'none'}"
    if needed not in backends:
        yield Finding("distributed", WARN, f"{text}; several processes need {needed}", REINSTALL)
    else:
        yield Finding("distributed", OK, text + (f"; {gpus} GPUs train together with: --nproc gpu" * (gpus > 1)))


def check_limits() -> Iterator[Finding]:
    """What several processes need: shared memory and open files."""
    if (shared := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shared).free
        fix = "several processes need more; in a container: docker run --shm-size 8g"
        yield _finding("shared memory", WARN if free < 512e6 else OK, f"{free / 1e9:.1f} GB free in /dev/shm", fix)
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        text = "no limit" if soft < 0 else f"at most {soft:,}"
        fix = f"ulimit -n {4096 if hard < 0 else min(4096, hard)}"
        yield _finding("open files", WARN if 0 < soft < 1024 else OK, text, fix)


def check_disk() -> Iterator[Finding]:
    """Space in the current folder."""
    here = Path.cwd()
    usage = shutil.disk_usage(here)
    status, text = OK, f"{usage.free / 1e9:,.1f} GB free of {usage.total / 1e9:,.0f} GB in {here}"
    fix = "free some space, or give train --out a folder elsewhere; the smallest run takes 200 MB"
    if not os.access(here, os.W_OK | os.X_OK):
        status, text, fix = BAD, f"{here} is not writable", "go to a folder of yours, or give train --out one"
    elif usage.free < 200e6:
        status = BAD
    elif usage.free < 5e9:
        status, fix = WARN, "checkpoints of larger models take gigabytes"
    yield _finding("disk", status, text, fix)


def check_extras() -> Iterator[Finding]:
    """Optional packages."""
    installed, missing = [], []
    for module, extra, purpose in EXTRAS:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            fix = f"pip install 'pretrain[{extra}]'"
            missing.append(Finding(module, WARN, f"not installed; it is for {purpose}", fix))
        else:
            try:
                installed.append(f"{module} {importlib.metadata.version(module)}")
            except importlib.metadata.PackageNotFoundError:
                installed.append(module)
    if installed:
        yield Finding("packages", OK, ", ".join(installed))
    yield from missing
