"""How large a model is and what fits: parameters, operations, the numbers that the dial derives, the micro-batch.

The dial (``model.depth``) follows nanochat: one number from which width, heads, horizon, batch and rates follow. The
laws for batch, rates and decay were measured there against its 12-layer model (2026; see docs/recipes.md).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pretrain.config import Config, ModelConfig
from pretrain.errors import UsageError
from pretrain.model import meta_model
from pretrain.model.transformer import PLAIN_LIMIT, Linear, head_dim, layer_kinds, mlp_width, window_length

PARTS: tuple[str, ...] = (
    "embedding", "value_embeddings", "bigram_embedding", "attention", "mlp", "head", "other",
)  # fmt: skip
WIDTH_PER_LAYER, HEAD_DIMENSION, WINDOW_MULTIPLE = 64, 128, 128
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19
"""The model and the batch, in tokens, against which the dial's laws were measured."""

ENLARGING_FLOPS = 5e17
"""From here on, for each device, a larger micro-batch repays that the model is compiled again for it: half an hour at
3e14 FLOP a second, of which it saves some percent."""

ACTIVATIONS_PER_CHANNEL = 18
"""Values that a block keeps for its backward pass beside those of the MLP, for each token and channel: 10 (gpt2-124m)
to 18 (nanochat) measured. Compiled it keeps a few less (nanochat-d20 in all 20 instead of 24)."""


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters by part, one of :data:`PARTS`.

    Attention and MLP are the blocks' matrices; norms, biases, scalars, gates outside the blocks and learned positions
    are ``other``. A tied head counts as the embedding it shares.
    """
    model = meta_model(config, vocab_size)
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
        first, *rest = name.split(".")
        part = rest[1] if first == "blocks" and parameter.ndim >= 2 else first  # blocks.3.mlp.up.weight
        counts[part if part in PARTS else "other"] += parameter.numel()
    return counts


def matrices(counts: dict[str, int]) -> int:
    """Parameters of the blocks' matrices."""
    return counts["attention"] + counts["mlp"]


