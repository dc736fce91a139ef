"""The processes that train together: who they are, how they agree, and which of them stopped responding.

torchrun starts them and sets their environment variables; a single process is a world of size 1 without communication.
Numbers of a step travel by the device's backend (NCCL on CUDA, gloo on the CPU); everything else (agreeing to stop,
the error of rank 0) by a gloo group of its own, ``control``; threads beside the main one by the store, since what a
group is asked must come in the same order in all processes.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import ParallelConfig
from pretrain.device import choose_device
from pretrain.errors import PeerError, PretrainError, TrainingError, UsageError
from pretrain.io import allow_open_files

T = TypeVar("T")

STRAGGLER_SECONDS = 5.0
"""A process without a heartbeat for this many seconds counts as gone; heartbeats come every second."""
COLLECT_SECONDS = 3600.0
"""How long rank 0 waits for the threads of other processes, which may be writing a large checkpoint to a slow disk."""


@dataclass(frozen=True)
class World:
    """A process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine."""
    control: dist.ProcessGroup | None = None
    """All processes, by gloo; None in a world of one."""
    store: dist.Store | None = None
    """Where each process leaves its heartbeat, and what its threads have to say."""
    clock_ahead: float = 0.0
    """Seconds by which this machine's clock is ahead of rank 0's."""

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that logs, saves and prepares."""
        return self.rank == 0

    def rows_per_rank(self, rows: int) -> int:
        """Rows of a global batch of ``rows`` for each process, rounded up: the last ranks may have to pad."""
        return -(-rows // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.control is not None:
            dist.all_reduce(tensor, group=self.control if tensor.is_cpu else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process: the same answer in all of them."""
        return flag if self.control is None else bool(self.sum(torch.tensor(int(flag))))

    def broadcast(self, value: T) -> T:
        """Rank 0's value, in every process."""
        values = [value]
        if self.control is not None:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process."""
        values: list[Any] = [value] * self.size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def collect(self, key: str, value: T) -> list[T]:
        """The values of all processes by rank on rank 0, elsewhere only its own: for threads beside the main one.

        Raises DistError after an hour.
        """
        if self.store is None or not self.is_rank0:
            if self.store is not None:
                self.store.set(f"{key}/{self.rank}", pickle.dumps(value))  # type: ignore[arg-type]
            return [value]
        values, deadline = [value], time.monotonic() + COLLECT_SECONDS
        for rank in range(1, self.size):
            name = f"{key}/{rank}"
            while not self.store.check([name]):  # to wait in the store would keep the heartbeats waiting
                if time.monotonic() > deadline:
                    raise dist.DistError(f"rank {rank} did not report ({key})")
                time.sleep(0.05)
            values.append(pickle.loads(self.store.get(name)))
            self.store.delete_key(name)
        return values

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 while the others wait; returns its result in every process.

        Raises on rank 0 whatever ``work`` raised, elsewhere PeerError, which says nothing more.
        """
        result, error, code = None, None, 0
        if self.is_rank0:
            try:
                result = work()
            except BaseException as raised:
                error, code = raised, raised.exit_code if isinstance(raised, PretrainError) else 1
        result, code = self.broadcast((result, code))
        if code:
            raise error or PeerError(code)
        return result  # type: ignore[return-value]

    def check_same_on_all_ranks(self, facts: dict[str, str]) -> None:
        """A UsageError that names the ranks and the fact, unless all processes have the same facts."""
        everybody = self.gather(facts)
        for name, value in everybody[0].items():
            different = {rank: theirs[name] for rank, theirs in enumerate(everybody) if theirs[name] != value}
            if different and not self.is_rank0:
                raise PeerError(UsageError.exit_code)  # rank 0 says it
            if different:
                rank, other = next(iter(different.items()))
                raise UsageError(
                    f"the processes disagree on {name}: rank 0 has {value}, rank {rank} has {other} (different from"
                    f" rank 0: {', '.join(map(str, different))}); start them all alike"
                )

    def set_timeout(self, seconds: float, groups: Sequence[dist.ProcessGroup]) -> None:
        """Wait so long from now on for processes that do not answer.

        ``groups`` are those that the model is sharded over.
        """
        if self.control is not None:
            set_timeout = dist.distributed_c10d._set_pg_timeout
            for group in {dist.group.WORLD, self.control, *groups}:
                set_timeout(timedelta(seconds=seconds), group)

    # Which of them stopped responding --------------------------------------------------------------------------------

    def publish_heartbeat(self, beat: dict[str, Any]) -> None:
        """Publish what this process is doing, for the others to read when they wait for it."""
        if self.store is not None:
            self.store.set(f"heartbeat/{self.rank}", json.dumps({**beat, "time": self.now()}))

    def now(self) -> float:
        """Seconds since 1970 by the clock of rank 0."""
        return time.time() - self.clock_ahead

    def is_reporter(self, stragglers: dict[int, str]) -> bool:
        """Whether this process reports for all: the first of those that are not ``stragglers``."""
        return self.rank == next((rank for rank in range(self.size) if rank not in stragglers), 0)

    def stragglers(self) -> dict[int, str]:
        """A description of each process that is silent or behind the others, by rank; empty if none is known."""
        if (store := self.store) is None:
            return {}
        found: list[dict[int, str]] = []
        # In a thread, since a machine that is cut off from the store would wait for it without end.
        asking = threading.Thread(target=lambda: found.append(self._stragglers(store)), daemon=True)
        asking.start()
        asking.join(STRAGGLER_SECONDS)
        # One rank that is not this one stands for all that cannot be reached.
        return found[0] if found else {int(self.is_rank0): "this machine cannot reach the others"}

    def _stragglers(self, store: dist.Store) -> dict[int, str]:
        unknown = {"step": 0, "beats": 0, "phase": "starting", "time": 0.0}
        keys = [f"heartbeat/{rank}" for rank in range(self.size)]
        beats = [unknown | (json.loads(store.get(key)) if store.check([key]) else {}) for key in keys]
        furthest = max(beat["beats"] for beat in beats)
        silent: dict[int, str] = {}
        for rank, beat in enumerate(beats):
            age = self.now() - beat["time"]
            if age > STRAGGLER_SECONDS or beat["beats"] < furthest:
                where = f" on {beat['host']}, process {beat['pid']}" if "host" in beat else ""
                heard = f"silent for {age:.0f} s, " if age > STRAGGLER_SECONDS and beat["time"] else ""
                silent[rank] = f"rank {rank}{where} ({heard}last seen {beat['phase']} after step {beat['step']})"
        return silent

    def connection_lost(self, error: Exception) -> PretrainError:
        """The error to leave with when other processes did not answer; one process alone names them."""
        deadline = time.monotonic() + STRAGGLER_SECONDS + 2
        while not (stragglers := self.stragglers()) and time.monotonic() < deadline:
            time.sleep(0.5)  # one that has just died is missed only after a while
        if not self.is_reporter(stragglers):
            return PeerError(1)
        names = "; ".join(stragglers.values()) or "it is not known which"
        return TrainingError(f"waiting for other processes failed: {names} ({str(error).splitlines()[0][:200]})")


class Later:
    """The number that a tensor is now, read when the device has come so far: the host waits for nothing after it."""

    def __init__(self, tensor: Tensor):
        self.copy, self.copied = tensor, None
        if tensor.is_cuda:
            self.copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> float:
        """The number."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.copy.item()


def say_open_files(rank: int, local: int, size: int) -> None:
    """Allow this process the open files that it may need; where they are too few, a process of each machine says so."""
    needed, before, now = allow_open_files(size)
    # What this process was given torchrun still has, which for rank 0's machine keeps the connections of all.
    limit = before if rank == 0 else now
    if local == 0 and limit < needed:
        print(
            f"pretrain: {size:,} processes may need {needed:,} open files on {platform.node()}, and {limit:,} are"
            f" allowed; if they cannot connect, start them after: ulimit -n {needed}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def join_world(device: str, config: ParallelConfig) -> Iterator[World]:
    """The world that torchrun describes in the environment, left again at the end; without torchrun this process alone.

    Raises:
        UsageError: the device is not available.
        PretrainError: the other processes did not join in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        yield World(chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "mps":
        raise UsageError("several processes cannot share an Apple GPU; use --train.device cpu, or one process")
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} are there);"
                f" start as many with --nproc-per-node as there are GPUs"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
        # What NCCL was doing when a collective hangs; read with torch's fr_trace.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    say_open_files(rank, local, size)
    backend, device_id = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
    timeout = timedelta(seconds=config.start_seconds)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        # After a restart by torchrun, what an earlier attempt left in its store does not count.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
        # Two processes are connected when they first talk, not each with each: hundreds of sockets otherwise.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise PretrainError(
            f"rank {rank} of {size} could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); are all machines started, with the same"
            f" --nnodes?"
        ) from None
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(chosen, rank, size, local_size, control, store.clone())  # type: ignore[arg-type,attr-defined]
    try:
        world.gather(None)  # connects all that ever talk, together with what follows, while all are surely there
        world.any(False)  # all read their clocks at the same time
        world = replace(world, clock_ahead=time.time() - world.broadcast(time.time()))
        world.publish_heartbeat({"step": 0, "phase": "starting", "host": platform.node(), "pid": os.getpid()})
        yield world
    except BaseException:
        if backend == "nccl":  # an orderly shutdown would wait for processes that may never answer
            dist.distributed_c10d._abort_process_group()
        raise
    else:
        dist.destroy_process_group()
        # gloo's threads drop the tensors of the last collectives, for which they need the GIL. One that waits for it
        # when the interpreter ends is killed, and the process with it ("terminate called without an active exception").
        time.sleep(0.1)
