"""Documents: where raw text comes from. The first room of the street; nothing heavier than the standard library.

    files, folders, patterns, URLs ──find_pieces──> Piece, Piece, ... ──read_piece──> Document, Document, ...

``sources`` finds the files, ``remote`` opens those on other machines, ``formats`` reads the types of file, ``pieces``
divides files into parts that are read by themselves. ``embedded`` is the corpus that comes with the installation,
``split`` sets the validation text apart. The imports of libraries for Parquet, remote text and the like stand where
they are needed.
"""

from pretrain.text.document import Document
from pretrain.text.embedded import embedded_documents, embedded_name
from pretrain.text.pieces import Piece, find_pieces, read_documents, read_piece

__all__ = [
    "Document",
    "Piece",
    "embedded_documents",
    "embedded_name",
    "find_pieces",
    "read_documents",
    "read_piece",
]
