"""Checkpoints: all of a run's state at one step, written so that it exists whole or not at all.

    step-00000500.tmp/   tensors as safetensors (torch.distributed.checkpoint), state.json  →  synced, hashed
    step-00000500/       renamed
    step-00000500/COMMIT the hashes, written last: a checkpoint without it does not exist

Nothing is pickled, so loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
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
from pretrain.io import read_bounded, sha256_of, sync_file, sync_folder, write_atomically

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist says

SAVE_TIMEOUT = timedelta(hours=1)
ASSUMED_SPEED = 1e8
"""Bytes of a checkpoint written in a second, hashing included, before any was: a slow disk's."""
COMMIT = "COMMIT"
STATE = "state.json"
STATE_BYTES = 2**28
"""More than the plain values of any run take."""

LAST, AVERAGE = "last", "average"
"""The weights of a checkpoint as the last step left them, and their moving average (``optim.ema``)."""

AsDTensor = Callable[[str, Tensor], Tensor]
"""From a name and a tensor on the CPU to what torch.distributed.checkpoint must see; see ``Parameters.as_dtensor``."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """The plain values saved with the tensors."""
        return json.loads(read_bounded(self.folder / STATE, STATE_BYTES))

    def names(self) -> set[str]:
        """The names of its tensors."""
        return set(HuggingFaceStorageReader(str(self.folder)).read_metadata().state_dict_metadata)

    def load(self, tensors: Mapping[str, Tensor], as_dtensor: AsDTensor = lambda name, tensor: tensor) -> None:
        """Fill these tensors in place with the saved ones of the same names, whatever processes saved them.

        Names not asked for are left alone. ``as_dtensor`` says which part of the whole a tensor on the CPU is.
        """
        copies = {name: t if t.is_cpu else torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        parts = {name: as_dtensor(name, copy) for name, copy in copies.items()}
        load(parts, storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])

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
    rank = 0 if group is None else dist.get_rank(group)

    def on_rank0(work: Callable[[], None]) -> None:
        """Let rank 0 work while the others wait; its OSError is raised in all of them."""
        error: list[OSError | None] = [None]
        if rank == 0:
            try:
                work()
            except OSError as raised:
                error = [raised]
        if group is not None:
            dist.broadcast_object_list(error, src=0, group=group)
        if error[0] is not None:
            raise error[0]

    def prepare() -> None:
        remove(temporary)  # of a save that was cut off
        temporary.mkdir(parents=True)

    def commit() -> None:
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
        _commit(temporary, final)

    try:
        on_rank0(prepare)
        _write_tensors(temporary, tensors, group)
        on_rank0(commit)
    except BaseException:
        if rank == 0:
            remove(temporary)
            if not (final / COMMIT).exists():
                remove(final)
        raise
    return Checkpoint(final, step)


def _write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # it wraps what each process met
        raise next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error) from None


def _commit(temporary: Path, final: Path) -> None:
    """Make what lies in ``temporary`` last, then make it exist: hashes, rename, marker."""
    hashes = {}
    for file in sorted(temporary.iterdir()):
        sync_file(file)
        hashes[file.name] = sha256_of(file)
    remove(final)  # the same step, saved before
    temporary.rename(final)
    sync_folder(final.parent)
    write_atomically(final / COMMIT, json.dumps(hashes, indent=2) + "\n")


class CheckpointWriter:
    """Saves to ``folder`` in the background; with ``several`` processes, all of them save together.

    Training waits only while the tensors are copied, and for a save still under way.
    """

    def __init__(self, folder: Path, as_dtensor: AsDTensor = lambda name, tensor: tensor, several: bool = False):
        self.folder, self.as_dtensor = folder, as_dtensor
        # A group of its own, since the main thread may be talking through the others meanwhile.
        self.group: Any = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if several else None
        self._copies: dict[str, Tensor] = {}
        self._elsewhere: set[str] = set()
        self._bytes, self._seconds = 0, 0.0  # of all tensors here; of the last save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def allocate(self, tensors: Mapping[str, Tensor], same: bool = False) -> None:
        """Get the memory for copies of these tensors: to lock it takes long, and there may be little time to save.

        With ``same`` all processes have the same values (DDP), and each saves a part of the names. All call it.
        """
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._bytes = sum(sizes.values())
        if same and self.group is not None:
            everybody: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(everybody, sizes, group=self.group)
            self._elsewhere = sizes.keys() - shares(everybody)[dist.get_rank(self.group)]
        for name, tensor in tensors.items():
            if name not in self._elsewhere:
                self._copy_of(name, tensor)

    def _copy_of(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._copies:
            self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._copies[name]

    @property
    def seconds(self) -> float:
        """What a save takes, by the last one, or at 100 MB/s before the first; twice that while one is under way."""
        seconds = self._seconds or self._bytes / ASSUMED_SPEED
        return 2 * seconds if self._thread is not None and self._thread.is_alive() else seconds

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], after: Callable[[], None]) -> None:
        """Begin to save; ``after`` is called once it is committed. Raises as :meth:`wait` for the save before."""
        self.wait()
        begin = time.monotonic()
        for name, tensor in tensors.items():  # to memory that is used again each time
            if name not in self._elsewhere:
                self._copy_of(name, tensor).copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

        def work() -> None:
            try:
                parts = {name: self.as_dtensor(name, copy) for name, copy in self._copies.items()}
                save_checkpoint(self.folder, step, parts, state, self.group)
                self._seconds = time.monotonic() - begin
                after()
            except BaseException as error:  # raised again where somebody waits
                self._error = error

        # A daemon, so that a second Ctrl-C need not wait for it: what it leaves is not a checkpoint yet.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way. Raises the OSError that it met, once."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)  # in short waits, so that signals are heard
        error, self._error = self._error, None
        if error is not None:
            raise error


def shares(holdings: list[dict[str, int]]) -> list[set[str]]:
    """The names that each process saves, from the sizes of those that it has: as evenly as the largest first allows."""
    holders: dict[str, list[int]] = {}
    for rank, sizes in enumerate(holdings):
        for name in sizes:
            holders.setdefault(name, []).append(rank)
    size = {name: holdings[ranks[0]][name] for name, ranks in holders.items()}
    given, loads = [set[str]() for _ in holdings], [0] * len(holdings)
    for name in sorted(holders, key=lambda name: (-size[name], name)):
        rank = min(holders[name], key=loads.__getitem__)
        given[rank].add(name)
        loads[rank] += size[name]
    return given


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
        say(f"skipping damaged checkpoint {checkpoint.folder.name}: {problem}")
    if there:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again with another --out")
    return None


def name_in_checkpoint(parameter: str, weights: str) -> str:
    """The name of a parameter's tensor among the ``last`` weights or their ``average``."""
    return f"{'ema' if weights == AVERAGE else 'model'}.{parameter}"


