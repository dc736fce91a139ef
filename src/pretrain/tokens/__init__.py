"""The tokens room: token shards on disk, the order in which they are read, and batches.

documents  →  prepare  →  shards + manifest  →  order (a function of the step)  →  batches (rows, T)
"""

from pretrain.tokens.batches import IGNORE, TrainingBatches, validation_batches
from pretrain.tokens.order import DataOrder
from pretrain.tokens.prepare import Prepared, open_prepared, prepare
from pretrain.tokens.shards import Manifest, TokenStream

__all__ = [
    "IGNORE",
    "DataOrder",
    "Manifest",
    "Prepared",
    "TokenStream",
    "TrainingBatches",
    "open_prepared",
    "prepare",
    "validation_batches",
]
