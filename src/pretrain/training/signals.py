"""Being asked to stop: the first SIGINT, SIGTERM or SIGUSR1 is remembered, the next one leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, ``requested`` says whether a signal asked the process to stop.

    SIGUSR1 is what SLURM can send ahead of its time limit. In a thread other than the main one, where Python cannot
    install handlers, it never says so.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
