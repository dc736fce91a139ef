"""The text of a run before it is tokenized: its pieces, which documents are held out, what a tokenizer learns from.

data.paths ──find_sides──> pieces ──read_parts──> Part, Part, ... ──> tokenizer
                                                                  ──> token shards (jobs) or batches (stream)
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

from pretrain.config import DataConfig
from pretrain.errors import DataError
from pretrain.io import sha256_of
from pretrain.text import ReadStats, embedded_name
from pretrain.text.files import Say
from pretrain.text.pieces import RANGE_BYTES, Piece, find_pieces, read_piece
from pretrain.text.split import TRAIN, Part, side_by_hash, split_hash
from pretrain.tokenizer.build import DIFFERENT_BYTES, learning_pieces
from pretrain.tokens.shards import utf8_bytes

HASH, TAIL = "hash", "tail"  # how to split pieces that hold documents of both sides
NO_TEXT = "there is no text to train on; give files that hold some with --data.paths, or hold less of it out"
NO_VALIDATION = (
    "no text is left for validation; give more text, another --data.split or --data.val_paths, or hold nothing out with"
    " --data.val_fraction 0"
)
ONE_FILE = (
    "data.split last_file needs two files or more; give more with --data, or use --data.split hash or --data.val_paths"
)

Report = Callable[[int, int], None]
"""Called with the bytes of text and the tokens done since the last call."""


def describe(data: DataConfig, size: int) -> str:
    """A line that names the text, of about ``size`` bytes."""
    paths = [*data.paths[:3], *(["..."] if len(data.paths) > 3 else [])]
    return f"text      {', '.join(paths) or embedded_name()}: about {size / 1e6:,.1f} MB"


def find_sides(data: DataConfig, say: Say = lambda _: None) -> tuple[list[Piece], list[Piece], str]:
    """The pieces to train on, those held out whole, and how documents of the former are split: train, hash or tail.

    A file that is held out is not trained on, nor is a copy of it; ``say`` is told of those, and of what is left out.

    Raises DataError if the text is missing or cannot be read, or none is left to train on.
    """
    train, held_out, split = find_pieces(data.paths, data.field, data.separator, say), [], TRAIN
    if data.val_paths:
        held_out = find_pieces(data.val_paths, data.field, data.separator, say)
    elif train and data.split == "last_file":
        last = train[-1].file
        held_out = [piece for piece in train if piece.file == last]
        train = train[: -len(held_out)]
        if not train:
            raise DataError(ONE_FILE)
    elif data.val_fraction:
        split = data.split
    if held_out:
        same = same_files([piece.file for piece in train], [piece.file for piece in held_out])
        for file in sorted(file for file, original in same.items() if file != original):
            say(f"held out  {file} too: it is the same file as {same[file]}")
        text, train = train, [piece for piece in train if piece.file not in same]
        if text and not train:
            raise DataError(
                f"all of the text is held out ({', '.join(data.val_paths or [held_out[0].file])}), and none is left to"
                f" train on; give more text, or hold less of it out"
            )
    if not train:  # all of it is held out, or it is a folder of Parquet files without rows
        raise DataError(NO_TEXT)
    return train, held_out, split


def same_files(files: Collection[str], originals: Collection[str]) -> dict[str, str]:
    """Those of ``files`` that are one of ``originals`` or hold the same bytes as one, each with that one.

    Only files on this machine of equal size are read. A URL is the same as itself.
    """
    files, originals = dict.fromkeys(files), dict.fromkeys(originals)  # each once
    same = {file: file for file in files if file in originals}
    sizes: dict[int, list[str]] = {}
    for file in originals:
        if os.path.isfile(file) and os.path.getsize(file):  # empty ones hold no text
            sizes.setdefault(os.path.getsize(file), []).append(file)
    hashed = functools.cache(lambda file: sha256_of(Path(file)))
    for file in files:
        for original in sizes.get(os.path.getsize(file), []) if os.path.isfile(file) and file not in same else []:
            if os.path.samefile(file, original) or hashed(file) == hashed(original):
                same[file] = original
                break
    return same


def read_parts(
    pieces: Sequence[Piece], field: str, split: str, val_fraction: float, stats: ReadStats
) -> Iterator[Part]:
    """The documents of consecutive pieces, each on its side of the split: all train, all val, or by hash."""
    documents = chain.from_iterable(read_piece(piece, field, stats) for piece in pieces)
    if split != HASH:
        yield from (Part(document.text, split, not document.continues) for document in documents)
    elif first := next(documents, None):
        opened = TRAIN
        if first.continues:  # a large plain text, whose side the beginning of the file decides
            start = replace(pieces[0], begin=0, end=RANGE_BYTES)
            for document in read_piece(start, field, ReadStats()):
                opened = side_by_hash(document.text, val_fraction)
                break
        yield from split_hash(chain([first], documents), val_fraction, opened)


def learning_texts(
    sources: Sequence[tuple[Callable[[], Iterable[Part]], int]],
    most: float,
    report: Report = lambda _size, _tokens: None,
) -> Iterator[str]:
    """The texts of the training side for a bpe to learn from: of all sources, or evenly about ``most`` bytes of them.

    A source is a function that reads it, and its size. First comes so little of each that a bpe learns from all of it
    in any case, then the rest: so what it learns from is even where it does not read all of it.
    """
    size = sum(own for _, own in sources)
    bounds = [0, DIFFERENT_BYTES, most]
    shares = [bound / size if bound < size else math.inf for bound in sorted({min(bound, most) for bound in bounds})]
    for begin, end in pairwise(shares):
        for read, own in sources if begin < math.inf else ():
            taken = 0
            for part in read():
                for text in learning_pieces(part.text):
                    length = utf8_bytes(text)
                    if begin * own <= taken < end * own:
                        report(length, 0)
                        if part.split == TRAIN:
                            yield text
                    taken += length
                if taken >= end * own:
                    break


def training_texts(parts: Iterable[Part], limit: float, report: Report = lambda _size, _tokens: None) -> Iterator[str]:
    """The texts of the training side, from parts of together about ``limit`` bytes."""
    taken = 0
    for part in parts:
        if part.split == TRAIN:
            yield part.text
        size = utf8_bytes(part.text)
        report(size, 0)
        taken += size
        if taken >= limit:
            break
