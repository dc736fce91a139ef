"""Being asked to stop: SIGINT, SIGTERM, SIGHUP (the terminal is gone) or SIGUSR1 (SLURM's warning before its limit).

first signal   →  requested; the loop leaves at its next check, with everything saved
second signal  →  leaves at once, if it comes later: torchrun and SLURM may send one request twice
grace over     →  leaves with the last checkpoint there is
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from pretrain.errors import Interrupted
from pretrain.io import signals_to_handle

TOGETHER = 1.0
"""Signals within this many seconds are one request."""


class Stopped(BaseException):
    """Raised where work is cut short because a signal asked to stop. Not an Exception: no handler swallows it."""


class StopRequest:
    """While entered, ``requested`` says whether a signal asked the process to stop; after ``grace`` it leaves.

    In a thread other than the main one, where Python cannot install handlers, it never says so.
    """

    def __init__(self, grace: Callable[[], float]):
        """``grace`` says, after the signal, how many seconds it may take to save, as far as is known by then."""
        self.requested = False
        self.grace = grace
        self._first = 0.0
        self._previous = {}
        self._ended = threading.Event()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # SIGINT even where it is ignored: a shell script starts its background jobs so, and they must still stop.
            for number in (signal.SIGINT, *signals_to_handle("SIGTERM", "SIGHUP", "SIGUSR1")):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def left(self) -> float:
        """Seconds left of the grace period; infinite before a signal."""
        return self._first + self.grace() - time.monotonic() if self.requested else math.inf

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            threading.Thread(target=self._leave, name="grace", daemon=True).start()
        elif time.monotonic() - self._first > TOGETHER:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        """The end of the grace period: whatever the main thread hangs in, nothing committed is lost."""
        while (left := self.left()) > 0:
            if self._ended.wait(left):
                return
        message = f"pretrain: not saved within {self.grace():g} s of the signal; the last checkpoint is safe"
        with suppress(OSError):  # nobody may be there to read it
            print(message, file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)
