"""Pieces: parts of the text that can be read independently, in any order and by any process.

    paths ──find_pieces──> Piece, Piece, ... ──read_piece──> Document, Document, ...

A piece is a whole file, some row groups of a Parquet file, or a range of the bytes of a large plain file. The pieces of
the same paths are the same on every machine, and reading them one after another gives every document once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pretrain.errors import DataError
from pretrain.text import formats
from pretrain.text.embedded import embedded_documents
from pretrain.text.files import Say, SourceFile, find_files
from pretrain.text.formats import Document
from pretrain.text.opening import JSON_LINES, PARQUET, TEXT, format_of, is_compressed, open_raw
from pretrain.text.problems import WHOLE, WHOLE_FILE, Cuts, ReadStats

EMBEDDED = "embedded:"

RANGE_BYTES = 8 * 1024 * 1024  # of a plain file make a piece
ROW_GROUPS_BYTES = 16 * 1024 * 1024  # neighbouring row groups that hold less, together, are one piece
COMPRESSION_RATIO = 3  # bytes of text to a byte of a compressed file, about
PROBES = 16  # files looked at side by side, mostly waiting for a server


@dataclass(frozen=True)
class Piece:
    """A part of the text that can be read independently."""

    file: str  # a path or URL, or EMBEDDED
    size: int  # about how many bytes of text it holds; for planning only
    begin: int = 0  # the first row group, or byte
    end: int = 0  # one after the last row group or byte; 0: the whole file
    separator: str = ""  # what stands between the documents of a plain text; empty: it is one document


def find_pieces(
    paths: Sequence[str], field: str = "text", separator: str = "", say: Say = lambda _: None
) -> list[Piece]:
    """List the pieces of these paths in order; with no paths, the embedded corpus.

    Every file was opened and its start looked at (of Parquet, the schema), so that what cannot be read is said before
    any work is done. ``field`` names the text in JSON lines and Parquet, ``separator`` is what stands between the
    documents of plain texts; ``say`` is told what is left out. Raises DataError as ``find_files`` does, and for a file
    that is damaged, no text, or without the field.
    """
    if not paths:
        return [Piece(EMBEDDED, size=4_200_000)]
    files = find_files(paths, say)
    pool = ThreadPoolExecutor(PROBES)
    try:
        return [piece for pieces in pool.map(lambda file: _pieces(file, field, separator), files) for piece in pieces]
    finally:
        pool.shutdown(cancel_futures=True)


def read_piece(piece: Piece, field: str = "text", stats: ReadStats | None = None) -> Iterator[Document]:
    """Give the documents of a piece in order, in bounded memory.

    Bad documents are fixed or skipped, and counted in ``stats``. Raises DataError if the file cannot be read or is
    damaged.
    """
    stats = ReadStats() if stats is None else stats
    kind, _ = format_of(piece.file) or (TEXT, "")
    if piece.file == EMBEDDED:
        for document in embedded_documents():
            stats.records += 1
            stats.size += len(document.text.encode()) + 1
            yield document
    elif piece.size == 0:  # an empty file
        stats.records += 1
        stats.note("empty", piece.file, WHOLE_FILE)
    elif kind == PARQUET:
        yield from formats.read_rows(piece.file, field, piece.begin, piece.end, stats)
    elif kind == JSON_LINES:
        yield from formats.read_lines(piece.file, field, piece.begin, piece.end, stats)
    elif piece.separator:
        yield from formats.read_separated(piece.file, piece.separator, piece.begin, piece.end, stats)
    else:
        yield from formats.read_text(piece.file, piece.begin, piece.end, RANGE_BYTES, stats)


def join_ranges(pieces: Sequence[Piece], cuts: Cuts) -> list[Piece]:
    """The pieces for a tokenizer with these ``cuts``: where any cut changes tokens, ranges of a text are of WHOLE."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        goes_on = before and (before.file, before.end) == (piece.file, piece.begin) and continues(piece)
        if before and goes_on and cuts == "all" and piece.begin % WHOLE:
            joined[-1] = replace(before, size=before.size + piece.size, end=piece.end)
        else:
            joined.append(piece)
    return joined


def continues(piece: Piece) -> bool:
    """Whether a piece begins inside a document: a plain text that is one, cut in ranges."""
    kind, _ = format_of(piece.file) or (TEXT, "")
    return piece.begin > 0 and kind == TEXT and not piece.separator


def read_documents(paths: Sequence[str], field: str = "text", stats: ReadStats | None = None) -> Iterator[Document]:
    """Give the documents of these paths in order. Raises DataError as ``find_pieces`` and ``read_piece`` do."""
    for piece in find_pieces(paths, field):
        yield from read_piece(piece, field, stats)


def _pieces(file: SourceFile, field: str, separator: str) -> list[Piece]:
    kind, _ = format_of(file.name) or (TEXT, "")
    if kind == PARQUET:
        return _row_group_pieces(file, field)
    if file.size == 0:
        return [Piece(file.name, 0)]
    formats.check_start(file.name, kind, must_hold_text=file.named)
    if kind == JSON_LINES:  # the first line is looked at before it is given
        next(formats.read_lines(file.name, field, 0, 0, ReadStats(), buffer=formats.PROBE), None)
    separator = separator if kind == TEXT else ""
    size = file.size if file.size is not None else RANGE_BYTES  # unknown
    if is_compressed(file.name):
        return [Piece(file.name, size * COMPRESSION_RATIO, separator=separator)]
    with open_raw(file.name) as stream:
        if size <= RANGE_BYTES or not stream.seekable():
            return [Piece(file.name, size, separator=separator)]
    ranges = [(begin, min(begin + RANGE_BYTES, size)) for begin in range(0, size, RANGE_BYTES)]
    return [Piece(file.name, end - begin, begin, end, separator) for begin, end in ranges]


def _row_group_pieces(file: SourceFile, field: str) -> list[Piece]:
    sizes = formats.row_group_sizes(file.name, field)
    if file.named and not any(sizes):
        raise DataError(f"{file.name}: this file has no rows; delete it or give another")
    pieces: list[Piece] = []
    begin = 0
    for end in range(1, len(sizes) + 1):
        held = sum(sizes[begin:end])
        if end == len(sizes) or held + sizes[end] > ROW_GROUPS_BYTES:
            if held:
                pieces.append(Piece(file.name, held, begin, end))
            begin = end
    return pieces
