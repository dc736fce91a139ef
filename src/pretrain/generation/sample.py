"""Text from a model: one text as it comes, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pretrain.config.sampling import SamplingOptions
from pretrain.errors import DataError
from pretrain.generation.decode import generate
from pretrain.generation.text import TextWriter
from pretrain.model import GPT
from pretrain.tokenizer import Tokenizer

ROWS_AT_ONCE = 32
"""Texts made in one batch: beyond it memory grows, and speed hardly."""


@dataclass(frozen=True)
class Sample:
    """A text that continues a prompt."""

    prompt: str
    """What it continues."""
    text: str
    """What the model wrote, without the prompt."""
    tokens: int
    """How many tokens the model made for it."""
    seed: int
    """With it, the same prompt and options give the same text."""


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, at least one: BOS, if the vocabulary has it, and those of its text.

    Raises DataError for a character that the tokenizer does not know.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if ids := bos + tokenizer.encode(prompt):
        return ids
    # Without BOS there is nothing to begin a document with; a line break comes closest, where the vocabulary has it.
    with suppress(DataError):
        return tokenizer.encode("\n")
    return [0]


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """Continue a text, yielding pieces of whole characters as they come; ends at the document's end.

    An empty prompt begins a new document. ``options`` are those of :class:`SamplingOptions`; :func:`generate` says what
    happens past the context length. Raises ValueError for a wrong option, and DataError for a prompt that cannot be
    encoded, at once.
    """
    settings, ids = SamplingOptions(**options), encode_prompt(tokenizer, prompt)
    return (piece for _, piece, _ in continue_prompts(model, tokenizer, [ids], settings, [settings.seed]) if piece)


def sample_texts(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], samples: int = 1, **options: Any
) -> Iterator[Sample]:
    """Continue each of many prompts in ``samples`` ways, in batches; yields them in order, prompt by prompt.

    Sample i of a prompt is drawn with ``seed`` + i, and is the text that the prompt gives alone with that seed,
    whatever the other prompts are. Raises as :func:`sample_text`.
    """
    settings = SamplingOptions(**options)
    ids = {prompt: encode_prompt(tokenizer, prompt) for prompt in prompts}
    rows = [(prompt, settings.seed + i) for prompt in prompts for i in range(samples)]

    def batches() -> Iterator[Sample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            texts, counts = [""] * len(batch), [0] * len(batch)
            tokens, seeds = [ids[prompt] for prompt, _ in batch], [seed for _, seed in batch]
            for row, piece, counts[row] in continue_prompts(model, tokenizer, tokens, settings, seeds):
                texts[row] += piece
            for (prompt, seed), text, count in zip(batch, texts, counts, strict=True):
                yield Sample(prompt, text, count, seed)

    return batches()


def continue_prompts(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Iterator[tuple[int, str, int]]:
    """Continue prompts, yielding (row, piece of its text, its tokens so far) with each token, and once at the end."""
    writers = [TextWriter(tokenizer, options.stop) for _ in prompts]
    ended: set[int] = set()
    for row, token in generate(model, prompts, options, end=tokenizer.bos_id, seeds=seeds, ended=ended):
        yield row, writers[row].push(token), writers[row].tokens
        if writers[row].stopped:
            ended.add(row)
    for row, writer in enumerate(writers):
        yield row, writer.finish(), writer.tokens
