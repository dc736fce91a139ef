"""Run tasks on a Ray cluster: the one that RAY_ADDRESS or ``ray start`` names, else one of this machine alone.

Ray starts a task again whose process or machine is lost; it goes on from the task's last commit. The folder of the
shards and the text must be at the same path on every machine.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.errors import PretrainError, UsageError
from pretrain.tokens.source import Report

RETRIES = 3  # how often Ray may start a task again


@contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """Gives the module ``ray``, connected to a cluster; where none is found, one with ``workers`` cores begins here."""
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'pretrain[ray]'") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    ours, main = not ray.is_initialized(), threading.current_thread() is threading.main_thread()
    if ours:
        handler = signal.getsignal(signal.SIGTERM)
        if main and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)  # workers inherit it, and are cancelled by it
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        if main:
            signal.signal(signal.SIGTERM, handler)  # Ray puts one in its place that aborts
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def run_on_ray(
    function: Callable[..., Any], arguments: Sequence[tuple], report: Report, shared: Path, workers: int
) -> list[Any]:
    """The results of calls of ``function`` with each of ``arguments``, from tasks of one core each on a Ray cluster.

    ``report`` is called when a task is done. Every machine must see the file ``shared``. Where no cluster is found,
    one with ``workers`` cores is started here.
    """
    with cluster(workers) as ray:
        left: list[Any] = []
        try:
            remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_perform)
            place = os.getcwd(), str(shared.absolute())
            left = tasks = [remote.remote(function, each, *place) for each in arguments]
            while left:
                (ready,), left = ray.wait(left)
                outcome, size, tokens = ray.get(ready)
                if isinstance(outcome, Exception):
                    raise outcome
                report(size, tokens)
            return [ray.get(task)[0] for task in tasks]
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            resume = "to resume, repeat the command"
            raise PretrainError(f"Ray gave up after {RETRIES} retries ({reason}); {resume}") from None
        finally:
            for task in left:
                ray.cancel(task)


def _perform(function: Callable[..., Any], arguments: tuple, folder: str, shared: str) -> tuple[Any, int, int]:
    """Do a task: its result or what it raised, which Ray would wrap into an error of its own; the bytes and tokens."""
    reports: list[tuple[int, int]] = [(0, 0)]
    try:
        if not Path(shared).is_file():
            host = socket.gethostname()
            raise UsageError(f"{shared} is not on {host}: with --engine ray, --out must be on shared storage")
        if Path(folder).is_dir():
            os.chdir(folder)  # paths may be relative to where the command was given
        outcome = function(*arguments, lambda *more: reports.append(more))
    except (PretrainError, OSError) as error:
        outcome = error
    size, tokens = map(sum, zip(*reports, strict=True))
    return outcome, size, tokens
