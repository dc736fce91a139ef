"""``pretrain doctor``: what this machine can do, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.cli.parsing import parse

OK, WARN, BAD = "ok", "warn", "bad"

LEAST_PYTHON = (3, 11)
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
"""Modules that are optional, the extra that brings each, and what it is for."""
DISK_TEST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Line:
    """One finding."""

    name: str
    status: str
    """ok, warn (something is slower or left out) or bad (training is impossible)."""
    text: str
    mend: str = ""


@dataclass
class DoctorArguments:
    """What this machine can do, what is missing, and the command that mends it.

    Leaves with 1 if something makes training impossible.
    """

    quick: bool = False
    """Leave out what takes seconds: the compiler, and the speeds of processor and disk."""
    json: bool = False
    """Print one JSON object: a list of findings, each with name, status (ok, warn, bad), text and mend."""


def doctor(args: list[str]) -> int:
    """What this machine can do, what is missing, and the command that mends it."""
    a = parse(DoctorArguments, args, "doctor")
    lines = []
    for line in examine(a.quick):
        lines.append(line)
        if not a.json:
            print(f"{line.status:<5} {line.name:<13} {line.text}" + (f"; {line.mend}" if line.mend else ""), flush=True)
    if a.json:
        print(json.dumps({"findings": [asdict(line) for line in lines]}))
    return int(any(line.status == BAD for line in lines))


def examine(quick: bool) -> Iterator[Line]:
    """All findings, one after another."""
    yield check_python()
    torch_line = check_torch()
    yield torch_line
    checks: list[Callable[[], Iterator[Line]]] = [check_memory]
    if torch_line.status != BAD:
        checks = [check_devices, check_memory, *([] if quick else [check_speed, check_compiler]), check_distributed]
    checks += [check_space] + ([] if quick else [check_disk]) + [check_limits, check_extras]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # one thing that cannot be told must not hide the others
            name = check.__name__.removeprefix("check_")
            yield Line(name, WARN, f"could not be examined ({(str(error) or type(error).__name__).splitlines()[0]})")


def check_python() -> Line:
    """The interpreter."""
    text = f"{platform.python_version()} ({platform.system()} {platform.machine()}) at {sys.executable}"
    if sys.version_info < LEAST_PYTHON:
        return Line("python", BAD, text, f"pretrain needs Python {'.'.join(map(str, LEAST_PYTHON))} or newer")
    return Line("python", OK, text)


def check_torch() -> Line:
    """PyTorch, and for what it was built."""
    try:
        import torch
    except Exception as error:  # missing, or a library that it needs
        return Line("torch", BAD, f"cannot be imported ({str(error).splitlines()[0]})", "pip install torch")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if getattr(torch.version, "hip", None):
        built = f"ROCm {torch.version.hip}"
    text = f"{torch.__version__}, built for {built}"
    if not torch.cuda.is_available() and has_nvidia_gpu():
        mend = "pip install --force-reinstall torch" if not torch.version.cuda else "install a newer NVIDIA driver"
        return Line("torch", WARN, f"{text}; this machine has an NVIDIA GPU that it cannot use", mend)
    return Line("torch", OK, text)


def has_nvidia_gpu() -> bool:
    """Whether the system shows one, whatever torch can do."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def check_devices() -> Iterator[Line]:
    """Processor and GPUs."""
    import torch

    from pretrain.device import cpu_name, known_gpu

    yield Line("cpu", OK, f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    driver = nvidia_driver() if torch.cuda.is_available() else ""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        known = known_gpu(properties.name)
        peak = f", peak {known.tflops:g} TFLOP/s" if known else ""
        text = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, capability {capability}{peak}{driver}"
        if properties.major < 7:
            yield Line(f"cuda:{index}", WARN, f"{text}; too old for torch.compile", "use --train.compile off")
        else:
            yield Line(f"cuda:{index}", OK, text)
    if torch.backends.mps.is_available():
        yield Line("mps", OK, f"{torch.mps.recommended_max_memory() / 1e9:.0f} GB for the GPU")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Line("gpu", WARN, "none; small models train on the CPU, larger ones take long")


def nvidia_driver() -> str:
    """The driver's version, for the end of a sentence; empty if it does not tell."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    version = result.stdout.splitlines()[:1]
    return f", driver {version[0].strip()}" if result.returncode == 0 and version else ""


def check_memory() -> Iterator[Line]:
    """Memory of the machine."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from pretrain.device import container_limit, free_memory, total_memory

    cpu = torch.device("cpu")
    free, total = free_memory(cpu), total_memory(cpu)
    text = f"{min(free, total) / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    text += " (this container's limit)" if container_limit() == total else ""
    if min(free, total) < 2e9:
        yield Line("memory", WARN, text, "stop other programs; the smallest run takes about 1 GB")
    else:
        yield Line("memory", OK, text)


def check_speed() -> Iterator[Line]:
    """Matrix products in each arithmetic, and which of them training would take."""
    from pretrain.device import DTYPES, choose_device, choose_precision, matmul_flops

    device = choose_device("auto")
    rates = []
    for name, dtype in DTYPES.items():
        try:
            rates.append(f"{name} {matmul_flops(device, dtype, 0.2) / 1e9:,.0f} GFLOP/s")
        except RuntimeError:
            rates.append(f"{name} not possible")
    taken = choose_precision("auto", device).name
    yield Line("precision", OK, f"{', '.join(rates)} on {device.type}; training takes {taken}")


def check_compiler() -> Iterator[Line]:
    """torch.compile, tried."""
    from pretrain.device import choose_device
    from pretrain.training.parallel import compiler_problem

    device = choose_device("auto")
    begin = time.perf_counter()
    problem = compiler_problem(device)
    if not problem:
        seconds = time.perf_counter() - begin
        yield Line("compiler", OK, f"torch.compile works ({seconds:.0f} s for the smallest program)")
        return
    without = "training is slower without it" if device.type == "cuda" else "on a CPU it is not used by itself"
    yield Line("compiler", WARN, f"torch.compile fails ({problem}); {without}", compiler_mend())


def compiler_mend() -> str:
    """The likeliest thing that is missing."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        return "install a C++ compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)"
    return "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"


def check_distributed() -> Iterator[Line]:
    """Backends for several processes."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Line("distributed", WARN, "this torch has no torch.distributed; one process trains", "pip install torch")
        return
    there = [name for name, test in (("gloo", dist.is_gloo_available), ("nccl", dist.is_nccl_available)) if test()]
    text = f"backends {', '.join(there) or 'none'}"
    if torch.cuda.device_count() > 1 and "nccl" not in there:
        yield Line("distributed", WARN, f"{text}; several GPUs need nccl", "pip install --force-reinstall torch")
    elif not there:
        yield Line("distributed", WARN, f"{text}; one process trains", "pip install --force-reinstall torch")
    else:
        many = torch.cuda.device_count()
        yield Line("distributed", OK, text + (f"; {many} GPUs train together with: --nproc gpu" if many > 1 else ""))


def check_space() -> Iterator[Line]:
    """Room in the current folder."""
    here = Path.cwd()
    if not os.access(here, os.W_OK | os.X_OK):
        yield Line("disk", BAD, f"{here} is not writable", "go to a folder of yours, or give train --out one")
        return
    usage = shutil.disk_usage(here)
    text = f"{usage.free / 1e9:,.1f} GB free of {usage.total / 1e9:,.0f} GB in {here}"
    if usage.free < 200e6:
        yield Line(
            "disk", BAD, text, "make room, or give train --out a folder elsewhere; the smallest run takes 200 MB"
        )
    elif usage.free < 5e9:
        yield Line("disk", WARN, text, "checkpoints of larger models take gigabytes")
    else:
        yield Line("disk", OK, text)


def check_disk() -> Iterator[Line]:
    """How fast the current folder is written, safely to the disk."""
    if shutil.disk_usage(Path.cwd()).free < 4 * DISK_TEST_BYTES:
        return
    data = os.urandom(1024 * 1024)
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        begin = time.perf_counter()
        for _ in range(DISK_TEST_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        rate = DISK_TEST_BYTES / (time.perf_counter() - begin)
    text = f"written at {rate / 1e6:,.0f} MB/s: a checkpoint of 100 million parameters in {1.2e9 / rate:.0f} s"
    yield Line("disk speed", OK if rate > 30e6 else WARN, text)


def check_limits() -> Iterator[Line]:
    """Shared memory and open files, which several processes need."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        text = f"{free / 1e9:.1f} GB free in /dev/shm"
        if free < 512e6:
            mend = "several processes need more; in a container: docker run --shm-size 8g"
            yield Line("shared memory", WARN, text, mend)
        else:
            yield Line("shared memory", OK, text)
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 < soft < 1024:
            yield Line("open files", WARN, f"at most {soft}", f"ulimit -n {4096 if hard < 0 else min(4096, hard)}")
        else:
            yield Line("open files", OK, "no limit" if soft < 0 else f"at most {soft:,}")


def check_extras() -> Iterator[Line]:
    """Packages that are not always needed."""
    there, missing = [], []
    for module, extra, purpose in EXTRAS:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            mend = f"pip install 'pretrain[{extra}]'"
            missing.append(Line(module, WARN, f"not installed; it is for {purpose}", mend))
        else:
            try:
                there.append(f"{module} {importlib.metadata.version(module)}")
            except importlib.metadata.PackageNotFoundError:
                there.append(module)
    if there:
        yield Line("packages", OK, ", ".join(there))
    yield from missing
