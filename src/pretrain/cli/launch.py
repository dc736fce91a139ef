"""``pretrain train --nproc N``: the same command as N processes of this machine, ended as if it were one.

    this process: torchrun's agent  →  N × python -m pretrain train …  →  one exit code, and one line of what is wrong

What torchrun reads from its environment (``PET_NNODES``, ``PET_RDZV_ENDPOINT``, …) holds here too, so the same command
on several machines makes one run of them all (docs/cluster.md).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import Interrupted, PeerError, PretrainError, UsageError
from pretrain.io import signals_to_handle

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""What is passed on to the processes; SIGUSR1 is SLURM's warning."""

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""Which process of this machine this is."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first process of a machine say what is wrong with the command, since all were given the same."""
    try:
        yield
    except PretrainError as error:
        if LOCAL_RANK:
            raise PeerError(error.exit_code) from None
        raise


def is_process() -> bool:
    """Whether torchrun, or :func:`launch`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def machines_join() -> bool:
    """Whether the environment tells torchrun of other machines."""
    return any(name in os.environ for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"))


def count_processes(nproc: str, device: str) -> int:
    """How many processes ``--nproc`` asks for on this machine: a number, ``gpu``, or ``auto``.

    Raises:
        UsageError: the device is not there, or not so often.
    """
    import torch

    from pretrain.device import choose_device

    kind = choose_device(device).type
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if nproc == "gpu" and not gpus:
        raise UsageError("--nproc gpu, but torch sees no CUDA GPU to train on here; use --nproc auto, or a number")
    count = max(1, gpus) if nproc in ("gpu", "auto") else int(nproc)
    if gpus and count > gpus:
        raise UsageError(f"--nproc {count}, but there are {gpus} GPUs here; use --nproc gpu, or --train.device cpu")
    if kind == "mps" and count > 1:
        raise UsageError("several processes cannot share an Apple GPU; use --train.device cpu, or leave --nproc out")
    return count


def launch(arguments: list[str], count: int, grace_seconds: float, command: str) -> int:
    """Run ``python -m pretrain ARGUMENTS`` in ``count`` processes of this machine; give the exit code of them all.

    Args:
        arguments: of the command line.
        count: processes on this machine.
        grace_seconds: how long they may take to save and leave when asked to stop.
        command: what goes on with the run, for messages.

    Raises:
        PeerError: asked to stop (130); the processes have said what is saved.
        PretrainError: a process was killed, or the other machines did not come.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    passed_on = [signal.Signals(number).name for number in signals_to_handle(*SIGNALS)]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(passed_on))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(grace_seconds) + 10))
    # The processes share the cores; torchrun would give each only one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    options = [f"--nproc-per-node={count}"]
    if not machines_join():
        # The name of this machine may lead nowhere (laptops, containers); its loopback always does.
        options += ["--standalone", "--local-addr=localhost"]
        if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), ""):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    agent = parse_args([*options, "-m", "pretrain"])
    agent.training_script_args = arguments  # given with the others, --nproc would count as torchrun's
    if "LOGLEVEL" not in os.environ:  # torchrun's own: what it would report, the processes have said in a line
        logging.disable(logging.CRITICAL)
    try:
        run(agent)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        often = ", often the system's when memory runs out" if name == "SIGKILL" else ""
        raise PretrainError(
            f"process {failure.pid} (local rank {failure.local_rank}) was killed by {name}{often}; the others were"
            f" stopped; go on with: {command}"
        ) from None
    except SignalException:
        raise PeerError(Interrupted.exit_code) from None
    except RendezvousError as error:
        where = os.environ.get("PET_RDZV_ENDPOINT") or os.environ.get("PET_MASTER_ADDR", "")
        raise PretrainError(
            f"the machines did not find each other at {where} ({error}); are all started, with the same address and"
            f" number of machines, and is the port open between them?"
        ) from None
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
