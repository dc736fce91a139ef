"""What every source gives and everything after it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text that stands by itself: a file, a paragraph of the embedded corpus; later a row of a Parquet file."""

    text: str
    source: str  # the path of its file as the user gave it, or 'embedded:' and the name of the corpus