def by_loss(there: Iterable[int], val_losses: Mapping[int, float]) -> list[int]:
    """The steps that were validated, the lowest loss first, of equal ones the earlier."""
    return sorted(val_losses.keys() & set(there), key=lambda step: (val_losses[step], step))


def lowest(folder: Path, val_losses: Mapping[int, float]) -> Checkpoint | None:
    """The intact checkpoint with the lowest validation loss, by step in ``val_losses``; None if none was validated."""
    there = {checkpoint.step: checkpoint for checkpoint in checkpoints(folder)}
    return next((there[step] for step in by_loss(there, val_losses) if not there[step].broken()), None)


def prune(folder: Path, config: CheckpointConfig, val_losses: Mapping[int, float]) -> None:
    """Remove the checkpoints that ``config`` does not keep; the newest always stays.

    ``val_losses`` are the validation losses by step, of which ``keep_best`` keeps the lowest that has a checkpoint.
    """
    there = {checkpoint.step: checkpoint for checkpoint in checkpoints(folder)}
    steps, every = list(there), config.keep_every
    regular = [step for step in steps if step not in config.at and not (every and step % every == 0)]
    keep = {*regular[-config.keep_last :], *steps[-1:]}  # keep_last 0 keeps all, as -0 is 0
    if config.keep_best:
        keep.update(by_loss(there, val_losses)[:1])
    for step in regular:
        if step not in keep:
            remove(there[step].folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint's folder, its marker first, so that half of one never counts."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
