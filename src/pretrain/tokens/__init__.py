"""The tokens room: token shards on disk, the order in which they are read, and batches.

documents  →  prepare  →  shards + manifest  →  order (a function of the step)  →  batches (rows, T)

Only batches need torch; their names are imported when first used, since the processes that tokenize do without it.
"""

from typing import TYPE_CHECKING, Any

from pretrain.tokens.datasets import Corpus, Dataset, is_tokens, open_corpus, prepared_dataset, training_order
from pretrain.tokens.live import LiveBatches, merge_states
from pretrain.tokens.live_text import find_text, prepare_stream
from pretrain.tokens.order import DataOrder, MixedOrder
from pretrain.tokens.prepare import Prepared, open_prepared, prepare
from pretrain.tokens.shards import Manifest
from pretrain.tokens.windows import TokenStream

if TYPE_CHECKING:
    from pretrain.model.loss import IGNORE
    from pretrain.tokens.loader import Batches, TrainingBatches, ahead, validation_batches

__all__ = [
    "IGNORE",
    "Batches",
    "Corpus",
    "DataOrder",
    "Dataset",
    "LiveBatches",
    "Manifest",
    "MixedOrder",
    "Prepared",
    "TokenStream",
    "TrainingBatches",
    "ahead",
    "find_text",
    "is_tokens",
    "merge_states",
    "open_corpus",
    "open_prepared",
    "prepare",
    "prepare_stream",
    "prepared_dataset",
    "training_order",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pretrain.tokens' has no attribute '{name}'")
    from pretrain.tokens import loader as batches

    return getattr(batches, name)
