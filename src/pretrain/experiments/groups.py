"""Which runs a place on the command line means: a run directory, or a folder of run directories."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import UsageError
from pretrain.runs import Run


def runs_at(place: str | Path) -> list[Run]:
    """The run in ``place``, or those in the folders directly below it, by name. Raises UsageError if there is none."""
    folder = Path(place)
    if Run.exists(folder):
        return [Run.open(folder)]
    below = sorted(child for child in folder.iterdir() if Run.exists(child)) if folder.is_dir() else []
    if not below:
        raise UsageError(f"{place} is neither a run directory nor a folder of run directories")
    return [Run.open(child) for child in below]
