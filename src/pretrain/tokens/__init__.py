"""Token shards on disk, the order in which they are read, and batches.

documents  →  prepare  →  shards + manifest  →  order (a function of the step)  →  batches (rows, T)

Nothing here imports torch before a batch is made, since the processes that tokenize do without it.
"""

from pretrain.tokens.datasets import (
    Corpus,
    Dataset,
    check_marked,
    check_undivided,
    is_tokens,
    open_corpus,
    prepared_dataset,
    training_order,
)
from pretrain.tokens.loader import Batches, BatchesAhead, TrainingBatches, validation_batches, window_batches
from pretrain.tokens.order import DataOrder, MixedOrder
from pretrain.tokens.origin import ORIGIN, Origin, difference, text_now, with_hashes
from pretrain.tokens.prepare import check_boundary, introduce, open_prepared, prepare
from pretrain.tokens.shards import Manifest
from pretrain.tokens.stream import LiveBatches, find_text, merge_states, prepare_stream
from pretrain.tokens.windows import TokenStream
