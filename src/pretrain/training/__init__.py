"""Training: the step, the loop, and what surrounds them."""

from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.loop import Trainer, train

__all__ = ["Callback", "Console", "Trainer", "train"]
