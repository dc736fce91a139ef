"""Text from a model: one text as it comes, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.generation.decode import generate
from pretrain.generation.options import SamplingOptions
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
    """The tokens of a prompt, at least one: the boundary token, if there is one, and those of its text.

    Raises DataError for a character that the tokenizer does not know.
    """
    boundary = tokenizer.bos_id
    ids = ([] if boundary is None else [boundary]) + tokenizer.encode(prompt)
    # Without a boundary token there is nothing to begin a document with; a line break comes closest.
    return ids or tokenizer.encode("\n")


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """Continue a text, yielding pieces of whole characters as they come; ends at the document's end.

    An empty prompt begins a new document. ``options`` are those of :class:`SamplingOptions`. What happens past the
    context length is told at :func:`generate`. Raises ValueError for an option and DataError for a prompt that cannot
    be, at once.
    """
    settings, ids = SamplingOptions(**options), encode_prompt(tokenizer, prompt)
    writer = TextWriter(tokenizer, settings.stop)
    return (piece for _, piece in _write(model, [ids], settings, [settings.seed], [writer], tokenizer.bos_id))


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
            writers = [TextWriter(tokenizer, settings.stop) for _ in batch]
            tokens, seeds = [ids[prompt] for prompt, _ in batch], [seed for _, seed in batch]
            texts = [""] * len(batch)
            for row, piece in _write(model, tokens, settings, seeds, writers, tokenizer.bos_id):
                texts[row] += piece
            for (prompt, seed), text, writer in zip(batch, texts, writers, strict=True):
                yield Sample(prompt, text, writer.tokens, seed)

    return batches()


def _write(
    model: GPT,
    prompts: list[list[int]],
    options: SamplingOptions,
    seeds: Sequence[int],
    writers: list[TextWriter],
    boundary: int | None,
) -> Iterator[tuple[int, str]]:
    """Continue prompts, each by its writer, yielding (row, piece of text) as text comes."""
    ended: set[int] = set()
    for row, token in generate(model, prompts, options, end=boundary, seeds=seeds, ended=ended):
        piece = writers[row].push(token)
        if writers[row].stopped:
            ended.add(row)
        if piece:
            yield row, piece
    for row, writer in enumerate(writers):
        if piece := writer.finish():
            yield row, piece
