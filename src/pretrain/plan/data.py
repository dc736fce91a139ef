"""How many tokens a configuration's data has: exactly from token shards, otherwise estimated from a sample of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.errors import DataError
from pretrain.text import embedded_name, find_pieces, read_piece
from pretrain.text.pieces import Piece
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens.datasets import is_tokens, open_corpus
from pretrain.tokens.shards import bytes_per_token, utf8_bytes

SAMPLE_BYTES = 2_000_000
"""Text that is read for an estimate, from up to four places."""


@dataclass(frozen=True)
class DataFacts:
    """The vocabulary, and the tokens of both splits."""

    vocab_size: int
    train_tokens: int
    val_tokens: int
    text_bytes: int
    """Bytes of text; 0 where the shards do not tell."""
    exact: bool
    source: str
    """Where the numbers are from, in words."""
    problem: str = ""
    """Why training would refuse this data; empty if nothing was seen."""


def look_at_data(config: Config) -> DataFacts:
    """Tokens of ``config.data``. A DataError or UsageError where training would raise it too."""
    data, paths, kind, problem = config.data, config.data.paths, config.tokenizer.kind, ""
    if paths and is_tokens(paths):
        corpus = open_corpus(paths, kind)
        size = int(corpus.bytes_per_token * corpus.tokens("train"))
        vocabulary = corpus.tokenizer.vocab_size
        return DataFacts(vocabulary, corpus.tokens("train"), corpus.tokens("val"), size, True, ", ".join(paths))
    pieces = find_pieces(paths, data.field, data.separator)
    size = sum(piece.size for piece in pieces)
    sample = read_sample(pieces, data.field)
    sampled = sum(map(utf8_bytes, sample))
    if not sampled:
        raise DataError(f"{', '.join(paths)}: there is nothing but white space in the text")
    try:
        tokenizer = build_tokenizer(kind, config.tokenizer.vocab_size, sample, config.tokenizer.pattern)
    except DataError as error:
        if kind != "bpe":
            raise
        # Too little text for such a vocabulary: the ratio for English, by our measurements.
        vocabulary = config.tokenizer.vocab_size
        per_token = min(4.7, max(1.0, 0.43 * math.log2(vocabulary) - 1.6))
        how = f"at about {per_token:.1f} bytes a token"
        problem = str(error) if sampled >= size else ""
    else:
        vocabulary = tokenizer.vocab_size
        per_token = bytes_per_token(sample, tokenizer)
        how = f"at {per_token:.2f} bytes a token in a sample"
    tokens = round(size / per_token)
    val = held_out = 0 if data.val_paths else round(tokens * data.val_fraction)
    if data.val_paths:
        val = round(sum(piece.size for piece in find_pieces(data.val_paths, data.field, data.separator)) / per_token)
    name = ", ".join(paths) if paths else embedded_name()
    return DataFacts(vocabulary, tokens - held_out, val, size, False, f"{name}, {how}", problem)


def read_sample(pieces: list[Piece], field: str) -> list[str]:
    """Documents of about SAMPLE_BYTES in all, from up to four pieces spread over the whole."""
    places = pieces[:: max(1, math.ceil(len(pieces) / 4))] if pieces else []
    texts: list[str] = []
    for number, piece in enumerate(places, 1):
        limit, read = SAMPLE_BYTES * number // len(places), sum(map(len, texts))
        for document in read_piece(piece, field):
            text = document.text[: SAMPLE_BYTES - read]
            texts.append(text)
            read += len(text)
            if read >= limit:
                break
    return [text for text in texts if text.strip()]
