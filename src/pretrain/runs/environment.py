"""What a run was made on: ``environment.json``, one object for each time that training began or went on.

The first is kept and the newest. No host name and no environment variables: reports are shown to others.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from pretrain.device import cpu_name
from pretrain.io import cores, write_atomically

ENVIRONMENT = "environment.json"
STARTS = 100
PACKAGES = ("pretrain", "torch", "numpy", "tokenizers", "safetensors")


def write_environment(folder: Path, device: torch.device, **facts: Any) -> None:
    """Add what this process runs on, and further ``facts``, to ``environment.json``, if that can be written."""
    starts = [*read_environment(folder), environment(device) | facts]
    starts = starts if len(starts) <= STARTS else [starts[0], *starts[1 - STARTS :]]
    with suppress(OSError):  # a full disk is reported where it matters more
        write_atomically(folder / ENVIRONMENT, json.dumps(starts, indent=1) + "\n")


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """What :func:`write_environment` noted, the oldest start first; empty if nothing was, or it is damaged."""
    try:
        return msgspec.json.decode((folder / ENVIRONMENT).read_bytes(), type=list[dict[str, Any]])
    except (OSError, msgspec.MsgspecError):
        return []


def environment(device: torch.device) -> dict[str, Any]:
    """What this process is: its time and command, versions, and what it computes on."""
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["pretrain", *sys.argv[1:]] if Path(sys.argv[0]).stem in ("pretrain", "__main__") else sys.argv,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
        "commit": source_commit(),
        "device": str(device),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return facts


def source_commit() -> str:
    """The git commit of this package's source, with ``+`` if it was changed since; empty if it is not in a git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "run.py")  # installed into somebody's own checkout, it is not theirs
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return ""
