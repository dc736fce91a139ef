"""What every source gives and everything after it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text that stands by itself: a file, a row of a Parquet or JSONL file, a paragraph of the embedded corpus."""

    text: str
    source: str  # the path of its file as the user gave it, or 'embedded:' and the name of the corpus
    continues: bool = False
    """Whether it goes on where the document before it ended: a part of a file too large to be held at once. It gets no
    boundary token."""
