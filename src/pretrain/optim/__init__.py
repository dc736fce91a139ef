"""Optimizers, one file each; the schedule of the learning rate; how processes share Muon's work."""

from pretrain.optim.build import build_optimizers, find_optimizer
from pretrain.optim.distributed import alone, replicated, row_sharded
from pretrain.optim.optimizer import Optimizer
from pretrain.optim.schedule import learning_rate_factor
