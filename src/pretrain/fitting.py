"""Settings that fit the text and the machine: what ``fit.fields`` names is chosen here, once, and then written down.

    look_at_text ──> Text ──fit_text──> tokenizer, held-out share     before there are tokens
                     Text, Machine ──fit_model──> model, batch, rates, regularisation
                     Text, Speed, seconds ──fit_steps──> steps that fill the time, validations, checkpoints

The three are pure functions: a configuration in, another out, with lines that say what was chosen and why. A field that
``fit.fields`` does not name was given; it stays, and the others are chosen to go with it. The numbers of the rules are
in ``TIERS``, ``SHAPES`` and the constants beside them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import Config, DataConfig, FitConfig
from pretrain.errors import DataError, UsageError
from pretrain.io import duration
from pretrain.optim import find_optimizer
from pretrain.sizing import (
    Speed,
    activation_bytes,
    count_parameters,
    flops_per_token,
    resolve,
    rows_up_to,
    tokens_read,
    validated_tokens,
)
from pretrain.text import ReadStats
from pretrain.tokens.source import find_sides, read_sample

# The rules -----------------------------------------------------------------------------------------------------------

LEAST_BYTES = 2000
"""Of text to train on: with less there is nothing to learn from."""
HELD_OUT_BYTES, MOST_HELD_OUT = 4000, 0.2
"""Text held out at least, where that is not more than this share of all: less measures little."""
RARE_CHARACTERS = 0.2
"""From this share of characters that come only once on, characters are no tokens to learn."""
RARE_VOCABULARY = 320
"""The bpe in their place."""
HEAD_DIMENSION = 64
MEMORY_SHARE = 0.5
"""Of the free memory that training may take."""
SMALL_TEXT, SMALL_TEXT_MEMORY, PROCESS_BYTES = 10_000_000, 2_000_000_000, 500_000_000
"""Up to so many bytes of text, training on a CPU takes at most so much memory, of which the process itself so much."""
VALIDATIONS, CHECKPOINTS = 10, 5
"""How often a run validates, and saves."""
MOST_VALIDATION, EVALUATION_SHARE, FEWEST_VALIDATIONS = 0.1, 1 / 3, 3
"""It validates less often, but so often, where that would take more than this share of the time of training; a token in
validation takes this part of one in training."""
USUAL_SHAPE, TOKENS_PER_PARAMETER = 1, 0.3
"""The shape of quickstart; a larger one is taken while the time lets it see so many tokens for each parameter that is
multiplied, not looked up."""
DEFAULT_SECONDS = 120.0
"""Of training, for the choice of a model where no time is given."""
STEP_SECONDS = 0.0008
"""Of each step beside its computation: the batch, the metrics, the callbacks."""
CALIBRATIONS = 2
"""Other temperatures that a validation tries, where the best one is the last or the next to it."""
COMPILE_SECONDS = 90.0
"""Training on a CPU that lasts longer is compiled, which takes up to half a minute."""
END_SECONDS = 2.0
"""Of what follows the last step: the model read again, plot, report."""


@dataclass(frozen=True)
class Tier:
    """What suits texts of a size."""

    below: float
    """Bytes of text to train on."""
    vocabulary: int
    """Of a bpe; 0: characters."""
    shape: int
    """The largest of ``SHAPES``, by its place."""
    context: int
    dropout: float
    weight_decay: float
    bigram_rows: int
    ngram_heads: int = 3
    """Where tokens are more than characters."""
    steps: int = 0
    """From so many and :data:`MOST_PASSES` through the text on, more learn less. 0: no bound is known."""


SHAPES = ((3, 128), (4, 256), (6, 384), (8, 512), (10, 640), (12, 768))
"""Layers and width of models, from small to large."""
TIERS = (
    Tier(100_000, 0, 0, 256, 0.3, 0.5, 0, ngram_heads=6, steps=500),
    Tier(800_000, 1024, 1, 256, 0.2, 0.4, 16384, steps=400),
    Tier(2_500_000, 2048, 1, 256, 0.1, 0.3, 16384, steps=400),
    Tier(math.inf, 4096, 5, 256, 0.0, 0.0, 16384),
)
MOST_PASSES = 2
"""Through a text with a bound on its steps, where that is more steps than the bound."""
MANY_PASSES = 3
"""From so many on, a text without a bound on its steps is learned with the dropout and decay of one with."""
BATCH_TOKENS = 2048


# What they go by -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text as far as the rules go by it. Of token shards only the tokens are known, and the bytes if they tell."""

    bytes: int
    """Of all the text, both sides; about, where it is large."""
    rare_characters: float = 0.0
    """Share of the different characters of a sample that come only once in it."""
    vocab_size: int = 0
    """This and the tokens of each side: 0 before there are tokens."""
    train_tokens: int = 0
    val_tokens: int = 0
    test_tokens: int = 0


