"""Run tasks here, or in worker processes of this machine.

    run_in_processes ── a thread for each ──> python process: serve() ──> function(*arguments, report)

A worker is a plain Python process that imports what its tasks need and nothing of the program that started it; tasks,
progress and results go through its standard input and output. It ends when its standard input does, so that no worker
outlives a parent that is killed. A worker that dies is replaced and its task tried once more.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pretrain.errors import PretrainError

Function = Callable[..., Any]
"""A function at the top of a module; its last argument is a function to tell of progress: (bytes, tokens) more."""
Told = Callable[[int, int, int], None]
"""Is told of progress: the number of the task, and how many more of its bytes and tokens are done."""

TRIES = 2

KEEP_FREED = {f"MALLOC_{name}_THRESHOLD_": str(2**26) for name in ("MMAP", "TRIM")}
"""For glibc: texts and tokens come and go by the megabyte, and to fetch their memory anew costs a tenth of the time."""


def run_here(function: Function, arguments: Sequence[tuple], told: Told) -> list[Any]:
    """The results of calls of ``function`` with each of ``arguments``, one after another in this process."""
    return [
        function(*each, lambda size, tokens, task=task: told(task, size, tokens)) for task, each in enumerate(arguments)
    ]


def run_in_processes(function: Function, arguments: Sequence[tuple], told: Told, workers: int) -> list[Any]:
    """The same results, from up to ``workers`` processes side by side.

    Raises what a task raises, a PretrainError if a task's process dies twice. However it ends, no worker is left.
    """
    pool = _Pool(function, arguments, min(workers, len(arguments)))
    results: dict[int, Any] = {}
    try:
        while len(results) < len(arguments):
            try:
                task, kind, value = pool.events.get(timeout=1)  # on Windows a wait without end cannot be interrupted
            except queue.Empty:
                continue
            if kind == "progress":
                told(task, *value)
            elif kind == "done":
                results[task] = value
            else:
                raise value
    finally:
        pool.stop()
    return [results[task] for task in range(len(arguments))]


class _Pool:
    """Threads that each keep a worker busy; what happens is put into ``events`` as (task, kind, value)."""

    def __init__(self, function: Function, arguments: Sequence[tuple], workers: int):
        self.events: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self._function, self._arguments = function, arguments
        self._todo = deque(range(len(arguments)))
        self._lock = threading.Lock()
        self._stopping = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        # The tokenizer's library has threads of its own; together they are as many as there are cores.
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._drivers = [threading.Thread(target=self._drive, daemon=True) for _ in range(workers)]
        for driver in self._drivers:
            driver.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.kill()
        for driver in self._drivers:
            driver.join()

    def _drive(self) -> None:
        try:
            self._work()
        except BaseException as error:  # what is not raised here would leave the main thread waiting
            self.events.put((0, "error", error))

    def _work(self) -> None:
        process = None
        while True:
            with self._lock:
                if not self._todo:
                    break
                task = self._todo.popleft()
            outcome: tuple[str, Any] | None = None
            for attempt in range(TRIES):
                process = process or self._start()
                if process is None:
                    return
                outcome = self._talk(process, task)
                if outcome is not None:
                    break
                self._retire(process)
                if attempt + 1 == TRIES:
                    outcome = "error", PretrainError(_died(process.returncode))
                process = None
            assert outcome is not None
            self.events.put((task, outcome[0], outcome[1]))
        if process is not None:
            self._retire(process)

    def _start(self) -> subprocess.Popen[bytes] | None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        threads = {"RAYON_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": str(self._threads > 1).lower()}
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"]
        with self._lock:
            if self._stopping:
                return None
            environment = {**KEEP_FREED, **os.environ, **threads, "PYTHONPATH": path}
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.add(process)
            return process

    def _talk(self, process: subprocess.Popen[bytes], task: int) -> tuple[str, Any] | None:
        """Have a task done; gives how it ended, or None if the process did."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((self._function, self._arguments[task]), process.stdin)
            process.stdin.flush()
            while True:
                kind, value = pickle.load(process.stdout)
                if kind != "progress":
                    return kind, value
                self.events.put((task, kind, value))
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    def _retire(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            self._processes.discard(process)
        with suppress(BrokenPipeError):
            process.stdin.close()  # at which it ends
        process.wait()
        process.stdout.close()


def _died(code: int) -> str:
    if code >= 0:
        return f"a worker process ended by itself, twice (exit code {code}); see its message above, if there is one"
    name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else f"signal {-code}"
    memory = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return (
        f"a worker process was ended by {name}{memory}, and again when tried once more; what is committed stays: "
        f"give the same command again, with fewer --workers if memory is short"
    )


def serve() -> None:
    """What a worker process does: the tasks that come, until no more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library may print must not get between our messages
    tasks: queue.SimpleQueue[tuple[Function, tuple]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                tasks.put(pickle.load(sys.stdin.buffer))
        except BaseException:  # the end, wherever it comes: the parent has closed it, or is dead
            os._exit(0)

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), out)
        out.flush()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        function, arguments = tasks.get()
        try:
            outcome = "done", function(*arguments, lambda *more: send("progress", more))
        except (PretrainError, OSError) as error:
            outcome = "error", error
        except Exception:
            outcome = "error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        send(*outcome)
