"""The Transformer, its loss, and its cache for generation.

tokens (B, T)  →  transformer.GPT  →  loss.linear_cross_entropy  →  nats
"""

from pretrain.model.transformer import GPT, meta_model
