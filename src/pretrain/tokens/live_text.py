"""The text of a live stream: which pieces are trained on, which held out, and what is made before the first step.

    data.paths ──find_text──> LiveText ──prepare_stream──> tokenizer.json and a shard of validation tokens
                                 └─parts(piece)──> Part, Part, ... , each for training or validation (live.py goes on)

The validation tokens are written as a shard, so that a run with a stream validates as any other does, now and later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.config import Config, DataConfig
from pretrain.errors import DataError, UsageError
from pretrain.text import embedded_name
from pretrain.text.pieces import EMBEDDED, Piece, find_pieces
from pretrain.text.split import TRAIN, VAL, Part
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.datasets import is_tokens
from pretrain.tokens.jobs import read_parts, training_texts
from pretrain.tokens.prepare import TOKENIZER, Prepared
from pretrain.tokens.shards import Manifest, Shard, ShardWriter, utf8_bytes

LEARN_BYTES = 32_000_000
"""Text that a bpe is trained on, at most."""
VALIDATION_TOKENS = 2**23
"""Tokens held ready for validation, at most."""
SEARCHED_BYTES = 512_000_000
"""Text read in search of them, at most, once there are some: a small share by hash is spread over all of the text."""
SAMPLED_BYTES = 64 * 1024
"""Bytes hashed at the beginning and at the end of each file, to know it again."""


@dataclass(frozen=True)
class LiveText:
    """The text of a stream in pieces."""

    train: tuple[Piece, ...]
    """In the order of ``data.paths``."""
    val: tuple[Piece, ...]
    """Those held out; all pieces where documents are held out by a hash; none where nothing is."""
    field: str
    val_fraction: float
    """Share of the documents of ``train`` that is held out by a hash of their text; 0: none."""

    def parts(self, piece: Piece, problems: Counter[str]) -> Iterator[Part]:
        """The documents of a piece, each on its side of the split, in bounded memory."""
        split = "hash" if self.val_fraction else VAL if piece in self._held_out else TRAIN
        first = self._first_pieces[piece.file]
        before = None if first == piece else first
        return read_parts([piece], self.field, split, problems, val_fraction=self.val_fraction, before=before)

    @property
    def size(self) -> int:
        """About how many bytes of text an epoch has."""
        return round(sum(piece.size for piece in self.train) * (1 - self.val_fraction))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the pieces, of the names of their files and of samples of those on this machine.

        Files may be moved or copied, but not changed, since the place in a stream is counted in them.
        """
        digest = hashlib.sha256(json.dumps([self.field, self.val_fraction]).encode())
        for side in (self.train, self.val):
            for piece in side:
                entry = [Path(piece.file).name, piece.size, piece.begin, piece.end]
                digest.update(json.dumps(entry).encode())
        for file in self._first_pieces:
            digest.update(_sample(file))
        return digest.hexdigest()

    @cached_property
    def _held_out(self) -> frozenset[Piece]:
        return frozenset(self.val)

    @cached_property
    def _first_pieces(self) -> dict[str, Piece]:
        first: dict[str, Piece] = {}
        for piece in (*self.train, *self.val):
            if piece.file not in first or piece.begin < first[piece.file].begin:
                first[piece.file] = piece
        return first


def find_text(data: DataConfig) -> LiveText:
    """Find the pieces that ``data`` names, and divide them.

    ``data.split`` tail holds out whole pieces, since no stream knows how many characters it will have read: the last
    ones, of together at most ``val_fraction`` of the bytes.

    Raises:
        UsageError: the configuration asks for what a stream cannot do.
        DataError: the text is missing or cannot be read, or a side of the split would be empty.
    """
    _check(data)
    pieces = find_pieces(data.paths, data.field, data.separator)
    if data.val_paths:
        val = find_pieces(data.val_paths, data.field, data.separator)
        names = {os.path.realpath(piece.file) for piece in val}
        train = [piece for piece in pieces if os.path.realpath(piece.file) not in names]
        if not train:
            raise DataError("all text of data.paths is held out by data.val_paths; give other text to train on")
        return LiveText(tuple(train), tuple(val), data.field, 0.0)
    if data.split == "last_file":
        last = pieces[-1].file
        train = [piece for piece in pieces if piece.file != last]
        if not train:
            raise DataError(
                f"data.split last_file needs two files or more, and there is only {last}; use --data.split hash, or"
                f" name a file with --data.val_paths"
            )
        return LiveText(tuple(train), tuple(piece for piece in pieces if piece.file == last), data.field, 0.0)
    if not data.val_fraction:
        return LiveText(tuple(pieces), (), data.field, 0.0)
    if data.split == "hash":
        return LiveText(tuple(pieces), tuple(pieces), data.field, data.val_fraction)
    wanted = data.val_fraction * sum(piece.size for piece in pieces)
    first, held = len(pieces), 0
    while first > 1 and held + pieces[first - 1].size <= wanted:
        first -= 1
        held += pieces[first].size
    if first == len(pieces):
        raise DataError(
            f"data.split tail of a stream holds out its last pieces, and the last of {len(pieces)} (about"
            f" {pieces[-1].size:,} bytes) is more than data.val_fraction {data.val_fraction} of the text; use"
            f" --data.split hash, --data.split last_file or --data.val_paths, or leave out --data.stream"
        )
    return LiveText(tuple(pieces[:first]), tuple(pieces[first:]), data.field, 0.0)


