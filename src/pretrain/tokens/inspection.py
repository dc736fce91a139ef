"""Look into token shards: of up to SCANNED tokens of a split, document lengths and frequent tokens; some documents."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from pretrain.tokenizer import Tokenizer
from pretrain.tokens.datasets import Corpus
from pretrain.tokens.windows import TokenStream

SCANNED = 100_000_000  # tokens: seconds, and enough for lengths and frequencies
CHUNK = 2**20
BAR = 40
SAMPLE_TOKENS = 100
FREQUENT = 12


def inspect_split(corpus: Corpus, split: str, samples: int, seed: int) -> Iterator[str]:
    """Lines that describe a split: document lengths, the most frequent tokens, and ``samples`` documents decoded.

    The first sample is the first document, the others are drawn by ``seed``.
    """
    stream, tokenizer = corpus.stream(split), corpus.tokenizer
    if not len(stream):
        return
    bos_places, counts = scan(stream, tokenizer)
    seen = min(len(stream), SCANNED)
    title = {"train": "training", "val": "validation"}.get(split, split)
    yield ""
    yield f"{title}: {len(stream):,} tokens" + (f", the first {seen:,} of which are looked at" * (seen < len(stream)))
    lengths = document_lengths(bos_places, seen, whole=seen == len(stream))
    if len(bos_places) and len(lengths):
        yield from histogram(lengths)
    most = [id for id in np.argsort(-counts, kind="stable")[:FREQUENT].tolist() if counts[id]]
    texts = [json.dumps(tokenizer.decode([id], show_special=True), ensure_ascii=False) for id in most]
    shown = [f"{text} {counts[id] / seen:.1%}" for id, text in zip(most, texts, strict=True)]
    yield "  frequent tokens   " + "   ".join(shown)
    draw = np.random.default_rng(seed)
    for number in range(samples):
        start = 0 if number == 0 else next_document(stream, int(draw.integers(len(stream))), tokenizer.bos_id)
        yield f"  at token {start:<12,} {_sample(stream, start, tokenizer)}"


def scan(stream: TokenStream, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Places of the BOS tokens among the first SCANNED tokens, and how often each id is there."""
    found, counts = [np.empty(0, dtype=np.int64)], np.zeros(tokenizer.vocab_size, dtype=np.int64)
    end = min(len(stream), SCANNED)
    for first in range(0, end, CHUNK):
        tokens = stream.windows(np.array([first]), min(CHUNK, end - first))[0]
        counts += np.bincount(tokens, minlength=tokenizer.vocab_size)[: tokenizer.vocab_size]
        if tokenizer.bos_id is not None:
            found.append(np.flatnonzero(tokens == tokenizer.bos_id) + first)
    return np.concatenate(found), counts


def document_lengths(bos_places: np.ndarray, seen: int, whole: bool) -> np.ndarray:
    """Tokens of each document without BOS, which may stand before a document (ours) or after it.

    ``seen`` tokens were looked at; where these are not ``whole``, the last document is cut off and does not count.
    """
    lengths = np.diff(bos_places, prepend=-1, append=seen).astype(np.int64) - 1
    first = 1 if len(bos_places) and lengths[0] == 0 else 0  # nothing stands before the first BOS, or after the last
    end = -1 if not whole or (len(bos_places) and lengths[-1] == 0) else None
    return lengths[first:end]


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Lines that show how many documents are how long, in powers of two."""
    median, long = np.quantile(lengths, [0.5, 0.9])
    yield (
        f"  {len(lengths):,} documents of {lengths.mean():,.0f} tokens on average; half have {median:,.0f} or fewer, "
        f"one in ten more than {long:,.0f}, the longest {lengths.max():,}"
    )
    powers = np.ceil(np.log2(np.maximum(lengths, 1) + 1)).astype(int)  # 2 ** (p - 1) <= length < 2 ** p
    counts = np.bincount(powers)
    for power in range(int(powers.min()), len(counts)):
        bar = "█" * round(BAR * counts[power] / counts.max()) or "▏" * bool(counts[power])
        yield f"  {2 ** (power - 1) if power > 1 else 0:>12,} to {2**power - 1:<12,} {bar:<{BAR}} {counts[power]:,}"


def next_document(stream: TokenStream, place: int, bos_id: int | None) -> int:
    """The place of the first BOS token from ``place`` on, near enough; else the place itself."""
    tokens = stream.windows(np.array([place]), min(CHUNK, len(stream) - place))[0]
    found = np.flatnonzero(tokens == (-1 if bos_id is None else bos_id))
    return place + int(found[0]) if len(found) else place


def _sample(stream: TokenStream, start: int, tokenizer: Tokenizer) -> str:
    """The beginning of a document as text on one line, up to its end or SAMPLE_TOKENS."""
    tokens = stream.windows(np.array([start]), min(SAMPLE_TOKENS, len(stream) - start))[0].tolist()
    if tokens[0] == tokenizer.bos_id:
        tokens = tokens[1:]
    ended = tokenizer.bos_id in tokens
    if ended:
        tokens = tokens[: tokens.index(tokenizer.bos_id)]
    text = tokenizer.decode([id for id in tokens if id < tokenizer.vocab_size])
    return f"“{' '.join(text.split())}{'' if ended else '…'}”"