@dataclass(frozen=True)
class Machine:
    """What models a machine can train."""

    flops: Mapping[int, float]
    """FLOP per second of all processes together in training, by the width of the models that were measured."""
    memory: int
    """Bytes free for each process."""
    seconds: float
    """Left for training; 0: no time is given."""
    accelerated: bool = False
    """Whether it is not a CPU."""
    value_bytes: int = 4
    """Of an activation."""
    processes: int = 1

    def token_seconds(self, config: Config, vocab_size: int) -> float:
        """Seconds to train on a token; widths between those measured have speeds between theirs."""
        width, measured = config.model.width, sorted(self.flops.items())
        speed = measured[0][1] if width <= measured[0][0] else measured[-1][1]
        for (narrow, slower), (wide, faster) in itertools.pairwise(measured):
            if narrow < width <= wide:
                speed = slower + (faster - slower) * math.log(width / narrow) / math.log(wide / narrow)
        return flops_per_token(config.model, vocab_size) / speed


def look_at_text(data: DataConfig) -> Text:
    """Look at the text that ``data`` names: its size, and a sample of it.

    Raises DataError if it is missing or cannot be read.
    """
    sides = find_sides(data)
    stats = ReadStats()
    sample, read, whole = read_sample(sides.train, data.field, stats)
    characters: Counter[str] = Counter()
    for text in sample:
        characters.update(text)
    share = read / max(1, stats.size)
    size = read if whole else round(share * sum(piece.size for piece in sides.train))
    return Text(
        bytes=size + round(share * sum(piece.size for piece in [*sides.val, *sides.test])),
        rare_characters=sum(n == 1 for n in characters.values()) / max(1, len(characters)),
    )


# What they choose ----------------------------------------------------------------------------------------------------


def fit_text(config: Config, text: Text) -> tuple[Config, list[str]]:
    """Choose the tokenizer and the held-out share. Raises DataError if the text is too little for any to be chosen."""
    if text.bytes < LEAST_BYTES and "tokenizer.kind" in config.fit.fields:
        raise DataError(
            f"the text has {text.bytes:,} bytes, too few to learn from; give {LEAST_BYTES:,} or more with --data.paths"
        )
    tier = tier_of(text)
    characters = not tier.vocabulary and "tokenizer.vocab_size" in config.fit.fields  # a given one is of a bpe
    held_out = max(0.05, round(min(MOST_HELD_OUT, HELD_OUT_BYTES / max(1, text.bytes)), 3))
    kind, vocabulary = "char" if characters else "bpe", tier.vocabulary or RARE_VOCABULARY
    why = f"the text has {text.bytes:,} bytes"
    if characters and (text.rare_characters > RARE_CHARACTERS or config.data.stream):
        kind = "bpe"
        why += " of which a stream does not know all characters" if config.data.stream else ", many characters once"
    values = {"data.val_fraction": held_out, "tokenizer.kind": kind, "tokenizer.vocab_size": vocabulary}
    config, said = _chosen(config, values), list[str]()
    if "tokenizer.kind" in config.fit.fields or "tokenizer.vocab_size" in config.fit.fields:
        of = {"char": "characters", "bpe": f"up to {config.tokenizer.vocab_size:,} tokens"}.get(config.tokenizer.kind)
        said += [f"vocabulary of {of}: {why}"] if of else []
    if "data.val_fraction" in config.fit.fields and held_out > 0.05 and not config.data.val_paths:
        said.append(f"{held_out:.0%} of the text held out, as less of a small text measures little")
    return config, said


