"""What listens to training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Callback:
    """What one's own code may do during training; override what is needed.

    Given to ``train(..., callbacks=[...])``. On several machines only the first process calls. What a callback raises
    ends training.
    """

    def on_step(self, record: dict[str, Any]) -> None:
        """After a step, with its line of metrics.jsonl; on a GPU some steps later, when the numbers are fetched."""

    def on_evaluation(self, record: dict[str, Any], sample: str | None) -> None:
        """After a validation, with the step's line and the text that was sampled, if any."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint was committed; called from the thread that wrote it."""
