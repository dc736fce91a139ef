"""What is wrong with the text that was read: how often, where first, and in words.

read_piece → ReadStats → problem_lines: lines to show
                       → refuse_broken: DataError, if most of the text cannot be used
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from pretrain.errors import DataError, PretrainError
from pretrain.io import without_secrets
from pretrain.text.opening import PARQUET, format_of, is_url, one_line, open_bytes

PROBLEMS = {
    "empty": "documents without text, or of nothing but white space; skipped",
    "not UTF-8": "bytes that are not UTF-8; U+FFFD stands in their place",
    "half surrogate": "halves of a surrogate pair (\\ud83d alone in JSON); U+FFFD in their place",
    "NUL character": "NUL characters; kept as they are",
    "not JSON": "lines that are not a JSON object; skipped",
    "no field": "JSON objects without the field; skipped",
    "null": "rows whose text is null; skipped",
    "not text": "JSON objects whose field is a number, list or object; skipped",
    "no separator": "text files in which the separator never occurs; each is one document",
    "cut": "places where a long document is cut; tokens beside them may differ from those of the whole document",
}
"""What can be wrong with text. Nothing else is changed or skipped."""

Cuts = Literal["none", "inside words", "all"]
"""At which cuts of a long document tokens may change (``Tokenizer.cuts``)."""

WHOLE = 16 * 1024 * 1024
"""Characters, or bytes of a plain file, up to which parts of a document are joined again where cuts change tokens."""

# Of manifests made before bytes and characters were counted.
_EARLIER = {
    "invalid UTF-8": "documents with bytes that are not UTF-8; U+FFFD stands in their place",
    "lone surrogate": "documents with half of a surrogate pair (\\ud83d alone in JSON); U+FFFD in its place",
    "NUL": "documents with NUL characters; kept as they are",
}
_BROKEN = ("not JSON", "no field", "null", "not text")  # skipped, and no text was meant to be there but is missing
_SKIPPED = ("empty", *_BROKEN)

WHOLE_FILE = -1  # in place of an offset
COUNTED_BYTES = 2**30  # of a file, at most, in which the number of a line is counted; beyond, its byte is given


@dataclass
class ReadStats:
    """What was read, and what was wrong with it. Readers add to it."""

    records: int = 0  # lines, rows, files, or what stands between separators; those skipped included
    size: float = 0  # bytes of the files that these records took, decompressed, about
    problems: dict[str, int] = field(default_factory=dict)  # how often each of PROBLEMS was met
    first: dict[str, tuple[str, int]] = field(default_factory=dict)  # of each, the file and the byte or row of Parquet
    cuts: Cuts = "none"  # which of them change tokens
    whole: bool = True  # whether the parts beside these are joined, up to WHOLE; earlier versions did not

    def note(self, problem: str, file: str, offset: int, count: int = 1) -> None:
        """Count a problem that is at an offset of a file."""
        self.problems[problem] = self.problems.get(problem, 0) + count
        self.first.setdefault(problem, (file, offset))

    def joins(self, file: str, offset: int, in_word: bool, held: int) -> bool:
        """Whether the part after a cut goes on with the one before, as tokens would change; else such a cut is counted.

        ``in_word``: no good place was found for the cut; ``held``: characters joined so far, beyond WHOLE no more are.
        """
        if self.cuts == "none" or (self.cuts == "inside words" and not in_word):
            return False
        if self.whole and held < WHOLE:
            return True
        self.note("cut", file, offset)
        return False

    def add(self, later: ReadStats) -> None:
        """Add what was read after this."""
        self.records += later.records
        self.size += later.size
        for problem, count in later.problems.items():
            self.problems[problem] = self.problems.get(problem, 0) + count
        self.first = {**later.first, **self.first}

    def places(self) -> dict[str, str]:
        """Where each problem is first, in words."""
        return {problem: _place(file, offset) for problem, (file, offset) in sorted(self.first.items())}

    def lines(self) -> list[str]:
        """A line to show for each problem."""
        return problem_lines(self.problems, self.places(), self.records)


def problem_lines(problems: Mapping[str, int], places: Mapping[str, str], records: int) -> list[str]:
    """A line for each problem: how often, of how many records (0: unknown), what, and where first."""
    lines = []
    for problem, count in sorted(dict(problems).items()):  # a copy: a thread may be adding to them
        of = f" of {records:,}" if records and problem in _SKIPPED else ""
        what = PROBLEMS.get(problem) or _EARLIER.get(problem, problem)
        where = f" (first: {places[problem]})" if problem in places else ""
        lines.append(f"problem   {count:,}{of} {what}{where}")
    return lines


def refuse_broken(read: ReadStats, allowed: bool = False) -> None:
    """A DataError if more than half of the records could not be used, unless that is ``allowed``."""
    broken = {problem: read.problems[problem] for problem in _BROKEN if problem in read.problems}
    if allowed or 2 * sum(broken.values()) <= read.records:
        return
    worst = max(broken, key=broken.__getitem__)
    raise DataError(
        f"{_place(*read.first[worst])}: the first of {broken[worst]:,} {PROBLEMS[worst].partition(';')[0]}, of"
        f" {read.records:,} in all; mend the text, or use only the rest of it with --data.allow_broken"
        f" (train, plan) or --allow-broken"
    )


def _place(file: str, offset: int) -> str:
    """A place in a file, in words: its line, or row of Parquet, from 1."""
    name = without_secrets(file).encode(errors="backslashreplace").decode()  # for a manifest, which is JSON in UTF-8
    kind = (format_of(file) or ("", ""))[0]
    if offset == WHOLE_FILE:
        return name
    if kind == PARQUET:
        return f"{name}, row {offset + 1:,}"
    if not is_url(file) and offset < COUNTED_BYTES:
        with suppress(PretrainError), one_line(file), open_bytes(file) as stream:  # it may be gone meanwhile
            return f"{name}, line {1 + sum(_line_ends(stream, offset)):,}"
    return f"{name}, byte {offset:,}"


def _line_ends(stream: BinaryIO, count: int) -> Iterator[int]:
    while count > 0 and (chunk := stream.read(min(2**20, count))):
        yield chunk.count(b"\n")
        count -= len(chunk)
