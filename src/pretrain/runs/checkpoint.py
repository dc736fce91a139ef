"""Checkpoints: all of a run's state at one step, written so that it exists whole or not at all.

    step-00000500.tmp/   a safetensors file of each process, state.json  →  synced, hashed
    step-00000500/       renamed
    step-00000500/COMMIT the hashes, written last: a checkpoint without it does not exist

A file holds parts of tensors, and where in the whole they begin: the format of torch.distributed.checkpoint's
HuggingFaceStorageWriter, which wrote older checkpoints. Nothing is pickled, so loading runs no code from a checkpoint.
"""

from __future__ import annotations

import json
import operator
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pretrain.config import CheckpointConfig
from pretrain.errors import CheckpointError, PeerError
from pretrain.io import read_bounded, sha256_of, sync_file, sync_folder, write_atomically

T = TypeVar("T")

ASSUMED_SPEED = 1e8
"""Bytes of a checkpoint written in a second, hashing included, before any was: a slow disk's."""
COMMIT = "COMMIT"
STATE = "state.json"
STATE_BYTES = 2**28
"""More than the plain values of any run take."""

BEGINS, BEGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""Where the parts in a file begin, by name, in its metadata."""

LAST, AVERAGE = "last", "average"
"""The weights of a checkpoint as the last step left them, and their moving average (``optim.ema``)."""


class Part(NamedTuple):
    """A part of a tensor: where in the whole it begins, and the shape of the whole."""

    begin: tuple[int, ...]
    whole: tuple[int, ...]


PartOf = Callable[[str, Tensor], Part]
"""From a name and this process's tensor to which part of the whole that is; see ``Parameters.part``."""


def all_of_it(name: str, tensor: Tensor) -> Part:
    """The part that is the whole."""
    return Part((0,) * tensor.ndim, tuple(tensor.shape))


class Piece(NamedTuple):
    """A part of a tensor in a file of a checkpoint, from ``begin`` to before ``end``."""

    file: str
    begin: tuple[int, ...]
    end: tuple[int, ...]


Index = dict[str, list[Piece]]
"""Where in the files of a checkpoint each tensor is."""


