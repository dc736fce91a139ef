"""What a person sees of work on data: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Shows how far the stages of some work are.

    Args:
        say: where lines go; nowhere by default.
        live: a rich.console.Console to show a live line on, if it is a terminal.

    Attributes:
        bytes, tokens, seconds: what the last stage did.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None, live: Any = None):
        self.say = say
        self._console = live if live is not None and live.is_terminal else None
        self._bar: Any = None
        self._stage, self._total = "", 0
        self.bytes, self.tokens, self.seconds = 0, 0, 0.0
        self._began = self._said = time.monotonic()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """While entered, show the course of a stage that has about ``total`` bytes of text to go through."""
        self._stage, self._total = name, max(1, total)
        self.bytes, self.tokens, self.seconds = 0, 0, 0.0
        self._began = self._said = time.monotonic()
        try:
            if self._console is None:
                yield
            else:
                from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar

                columns = (
                    TextColumn(name),
                    BarColumn(),
                    TaskProgressColumn(),
                    TextColumn("{task.fields[numbers]}"),
                    TimeRemainingColumn(),
                )
                with Bar(*columns, console=self._console, transient=True, refresh_per_second=4) as self._bar:
                    self._bar.add_task("", total=self._total, numbers="")
                    yield
        finally:
            self._bar = None
            self.seconds = time.monotonic() - self._began

    def add(self, _task: int, size: int, tokens: int) -> None:
        """So many more bytes and tokens are done."""
        self.bytes += size
        self.tokens += tokens
        now = time.monotonic()
        self.seconds = now - self._began
        share = min(1.0, self.bytes / self._total)
        numbers = f"{self.bytes / 1e6:,.0f} MB  {self.bytes / 1e6 / max(self.seconds, 1e-9):,.0f} MB/s"
        if self.tokens:
            numbers += f"  {self.tokens / 1e6:,.1f} M tokens"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=share * self._total, numbers=numbers)
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = self.seconds * (1 - share) / max(share, 1e-9)
            self.say(f"{self._stage:<9} {share:.0%}  {numbers}  about {left / 60:,.0f} min left")
