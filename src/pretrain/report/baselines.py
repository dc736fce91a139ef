"""What to compare a loss with: guesses by counting on the same data, and general compressors.

some of the training tokens → counts of tokens and of pairs → cross-entropy of some of the held-out tokens
"""

from __future__ import annotations

import json
import math
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pretrain.errors import PretrainError
from pretrain.io import write_atomically
from pretrain.report.compressors import (
    AT_ONCE_BYTES,
    HELD_OUT_BYTES,
    TRAIN_BYTES,
    bits_per_byte,
    compressors,
)
from pretrain.runs import Run
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import Corpus, TokenStream

CACHE = "baselines.json"
TRAIN_TOKENS, HELD_OUT_TOKENS = 2_000_000, 200_000
"""Tokens counted, and tokens guessed, at most: a second, and enough for two digits."""
BLOCKS = 32
"""Places, evenly over the data, that they are taken from."""


@dataclass(frozen=True)
class Baselines:
    """Losses of guessing without a model, in nats per token."""

    fingerprint: str
    """Of the data they were measured on."""
    tokens: int
    """Training tokens counted."""
    guessed: int
    """Tokens guessed: held-out ones, or if none are held out, others of the training tokens."""
    uniform: float
    """Every token equally likely: ln of the vocabulary size."""
    unigram: float
    """Each token as likely as it is frequent."""
    bigram: float
    """Each token as likely as it is frequent after the one before it."""
    bytes_per_token: float
    """UTF-8 bytes of text that a guessed token stands for; 0 if none of them stands for text."""
    zipped: float
    """Bits that a byte of the guessed text takes in a zip file (deflate)."""
    compressed: dict[str, tuple[str, float]] = field(default_factory=dict)
    """What compressors reach on held-out text after training text, by their names: how, and bits per byte. Those that
    would take seconds are missing until somebody waits for them."""
    compressed_bytes: tuple[int, int] = (0, 0)
    """Bytes of the training text, its last, and of the held-out text, its first, that they took."""
    compressed_all: bool = False
    """Whether that is all of both."""

    def bits_per_byte(self, loss: float) -> float | None:
        """About how many bits a byte of the held-out text costs at a loss; special tokens count as others here."""
        return loss / (math.log(2) * self.bytes_per_token) if self.bytes_per_token else None


def baselines(run: Run, patient: bool = False) -> Baselines | None:
    """The baselines of a run's data, measured once and kept in the run directory.

    Compressors that take seconds are measured only if one is ``patient``. None when there are no token shards to
    measure on: they are gone, or the text was tokenized while training.
    """
    file = run.folder / CACHE
    with suppress(PretrainError, OSError):
        corpus, kept = run.corpus(), None
        train, held_out = corpus.stream("train"), corpus.stream("val")
        if len(train) < 2:
            return None
        with suppress(OSError, ValueError, TypeError, AttributeError):
            read = from_json(json.loads(file.read_text(encoding="utf-8")))
            kept = read if read.fingerprint == corpus.fingerprint else None
        found = kept or measure_baselines(train, held_out, corpus.tokenizer, corpus.fingerprint)
        size = found.bytes_per_token * (len(train) + len(held_out))
        if len(held_out) > 1 and found.bytes_per_token and (patient or size <= AT_ONCE_BYTES):
            found = with_compressors(found, corpus)
        if found != kept:
            with suppress(OSError):  # a run directory that is read-only
                write_atomically(file, json.dumps(asdict(found), indent=2) + "\n")
        return found
    return None


def from_json(tree: dict[str, Any]) -> Baselines:
    """What was kept. Raises TypeError, ValueError or AttributeError if it is something else."""
    how = {name: (str(setting), float(bits)) for name, (setting, bits) in tree.pop("compressed", {}).items()}
    train, held_out = tree.pop("compressed_bytes", (0, 0))
    return Baselines(**tree, compressed=how, compressed_bytes=(train, held_out))


