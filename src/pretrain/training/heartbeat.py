"""Watching a run from a thread: a heartbeat on disk once a second, and in a hang the stacks of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import platform
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import GuardConfig
from pretrain.io import write_atomically
from pretrain.training.callbacks import Callback

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

HEARTBEAT = "heartbeat.json"
STACKS = "hang.txt"
POLL = 1.0
"""Seconds between looks."""
SAVING = "saving"
"""The phase of waiting for a checkpoint to be written."""


class Heartbeat(Callback):
    """While training, keeps ``heartbeat.json`` fresh and reports a hang.

    Args:
        folder: the run directory; None for processes that write nothing.
        config: when silence counts as a hang: ``hang_factor`` usual steps, and at least ``hang_seconds``.
        publish: also called with every heartbeat, in its own thread, since it may block on the network.
    """

    def __init__(
        self,
        folder: Path | None,
        config: GuardConfig,
        publish: Callable[[dict[str, Any]], None] | None = None,
        on_hang: Callable[[str], None] = lambda text: None,
    ):
        self.folder, self.config, self.publish, self.on_hang = folder, config, publish, on_hang
        self.step, self.phase = 0, "starting"
        self.beats = 0  # processes that do the same have as many
        self._last = time.monotonic()
        self._reported = False
        self._steps: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self._end = threading.Event()
        self.longest_silence = math.inf
        """Silence of this many seconds counts as a hang in any phase but saving, which may take longer."""
        self._threads = [threading.Thread(target=self._watch, name="heartbeat", daemon=True)]
        if publish is not None:
            self._threads.append(threading.Thread(target=self._publish, name="published heartbeat", daemon=True))

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(5)

    def on_start(self, trainer: Trainer) -> None:
        """Begin to watch."""
        self.on_hang = trainer.hang
        self.__enter__()

    def on_end(self, interrupted: bool) -> None:
        """The last heartbeat."""
        self.__exit__()

    def on_phase(self, step: int, phase: str, seconds: float | None = None) -> None:
        """Something moved; the same phase again is not counted, as processes may call it unequally often."""
        if (step, phase) != (self.step, self.phase):
            self.step, self.phase = step, phase
            self.beats += 1
        self._last, self._reported = time.monotonic(), False
        if seconds is not None:
            self._steps.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds of silence that count as a hang."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        limit = max(self.config.hang_seconds, self.config.hang_factor * usual)
        return limit if self.phase == SAVING else min(limit, self.longest_silence)

    def _publish(self) -> None:
        assert self.publish is not None
        while True:
            with contextlib.suppress(RuntimeError):  # when the process that keeps the heartbeats is gone
                self.publish(self._beat())
            if self._end.wait(POLL):
                break

    def _watch(self) -> None:
        self._write()
        while not self._end.wait(min(POLL, self.config.hang_seconds / 4 or POLL)):
            self._write()
            silent = time.monotonic() - self._last
            if self.config.hang_seconds and silent > self.limit and not self._reported:
                self._reported = True
                self._report(silent)
        self._write()

    def _report(self, silent: float) -> None:
        text = f"no progress for {silent:.0f} s while {self.phase} after step {self.step}"
        if self.folder is not None:
            try:
                with (self.folder / STACKS).open("a", encoding="utf-8") as out:
                    out.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n")
                    out.flush()
                    faulthandler.dump_traceback(out, all_threads=True)
                text += f"; the stack of every thread is in {self.folder / STACKS}"
            except OSError as error:
                text += f"; the threads' stacks could not be written ({error.strerror})"
        self.on_hang(text)

    def _beat(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "beats": self.beats,
            "phase": self.phase,
            "time": round(time.time(), 1),
            "silent_seconds": round(time.monotonic() - self._last, 1),
            "pid": os.getpid(),
            "host": platform.node(),
        }

    def _write(self) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the run; it is reported where it matters
                write_atomically(self.folder / HEARTBEAT, json.dumps(self._beat()) + "\n", sync=False)