def multiplied(config: ModelConfig, counts: dict[str, int]) -> int:
    """Parameters that each token is multiplied with: the matrices of the blocks and the head."""
    return matrices(counts) + (counts["embedding"] if config.tied_head else counts["head"])


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Operations of a forward and backward pass for one token (PaLM, arXiv 2204.02311, appendix B).

    6 for each parameter of a matrix product, and 12 for each channel of queries and each token they see; of n-gram
    heads, which have no queries, 6 for each channel of the stream.
    """
    model = meta_model(config, vocab_size)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    channels = config.heads * head_dim(config)
    seen = sum(
        min(window_length(config), config.context_length) if kind == "S" else config.context_length
        for kind in layer_kinds(config)
    )
    ngrams = config.ngram_heads * config.width * config.context_length
    return 6 * products + 12 * channels * seen + 6 * ngrams


def resolve(config: Config, vocab_size: int, windows: int = 0) -> tuple[Config, list[str]]:
    """Fill in the fields that are left to be derived (0), for a vocabulary; also says what was derived, line by line.

    With ``model.depth``: layers, width, heads, window, and the batch with its rates. Always: the steps from the
    horizon, and what follows from them. What is not 0 stays, so any derived number can be overridden, and a resolved
    configuration resolves to itself. ``windows`` are those to train on in an epoch, which only ``train.epochs`` needs.

    Raises:
        UsageError: a derived number contradicts one that was given.
    """
    said: list[str] = []

    def derive(section: str, **fields: int | float) -> None:
        nonlocal config
        fields = {name: value for name, value in fields.items() if value != getattr(getattr(config, section), name)}
        try:
            part = dataclasses.replace(getattr(config, section), **fields)
            config = dataclasses.replace(config, **{section: part})
        except ValueError as error:
            raise UsageError(str(error)) from None
        said.extend(f"{section}.{name} = {value:.6g}" if isinstance(value, float) else f"{section}.{name} = {value:,}"
                    for name, value in fields.items() if value)  # fmt: skip

    if config.model.depth:
        shape = dial_shape(config.model.depth, config.model.width)
        shape = {name: value for name, value in shape.items() if not getattr(config.model, name)}
        # A run from before this law has its shape and window 0, and keeps both.
        if shape and "S" in config.model.window_pattern and not config.model.window:
            shape["window"] = WINDOW_MULTIPLE * math.ceil(config.model.context_length / 4 / WINDOW_MULTIPLE) + 1
        derive("model", **shape)
    epochs, length = config.train.epochs, config.model.context_length
    if not config.train.batch_tokens or (config.model.depth and config.optim.batch_scaling):
        horizon = max(1, epochs * windows * length) if epochs else horizon_tokens(config, config.model, vocab_size)
        reference = dataclasses.replace(config.model, kv_heads=0, **dial_shape(REFERENCE_DEPTH))
        reference_horizon = horizon_tokens(config, reference, vocab_size)
        # The best batch grows with the horizon to the power 0.383; the rates with the root of the batch.
        if not config.train.batch_tokens:
            batch = 2 ** round(math.log2(REFERENCE_BATCH * (horizon / reference_horizon) ** 0.383))
            derive("train", batch_tokens=max(batch, length))
        root = math.sqrt(config.train.batch_tokens / REFERENCE_BATCH)
        rates = ("lr", "embedding_lr", "value_embedding_lr", "bigram_lr", "head_lr", "scalar_lr")
        decay = config.optim.weight_decay * root * reference_horizon / horizon
        scaled = {name: getattr(config.optim, name) * root for name in rates}
        derive("optim", **scaled, weight_decay=decay, batch_scaling=False)
    if not config.train.steps:
        if epochs:
            steps = int(epochs * windows / config.batch_rows)
        elif config.train.target_flops:
            tokens = config.train.target_flops / flops_per_token(config.model, vocab_size)
            steps = round(tokens / config.train.batch_tokens)
        else:
            steps = horizon_tokens(config, config.model, vocab_size) // config.train.batch_tokens
        derive("train", steps=max(1, steps), epochs=0.0)
    if config.schedule.warmup_fraction:
        warmup = int(config.schedule.warmup_fraction * config.train.steps)
        derive("schedule", warmup_steps=warmup, warmup_fraction=0.0)
    if config.train.grad_clip_after_warmup and config.schedule.warmup_steps and not config.train.grad_clip_from:
        derive("train", grad_clip_from=config.schedule.warmup_steps)
    return config, said


def dial_shape(depth: int, width: int = 0) -> dict[str, int]:
    """Layers, width and heads of a depth, or of another width."""
    width = width or HEAD_DIMENSION * math.ceil(WIDTH_PER_LAYER * depth / HEAD_DIMENSION)
    return {"layers": depth, "width": width, "heads": max(1, math.ceil(width / HEAD_DIMENSION))}


def horizon_tokens(config: Config, model: ModelConfig, vocab_size: int) -> int:
    """Training tokens by ``train.tokens_per_parameter`` for a model."""
    counts = count_parameters(model, vocab_size)
    counted = multiplied(model, counts) if config.train.horizon_parameters == "matrices" else sum(counts.values())
    return int(config.train.tokens_per_parameter * counted)


def activation_bytes(config: Config, bytes_per_value: int, on_cpu: bool = False) -> int:
    """About how much memory the forward pass of one row of the context length keeps for its backward pass.

    On a CPU that is more: the weights of attention, a little more than half of each square.
    """
    model = config.model
    hidden = (4 if model.mlp == "swiglu" else 2) * mlp_width(model)
    if on_cpu and (model.context_length <= PLAIN_LIMIT or model.dropout):
        hidden += 0.6 * model.heads * model.context_length
    kept = (ACTIVATIONS_PER_CHANNEL * model.width + hidden) * (1.5 if model.dropout else 1.0)
    if config.train.activation_checkpointing:  # the input of each block, and one of them again
        kept = kept / model.layers + model.width
    ngrams = model.ngram_heads * (model.context_length + model.width)
    return int(model.context_length * (model.layers * kept + ngrams) * bytes_per_value)


def rows_that_fit(config: Config, bytes_per_value: int, free_bytes: int, on_cpu: bool = False) -> int:
    """The most rows of the batch, dividing it evenly, whose activations fit in 70 % of the free memory; at least 1."""
    return rows_up_to(config, int(0.7 * free_bytes / activation_bytes(config, bytes_per_value, on_cpu)))


def rows_measured(config: Config, rows: int, passes_bytes: int, free_bytes: int) -> int:
    """The most rows that a micro-batch of ``rows`` shows to fit in 85 % of the free memory, or ``rows``.

    Fewer than twice as many would not repay that they are compiled anew. ``passes_bytes`` are those that its passes
    took, 0 if that is not known; what of them does not grow with the rows counts as if it did.
    """
    fit = rows_up_to(config, int(0.85 * free_bytes * rows / passes_bytes)) if passes_bytes else rows
    return fit if fit >= 2 * rows else rows


def rows_up_to(config: Config, limit: int) -> int:
    """The largest micro-batch of at most ``limit`` rows that divides the batch; at least 1."""
    return next((n for n in range(min(limit, config.batch_rows), 0, -1) if config.batch_rows % n == 0), 1)


def parallelism_that_fits(parameters: int, free_bytes: int, processes: int, per_machine: int) -> str:
    """How processes share a model whose weights, gradients, two moments and work space take at most 60 % of a device.

    ``ddp`` if these fit whole; across machines ``hsdp`` if they fit divided by the processes of one; else ``fsdp``.
    """

    def fit(shards: int) -> bool:
        return 20 * parameters / shards < 0.6 * free_bytes

    machines, more = divmod(processes, per_machine)
    if fit(1):
        return "ddp"
    return "hsdp" if machines > 1 < per_machine and not more and fit(per_machine) else "fsdp"


@dataclass(frozen=True)
class Speed:
    """Seconds of the parts of a training on one device."""

    micro_step: float
    """Of a forward and backward pass of the micro-batch."""
    update: float
    """Of clipping and the optimizers, once a step."""
    evaluation: float
    """Of each token in validation."""
    sample: float = 0.0
    """Of each token that is sampled; 0: not measured."""

    def step(self, micro_steps: int) -> float:
        """Seconds of an optimizer step."""
        return micro_steps * self.micro_step + self.update


VALIDATION_TOKENS = 8192
"""Tokens in a validation batch at least: without a backward pass it may be larger than a micro-batch."""


def validation_rows(micro_rows: int, length: int) -> int:
    """Rows of a validation batch."""
    return max(micro_rows, VALIDATION_TOKENS // length)


def validated_tokens(config: Config, held_out: int) -> int:
    """Tokens that all validations of a run read, where there are ``held_out``."""
    settings = config.eval
    earlier = len(range(settings.offset or settings.every, config.train.steps, settings.every)) if settings.every else 0
    earlier += settings.at_start
    part = settings.tokens if held_out and settings.order == "random" else min(settings.tokens, held_out)
    last = held_out + (part if part != held_out else 0)
    return tokens_read(config, earlier * (part or held_out) + last) + (earlier + 1) * settings.train_tokens


def tokens_read(config: Config, counted: int) -> int:
    """Tokens in the windows, which may overlap, that count so many."""
    return round(counted * config.model.context_length / (config.eval.stride or config.model.context_length))
