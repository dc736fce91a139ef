"""Watching a run from a thread of its own: a heartbeat on disk, and a word when nothing moves any more.

the loop: beat(step, phase)  →  heartbeat.json, at most once a second
→  no beat for long: hang.txt with every thread's stack, and a line that says where
"""

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
from typing import Any

from pretrain.config import GuardConfig

HEARTBEAT = "heartbeat.json"
STACKS = "hang.txt"
POLL = 1.0
"""Seconds between looks."""
SAVING = "saving"
"""The phase of waiting for a checkpoint to be written."""


class Watch:
    """While entered, keeps ``heartbeat.json`` fresh and tells of a hang.

    Args:
        folder: the run directory; None for processes that write nothing.
        config: when silence counts as a hang: ``hang_factor`` usual steps, and at least ``hang_seconds``.
        say: hears of a hang, in one line.
        publish: gets every heartbeat too, in a thread of its own: it may wait for another machine without end.
    """

    def __init__(
        self,
        folder: Path | None,
        config: GuardConfig,
        say: Callable[[str], None],
        publish: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.folder, self.config, self.say, self.publish = folder, config, say, publish
        self.step, self.phase = 0, "starting"
        self.beats = 0  # processes that do the same have as many
        self._last = time.monotonic()
        self._told = False
        self._steps: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self._end = threading.Event()
        self.patience = math.inf
        """Silence of so many seconds counts as a hang in any case, but while saving, which may take its time."""
        self._threads = [threading.Thread(target=self._work, name="watch", daemon=True)]
        if publish is not None:
            self._threads.append(threading.Thread(target=self._publish, name="signs of life", daemon=True))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(5)

    def beat(self, step: int, phase: str, seconds: float | None = None) -> None:
        """Something moved: ``step`` steps are done and ``phase`` begins; the last step took ``seconds``."""
        self.step, self.phase, self._last, self._told = step, phase, time.monotonic(), False
        self.beats += 1
        if seconds is not None:
            self._steps.append(seconds)

    def alive(self) -> None:
        """Something moved in the same phase."""
        self._last = time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds of silence that count as a hang."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        limit = max(self.config.hang_seconds, self.config.hang_factor * usual)
        return limit if self.phase == SAVING else min(limit, self.patience)

    def _publish(self) -> None:
        assert self.publish is not None
        while True:
            with contextlib.suppress(RuntimeError):  # when the process that keeps the words is gone
                self.publish(self._beat())
            if self._end.wait(POLL):
                break

    def _work(self) -> None:
        self._write()
        while not self._end.wait(min(POLL, self.config.hang_seconds / 4 or POLL)):
            self._write()
            silent = time.monotonic() - self._last
            if self.config.hang_seconds and silent > self.limit and not self._told:
                self._told = True
                self._tell(silent)
        self._write()

    def _tell(self, silent: float) -> None:
        text = f"no sign of life for {silent:.0f} s while {self.phase} after step {self.step}"
        if self.folder is not None:
            try:
                with (self.folder / STACKS).open("a", encoding="utf-8") as out:
                    out.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n")
                    out.flush()
                    faulthandler.dump_traceback(out, all_threads=True)
                text += f"; where every thread is stands in {self.folder / STACKS}"
            except OSError as error:
                text += f"; the threads' stacks could not be written ({error.strerror})"
        self.say(text)

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
        if self.folder is None:
            return
        temporary = self.folder / f"{HEARTBEAT}.tmp"
        with contextlib.suppress(OSError):  # a full disk must not end the run; it is told where it matters
            temporary.write_text(json.dumps(self._beat()) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / HEARTBEAT)
