"""Watching a run from a thread: a heartbeat on disk once a second, and in a hang the stacks of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Config
from pretrain.io import write_atomically
from pretrain.runs.run import HEARTBEAT
from pretrain.training.callbacks import Callback
from pretrain.training.world import World

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

STACKS = "hang.txt"
SAVING = "saving"
"""The phase of waiting for a checkpoint to be written, which may take longer than any other."""
MEASURING = {"validating", "measuring CORE", "sampling"}
"""The phases in which processes wait for each other as long as at the start: some have more to do than others."""
WARNED_AFTER = 0.7
"""Stragglers are named after this fraction of the time that processes wait: at its end NCCL aborts the process before
Python can."""


class Heartbeat(Callback):
    """Keeps ``heartbeat.json`` in ``folder`` fresh on rank 0, tells the other processes, and reports a hang."""

    def __init__(self, folder: Path, config: Config, world: World):
        self.folder, self.config, self.world = folder, config, world
        self.step, self.phase = 0, "starting"
        self.beats = 0  # processes that do the same have as many
        self._last = time.monotonic()
        self._reported = False
        self._steps: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self._end = threading.Event()
        # Two threads, since telling the other processes may block on the network.
        work = (self._watch, self._publish) if world.size > 1 else (self._watch,)
        self._threads = [threading.Thread(target=each, name="heartbeat", daemon=True) for each in work]

    def on_start(self, trainer: Trainer) -> None:
        """Begin to watch."""
        self.trainer = trainer
        for thread in self._threads:
            thread.start()

    def on_end(self, interrupted: bool) -> None:
        """The last heartbeat."""
        self._end.set()
        for thread in self._threads:
            thread.join(5)

    def on_phase(self, step: int, phase: str, seconds: float | None = None) -> None:
        """Note progress; the same phase again is not counted, as processes may call it unequally often."""
        if (step, phase) != (self.step, self.phase):
            self.step, self.phase = step, phase
            self.beats += 1
        self._last, self._reported = time.monotonic(), False
        if seconds is not None:
            self._steps.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds of silence that count as a hang."""
        guard, usual = self.config.guard, statistics.median(self._steps or [0.0])
        limit = max(guard.hang_seconds, guard.hang_factor * usual)
        if self.world.size > 1 and self._steps and self.phase != SAVING:
            parallel = self.config.parallel
            long = self.phase in MEASURING or self.step == self.trainer.first  # compiles
            waits = parallel.start_seconds if long else parallel.timeout_seconds
            limit = min(limit, WARNED_AFTER * waits)
        return limit

    def _publish(self) -> None:
        while True:
            with contextlib.suppress(RuntimeError):  # when the process that keeps the heartbeats is gone
                self.world.publish_heartbeat(self._beat())
            if self._end.wait(1.0):
                break

    def _watch(self) -> None:
        hang_seconds = self.config.guard.hang_seconds
        self._write()
        while not self._end.wait(min(1.0, hang_seconds / 4 or 1.0)):
            self._write()
            silent = time.monotonic() - self._last
            if hang_seconds and silent > self.limit and not self._reported:
                self._reported = True
                self._report(f"no progress for {silent:.0f} s while {self.phase} after step {self.step}")
        self._write()

    def _report(self, text: str) -> None:
        """Write the stacks, and name the stragglers, from a process that is not one of them."""
        if self.world.is_rank0:
            with contextlib.suppress(OSError), (self.folder / STACKS).open("a", encoding="utf-8") as out:
                out.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
                text += f"; the stack of every thread is in {self.folder / STACKS}"
        stragglers = self.world.stragglers()
        text = "; ".join([text, *stragglers.values()])
        if self.world.is_rank0:
            self.trainer.event("hang", text)
        elif self.world.is_reporter(stragglers):
            print(f"pretrain: rank {self.world.rank}: {text}", file=sys.stderr, flush=True)

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
        if self.world.is_rank0:
            with contextlib.suppress(OSError):  # a full disk must not end the run; it is reported where it matters
                write_atomically(self.folder / HEARTBEAT, json.dumps(self._beat()) + "\n", sync=False)