class Peers(Protocol):
    """The processes that save and load together, as each of them sees them; see ``World``."""

    @property
    def rank(self) -> int:
        """Which of them this is."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def gather(self, value: T, /) -> list[T]:
        """The values of all by rank, in every process."""
        ...

    def collect(self, key: str, value: T, /) -> list[T]:
        """The values of all by rank on rank 0, elsewhere only its own: for a thread beside the one that gathers."""
        ...


class Alone:
    """One process by itself."""

    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        """Its value."""
        return [value]

    def collect(self, key: str, value: T) -> list[T]:
        """Its value."""
        return [value]


ALONE = Alone()


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """The plain values saved with the tensors."""
        return json.loads(read_bounded(self.folder / STATE, STATE_BYTES))

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file, as its marker lists them."""
        return dict(json.loads(read_bounded(self.folder / COMMIT, STATE_BYTES)))

    def index(self, peers: Peers = ALONE) -> Index:
        """Where each tensor is. All ``peers`` call it, and each reads the headers of some files."""
        files = sorted(name for name in self.hashes() if name.endswith(".safetensors"))
        index: Index = {}
        for pieces in peers.gather([_header(self.folder, file) for file in files[peers.rank :: peers.size]]):
            for name, piece in (named for file in pieces for named in file.items()):
                index.setdefault(name, []).append(piece)
        return index

    def load(self, tensors: Mapping[str, Tensor], part: PartOf = all_of_it, index: Index | None = None) -> None:
        """Fill these tensors in place with the saved ones of the same names, whatever processes saved them.

        Names not asked for are left alone. ``part`` says which part of the whole a tensor is; ``index`` is that of
        :meth:`index`, where it is known. Raises CheckpointError for a tensor that is not there, or of another shape.
        """
        index = self.index() if index is None else index
        copies = {name: t if t.is_cpu else torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        wanted: dict[str, list[tuple[str, Box, Tensor]]] = {}  # by file, so that each is opened once
        for name, copy in copies.items():
            (begin, whole), pieces, found = part(name, copy), index.get(name, []), 0
            saved = tuple(max(ends) for ends in zip(*(piece.end for piece in pieces), strict=True))
            if not pieces or saved != whole:
                there = f"has the shape {saved}, not {whole}" if pieces else "is not there"
                raise CheckpointError(f"{self.folder} is of another model: {name} {there}")
            end = tuple(map(operator.add, begin, copy.shape))
            for piece in pieces:
                low, high = tuple(map(max, begin, piece.begin)), tuple(map(min, end, piece.end))
                if all(map(operator.lt, low, high)):
                    here = copy[_box(low, high, begin)]
                    wanted.setdefault(piece.file, []).append((name, _box(low, high, piece.begin), here))
                    found += here.numel()
            if found != copy.numel():
                raise CheckpointError(f"{self.folder} has {found:,} of {copy.numel():,} values of {name}")
        for file, parts in wanted.items():
            with safetensors.safe_open(self.folder / file, framework="pt") as opened:
                for name, box, here in parts:
                    here.copy_(opened.get_slice(name)[box])
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])

    def broken(self, peers: Peers = ALONE) -> str:
        """What is wrong with the files, in a few words; empty if every byte is as it was written.

        All ``peers`` call it, and each reads some of the files.
        """
        found = peers.gather(self._broken(peers.rank, peers.size))
        markers = {marker for marker, _ in found}
        return next(filter(None, (problem for _, problem in found)), "") or "COMMIT differs" * (len(markers) > 1)

    def _broken(self, rank: int, size: int) -> tuple[str, str]:
        """The hash of the marker, and what is wrong with the files that it gives to this of ``size`` processes."""
        name = COMMIT
        try:
            marker, hashes = sha256_of(self.folder / COMMIT), self.hashes()
            if STATE not in hashes:
                return marker, f"{COMMIT} does not list {STATE}"
            for name in sorted(hashes)[rank::size]:
                file = self.folder / name
                if Path(name).name != name or not file.is_file():
                    return marker, f"{name} is missing"
                if sha256_of(file) != hashes[name]:
                    return marker, f"{name} is not what was written"
        except OSError as error:
            return "", f"{name} cannot be read ({error.strerror})"
        except (ValueError, TypeError):
            return "", f"{COMMIT} is not what was written"
        return marker, ""


Box = tuple[slice, ...]


def _box(low: tuple[int, ...], high: tuple[int, ...], begin: tuple[int, ...]) -> Box:
    return tuple(slice(a - b, z - b) for a, z, b in zip(low, high, begin, strict=True))


def _header(folder: Path, file: str) -> dict[str, Piece]:
    """What a file holds, by name."""
    pieces = {}
    with safetensors.safe_open(folder / file, framework="pt") as opened:
        begins = json.loads((opened.metadata() or {}).get(BEGINS, "{}"))
        for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
            shape = opened.get_slice(name).get_shape()
            begin = tuple(begins[name][BEGIN]) if begins else (0,) * len(shape)
            pieces[name] = Piece(file, begin, tuple(map(operator.add, begin, shape)))
    return pieces


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    part: PartOf = all_of_it,
    peers: Peers = ALONE,
) -> Checkpoint:
    """Write and commit a checkpoint below ``folder`` (the run's ``checkpoints``).

    Each of several processes writes a file of its tensors and hashes it; rank 0 waits for all and commits, and only
    there does the checkpoint exist when this returns. No two of them give the same part of a tensor.

    Raises:
        OSError: on rank 0 where it could not be written, elsewhere where this process's file could not; nothing of it
            is left, and no other checkpoint was touched.
    """
    final = folder / f"step-{step:08d}"
    temporary = final.with_name(final.name + ".tmp")
    try:
        written: dict[str, str] | Exception
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            file = temporary / f"shard-{peers.rank + 1:05d}.safetensors"
            written = {file.name: _write_tensors(file, tensors, part)} if tensors else {}
        except Exception as error:
            written = error
        hashes: dict[str, str] = {}
        for each in peers.collect(f"saved/{step}", written):
            if isinstance(each, Exception):
                raise each
            hashes |= each
        if peers.rank == 0:
            _commit(temporary, final, {"step": step, **state}, hashes)
    except BaseException:
        if peers.rank == 0:
            remove(temporary)
            if not (final / COMMIT).exists():
                remove(final)
        raise
    return Checkpoint(final, step)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], part: PartOf) -> str:
    """Write a file of tensors that lasts; returns its hash."""
    begins = {name: {BEGIN: part(name, tensor).begin} for name, tensor in tensors.items()}
    metadata = {BEGINS: json.dumps(begins), "DCP_VERSION": "1.0", "format": "pt"}
    file.write_bytes(safetensors.torch.save(dict(tensors), metadata))
    sync_file(file)
    return sha256_of(file)


