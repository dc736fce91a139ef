"""Progress of work on data: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pretrain.io import duration

SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_UPDATES = 0.1  # of the live line


class Progress:
    """Shows how far the stages of some work are.

    Args:
        say: where lines go; nowhere by default.
        console: a rich.console.Console to show a live line on, if it is a terminal.

    Attributes:
        bytes, tokens, seconds: what the last stage did.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None, console: Any = None):
        self.say, self._console = say, console
        self._bar: Any = None
        self.bytes = self.tokens = 0
        self.seconds = 0.0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """While entered, show the progress of a stage over about ``total`` bytes of text."""
        self._name, self._total = name, max(1, total)
        self.bytes = self.tokens = 0
        self._began = self._said = time.monotonic()
        try:
            if self._console is None or not self._console.is_terminal:
                yield
            else:
                from rich import progress as rich

                numbers = rich.TextColumn("{task.fields[numbers]}")
                columns = (*rich.Progress.get_default_columns()[:3], numbers, rich.TimeRemainingColumn())
                with rich.Progress(*columns, console=self._console, transient=True) as self._bar:
                    self._bar.add_task(name, total=self._total, numbers="")
                    yield
        finally:
            self._bar = None
            self.seconds = time.monotonic() - self._began

    def add(self, size: int, tokens: int = 0) -> None:
        """So many more bytes and tokens are done."""
        self.bytes += size
        self.tokens += tokens
        now = time.monotonic()
        if now - self._said < (SECONDS_BETWEEN_UPDATES if self._bar else SECONDS_BETWEEN_LINES) or not self.bytes:
            return
        self._said, seconds = now, now - self._began
        numbers = f"{self.bytes / 1e6:,.0f} MB  {self.bytes / 1e6 / seconds:,.0f} MB/s"
        if self.tokens:
            numbers += f"  {self.tokens / 1e6:,.1f} M tokens"
        share = min(1.0, self.bytes / self._total)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=share * self._total, numbers=numbers)
        else:
            left = duration(seconds * (1 - share) / share)
            self.say(f"{self._name:<9} {share:.0%}  {numbers}  about {left} left")