def fit_model(config: Config, text: Text, machine: Machine) -> tuple[Config, list[str]]:
    """Choose the model, batch, rates and regularisation."""
    tier = tier_of(text)
    context = tier.context
    for tokens in (text.train_tokens, text.val_tokens, text.test_tokens):
        while tokens and context >= tokens and context > 8:
            context //= 2
    if "model.context_length" in config.fit.fields and "train.batch_tokens" not in config.fit.fields:
        context = max(n for n in range(1, context + 1) if config.train.batch_tokens % n == 0)
    config = _chosen(
        config,
        {
            "model.context_length": context,
            "model.dropout": tier.dropout,
            "model.head_gates": True,
            "model.ngram_heads": 0 if config.tokenizer.kind == "char" else tier.ngram_heads,
            "model.value_embeddings": tier.bigram_rows > 0,
            "model.bigram_rows": tier.bigram_rows,
            "optim.weight_decay": tier.weight_decay,
        },
    )
    length = config.model.context_length
    rows = max(1, round(BATCH_TOKENS / length / max(1, config.train.micro_batch))) * max(1, config.train.micro_batch)
    config = _chosen(config, {"train.batch_tokens": rows * length})

    def sized(config: Config) -> Config:
        return resolve(with_steps(config, 1), text.vocab_size)[0]  # with a shape, where the dial has still to make it

    overfits = tier.dropout > 0
    config = _chosen(
        config,
        {
            "eval.calibrate": overfits and not config.model.tied_head,
            "eval.stride": math.ceil(length / 2) if config.eval.order == "sequential" else 0,
        },
    )
    limit, seconds = memory_limit(text, machine), machine.seconds or DEFAULT_SECONDS
    chosen, why = _shaped(config, *SHAPES[0]), "the smallest"
    for number, shape in enumerate(SHAPES[: tier.shape + 1]):
        candidate = sized(_shaped(config, *shape))
        tokens = seconds / machine.token_seconds(candidate, text.vocab_size)
        wanted = TOKENS_PER_PARAMETER * flops_per_token(candidate.model, text.vocab_size) / 6
        if number > USUAL_SHAPE and tokens < wanted:
            why = "a larger one would see too little in this time"
            break
        if memory_needed(candidate, text.vocab_size, 1, machine) > limit:
            why = "a larger one would take too much memory"
            break
        chosen, why = _shaped(config, *shape), "as large as suits the text"
    config, rows = chosen, -(-chosen.batch_rows // machine.processes)
    token_seconds = machine.token_seconds(sized(config), text.vocab_size)
    seen = config.train.steps * config.train.batch_tokens or seconds / token_seconds
    if enough := steps_enough(config, text):
        seen = min(seen, enough * config.train.batch_tokens)
    compiles = machine.seconds and seen * token_seconds > COMPILE_SECONDS and not machine.accelerated
    config = _chosen(config, {"train.compile": "on" if compiles else "auto"})
    if not overfits and text.train_tokens and seen > MANY_PASSES * text.train_tokens:
        repeated = {"model.dropout": 0.1, "optim.weight_decay": 0.3, "eval.calibrate": not config.model.tied_head}
        config = _chosen(config, repeated)
    if memory_needed(sized(config), text.vocab_size, rows, machine) > limit:
        while rows > 1 and memory_needed(sized(config), text.vocab_size, rows, machine) > limit:
            rows //= 2
        config = _chosen(config, {"train.micro_batch": rows_up_to(config, rows)})
    model = sized(config).model
    size = parameters(sized(config), text.vocab_size) / 1e6
    why = why if {"model.layers", "model.width"} & set(config.fit.fields) else "as given"
    return config, [
        f"model of {model.layers} layers, width {model.width}, context {model.context_length} ({size:.2g} million"
        f" parameters): {why}",
        f"dropout {model.dropout:g}, weight decay {config.optim.weight_decay:g}, learning rate {config.optim.lr:g}",
    ]


def fit_steps(
    config: Config, text: Text, speed: Speed, micro_steps: int, seconds: float, processes: int = 1
) -> tuple[int, list[str]]:
    """The steps that fill ``seconds``, with all validations and samples, or fewer where more would learn less.

    Args:
        config: with a model.
        text: with its tokens.
        speed: of the model.
        micro_steps: in a step.
        seconds: left of ``train.minutes``.
        processes: that share validations.

    Raises UsageError if the time is over before the first step.
    """
    left = seconds - END_SECONDS

    def takes(steps: int) -> float:
        return run_seconds(fit_marks(with_steps(config, steps), text), speed, micro_steps, text, processes)

    if takes(1) > left:
        raise UsageError(
            f"train.minutes {config.train.minutes:g} leave {duration(max(0, left))} for training, and a step with its"
            f" validation takes {duration(takes(1))}; give more"
        )
    steps, enough = _largest(lambda steps: takes(steps) <= left), steps_enough(config, text)
    minutes = f"{config.train.minutes:g} minute" + "s" * (config.train.minutes != 1)
    why = f"fill {minutes}"
    if enough and steps > enough:
        steps = enough
        why = f"take {duration(takes(steps))} of {minutes}; more would learn less from so little text"
    passes = f", {steps * config.train.batch_tokens / text.train_tokens:.2g} passes," if text.train_tokens else ""
    return steps, [f"{steps:,} steps of {speed.step(micro_steps):.2g} s{passes} {why}"]


def steps_enough(config: Config, text: Text) -> int:
    """The steps from which on more would learn less; 0 where they are not chosen, or no bound is known."""
    least = tier_of(text).steps if "train.steps" in config.fit.fields else 0
    return least and max(least, round(MOST_PASSES * text.train_tokens / config.train.batch_tokens))


def fit_marks(config: Config, text: Text) -> Config:
    """Choose when to validate and to save, by the steps."""
    steps = config.train.steps
    measured = passes(config) * tokens_read(config, min(config.eval.tokens or text.val_tokens, text.val_tokens))
    least = math.ceil(measured * EVALUATION_SHARE / MOST_VALIDATION / config.train.batch_tokens)
    every = {
        "eval.every": max(1, steps // VALIDATIONS, min(least, steps // FEWEST_VALIDATIONS)),
        "checkpoint.every": max(1, steps // CHECKPOINTS),
    }
    return _chosen(config, every)


def with_steps(config: Config, steps: int) -> Config:
    """The configuration with so many steps, whatever else would decide them."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, epochs=0.0))


def settled(config: Config, text: Text) -> Config:
    """The configuration, with its steps, once all else is chosen: nothing is left to choose, and what was is recorded.

    Raises UsageError if what was chosen does not go with what was given.
    """
    config, fit = fit_marks(config, text), config.fit
    try:
        return dataclasses.replace(config, fit=FitConfig(chosen=fit.fields or fit.chosen))
    except ValueError as error:
        raise UsageError(str(error)) from None


def tier_of(text: Text) -> Tier:
    """The tier of a text."""
    return next(tier for tier in TIERS if text.bytes < tier.below)


def run_seconds(config: Config, speed: Speed, micro_steps: int, text: Text, processes: int = 1) -> float:
    """Seconds of all steps, validations, samples and the test."""
    settings, sampling = config.eval, config.sample
    validations = config.train.steps // settings.every + 1 if settings.every else 1
    samples = config.train.steps // sampling.every + 1 if sampling.every else validations
    sampled = samples * len(sampling.prompts) * sampling.max_tokens
    steps = config.train.steps * (speed.step(micro_steps) + STEP_SECONDS)
    measured = passes(config) * validated_tokens(config, text.val_tokens) + tokens_read(config, text.test_tokens)
    return steps + speed.evaluation * measured / processes + sampled * speed.sample


def passes(config: Config) -> int:
    """How often a validation reads its text: for the weights, their average, and other temperatures."""
    return 1 + bool(config.optim.ema) + CALIBRATIONS * config.eval.calibrate


def parameters(config: Config, vocab_size: int) -> int:
    """How many the model has."""
    return sum(count_parameters(config.model, vocab_size).values())


def memory_limit(text: Text, machine: Machine) -> float:
    """Bytes that training may take."""
    limit = MEMORY_SHARE * machine.memory
    return min(limit, SMALL_TEXT_MEMORY) if text.bytes <= SMALL_TEXT and not machine.accelerated else limit


def memory_needed(config: Config, vocab_size: int, rows: int, machine: Machine) -> float:
    """Bytes that training takes about, with micro-batches of ``rows``."""
    counts = count_parameters(config.model, vocab_size)
    state = 4 * sum(counts.values()) + find_optimizer(config.optim).state_bytes(counts)
    saving = 0 if machine.accelerated else 2 * state
    gradients = 4 * sum(counts.values())
    return PROCESS_BYTES + state + saving + gradients + 1.4 * rows * activation_bytes(config, machine.value_bytes)


def _shaped(config: Config, layers: int, width: int) -> Config:
    """The configuration with a model of this shape, as far as it is chosen; what is given decides the rest."""
    fields, model = set(config.fit.fields), config.model
    if model.depth and not model.width:
        return config
    heads = model.heads if "model.heads" not in fields else 0
    if "model.width" in fields and heads:
        width = max(1, round(width / (2 * heads))) * 2 * heads
    width = width if "model.width" in fields else model.width
    if not heads:
        step = model.kv_heads or 1
        possible = [n for n in range(step, width + 1, step) if width % (2 * n) == 0] or [step]
        heads = min(possible, key=lambda n: abs(math.log(width / n / HEAD_DIMENSION)))
    return _chosen(config, {"model.layers": layers, "model.width": width, "model.heads": heads})


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number for which ``holds``, which does for 1 and not from some number on."""
    high = 2
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _chosen(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with those of the values, by dotted name, that are to be chosen."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name in config.fit.fields:
            section, field = name.split(".")
            sections.setdefault(section, {})[field] = value
    try:
        parts = {name: dataclasses.replace(getattr(config, name), **each) for name, each in sections.items()}
        return dataclasses.replace(config, **parts)
    except ValueError as error:
        raise UsageError(str(error)) from None