def _commit(temporary: Path, final: Path, state: dict[str, Any], hashes: dict[str, str]) -> None:
    """Make what lies in ``temporary`` exist: ``state.json``, rename, marker."""
    (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    sync_file(temporary / STATE)
    hashes = {**hashes, STATE: sha256_of(temporary / STATE)}
    for file in temporary.iterdir():
        if file.name not in hashes:  # of a save by more processes that was cut off
            file.unlink()
    remove(final)  # the same step, saved before
    temporary.rename(final)
    sync_folder(final.parent)
    write_atomically(final / COMMIT, json.dumps(hashes, indent=2) + "\n")


def copy_checkpoint(checkpoint: Checkpoint, folder: Path, state: dict[str, Any]) -> None:
    """Commit a copy of a checkpoint, of another run, below ``folder``, with other plain values.

    Raises CheckpointError if it is not there any more, or damaged.
    """
    final = folder / checkpoint.folder.name
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    try:
        hashes = {name: sha256 for name, sha256 in checkpoint.hashes().items() if name != STATE}
        for name, sha256 in hashes.items():
            shutil.copyfile(checkpoint.folder / name, temporary / name)
            sync_file(temporary / name)
            if sha256_of(temporary / name) != sha256:
                raise CheckpointError(f"{checkpoint.folder / name} is not what was written; use another step")
    except FileNotFoundError:
        keep = f"--checkpoint.at {checkpoint.step}"
        raise CheckpointError(
            f"{checkpoint.folder} was pruned meanwhile; use another step, or keep it with {keep}"
        ) from None
    _commit(temporary, final, state, hashes)


class CheckpointWriter:
    """Saves to ``folder`` in the background, together with ``peers``.

    Training waits only while the tensors are copied, and for a save still under way.
    """

    def __init__(self, folder: Path, part: PartOf = all_of_it, peers: Peers = ALONE):
        self.folder, self.part, self.peers = folder, part, peers
        self.took = 0.0
        """Seconds of the last save, on rank 0."""
        self._names: set[str] | None = None  # of all tensors here
        self._copies: dict[str, Tensor] = {}  # of those that this process saves
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def allocate(self, tensors: Mapping[str, Tensor]) -> None:
        """Get the memory for copies of these tensors: to lock it takes long, and there may be little time to save.

        What several processes have (the same part of the same name), one of them saves. All call it, once.
        """
        parts = {(name, self.part(name, tensor).begin): tensor.nbytes for name, tensor in tensors.items()}
        mine = {name for name, _ in shares(self.peers.gather(parts))[self.peers.rank]}
        self._names, self._bytes = set(tensors), sum(parts.values())
        self._copies = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            for name, tensor in tensors.items()
            if name in mine
        }

    @property
    def seconds(self) -> float:
        """What a save takes, by the last one, or at 100 MB/s before the first; twice that while one is under way."""
        seconds = self.took or self._bytes / ASSUMED_SPEED
        return 2 * seconds if self.busy() else seconds

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], after: Callable[[], None]) -> None:
        """Begin to save; rank 0 calls ``after`` once it is committed. Raises as :meth:`wait` for the save before."""
        self.wait()
        if self._names is None:
            self.allocate(tensors)
        assert tensors.keys() == self._names
        begin = time.monotonic()
        for name, copy in self._copies.items():  # memory that is used again each time
            copy.copy_(tensors[name].detach(), non_blocking=tensors[name].is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

        def work() -> None:
            try:
                save_checkpoint(self.folder, step, self._copies, state, self.part, self.peers)
                if self.peers.rank == 0:
                    self.took = time.monotonic() - begin
                    after()
            except BaseException as error:  # raised again where somebody waits
                self._error = error

        # A daemon, so that a second Ctrl-C need not wait for it: what it leaves is not a checkpoint yet.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def busy(self, seconds: float = 0.0) -> bool:
        """Whether a save is under way, after waiting so long for its end: in short waits signals are heard."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save under way. Raises the error that it met, once."""
        while self.busy(0.1):
            pass
        error, self._error = self._error, None
        if error is not None:
            raise error


def shares(holdings: list[dict[T, int]]) -> list[set[T]]:
    """What each process saves, from the sizes of what it has: as evenly as the largest first allows."""
    holders: dict[T, list[int]] = {}
    for rank, sizes in enumerate(holdings):
        for name in sizes:
            holders.setdefault(name, []).append(rank)
    given, loads = [set[T]() for _ in holdings], [0] * len(holdings)
    for name, ranks in sorted(holders.items(), key=lambda held: -holdings[held[1][0]][held[0]]):
        rank = min(ranks, key=loads.__getitem__)
        given[rank].add(name)
        loads[rank] += holdings[rank][name]
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


def newest(folder: Path, say: Callable[[str], None], peers: Peers = ALONE) -> Checkpoint | None:
    """The newest intact checkpoint, None if there is none at all; damaged ones that are skipped are named.

    All ``peers`` call it. Raises CheckpointError if all are damaged.
    """
    there = peers.gather(checkpoints(folder))[0]
    for checkpoint in reversed(there):
        problem = checkpoint.broken(peers)
        if not problem:
            return checkpoint
        say(f"skipping damaged checkpoint {checkpoint.folder.name}: {problem}")
    if there and peers.rank:
        raise PeerError(CheckpointError.exit_code)  # rank 0 says it
    if there:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again with another --out")
    return None


def name_in_checkpoint(parameter: str, weights: str) -> str:
    """The name of a parameter's tensor among the ``last`` weights or their ``average``."""
    return f"{'ema' if weights == AVERAGE else 'model'}.{parameter}"


def by_loss(there: Iterable[int], val_losses: Mapping[int, float]) -> list[int]:
    """The steps that were validated, the lowest loss first, of equal ones the earlier."""
    return sorted(val_losses.keys() & set(there), key=lambda step: (val_losses[step], step))


def lowest(folder: Path, val_losses: Mapping[int, float], peers: Peers = ALONE) -> Checkpoint | None:
    """The intact checkpoint with the lowest validation loss, by step in ``val_losses``; None if none was validated.

    All ``peers`` call it.
    """
    there = {checkpoint.step: checkpoint for checkpoint in peers.gather(checkpoints(folder))[0]}
    return next((there[step] for step in by_loss(there, val_losses) if not there[step].broken(peers)), None)


def prune(
    folder: Path, config: CheckpointConfig, val_losses: Mapping[int, float], held: Container[int | None] = ()
) -> None:
    """Remove the checkpoints that ``config`` does not keep, except those ``held``; see :func:`surplus`."""
    there = {checkpoint.step: checkpoint for checkpoint in checkpoints(folder)}
    for step in surplus(there, config, val_losses):
        if step not in held:
            remove(there[step].folder)


def surplus(there: Iterable[int], config: CheckpointConfig, val_losses: Mapping[int, float]) -> list[int]:
    """The steps, of those with a checkpoint, whose checkpoint ``config`` does not keep; never the newest.

    ``val_losses`` are the validation losses by step, of which ``keep_best`` keeps the lowest that has a checkpoint.
    """
    steps, every = sorted(there), config.keep_every
    regular = [step for step in steps if step not in config.at and not (every and step % every == 0)]
    keep = {*regular[-config.keep_last :], *steps[-1:]}  # keep_last 0 keeps all, as -0 is 0
    if config.keep_best:
        keep.update(by_loss(steps, val_losses)[:1])
    return [step for step in regular if step not in keep]


def remove(folder: Path) -> None:
    """Delete a checkpoint's folder, its marker first, so that half of one never counts."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
