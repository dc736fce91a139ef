"""Parameters, operations and bytes of a model, counted on the meta device, so that no memory is needed."""

from __future__ import annotations

import torch

from pretrain.config import Config, ModelConfig
from pretrain.model import GPT
from pretrain.model.transformer import Linear, layer_kinds, window_length

PARTS: tuple[str, ...] = ("embedding", "value_embeddings", "attention", "mlp", "head", "other")


def meta_model(config: ModelConfig, vocab_size: int) -> GPT:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return GPT(config, vocab_size)


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters by part: ``embedding``, ``value_embeddings``, ``attention``, ``mlp``, ``head`` and ``other``.

    Attention and MLP are the blocks' matrices; norms, biases, scalars, gates outside the blocks and learned positions
    are ``other``. A tied head counts as the embedding it shares.
    """
    model = meta_model(config, vocab_size)
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
        counts[_part(name, parameter)] += parameter.numel()
    return counts


def _part(name: str, parameter: torch.Tensor) -> str:
    first, *rest = name.split(".")
    if first == "blocks":
        return "other" if parameter.ndim < 2 else rest[1]  # blocks.3.mlp.up.weight
    return first if first in PARTS else "other"


def matrices(counts: dict[str, int]) -> int:
    """Parameters of the blocks' matrices: those that Muon updates."""
    return counts["attention"] + counts["mlp"]


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Operations of a forward and backward pass for one token (PaLM, arXiv 2204.02311, appendix B).

    6 for each parameter of a matrix product, and 12 for each channel of queries and each token they see.
    """
    model = meta_model(config, vocab_size)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    channels = config.heads * (config.head_width or config.width // config.heads)
    seen = sum(
        min(window_length(config), config.context_length) if kind == "S" else config.context_length
        for kind in layer_kinds(config)
    )
    return 6 * products + 12 * channels * seen


def moment_bytes(config: Config, counts: dict[str, int]) -> int:
    """Bytes of the optimizers' state: two moments in fp32 under AdamW, one under Muon."""
    total = sum(counts.values())
    by_muon = matrices(counts) if config.optim.kind == "muon" else 0
    return 8 * (total - by_muon) + 4 * by_muon
