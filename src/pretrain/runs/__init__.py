"""A run on disk: its directory, checkpoints, metrics, and what it ran on."""

from pretrain.runs.checkpoint import checkpoints
from pretrain.runs.run import Run
