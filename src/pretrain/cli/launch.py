"""``pretrain train --nproc N``: the same command in N processes of this machine, which end as one would.

    this process: torchrun's agent  →  N × python -m pretrain train …  →  one exit code, one line of what is wrong

What torchrun reads from its environment (``PET_NNODES``, ``PET_RDZV_ENDPOINT``, …) works here too, so the same command
on several machines makes one run of them all (docs/cluster.md).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Iterator

from pretrain.errors import Interrupted, PeerError, PretrainError, UsageError
from pretrain.io import LONGEST_GRACE, allow_open_files, cores, signals_to_handle

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""Which process of this machine this is."""


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While entered, no garbage is looked for, nor later among what there is then.

    Importing torch makes a million objects and no garbage. Python would look for it among them several times until
    training begins, and again at its end: a second altogether.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def is_process() -> bool:
    """Whether torchrun, or :func:`launch`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def machines_join() -> bool:
    """Whether the environment tells torchrun of other machines."""
    return any(name in os.environ for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"))


def count_processes(nproc: str, device: str) -> int:
    """The number of processes that ``--nproc`` (a number, ``gpu`` or ``auto``) means on this machine.

    Raises UsageError if there are fewer such devices.
    """
    with importing():
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
    """Run ``python -m pretrain ARGUMENTS`` in ``count`` processes of this machine and give their exit code.

    When stopped by a signal they get ``grace_seconds`` to save and exit, or longer, as long as each of them finds that
    it needs (:meth:`Trainer.grace_seconds`). ``command`` is the one that resumes the run.

    Raises:
        PeerError: stopped by a signal (130); the processes have said what is saved.
        PretrainError: a process was killed, or the other machines did not come.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    # SIGUSR1 is SLURM's warning before its time limit.
    passed_on = signals_to_handle("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(signal.Signals(number).name for number in passed_on))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(max(grace_seconds, LONGEST_GRACE)) + 10))
    # The processes share the cores; torchrun would give each only one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    options = [f"--nproc-per-node={count}"]
    if not machines_join():
        # The name of this machine may lead nowhere (laptops, containers); its loopback always works.
        options += ["--standalone", "--local-addr=localhost"]
        if loopback := next((name for _, name in socket.if_nameindex() if name.startswith("lo")), ""):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    agent = parse_args([*options, "-m", "pretrain"])
    allow_open_files(count * int(str(agent.nnodes).rpartition(":")[2]))  # the processes inherit it
    agent.training_script_args = arguments  # given with the others, --nproc would count as torchrun's
    if "LOGLEVEL" not in os.environ:  # torchrun would report again what the processes have said in one line
        logging.disable(logging.CRITICAL)
    try:
        run(agent)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        often = ", often the system's when memory runs out" if name == "SIGKILL" else ""
        killed = f"process {failure.pid} (local rank {failure.local_rank}) was killed by {name}{often}"
        raise PretrainError(f"{killed}; the others were stopped; resume with: {command}") from None
    except SignalException:
        raise PeerError(Interrupted.exit_code) from None
    except RendezvousError as error:
        where = os.environ.get("PET_RDZV_ENDPOINT") or os.environ.get("PET_MASTER_ADDR", "")
        hint = "start all, with the same address and number of machines, and open the port between them"
        raise PretrainError(f"the machines did not find each other at {where} ({error}); {hint}") from None
    return 0
