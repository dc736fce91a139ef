"""How many tokens a configuration's data has: exactly from token shards, otherwise estimated from a sample of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pretrain.config import Config
from pretrain.errors import DataError
from pretrain.text import ReadStats, embedded_name, problem_lines, refuse_broken
from pretrain.text.pieces import continues, join_ranges
from pretrain.text.split import SIDES
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens import check_boundary
from pretrain.tokens.datasets import check_marked, check_undivided, is_tokens, mixed_order, open_corpus
from pretrain.tokens.order import DataOrder
from pretrain.tokens.shards import bytes_per_token, utf8_bytes
from pretrain.tokens.source import find_sides, read_sample


@dataclass(frozen=True)
class DataFacts:
    """The vocabulary, and the tokens of each side of the split."""

    vocab_size: int
    train_tokens: int
    val_tokens: int
    test_tokens: int
    text_bytes: int
    """Bytes of text; 0 where the shards do not tell."""
    windows: int
    """Windows to train on in an epoch."""
    exact: bool
    source: str
    """Where the numbers are from, in words."""
    problem: str = ""
    """Why training would refuse this data; empty if nothing was seen."""
    cautions: tuple[str, ...] = ()
    """What is unusual about the tokenizer."""
    left_out: tuple[str, ...] = ()
    """What is left out or changed of the text, a line each; of the sample only, where that is not all."""
    datasets: tuple[tuple[str, int], ...] = ()
    """Path and training tokens of each data set, with ``data.weights``."""


def look_at_data(config: Config) -> DataFacts:
    """Tokens of ``config.data``. A DataError or UsageError where training would raise it too."""
    data, kind, vocab_size = config.data, config.tokenizer.kind, config.tokenizer.vocab_size
    name = ", ".join(data.paths) or embedded_name()
    if data.paths and is_tokens(data.paths):
        check_undivided(data)
        corpus = open_corpus(data.paths, kind, data.bos, boundary=config.tokenizer.bos, dtype=data.dtype)
        train, val, test = (corpus.tokens(side) for side in SIDES)
        check_boundary(corpus.tokenizer, config.model.document_mask)
        if config.model.document_mask:
            check_marked(corpus)
        cautions = tuple(corpus.tokenizer.cautions(data.bos))
        sets = tuple((each.name, each.tokens("train")) for each in corpus.datasets) if data.weights else ()
        windows = sum(windows_of(config, tokens) for _, tokens in sets or [(name, train)])
        size, vocab_size = int(corpus.bytes_per_token * train), corpus.tokenizer.vocab_size
        return DataFacts(vocab_size, train, val, test, size, windows, True, name, cautions=cautions, datasets=sets)
    left_out: list[str] = []
    problem, cautions = "", ()
    try:
        sides = find_sides(data, left_out.append)
    except DataError as error:
        if data.split != "last_file" or data.val_paths:
            raise
        problem = str(error)  # there may be one file of many so far; if not that is wrong, it is raised here again
        left_out.clear()
        sides = find_sides(replace(data, split="tail", val_fraction=0.0, test_fraction=0.0), left_out.append)
    pieces = sides.train
    stats = ReadStats()
    sample, read, whole = read_sample(pieces, data.field, stats)
    left_out += [line if whole else f"{line}, in a sample" for line in stats.lines()]
    refuse_broken(stats, data.allow_broken)
    if not sample:
        raise DataError(f"{name}: there is nothing but white space in the text")
    share = read / stats.size  # of the bytes of the files is text: not what JSON adds, nor what is skipped
    size = read if whole else round(share * sum(piece.size for piece in pieces))
    try:
        texts = sample if data.bos else ["".join(sample)]  # of characters, only several documents have a BOS token
        fewer = "tokenizer.vocab_size" in config.fit.fields
        tokenizer = build_tokenizer(kind, vocab_size, texts, config.tokenizer.pattern, config.tokenizer.bos, fewer)
        tokenizer, vocab_size = tokenizer.with_bos(data.bos), tokenizer.vocab_size
        if kind != "char":  # which has a BOS token if there are several documents
            check_boundary(tokenizer, config.model.document_mask)
            cautions = tuple(tokenizer.cautions(data.bos))
        per_token = bytes_per_token(sample, tokenizer)
        source = f"{name}, at {per_token:.2f} bytes per token in a sample"
        parts = [join_ranges(side, tokenizer.cuts) for side in (pieces, sides.val, sides.test)]
        cuts = sum(continues(piece) for side in parts for piece in side) if tokenizer.cuts == "all" else 0
        left_out += [f"{line}, or more" for line in problem_lines({"cut": cuts} if cuts else {}, {}, 0)]
    except DataError as error:
        if kind != "bpe":
            raise
        # Too little text for such a vocabulary: the ratio for English, by our measurements.
        per_token = min(4.7, max(1.0, 0.43 * math.log2(vocab_size) - 1.6))
        source = f"{name}, at about {per_token:.1f} bytes per token"
        if sum(map(utf8_bytes, sample)) >= size:
            problem = problem or str(error)
    tokens = round(size / per_token)
    val, test = (
        round(share * sum(piece.size for piece in whole) / per_token + tokens * part)
        for whole, part in ((sides.val, sides.shares.val), (sides.test, sides.shares.test))
    )
    tokens -= round(tokens * sides.shares.val) + round(tokens * sides.shares.test)
    windows = windows_of(config, tokens)
    return DataFacts(vocab_size, tokens, val, test, size, windows, False, source, problem, cautions, tuple(left_out))


def mixture_read(config: Config, datasets: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """What a run reads of each data set of a mixture: tokens in each stage, and its epochs in all."""
    if not datasets:
        return []
    names, sizes = zip(*datasets, strict=True)
    order = mixed_order(names, sizes, config)
    ends = [batch * config.batch_rows for batch in [*(begin for begin, _ in config.mixtures), config.train.steps]]
    before = [order.rows_before(row) for row in ends]
    length = config.model.context_length
    return [
        {
            "path": name,
            "tokens": [length * (after - rows) for rows, after in pairwise(read)],
            "epochs": read[-1] / own.windows,
        }
        for (name, _), read, own in zip(datasets, zip(*before, strict=True), order.orders, strict=True)
    ]


def windows_of(config: Config, tokens: int) -> int:
    """Training windows of an epoch of a data set of so many tokens."""
    length, data = config.model.context_length, config.data
    return DataOrder(tokens, length, data.order, data.stride, config.train.seed).windows if tokens > length else 0
