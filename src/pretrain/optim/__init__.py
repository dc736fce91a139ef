"""The optimizer room: Muon, which parameter goes where, and schedules as functions of the step."""

from pretrain.optim.build import build_optimizers
from pretrain.optim.distributed import Replicated, RowSharded, alone
from pretrain.optim.muon import Muon
from pretrain.optim.schedule import learning_rate_factor, muon_momentum, weight_decay_factor

__all__ = [
    "Muon",
    "Replicated",
    "RowSharded",
    "alone",
    "build_optimizers",
    "learning_rate_factor",
    "muon_momentum",
    "weight_decay_factor",
]
