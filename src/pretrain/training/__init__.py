"""The training room: the step, the loop, checkpoints, metrics and the run directory."""

from pretrain.training.console import Console
from pretrain.training.loggers import Callback
from pretrain.training.loop import Trainer, train
from pretrain.training.run import Run

__all__ = ["Callback", "Console", "Run", "Trainer", "train"]
