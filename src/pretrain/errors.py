"""What a user can get wrong.

Every exception here carries one line for people: what is wrong, where, and how to fix it. The command line prints that
line on standard error and exits with the exception's code, without a traceback. An ``assert`` elsewhere states an
invariant of our own, and its failure is our bug.
"""

import difflib
from collections.abc import Collection


class PretrainError(Exception):
    """A failure that a user can fix. Its text is the line to print; ``exit_code`` is what the process returns."""

    exit_code = 1


class UsageError(PretrainError):
    """The command or the configuration asked for something impossible (unknown field, contradictory values)."""

    exit_code = 2


class DataError(PretrainError):
    """The text or tokens given cannot be used: missing, empty, binary, too short, corrupt, of another vocabulary."""


class CheckpointError(PretrainError):
    """A run directory or checkpoint cannot be used: absent, cut short, or of another configuration."""


class DeviceMemoryError(PretrainError):
    """The device is out of memory, and a smaller micro-batch cannot be tried here."""


class TrainingError(PretrainError):
    """Training cannot continue: values are not finite, or another process was lost."""


class PeerError(PretrainError):
    """Another process failed and says why; this one exits with the same code and no message."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


class Interrupted(PretrainError):
    """The user or the system asked to stop; everything is saved. The text names the command that resumes."""

    exit_code = 130


def did_you_mean(name: str, names: Collection[str], or_list: bool = True) -> str:
    """The end of a message about an unknown name: the nearest right one, or all of a few."""
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean '{near[0]}'?"
    return f"; there are {', '.join(names)}" if or_list and len(names) < 13 else ""
