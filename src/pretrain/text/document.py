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


PROBLEMS = {
    "empty": "documents without text, or of nothing but white space; left out",
    "invalid UTF-8": "documents with bytes that are not UTF-8; U+FFFD stands in their place",
    "lone surrogate": "documents with half of a surrogate pair (\\ud83d alone in JSON); U+FFFD in its place",
    "NUL": "documents with NUL characters; kept as they are",
    "not JSON": "lines that are not a JSON object; left out",
    "no field": "JSON objects without the field; left out",
    "null": "rows whose text is null; left out",
    "not text": "JSON objects whose field is a number, list or object; left out",
}
"""What can be wrong with a document, by the name under which readers count it. Nothing else is changed or left out."""