def with_compressors(found: Baselines, corpus: Corpus) -> Baselines:
    """The same with what the compressors reach that are installed and were not measured yet."""
    missing = {name: settings for name, settings in compressors().items() if name not in found.compressed}
    if not missing:
        return found
    texts, whole = [], True
    for split, most in (("train", TRAIN_BYTES), ("val", HELD_OUT_BYTES)):
        stream = corpus.stream(split)
        tokens = min(len(stream), math.ceil(1.5 * most / found.bytes_per_token))
        start = len(stream) - tokens if split == "train" else 0
        (ids,) = stream.windows(np.array([start]), tokens).tolist()
        text = corpus.tokenizer.decode([id for id in ids if id < corpus.tokenizer.vocab_size]).encode()
        whole = whole and tokens == len(stream) and len(text) <= most
        texts.append(text[-most:] if split == "train" else text[:most])
    if not all(texts):
        return found
    measured = {**found.compressed, **bits_per_byte(missing, *texts)}
    sizes = len(texts[0]), len(texts[1])
    return replace(found, compressed=measured, compressed_bytes=sizes, compressed_all=whole)


def measure_baselines(train: TokenStream, held_out: TokenStream, tokenizer: Tokenizer, fingerprint: str) -> Baselines:
    """Count tokens and pairs of ``train`` (two tokens at least), and guess those of ``held_out`` by them.

    What was never counted gets the probability that Witten and Bell give to something new (IEEE Trans. Inf. Theory 37,
    1991, method C): the number of kinds seen against the number of all; for a pair it goes to the single token's.
    """
    counted = some_blocks(train, TRAIN_TOKENS)
    if len(held_out) > 1:
        guessed = some_blocks(held_out, HELD_OUT_TOKENS)
    else:
        flat = counted.reshape(1, -1)
        cut = max(1, flat.size - flat.size // 20 - 1)
        counted, guessed = flat[:, :cut], flat[:, cut - 1 :]
    vocabulary = max(tokenizer.vocab_size, int(counted.max()) + 1, int(guessed.max()) + 1)

    counts = np.bincount(counted.reshape(-1), minlength=vocabulary)
    total, kinds = counts.sum(), np.count_nonzero(counts)
    new = vocabulary - kinds
    single = np.where(counts, counts / (total + kinds * (new > 0)), kinds / (total + kinds) / max(1, new))

    pairs, pair_counts = np.unique(counted[:, :-1] * vocabulary + counted[:, 1:], return_counts=True)
    first = pairs // vocabulary
    totals = np.bincount(first, weights=pair_counts, minlength=vocabulary)
    followers = np.bincount(first, minlength=vocabulary)

    before, after = guessed[:, :-1].reshape(-1), guessed[:, 1:].reshape(-1)
    wanted = before * vocabulary + after
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[places] == wanted, pair_counts[places], 0) if len(pairs) else np.zeros(len(wanted))
    context = totals[before] + followers[before]
    both = np.where(context, (seen + followers[before] * single[after]) / np.maximum(1, context), single[after])

    lengths = tokenizer.token_bytes()
    text = tokenizer.decode([id for id in guessed.reshape(-1).tolist() if id < tokenizer.vocab_size]).encode()
    return Baselines(
        fingerprint=fingerprint,
        tokens=int(total),
        guessed=len(after),
        uniform=math.log(tokenizer.vocab_size),
        unigram=float(-np.log(single[after]).mean()),
        bigram=float(-np.log(both).mean()),
        bytes_per_token=float(lengths[np.minimum(after, len(lengths) - 1)].mean()),
        zipped=8 * len(zlib.compress(text, 9)) / max(1, len(text)),
    )


def some_blocks(stream: TokenStream, limit: int) -> np.ndarray:
    """All tokens of a stream as one row, or ``limit`` of them as blocks taken evenly from it: int64 (blocks, T)."""
    if len(stream) <= limit:
        return stream.windows(np.zeros(1, dtype=np.int64), len(stream))
    length = limit // BLOCKS
    return stream.windows(np.linspace(0, len(stream) - length, BLOCKS).astype(np.int64), length)
