"""How many tokens a configuration's data has: exactly from token shards, otherwise estimated from a sample of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.errors import DataError
from pretrain.text import embedded_name, find_pieces, read_piece
from pretrain.text.pieces import Piece
from pretrain.tokenizer import build_tokenizer
from pretrain.tokens import check_boundary
from pretrain.tokens.datasets import is_tokens, open_corpus
from pretrain.tokens.order import DataOrder
from pretrain.tokens.shards import bytes_per_token, utf8_bytes
from pretrain.tokens.source import ONE_FILE

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
    windows: int
    """Windows to train on in an epoch."""
    exact: bool
    source: str
    """Where the numbers are from, in words."""
    problem: str = ""
    """Why training would refuse this data; empty if nothing was seen."""
    cautions: tuple[str, ...] = ()
    """What is unusual about the tokenizer."""


def look_at_data(config: Config) -> DataFacts:
    """Tokens of ``config.data``. A DataError or UsageError where training would raise it too."""
    data, kind, vocab_size = config.data, config.tokenizer.kind, config.tokenizer.vocab_size
    name = ", ".join(data.paths) or embedded_name()
    if data.paths and is_tokens(data.paths):
        corpus = open_corpus(data.paths, kind, data.bos, boundary=config.tokenizer.bos, dtype=data.dtype)
        train, val = corpus.tokens("train"), corpus.tokens("val")
        check_boundary(corpus.tokenizer, config.model.document_mask)
        cautions = tuple(corpus.tokenizer.cautions(data.bos))
        sizes = [dataset.tokens("train") for dataset in corpus.datasets] if data.weights else [train]
        windows = sum(_windows(config, tokens) for tokens in sizes)
        size = int(corpus.bytes_per_token * train)
        return DataFacts(corpus.tokenizer.vocab_size, train, val, size, windows, True, name, cautions=cautions)
    pieces = find_pieces(data.paths, data.field, data.separator)
    size = sum(piece.size for piece in pieces)
    sample = read_sample(pieces, data.field)
    if not sample:
        raise DataError(f"{name}: there is nothing but white space in the text")
    problem, cautions = "", ()
    try:
        texts = sample if data.bos else ["".join(sample)]  # of characters, only several documents have a BOS token
        tokenizer = build_tokenizer(kind, vocab_size, texts, config.tokenizer.pattern, config.tokenizer.bos)
        tokenizer, vocab_size = tokenizer.with_bos(data.bos), tokenizer.vocab_size
        if kind != "char":  # which has a BOS token if there are several documents
            check_boundary(tokenizer, config.model.document_mask)
            cautions = tuple(tokenizer.cautions(data.bos))
        per_token = bytes_per_token(sample, tokenizer)
        source = f"{name}, at {per_token:.2f} bytes per token in a sample"
    except DataError as error:
        if kind != "bpe":
            raise
        # Too little text for such a vocabulary: the ratio for English, by our measurements.
        per_token = min(4.7, max(1.0, 0.43 * math.log2(vocab_size) - 1.6))
        source = f"{name}, at about {per_token:.1f} bytes per token"
        if sum(map(utf8_bytes, sample)) >= size:
            problem = str(error)
    tokens = round(size / per_token)
    last = sum(piece.size for piece in pieces if piece.file == pieces[-1].file)
    if data.split == "last_file" and not data.val_paths and last == size:
        val, problem = 0, problem or ONE_FILE
    elif data.split == "last_file" and not data.val_paths:
        val = round(last / per_token)
        tokens -= val
    elif data.val_paths:
        val_size = sum(piece.size for piece in find_pieces(data.val_paths, data.field, data.separator))
        val = round(val_size / per_token)
    else:
        val = round(tokens * data.val_fraction)
        tokens -= val
    return DataFacts(vocab_size, tokens, val, size, _windows(config, tokens), False, source, problem, cautions)


def _windows(config: Config, tokens: int) -> int:
    """Training windows of an epoch of a data set of so many tokens."""
    length, data = config.model.context_length, config.data
    return DataOrder(tokens, length, data.order, data.stride, config.train.seed).windows if tokens > length else 0


def read_sample(pieces: list[Piece], field: str) -> list[str]:
    """Documents of about SAMPLE_BYTES in all, from up to four pieces spread over the whole."""
    places = pieces[:: max(1, math.ceil(len(pieces) / 4))]
    texts: list[str] = []
    read = 0
    for number, piece in enumerate(places, 1):
        for document in read_piece(piece, field):
            texts.append(document.text[: SAMPLE_BYTES - read])
            read += len(texts[-1])
            if read >= SAMPLE_BYTES * number // len(places):
                break
    return [text for text in texts if text.strip()]
