"""Set the validation text apart, document by document as they are read, in bounded memory.

    Document, Document, ... ──split_tail or split_hash──> Part, Part, ...   each for training or validation
            └─────────survey ──find_tail──> Tail, where a tail begins

A document is wholly on one side, except the one that ``split_tail`` may cut. Any run of documents can be split by
itself, so that many processes split one text: only its place in the whole has to be known.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from pretrain.errors import DataError
from pretrain.text.formats import Document
from pretrain.text.problems import ReadStats

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Part:
    """A document, or a part of one, on its side of the split."""

    text: str
    split: str  # TRAIN or VAL
    begins: bool  # whether a document of this side begins here; otherwise it continues the part before


@dataclass(frozen=True)
class Survey:
    """What a run of documents holds."""

    characters: int = 0
    documents: int = 0  # that begin here
    last: int | None = None  # characters before the last document that begins here; None: none does
    alphabet: str = ""  # the distinct characters, sorted, if they were asked for
    read: ReadStats = field(default_factory=ReadStats)  # what was read for it


def survey(documents: Iterable[Document], alphabet: bool = False) -> Survey:
    """Count the documents, in one pass."""
    characters, count, last = 0, 0, None
    distinct: set[str] = set()
    for document in documents:
        if not document.continues:
            count, last = count + 1, characters
        characters += len(document.text)
        if alphabet:
            distinct.update(document.text)
    return Survey(characters, count, last, "".join(sorted(distinct)))


def join_surveys(surveys: Sequence[Survey]) -> Survey:
    """The survey of runs of documents that follow one another."""
    characters, last = 0, None
    for each in surveys:
        last = last if each.last is None else characters + each.last
        characters += each.characters
    alphabet = "".join(sorted(set().union(*(each.alphabet for each in surveys))))
    return Survey(characters, sum(each.documents for each in surveys), last, alphabet)


@dataclass(frozen=True)
class Tail:
    """The last share of all characters, for :func:`split_tail`. Places are counted in characters over all text."""

    cut: int  # where validation begins
    last: int  # where the last document begins


def find_tail(whole: Survey, val_fraction: float) -> Tail:
    """Where the last ``val_fraction`` of all characters begin: ``int((1 - val_fraction) * characters)``.

    Raises DataError if there is no text or a side would be empty.
    """
    if whole.characters == 0:
        raise DataError("there is no text to train on; give files that hold some with --data.paths")
    # In decimals, as 1 - 0.9 in floats is 0.0999...98 and would move the cut by one character.
    cut = int((1 - Decimal(str(val_fraction))) * whole.characters)
    if cut == 0:  # a larger fraction cannot leave validation empty, only training
        raise DataError(
            f"no text is left for training ({whole.characters:,} characters in {whole.documents:,} documents, "
            f"data.val_fraction {val_fraction}); give more text or another data.val_fraction"
        )
    return Tail(cut, whole.last or 0)


def split_tail(documents: Iterable[Document], tail: Tail, position: int = 0, opened: int = 0) -> Iterator[Part]:
    """Split off the characters from ``tail.cut`` on.

    The document in which the cut falls stays whole, in training, unless it is the last one: that is cut at exactly
    this character, so that a single file splits as nanoGPT and LLMs-from-scratch do it. ``position``: characters
    before this run of documents; ``opened``: where the document began that the run may continue.
    """
    for document in documents:
        if not document.continues:
            opened = position
        text, begins = document.text, not document.continues
        if opened == tail.last < tail.cut:
            head = text[: max(0, tail.cut - position)]
            if head or len(head) == len(text):
                yield Part(head, TRAIN, begins)
            if len(head) < len(text):
                yield Part(text[len(head) :], VAL, begins=position + len(head) == tail.cut)
        else:
            yield Part(text, VAL if opened >= tail.cut else TRAIN, begins)
        position += len(text)


def split_hash(documents: Iterable[Document], val_fraction: float, opened: str = TRAIN) -> Iterator[Part]:
    """Choose about ``val_fraction`` of the documents for validation by the SHA-256 of their text.

    The choice depends on nothing else, so equal documents are on the same side and stay there when others are added.
    Of a document in several parts the first one decides; ``opened`` is the side of the one that the run may continue.
    """
    for document in documents:
        if not document.continues:
            opened = side_by_hash(document.text, val_fraction)
        yield Part(document.text, opened, not document.continues)


def side_by_hash(text: str, val_fraction: float) -> str:
    """The side of a document, by the first 64 bits of its SHA-256."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return VAL if number < val_fraction * 2**64 else TRAIN
