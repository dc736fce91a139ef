"""Documents: where raw text comes from. The first room of the street; nothing heavier than the standard library.

    files, folders, globs ─┐
                           ├─ read_documents ──> Document, Document, ... ──> split_documents ──> training, validation
    the embedded corpus ───┘

``sources`` finds and reads files, ``embedded`` is the corpus that comes with the installation, ``split`` sets the
validation text apart. A new kind of file is one more entry in ``sources.READERS``.
"""

from pretrain.text.embedded import embedded_documents, embedded_name
from pretrain.text.sources import Document, find_files, read_documents
from pretrain.text.split import split_documents

__all__ = [
    "Document",
    "embedded_documents",
    "embedded_name",
    "find_files",
    "read_documents",
    "split_documents",
]
