"""Copies checkpoints to ``checkpoint.copy_to`` from a thread of its own, so that no step ever waits for a bucket."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from pretrain.errors import CheckpointError, DataError
from pretrain.io import LONGEST_GRACE
from pretrain.runs.copy import RunCopy
from pretrain.training.callbacks import Callback

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

LONGEST_PAUSE = 60  # seconds between tries
SLOWEST = 1e7  # bytes per second that the end of a run waits for


class Copier(Callback):
    """Keeps a copy of a run: what fails is tried again until it works, with the checkpoint that is then the newest."""

    def __init__(self, copy: RunCopy):
        self.copy = copy
        self._asked = self._done = 0
        self._problem = ""  # of the last try
        self._ended, self._until = True, math.inf
        self._wake = threading.Event()

    def on_start(self, trainer: Trainer) -> None:
        """Begin, with what is not there yet, such as the run's tokens."""
        self.trainer, self._ended = trainer, False
        self.ask()
        threading.Thread(target=self._work, name="copy", daemon=True).start()

    def on_checkpoint(self, path: Path) -> None:
        """Copy it."""
        self.ask()

    def ask(self) -> None:
        """Let the run be copied as it is now."""
        self._asked += 1
        self._wake.set()

    def finish(self, seconds: float | None = None) -> None:
        """Let it be copied for the last time, in so many seconds; None: as many as a slow connection takes."""
        if self._ended:  # or has not begun
            return
        files = self.trainer.run.checkpoints.glob(f"step-{self.trainer.step:08d}/*")
        longest = max(LONGEST_GRACE, sum(file.stat().st_size for file in files) / SLOWEST)
        self._until = time.monotonic() + (longest if seconds is None else seconds)
        self.ask()

    def busy(self, seconds: float) -> bool:
        """Whether it is still being copied, after waiting so long."""
        if self._done == self._asked or self._ended or time.monotonic() > self._until:
            return False
        time.sleep(seconds)
        return True

    def close(self) -> str:
        """End; gives what is not copied and why, or nothing."""
        self.copy.closed = True
        self._wake.set()
        if self._done == self._asked:
            return ""
        there = max(self.copy.known, default=0)
        newest = f"the newest checkpoint there is of step {there:,}" if there else "there is no checkpoint there"
        return f"not all is copied ({self._problem or f'{self.copy.shown} is slow'}); {newest}"

    def _work(self) -> None:
        retrying = Retrying(
            retry=retry_if_exception_type(DataError),
            wait=wait_exponential(max=LONGEST_PAUSE) + wait_random(0, 1),
            sleep=self._sleep,
            before_sleep=self._failed,
            reraise=True,
        )
        try:
            while not self.copy.closed:
                if (asked := self._asked) == self._done:
                    self._sleep(None)
                    continue
                retrying(self.copy.send, self.trainer.run)
                if self._problem:
                    self._problem = ""
                    self.trainer.event("copied", f"copying to {self.copy.shown} works again")
                self._done = asked
        except CheckpointError as error:
            if not self.copy.closed:
                self._problem = str(error)
                self.trainer.event("copy_failed", self._problem)
        finally:
            self._ended = True

    def _sleep(self, seconds: float | None) -> None:
        self._wake.wait(seconds)  # what is new is a reason to try again at once
        self._wake.clear()

    def _failed(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        before, self._problem = self._problem, str(state.outcome.exception())
        if not before:
            self.trainer.event("copy_failed", f"copying failed: {self._problem}; training goes on, and so do the tries")
