"""Training: ``start.train`` opens a run, ``setup`` builds it, ``loop`` repeats ``step``."""

from pretrain.training.callbacks import Callback
from pretrain.training.console import Console
from pretrain.training.start import train