def _check(data: DataConfig) -> None:
    if data.paths and is_tokens(data.paths):
        raise UsageError(f"{data.paths[0]} holds tokens already, which need no data.stream; leave that out")
    if data.order == "random":
        raise UsageError("data.order random needs token shards; a stream is read shuffled or sequential")
    if data.stride:
        raise UsageError("data.stride needs token shards; leave out --data.stride or --data.stream")
    if data.weights:
        raise UsageError("data.weights needs token shards; make some of each text with: pretrain data prepare")


def prepare_stream(
    config: Config, text: LiveText, folder: Path, say: Callable[[str], None] = lambda _: None
) -> Prepared:
    """Make the tokenizer and the shard of validation tokens of a run that trains on a stream, in ``folder``.

    The folder appears whole or not at all. Its manifest has no training shards.

    Raises:
        UsageError: the tokenizer is of kind char.
        DataError: a side of the split is empty, or the text cannot be read or does not fit the vocabulary.
    """
    if config.tokenizer.kind == "char":
        raise UsageError(
            "tokenizer.kind char needs every character of the text beforehand, which a stream does not know; use"
            " --tokenizer.kind byte, bpe or gpt2, or leave out --data.stream"
        )
    name = embedded_name() if text.train[0].file == EMBEDDED else ", ".join(config.data.paths)
    say(f"text      {name}: about {text.size / 1e6:,.0f} MB in {len(text.train):,} pieces, tokenized while training")
    problems: Counter[str] = Counter()
    tokenizer = build_tokenizer(
        config.tokenizer.kind, config.tokenizer.vocab_size, learning_texts(text), config.tokenizer.pattern
    )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shard = _write_validation(temporary, text, tokenizer, problems)
        if text.val and (shard is None or shard.tokens < 2):
            raise DataError(
                f"no text is left for validation (data.split {config.data.split}, data.val_fraction"
                f" {config.data.val_fraction}); give more text, another split or --data.val_paths, or hold nothing out"
                f" with --data.val_fraction 0"
            )
        if shard:
            said = f"{shard.tokens:,} tokens of {shard.documents:,} documents"
            say(f"held out  {said} are kept for validation")
        tokenizer.save(temporary / TOKENIZER)
        manifest = Manifest(
            tokenizer.dtype.name,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            (shard,) if shard else (),
            tokenizer.bos_id,
            dict(sorted(problems.items())),
        )
        manifest.save(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Prepared(folder, manifest, tokenizer)


def learning_texts(text: LiveText) -> Iterator[str]:
    """Training texts for a tokenizer to learn from: about LEARN_BYTES, from pieces spread evenly over all of them."""
    size = sum(piece.size for piece in text.train)
    mean = max(1, size // len(text.train))
    chosen = (
        text.train[:: max(1, len(text.train) // max(16, LEARN_BYTES // mean))] if size > LEARN_BYTES else text.train
    )
    limit = LEARN_BYTES // len(chosen) if size > LEARN_BYTES else math.inf

    def training_parts(piece: Piece) -> Iterator[Part]:
        return (part for part in text.parts(piece, Counter()) if part.split == TRAIN)

    return training_texts((training_parts(piece), limit) for piece in chosen)


def bytes_per_token(text: LiveText, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes that a token of the training text stands for, in its first quarter of a megabyte.

    Raises DataError if there is no text for training at all.
    """
    texts: list[str] = []
    size = 0
    for piece in text.train:
        for part in text.parts(piece, Counter()):
            if part.split == TRAIN and part.text:
                texts.append(part.text[: 2**18])
                size += utf8_bytes(texts[-1])
            if size >= 2**18:
                break
        if size >= 2**18:
            break
    if not size:
        raise no_text()
    return size / sum(len(ids) for _, ids in tokenizer.encode_documents(enumerate(texts)))


def no_text() -> DataError:
    """The error for a stream without any training text."""
    return DataError("there is no text to train on; give files that hold some with --data.paths, or hold out less")


def _write_validation(folder: Path, text: LiveText, tokenizer: Tokenizer, problems: Counter[str]) -> Shard | None:
    """Tokenize what is held out, up to VALIDATION_TOKENS; None if nothing is to be."""
    if not text.val:
        return None

    def texts() -> Iterator[tuple[Part, str]]:
        searched = 0
        for piece in text.val:
            for part in text.parts(piece, problems):
                if part.split == VAL and part.text:
                    yield part, part.text
                searched += utf8_bytes(part.text)
                if searched >= SEARCHED_BYTES and writer.tokens:
                    return

    writer = ShardWriter(folder, "val-00000.bin", VAL, tokenizer)
    try:
        for part, ids in tokenizer.encode_documents(texts()):
            # Held-out text may begin in the middle of a document, the rest of which is trained on.
            writer.write(ids, utf8_bytes(part.text), part.begins or not writer.tokens)
            if writer.tokens >= VALIDATION_TOKENS:
                break
        return writer.close()
    except BaseException:
        writer.discard()
        raise


def _sample(file: str) -> bytes:
    """A hash of both ends of a file on this machine; nothing for others, whose pieces have to do."""
    if file == EMBEDDED or "://" in file:
        return b""
    try:
        with open(os.path.expanduser(file), "rb") as source:
            head = source.read(SAMPLED_BYTES)
            end = source.seek(0, os.SEEK_END)
            source.seek(max(0, end - SAMPLED_BYTES))
            return hashlib.sha256(end.to_bytes(8, "big") + head + source.read(SAMPLED_BYTES)).digest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); mend its permissions") from error
