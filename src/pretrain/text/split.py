"""Set the held-out text apart, document by document as they are read, in bounded memory.

    Document, Document, ... ──split_tail or split_hash──> Part, Part, ...   each for training, validation or the test
            │                       └─join_parts──> Part, Part, ...         as they are encoded
            └─────────survey ──find_tail──> Tail, where a tail begins

A document is wholly on one side, except the one that ``split_tail`` may cut. Any run of documents can be split by
itself, so that many processes split one text: only its place in the whole has to be known.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from pretrain.errors import DataError
from pretrain.text.formats import Document
from pretrain.text.problems import ReadStats

TRAIN, VAL, TEST = SIDES = "train", "val", "test"
"""To learn from; to choose by; and what nothing learns from or is chosen by, measured once at the end of a run."""


@dataclass(frozen=True)
class Shares:
    """Shares of a text that are held out, together below 1."""

    val: float = 0.0
    test: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.val or self.test)

    def __str__(self) -> str:
        return " and ".join(f"data.{side}_fraction {share}" for side, share in vars(self).items() if share)


NOTHING = Shares()


@dataclass(frozen=True)
class Part:
    """A document, or a part of one, on its side of the split."""

    text: str
    split: str  # TRAIN, VAL or TEST
    begins: bool  # whether a document of this side begins here; otherwise it continues the part before
    more: bool = False  # whether it is to be encoded with the part that continues it (``join_parts``)


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
    test: int  # where the test begins; beyond the end if there is none


def find_tail(whole: Survey, shares: Shares) -> Tail:
    """Where the last ``shares.test`` of all characters begin, and ``shares.val`` before them.

    That is ``int((1 - share) * characters)`` for what is held out from there on.

    Raises DataError if there is no text or a side would be empty.
    """
    if whole.characters == 0:
        raise DataError("there is no text to train on; give files that hold some with --data.paths")
    # In decimals, as 1 - 0.9 in floats is 0.0999...98 and would move the cut by one character.
    val, test = Decimal(str(shares.val)), Decimal(str(shares.test))
    cut, test_cut = (int((1 - share) * whole.characters) for share in (val + test, test))
    if cut == 0:  # a larger fraction cannot leave validation empty, only training
        raise DataError(
            f"no text is left for training ({whole.characters:,} characters in {whole.documents:,} documents, "
            f"{shares}); give more text or hold less of it out"
        )
    return Tail(cut, whole.last or 0, test_cut if test else whole.characters + 1)


def split_tail(documents: Iterable[Document], tail: Tail, position: int = 0, opened: int = 0) -> Iterator[Part]:
    """Split off the characters from ``tail.cut`` on for validation, and those from ``tail.test`` on for the test.

    A document in which a cut falls stays whole, on the side before it, unless it is the last one: that is cut at
    exactly this character, so that a single file splits as nanoGPT and LLMs-from-scratch do it. ``position``:
    characters before this run of documents; ``opened``: where the document began that the run may continue.
    """
    begin = {TRAIN: 0, VAL: tail.cut, TEST: tail.test}  # of each side
    end = {TRAIN: tail.cut, VAL: tail.test, TEST: math.inf}
    for document in documents:
        if not document.continues:
            opened = position
        text, begins = document.text, not document.continues
        if opened < tail.last or not text:
            yield Part(text, next(side for side in reversed(SIDES) if opened >= begin[side]), begins, document.more)
        else:  # the last document
            for side in SIDES:
                first, last = (min(max(0, place - position), len(text)) for place in (begin[side], end[side]))
                if first < last:
                    begins = begins or position + first == begin[side] > opened
                    yield Part(text[first:last], side, begins, document.more)
                    begins = False
        position += len(text)


def split_hash(documents: Iterable[Document], shares: Shares, opened: str = TRAIN) -> Iterator[Part]:
    """Choose about ``shares`` of the documents for validation and the test by the SHA-256 of their text.

    The choice depends on nothing else, so equal documents are on the same side and stay there when others are added.
    Of a document in several parts the first one decides; ``opened`` is the side of the one that the run may continue.
    """
    for document in documents:
        if not document.continues:
            opened = side_by_hash(document.text, shares)
        yield Part(document.text, opened, not document.continues, document.more)


def join_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """Join the parts that are to be encoded as one, since tokens would change at the cuts between them."""
    held: list[Part] = []
    for part in parts:
        if held and (part.begins or part.split != held[0].split):  # the other side begins within the document
            yield _joined(held)
            held = []
        held.append(part)
        if not part.more:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: list[Part]) -> Part:
    return parts[0] if len(parts) == 1 else replace(parts[0], text="".join(part.text for part in parts), more=False)


def side_by_hash(text: str, shares: Shares) -> str:
    """The side of a document, by the first 64 bits of its SHA-256.

    Validation has the lowest numbers and the test the highest, so that neither depends on the other's share.
    """
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return VAL if number < shares.val * 2**64 else TEST if number >= (1 - shares.test) * 2**64 else TRAIN
