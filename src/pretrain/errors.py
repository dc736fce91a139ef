"""What a user can get wrong, each with its mend.

Every exception here carries one line for people: what is wrong, where, and how to mend it. The command line prints that
line on standard error and leaves with the exception's exit code; nothing else of the package is shown. An ``assert``
elsewhere states an invariant of our own, and its failure is our defect.
"""


class PretrainError(Exception):
    """A failure that a user can mend. Its text is the line to print; ``exit_code`` is what the process returns."""

    exit_code = 1


class UsageError(PretrainError):
    """The command or the configuration asked for something that cannot be (unknown field, impossible combination)."""

    exit_code = 2


class DataError(PretrainError):
    """The text or tokens given cannot be used: missing, empty, binary, too short, corrupt, of another vocabulary."""


class CheckpointError(PretrainError):
    """A run directory or checkpoint cannot be used: absent, torn, or of another configuration."""


class DeviceMemoryError(PretrainError):
    """Not even the smallest piece of work fits in the device's memory."""


class TrainingError(PretrainError):
    """Training cannot go on from here: its gradients are not finite any more, or its weights are not."""


class PeerError(PretrainError):
    """Another process failed and says why; this one only leaves, with the same exit code."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


class Interrupted(PretrainError):
    """The user or the system asked to stop; everything is saved. The text names the command that goes on."""

    exit_code = 130
