"""Checkpoints: all of a run's state at one step, written so that it exists whole or not at all.

    step-00000500.tmp/   tensors as safetensors (torch.distributed.checkpoint), state.json  →  synced, hashed
    step-00000500/       renamed
    step-00000500/COMMIT the hashes, written last: a checkpoint without it does not exist

Nothing is pickled, so loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

COMMIT = "COMMIT"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """The plain values saved beside the tensors."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors in place with the saved ones of the same names; names not asked for are left alone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)

    def broken(self) -> str:
        """What is wrong with the files, in a few words; empty if every byte is as it was written."""
        for name, digest in json.loads((self.folder / COMMIT).read_text(encoding="utf-8")).items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != digest:
                return f"{name} is not what was written"
        return ""


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Checkpoint:
    """Write and commit a checkpoint below ``folder`` (the run's ``checkpoints``)."""
    final = folder / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    for leftover in (temporary, final):  # of a save that was cut off, or of an equal one
        remove(leftover)
    temporary.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(dict(tensors), storage_writer=writer, no_dist=True)
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
    hashes = {}
    for file in sorted(temporary.iterdir()):
        _sync(file)
        hashes[file.name] = _sha256(file)
    temporary.rename(final)
    _sync(folder)
    marker = final / f"{COMMIT}.tmp"
    marker.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    _sync(marker)
    marker.rename(final / COMMIT)
    _sync(final)
    return Checkpoint(final, step)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All committed checkpoints, oldest first."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and (path / COMMIT).is_file()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that proves whole; those passed over are named through ``say``."""
    for checkpoint in reversed(checkpoints(folder)):
        problem = checkpoint.broken()
        if not problem:
            return checkpoint
        say(f"passing over damaged checkpoint {checkpoint.folder.name}: {problem}")
    return None


def retire(folder: Path, keep_last: int, keep: tuple[int, ...]) -> None:
    """Remove all but the last ``keep_last`` checkpoints (0: none) and those of the steps in ``keep``."""
    regular = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.step not in keep]
    for checkpoint in regular[:-keep_last] if keep_last else []:
        remove(checkpoint.folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint's folder, its marker first, so that half of one never counts."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def run_tensors(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], extra: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Every tensor of a run by name: ``model.NAME``, ``optim.NAME.KEY`` and ``extra``."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            tensors |= {f"optim.{names[parameter]}.{key}": value for key, value in values.items()}
    return tensors | extra


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Ask the disk to really have a file, or a folder's list of files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
