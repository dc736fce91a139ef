"""The text of a run before it is tokenized: its pieces, which documents are held out, what a tokenizer learns from.

data.paths ──find_sides──> pieces ──read_parts──> Part, Part, ... ──> tokenizer
                                                                  ──> token shards (jobs) or batches (stream)
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

from pretrain.config import DataConfig
from pretrain.errors import DataError
from pretrain.io import sha256_of
from pretrain.text import ReadStats, embedded_name
from pretrain.text.files import Say
from pretrain.text.pieces import RANGE_BYTES, Piece, find_pieces, read_piece
from pretrain.text.split import NOTHING, TRAIN, Part, Shares, join_parts, side_by_hash, split_hash
from pretrain.tokenizer.build import DIFFERENT_BYTES, learning_pieces
from pretrain.tokens.shards import utf8_bytes

HASH, TAIL = "hash", "tail"  # how to split pieces that hold documents of both sides
NO_TEXT = "there is no text to train on; give files that hold some with --data.paths, or hold less of it out"
NO_VALIDATION = (
    "no text is left for validation; give more text, another --data.split or --data.val_paths, or hold nothing out with"
    " --data.val_fraction 0"
)
NO_TEST = "no text is left for the test; give more text, another --data.split, or leave out --data.test_fraction"
FEW_FILES = (
    "data.split last_file needs {} files or more; give more with --data, or use --data.split hash or --data.val_paths"
)

SAMPLE_BYTES = 2_000_000
"""Text that is read for an estimate, from up to four places."""

Report = Callable[[int, int], None]
"""Called with the bytes of text and the tokens done since the last call."""


def describe(data: DataConfig, size: int) -> str:
    """A line that names the text, of about ``size`` bytes."""
    paths = [*data.paths[:3], *(["..."] if len(data.paths) > 3 else [])]
    return f"text      {', '.join(paths) or embedded_name()}: about {size / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Sides:
    """The pieces of the text: those held out whole, and the others, of whose documents some may be held out."""

    train: list[Piece]
    val: list[Piece]
    test: list[Piece]
    split: str  # how documents of ``train`` are split: train (not at all), hash or tail
    shares: Shares  # of them that are held out so


def find_sides(data: DataConfig, say: Say = lambda _: None) -> Sides:
    """Find the text that ``data`` names, and which of it is held out.

    A file that is held out is not trained on, nor is a copy of it, and what is tested on is in no other side; ``say``
    is told of copies, and of what is left out.

    Raises DataError if the text is missing or cannot be read, or none is left to train on.
    """
    train, val, test, split = find_pieces(data.paths, data.field, data.separator, say), [], [], TRAIN
    shares = Shares(0.0 if data.val_paths else data.val_fraction, data.test_fraction)
    if data.val_paths:
        val = find_pieces(data.val_paths, data.field, data.separator, say)
        train = _without(train, val, data.val_paths, say)
    if data.split == "last_file":
        needed = "three" if data.test_fraction and not data.val_paths else "two"
        if data.test_fraction:
            train, test = _last_file(train, needed, say)
        if not data.val_paths:
            train, val = _last_file(train, needed, say)
    elif shares:
        split = data.split
    if not train:  # all of it is held out, or it is a folder of Parquet files without rows
        raise DataError(NO_TEXT)
    return Sides(train, val, test, split, shares if split != TRAIN else NOTHING)


def _last_file(pieces: list[Piece], needed: str, say: Say) -> tuple[list[Piece], list[Piece]]:
    """The pieces before the last file that are none of a copy of it, and those of the last file."""
    last = [piece for piece in pieces if piece.file == pieces[-1].file]
    if len(last) == len(pieces) > 0:
        raise DataError(FEW_FILES.format(needed))
    return _without(pieces[: len(pieces) - len(last)], last, [piece.file for piece in last[:1]], say), last


def _without(pieces: list[Piece], held_out: list[Piece], names: Sequence[str], say: Say) -> list[Piece]:
    """The pieces whose files are not those of ``held_out``, nor copies of these. A DataError if none is."""
    same = same_files([piece.file for piece in pieces], [piece.file for piece in held_out])
    for file in sorted(file for file, original in same.items() if file != original):
        say(f"held out  {file} too: it is the same file as {same[file]}")
    left = [piece for piece in pieces if piece.file not in same]
    if pieces and not left:
        raise DataError(
            f"all of the text is held out ({', '.join(names)}), and none is left to train on; give more text, or hold"
            f" less of it out"
        )
    return left


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


def read_parts(pieces: Sequence[Piece], field: str, split: str, shares: Shares, stats: ReadStats) -> Iterator[Part]:
    """The documents of consecutive pieces, each on its side: all on that which ``split`` names, or by hash."""
    return join_parts(_split_parts(pieces, field, split, shares, stats))


def _split_parts(pieces: Sequence[Piece], field: str, split: str, shares: Shares, stats: ReadStats) -> Iterator[Part]:
    documents = chain.from_iterable(read_piece(piece, field, stats) for piece in pieces)
    if split != HASH:
        yield from (Part(document.text, split, not document.continues, document.more) for document in documents)
    elif first := next(documents, None):
        opened = TRAIN
        if first.continues:  # a large plain text, whose side the beginning of the file decides
            start = replace(pieces[0], begin=0, end=RANGE_BYTES)
            for document in read_piece(start, field, ReadStats()):
                opened = side_by_hash(document.text, shares)
                break
        yield from split_hash(chain([first], documents), shares, opened)


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


def read_sample(pieces: list[Piece], field: str, stats: ReadStats) -> tuple[list[str], int, bool]:
    """Documents of about SAMPLE_BYTES in all, from up to four pieces spread over the whole.

    Gives the texts without those that are blank, their bytes, and whether that is all of the text.
    """
    places = pieces[:: max(1, math.ceil(len(pieces) / 4))]
    whole = len(places) == len(pieces)
    texts: list[str] = []
    read = 0
    for number, piece in enumerate(places, 1):
        for document in read_piece(piece, field, stats):
            if read >= SAMPLE_BYTES * number // len(places):
                whole = False
                break
            texts.append(document.text[:SAMPLE_BYTES])
            read += utf8_bytes(document.text)
    return [text for text in texts if text.strip()], read, whole
