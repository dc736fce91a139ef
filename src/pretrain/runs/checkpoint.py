"""Checkpoints: all of a run's state at one step, written so that it exists whole or not at all.

    step-00000500.tmp/   tensors as safetensors (torch.distributed.checkpoint), state.json  →  synced, hashed
    step-00000500/       renamed
    step-00000500/COMMIT the hashes, written last: a checkpoint without it does not exist

Nothing is pickled, so loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain.config import CheckpointConfig
from pretrain.errors import CheckpointError
from pretrain.io import read_bounded, sha256_of, sync_folder, write_atomically

SAVE_TIMEOUT = timedelta(hours=1)
COMMIT = "COMMIT"
STATE = "state.json"
STATE_BYTES = 2**28
"""More than the plain values of any run take."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """The plain values saved with the tensors."""
        return json.loads(read_bounded(self.folder / STATE, STATE_BYTES))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors in place with the saved ones of the same names; names not asked for are left alone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)

    def broken(self) -> str:
        """What is wrong with the files, in a few words; empty if every byte is as it was written."""
        try:
            hashes = dict(json.loads(read_bounded(self.folder / COMMIT, STATE_BYTES)))
        except (ValueError, TypeError):
            return f"{COMMIT} is not what was written"
        if STATE not in hashes:
            return f"{COMMIT} does not list {STATE}"
        for name, digest in hashes.items():
            file = self.folder / name
            if Path(name).name != name or not file.is_file():
                return f"{name} is missing"
            if sha256_of(file) != digest:
                return f"{name} is not what was written"
        return ""


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Checkpoint:
    """Write and commit a checkpoint below ``folder`` (the run's ``checkpoints``).

    With several processes each writes its part, through ``group``; rank 0 hashes and commits.

    Raises:
        OSError: it could not be written; nothing of it is left, and no other checkpoint was touched.
    """
    final = folder / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    first = group is None or dist.get_rank(group) == 0
    try:
        if first:
            for leftover in (temporary, final):  # of a save that was cut off, or of an equal one
                remove(leftover)
            temporary.mkdir(parents=True)
        if group is not None:
            dist.barrier(group)
        _write_tensors(temporary, tensors, group)
        if first:
            (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
            _commit(temporary, final)
        if group is not None:
            dist.barrier(group)
    except BaseException:
        if first:
            remove(temporary)
            if not (final / COMMIT).exists():
                remove(final)
        raise
    return Checkpoint(final, step)


def _write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by the next line's no_dist
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # it wraps what each process met
        for failure in error.failures.values():
            if isinstance(cause := failure[0], OSError):
                raise cause from None
        raise


def _commit(temporary: Path, final: Path) -> None:
    """Make what lies in ``temporary`` last, then make it exist: hashes, rename, marker."""
    hashes = {}
    for file in sorted(temporary.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        hashes[file.name] = sha256_of(file)
    temporary.rename(final)
    sync_folder(final.parent)
    write_atomically(final / COMMIT, json.dumps(hashes, indent=2) + "\n")


def load_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], as_dtensor: Callable[[str, Tensor], Tensor]
) -> None:
    """Fill the tensors of this process in place, whatever processes saved them.

    ``as_dtensor`` says which part of the whole a tensor is, see ``Parameters.as_dtensor``.
    """
    copies = {
        name: tensor if tensor.is_cpu else torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()
    }
    checkpoint.load({name: as_dtensor(name, copy) for name, copy in copies.items()})
    for name, tensor in tensors.items():
        tensor.copy_(copies[name])


class CheckpointWriter:
    """Saves in the background: training waits only while the tensors are copied, and for a save still under way.

    Args:
        folder: the run's ``checkpoints``.
        as_dtensor: from a name and a copy on the CPU to what is saved; see ``Parameters.as_dtensor``.
        several: whether several processes save together.
    """

    def __init__(
        self,
        folder: Path,
        as_dtensor: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
        several: bool = False,
    ):
        self.folder, self.as_dtensor = folder, as_dtensor
        # A group of its own, since the main thread may be talking through the others meanwhile.
        self.group: Any = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if several else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], after: Callable[[], None]) -> None:
        """Begin to save; ``after`` is called once it is committed. Raises as :meth:`wait` for the save before."""
        self.wait()
        self._copy(tensors)

        def work() -> None:
            try:
                whole = {name: self.as_dtensor(name, copy) for name, copy in self._copies.items()}
                save_checkpoint(self.folder, step, whole, state, self.group)
                after()
            except BaseException as error:  # raised again where somebody waits
                self._error = error

        # A daemon, so that a second Ctrl-C need not wait for it: what it leaves is not a checkpoint yet.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way. Raises the OSError that it met, once."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(0.1)  # in short waits, so that signals are heard
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Copy to memory of our own, used again each time, so that training may change the tensors meanwhile."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a floating-point tensor with a NaN or infinity in it; empty if there is none."""
    named = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in named.values()])
    if torch.isfinite(sums).all():  # one wait for the device; a sum is finite only if all of it is
        return ""
    return next((name for name, tensor in named.items() if not torch.isfinite(tensor).all()), "")


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All committed checkpoints, oldest first."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and (path / COMMIT).is_file()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, None if there is none at all; damaged ones that are skipped are named.

    Raises CheckpointError if all are damaged.
    """
    there = checkpoints(folder)
    for checkpoint in reversed(there):
        problem = checkpoint.broken()
        if not problem:
            return checkpoint
        say(f"passing over damaged checkpoint {checkpoint.folder.name}: {problem}")
    if there:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again with another --out")
    return None


def prune(folder: Path, config: CheckpointConfig, val_losses: Mapping[int, float]) -> None:
    """Remove the checkpoints that ``config`` does not keep; the newest always stays.

    ``val_losses`` are the validation losses by step, of which ``keep_best`` keeps the lowest that has a checkpoint.
    """
    there = checkpoints(folder)
    losses = [(val_losses[c.step], c.step) for c in there if c.step in val_losses] if config.keep_best else []
    keep = {*config.at, *(step for _, step in sorted(losses)[:1]), *(c.step for c in there[-1:])}
    regular = [
        c for c in there if c.step not in config.at and not (config.keep_every and c.step % config.keep_every == 0)
    ]
    for checkpoint in regular[: -config.keep_last] if config.keep_last else []:
        if checkpoint.step not in keep:
            remove(checkpoint.folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint's folder, its marker first, so that half of one never counts."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
