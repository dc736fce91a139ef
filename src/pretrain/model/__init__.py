"""The model room: the Transformer and its loss.

tokens (B, T)  →  transformer.GPT  →  loss.linear_cross_entropy  →  nats
"""

from pretrain.model.transformer import GPT, KVCache

__all__ = ["GPT", "KVCache"]
