"""Run tasks in worker processes of this machine: a process pool whose workers never outlive their parent.

A worker is a new Python process that imports what its tasks need and nothing of the program that started it. A pool in
which a worker dies is started once more for the tasks that are left.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from types import ModuleType
from typing import Any

from pretrain.errors import PretrainError
from pretrain.io import cores
from pretrain.tokens.source import Report

TRIES = 2
POLL_SECONDS = 0.2  # between looks at the progress; on Windows a wait without end could not be interrupted

ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # a random.py in the working directory is not the standard library's
    # For glibc: texts and tokens come and go by the megabyte; to fetch their memory anew costs a tenth of the time.
    **{f"MALLOC_{name}_THRESHOLD_": str(2**26) for name in ("MMAP", "TRIM")},
}


def run_in_processes(
    function: Callable[..., Any], arguments: Sequence[tuple], report: Report, workers: int
) -> list[Any]:
    """The results of calls of ``function`` with each of ``arguments`` and a Report, from up to ``workers`` processes.

    The function is at the top of its module. Raises what a task raises, and a PretrainError if workers die twice and no
    task is done in between. However it ends, no worker is left.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    results: dict[int, Any] = {}
    deaths = 0  # since a task was done
    while todo := [task for task in range(len(arguments)) if task not in results]:
        side_by_side = min(workers, len(todo))
        # The tokenizer's library has threads of its own; together they are as many as there are cores.
        threads = max(1, cores() // side_by_side)
        reports = context.SimpleQueue()
        pool = ProcessPoolExecutor(side_by_side, context, _initialize, (reports, threads))
        others = set(multiprocessing.active_children())
        processes = set()
        try:
            with _starting_workers():
                try:
                    tasks = {pool.submit(_perform, function, arguments[task]): task for task in todo}
                finally:
                    processes = set(multiprocessing.active_children()) - others
            running = set(tasks)
            while running:
                done, running = wait(running, POLL_SECONDS, "FIRST_COMPLETED")
                while not reports.empty():
                    report(*reports.get())
                for future in done:
                    results[tasks[future]] = future.result()
                    deaths = 0
        except BrokenProcessPool:
            deaths += 1
            if deaths == TRIES:
                pool.shutdown()  # which ends the other workers, by SIGTERM
                raise PretrainError(
                    f"a worker process died, twice ({_death([process.exitcode for process in processes])}; the system"
                    f" sends SIGKILL when memory runs out); what is committed stays: give the same command again, with"
                    f" fewer --workers if memory is short"
                ) from None
        finally:
            for process in processes:
                process.kill()
            pool.shutdown(cancel_futures=True)
    return [results[task] for task in range(len(arguments))]


@contextmanager
def _starting_workers() -> Iterator[None]:
    """While entered, processes start with the environment of workers, ignoring Ctrl-C, and without our main module."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    # A spawned process imports the main module of its parent: a user's script without a main guard would run again.
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    os.environ.update(added)
    try:
        with _interrupts_later():
            yield
    finally:
        sys.modules["__main__"] = main
        for name in added:
            del os.environ[name]


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C in the body acts at its end, so that no process has begun that we do not know of.

    Ctrl-C goes to all processes of a terminal, and the parent decides: what is blocked here stays so in a child. Here a
    block is not enough: a thread of a library may take the signal, and then Python interrupts the main thread.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # one that waited comes now
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _death(codes: Sequence[int | None]) -> str:
    """How a worker died, by the exit codes of all; SIGTERM is how the pool ends the others."""
    code = next((code for code in codes if code not in (None, -signal.SIGTERM)), -signal.SIGTERM)
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


# In a worker ------------------------------------------------------------------------------------------------------

_reports: Any = None


def _initialize(reports: Any, threads: int) -> None:
    global _reports
    _reports = reports
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM=str(threads > 1).lower())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _perform(function: Callable[..., Any], arguments: tuple) -> Any:
    size = tokens = 0
    sent = 0.0

    def report(more_size: int, more_tokens: int) -> None:
        nonlocal size, tokens, sent
        size, tokens = size + more_size, tokens + more_tokens
        if time.monotonic() - sent >= POLL_SECONDS:
            _reports.put((size, tokens))
            size, tokens, sent = 0, 0, time.monotonic()

    try:
        return function(*arguments, report)
    finally:
        _reports.put((size, tokens))
