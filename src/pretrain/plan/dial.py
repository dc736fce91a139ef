"""The numbers that a configuration leaves to be derived: the dial, and the steps from the horizon.

The dial (``model.depth``) follows nanochat: one number from which width, heads, horizon, batch and rates follow. The
laws for batch, rates and decay were measured there against its 12-layer model (2026; see docs/recipes.md).
"""

from __future__ import annotations

import dataclasses
import math

from pretrain.config import Config, ModelConfig
from pretrain.errors import UsageError
from pretrain.plan.count import count_parameters, flops_per_token, matrices

WIDTH_PER_LAYER, HEAD_WIDTH = 64, 128
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19
"""The model and the batch, in tokens, against which the dial's laws were measured."""


def resolve(config: Config, vocab_size: int) -> tuple[Config, list[str]]:
    """Fill in the fields that are left to be derived (0), for a vocabulary; also says what was derived, line by line.

    With ``model.depth``: layers, width, heads, and the batch with its rates. Always: the steps from the horizon. What
    is not 0 stays, so any derived number can be overridden, and a resolved configuration resolves to itself.

    Raises:
        UsageError: a derived number contradicts one that was given.
    """
    said: list[str] = []

    def derive(section: str, **fields: int | float) -> None:
        nonlocal config
        try:
            part = dataclasses.replace(getattr(config, section), **fields)
            config = dataclasses.replace(config, **{section: part})
        except ValueError as error:
            raise UsageError(str(error)) from None
        said.extend(f"{section}.{name} = {value:.6g}" if isinstance(value, float) else f"{section}.{name} = {value:,}"
                    for name, value in fields.items())  # fmt: skip

    if config.model.depth:
        shape = dial_shape(config.model)
        missing = {name: value for name, value in shape.items() if not getattr(config.model, name)}
        if missing:
            derive("model", **missing)
    if not config.train.batch_tokens:
        horizon = horizon_tokens(config, config.model, vocab_size)
        reference = dataclasses.replace(config.model, depth=REFERENCE_DEPTH, layers=0, width=0, heads=0, kv_heads=0)
        reference = dataclasses.replace(reference, **dial_shape(reference))
        reference_horizon = horizon_tokens(config, reference, vocab_size)
        # The best batch grows with the horizon to the power 0.383; the rates with the root of the batch.
        batch = 2 ** round(math.log2(REFERENCE_BATCH * (horizon / reference_horizon) ** 0.383))
        batch = max(batch, config.model.context_length)
        root = math.sqrt(batch / REFERENCE_BATCH)
        derive("train", batch_tokens=batch)
        rates = ("lr", "embedding_lr", "value_embedding_lr", "head_lr", "scalar_lr")
        decay = config.optim.weight_decay * root * reference_horizon / horizon
        derive("optim", **{name: getattr(config.optim, name) * root for name in rates}, weight_decay=decay)
    if not config.train.steps:
        if config.train.target_flops:
            tokens = config.train.target_flops / flops_per_token(config.model, vocab_size)
            steps = round(tokens / config.train.batch_tokens)
        else:
            steps = horizon_tokens(config, config.model, vocab_size) // config.train.batch_tokens
        derive("train", steps=max(1, steps))
    return config, said


def dial_shape(model: ModelConfig) -> dict[str, int]:
    """Layers, width and heads of a depth."""
    width = model.width or WIDTH_PER_LAYER * model.depth
    return {"layers": model.depth, "width": width, "heads": max(1, math.ceil(width / HEAD_WIDTH))}


def horizon_tokens(config: Config, model: ModelConfig, vocab_size: int) -> int:
    """Training tokens by ``train.tokens_per_parameter`` for a model."""
    counts = count_parameters(model, vocab_size)
    if config.train.horizon_parameters == "matrices":
        counted = matrices(counts) + (counts["embedding"] if model.tied_head else counts["head"])
    else:
        counted = sum(counts.values())
    return int(config.train.tokens_per_parameter * counted)
