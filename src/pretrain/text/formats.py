"""The types of file: bytes to documents, in bounded memory, whatever they contain.

    a range of plain text ───────────read_text───────┐
    the same with a separator in it ─read_separated──┤
    a range of JSON lines ───────────read_lines──────┼──> Document, Document, ...
    row groups of Parquet ───────────read_rows───────┘

A range of a file begins and ends where ``_text_cut`` (plain text) or the next line or separator says, so that
consecutive ranges give every document once. Readers count in ``stats`` what they read and what was wrong with it
(``problems.py``).
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from pretrain.errors import DataError
from pretrain.text.content import START, refuse_other_encoding, refuse_what_is_not_text
from pretrain.text.opening import PARQUET, REMOTE_BUFFER, TEXT, is_url, one_line, open_bytes, open_raw
from pretrain.text.problems import WHOLE, WHOLE_FILE, ReadStats

PROBE = 64 * 1024  # bytes at the start of a file that must look like text
CHUNK = 1024 * 1024  # bytes of plain text decoded at once
BLOCK = 64 * 1024  # bytes of lines split at once; few, so that little is read beyond a range
PART_CHARACTERS = 4 * 1024 * 1024  # a longer text is given in parts; in memory each is 16 MiB at most
CUT_WINDOW = 64 * 1024  # characters (of a range: bytes) searched for a good place to cut
LINE_BYTES = 1024**3  # a longer line is an error
ROWS, ROWS_BYTES = 1024, 8 * 1024 * 1024  # rows of Parquet decoded at once, at most, and about their bytes

# Where a text may be cut without changing its tokens: between a letter or digit and a blank or line end (as
# tokenizer.split_text does), or after a single line end. The pre-tokenizers in use end a word in both places.
_GOOD_CUT = re.compile(r"(?<=[^\W_])(?=[ \n])|(?<=\S\n)(?=[^\s/])")
GOOD, IN_WORD = "at a good place", "in a word"  # how a part of a text is cut off
_LINE_ENDS = (b"\r\n", b"\n")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Of Arrow. A column of nothing but nulls may have the type null, as one of many files of a text.
_TEXT_TYPE = re.compile(r"null$|(dictionary<values=)?(large_)?(string|binary)(_view)?(,|$)")
_JSON = json.JSONDecoder(strict=False)  # which keeps raw tabs and line ends in strings, rather than refusing them


@dataclass(frozen=True)
class Document:
    """An independent text: a file, a row of a Parquet or JSONL file, a paragraph of the embedded corpus."""

    text: str
    source: str  # the path of its file as the user gave it, or 'embedded:' and the name of the corpus
    continues: bool = False
    """Whether it continues the one before it, as a part of a document too large to be held. It gets no BOS token."""
    more: bool = False
    """Whether tokens would change if it were encoded apart from the part that follows."""


def check_start(file: str, kind: str, must_hold_text: bool) -> None:
    """Look at the start of a file of text or JSON lines.

    Raises DataError if it is not UTF-8 text: another type of file, UTF-16 or UTF-32, binary, or of another encoding
    (more than 1 in 1000 bytes are not UTF-8, of JSON lines 1 in 50, as one of them may be all wrong); what is rarer is
    left to the reader. With ``must_hold_text`` also if the whole file is blank.
    """
    with one_line(file), open_bytes(file, buffer=PROBE) as stream:
        start = stream.read(PROBE)
    whole = len(start) < PROBE
    refuse_what_is_not_text(file, start, kind)
    text, _, wrong, offset = _utf8(start, whole)
    if (1000 if kind == TEXT else 50) * wrong > len(start):
        refuse_other_encoding(file, start, wrong, offset, kind)
    if must_hold_text and whole and not text.removeprefix("\ufeff").strip():
        raise DataError(f"{file}: this file holds only white space; delete it or give another")


# Plain text -----------------------------------------------------------------------------------------------------------


def read_text(file: str, begin: int, end: int, step: int, stats: ReadStats) -> Iterator[Document]:
    """Give the text from the cut at ``begin`` to the cut at ``end``, or with ``end`` 0 to the end of the file.

    It is one document, in parts of about PART_CHARACTERS that of a range also end every ``step`` bytes; those after the
    first, and all if ``begin`` > 0, continue it. Every character is kept, line ends included; only a byte-order mark at
    the start of the file goes.
    """
    with one_line(file), open_bytes(file) as stream:
        start, ends = 0, {None: False}  # where parts end in any case, and whether in a word
        if end:
            with open_raw(file) as beyond:
                start, in_word = _range_cut(beyond, begin, stats)
                stop, _ = _range_cut(beyond, end, stats)
                within = dict(_text_cut(beyond, edge) for edge in (*range(begin + step, end, step), end))
            ends = {edge: bad for edge, bad in within.items() if start < edge < stop} | {stop: False}
            stream.seek(start)
            if begin and start < stop:
                stats.joins(file, start, in_word, WHOLE)
        continues, held = begin > 0, 0
        stats.records += not continues
        for stop, in_word in ends.items():
            place = start
            for part, cut in _parts(_decoded(stream, file, start, None if stop is None else stop - start, stats)):
                if not cut and not continues and not end and not part.strip():
                    stats.note("empty", file, WHOLE_FILE)
                    return
                size = len(part) if part.isascii() else len(part.encode())
                stats.size += size
                place += size
                held += len(part)
                is_last = not cut and stop == next(reversed(ends))
                more = not is_last and stats.joins(file, place, cut == IN_WORD if cut else in_word, held)
                if part:
                    yield Document(part, file, continues, more)
                held = held if more else 0
                continues = True
            start = stop or 0


def _range_cut(stream: BinaryIO, position: int, stats: ReadStats) -> tuple[int, bool]:
    """Where a range of a plain text begins or ends, and whether that is no good place: as ``_text_cut``.

    Where only a cut in a word changes tokens, it is the first good place, or the end of the file, in WHOLE bytes.
    """
    offset, in_word = _text_cut(stream, position)
    if in_word and stats.whole and stats.cuts == "inside words":
        size = stream.seek(0, os.SEEK_END)
        for at in range(position, min(position + WHOLE, size), CHUNK):
            found, bad = _text_cut(stream, at, CHUNK)
            if not bad:
                return found, False
        if position + WHOLE >= size:
            return size, False
    return offset, in_word


def _text_cut(stream: BinaryIO, position: int, length: int = 0) -> tuple[int, bool]:
    """The offset at which to cut a plain text, the first good place from ``position`` on, and whether it is none.

    Where there is none within ``length`` bytes (0: CUT_WINDOW) it is the next character. It depends on the bytes of the
    file alone, so that the reader of a range and the reader of the next agree on it.
    """
    if position == 0:
        return 0, False
    before = max(0, position - 8)  # a good place looks back at up to two characters
    stream.seek(before)
    window = stream.read(position - before + (length or CUT_WINDOW))
    start = _next_character(window, 0) if before else 0
    text = window[start:].decode("utf-8", "surrogateescape")
    for cut in _GOOD_CUT.finditer(text):
        offset = before + start + len(text[: cut.start()].encode("utf-8", "surrogateescape"))
        if offset >= position:
            return offset, False
    return before + _next_character(window, position - before), True


def _next_character(data: bytes, offset: int) -> int:
    """Skip the continuation bytes of a character; there are never more than three."""
    stop = min(offset + 3, len(data))
    while offset < stop and data[offset] & 0xC0 == 0x80:
        offset += 1
    return offset


def _decoded(stream: BinaryIO, file: str, start: int, count: int | None, stats: ReadStats) -> Iterator[str]:
    """Decode ``count`` bytes from ``start`` on (None: all), whole characters at a time; bad bytes become U+FFFD."""
    rest, last = b"", False
    while not last:
        chunk = stream.read(CHUNK if count is None else min(CHUNK, count))
        count = None if count is None else count - len(chunk)
        last = not chunk
        rest += chunk
        if start == 0 and rest.startswith(codecs.BOM_UTF8):
            rest, start = rest.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        text, used, wrong, place = _utf8(rest, last)
        if wrong:
            stats.note("not UTF-8", file, start + place, wrong)
        if nuls := text.count("\0"):
            stats.note("NUL character", file, start + rest.index(b"\0"), nuls)
        rest, start = rest[used:], start + used
        yield text


def _utf8(data: bytes, final: bool) -> tuple[str, int, int, int]:
    """Decode the complete characters, or all if ``final``.

    Gives the text, the number of bytes it took, how many of these are not UTF-8, and the place of the first such.
    """
    try:
        return *codecs.utf_8_decode(data, "strict", final), 0, 0
    except UnicodeDecodeError as error:
        wrong = len(_SURROGATE.findall(codecs.utf_8_decode(data, "surrogateescape", final)[0]))
        return *codecs.utf_8_decode(data, "replace", final), wrong, error.start


def _parts(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Join texts and cut them at good places into long parts. Gives each part and how it is cut off: the last, not."""
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > PART_CHARACTERS + CUT_WINDOW:
            end, cut = start + PART_CHARACTERS, IN_WORD
            if good := _GOOD_CUT.search(held, end, end + CUT_WINDOW):
                end, cut = good.start(), GOOD
            yield held[start:end], cut
            start = end
        held = held[start:]
    yield held, ""


def _documents(text: Any, file: str, place: int, stats: ReadStats) -> Iterator[Document]:
    """Give the text of a record as a document, in parts if it is long; leave out and count what is none."""
    if not isinstance(text, str):
        stats.note("null" if text is None else "not text", file, place)
    elif not text or text.isspace():
        stats.note("empty", file, place)
    else:
        if nuls := text.count("\0"):
            stats.note("NUL character", file, place, nuls)
        parts = _parts([text]) if len(text) > PART_CHARACTERS else [(text, "")]  # most are short
        held = 0
        for number, (part, cut) in enumerate(parts):
            held += len(part)
            more = bool(cut) and stats.joins(file, place, cut == IN_WORD, held)
            yield Document(part, file, number > 0, more)
            held = held if more else 0


# Documents between separators, and JSON lines -------------------------------------------------------------------------


def read_separated(file: str, separator: str, begin: int, end: int, stats: ReadStats) -> Iterator[Document]:
    """Give the documents between separators (long ones in parts) that start after ``begin``, not after ``end``.

    A line end before and one after a separator go with it.
    """
    fix = f"is {separator!r} what stands between its documents (data.separator)?"
    for position, data, closed in _records(file, separator.encode(), begin, end, stats, fix):
        if not closed and not position:
            stats.note("no separator", file, WHOLE_FILE)
        elif not closed and not data.strip():
            return
        stats.records += 1
        before = (codecs.BOM_UTF8,) if position == 0 else _LINE_ENDS
        data = data.removeprefix(next(filter(data.startswith, before), b""))
        if closed:
            data = data.removesuffix(next(filter(data.endswith, _LINE_ENDS), b""))
        text, _, wrong, place = _utf8(data, True)
        if wrong:
            stats.note("not UTF-8", file, position + place, wrong)
        yield from _documents(text, file, position, stats)


def read_lines(file: str, field: str, begin: int, end: int, stats: ReadStats, buffer: int = 0) -> Iterator[Document]:
    """Give one document a line (a long one in parts), from the lines that start after ``begin``, not after ``end``.

    Blank lines are nothing. ``buffer``: bytes to read at once, if not as usual. Raises DataError if the first line of
    the file is not a JSON object with a text in ``field``: then it is the wrong file or the wrong field.
    """
    fix = f'give one such as {{"text": "..."}} a line; from a JSON array: jq -c .[] {shlex.quote(file)} > OUT.jsonl'
    object_fix = f"write each object on a line of its own: jq -c . {shlex.quote(file)} > OUT.jsonl"
    first = begin == 0
    for position, line, _ in _records(file, b"\n", begin, end, stats, fix, buffer):
        if position == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            continue
        stats.records += 1
        decoded, _, wrong, _ = _utf8(line, True)
        try:
            row = _JSON.decode(decoded)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            if first and decoded.lstrip().startswith("{"):
                raise DataError(f"{file}: its first line is not one whole JSON object; {object_fix}")
            if first:
                raise DataError(f"{file}: its first line is not a JSON object; {fix}")
            stats.note("not JSON", file, position)
            continue
        if first and not isinstance(row.get(field, 0), str | None):
            texts = [name for name, value in row.items() if isinstance(value, str)]
            raise _no_text(
                file, field, list(row), texts, {list: "a list", dict: "an object"}.get(type(row.get(field)), "")
            )
        first = False
        if field not in row:
            stats.note("no field", file, position)
            continue
        text = row.pop(field)
        may_have_halves = b"\\ud" in line or b"\\uD" in line  # of surrogate pairs, which only an escape can bring
        if may_have_halves and isinstance(text, str):
            text, halves = _SURROGATE.subn("\ufffd", text)
            if halves:
                stats.note("half surrogate", file, position, halves)
        if wrong and isinstance(text, str) and "\ufffd" in text:
            stats.note("not UTF-8", file, position, wrong)
        yield from _documents(text, file, position, stats)


def _records(
    file: str, mark: bytes, begin: int, end: int, stats: ReadStats, fix: str, buffer: int = 0
) -> Iterator[tuple[int, bytes, bool]]:
    """Give what starts after ``begin``, not after ``end``, and ends at a mark: its offset, its bytes, whether it does.

    The one at offset 0 counts as after ``begin`` 0, and ``end`` 0 is the end of the file, where the last one may end
    without a mark. ``mark`` does not overlap itself, so that it is found at the same places from wherever one reads.
    """
    held, inside = b"", begin == 0
    position = max(0, begin - len(mark) + 1)  # of held in the file
    with one_line(file), open_bytes(file, buffer) as stream:
        if position:
            stream.seek(position)
        while chunk := stream.read(max(BLOCK, len(held))):  # doubling: a long record is joined in O(n)
            *records, held = (held + chunk).split(mark)
            for record in records:
                start, position = position, position + len(record) + len(mark)
                if inside:
                    stats.size += position - start
                    yield start, record, True
                inside = True
                if position > end > 0:
                    return
            if len(held) > LINE_BYTES:
                raise DataError(f"{file}: what begins at byte {position:,} is longer than {LINE_BYTES:,} bytes; {fix}")
        if inside and held:
            stats.size += len(held)
            yield position, held, False


def _no_text(file: str, field: str, names: Sequence[str], texts: Sequence[str], kind: str = "") -> DataError:
    """Say that rows have no text under ``field``, but what ``kind`` says.

    ``names``: what they have; ``texts``: those that hold text.
    """
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    what = f"'{field}' is {kind or 'of another type'}, not text" if field in names else f"it has no '{field}'"
    fix = "none of them holds text; give another file"
    if kind.startswith(("a list", "list", "large_list")):
        fix = "none of them holds text; join each list into one text and write the file again"
    if near := difflib.get_close_matches(field, texts, n=1, cutoff=0.4) or list(texts)[:1]:
        fix = f"did you mean {near[0]} ? Say so with --data.field or --field"
    return DataError(f"{file}: {what} (it has {listed or 'nothing'}); {fix}")


# Parquet --------------------------------------------------------------------------------------------------------------


def row_group_sizes(file: str, field: str) -> list[int]:
    """Give the bytes of text in each row group (decompressed, about; 0: no rows).

    Raises DataError if the file cannot be read as Parquet, or has no text in a column ``field``.
    """
    with one_line(file):
        with open_raw(file) as stream:
            start = stream.read(START)
        if start and not start.startswith(b"PAR1"):
            refuse_what_is_not_text(file, start, PARQUET)
        with _parquet(file) as parquet:
            return _column_sizes(parquet, file, field)


def read_rows(file: str, field: str, begin: int, end: int, stats: ReadStats) -> Iterator[Document]:
    """Give one document a row (a long one in parts), from the row groups ``begin`` to before ``end``.

    A batch of rows is held at a time.
    """
    with one_line(file), _parquet(file) as parquet:
        size = sum(_column_sizes(parquet, file, field)[begin:end])
        counts = [parquet.metadata.row_group(group).num_rows for group in range(end)]
        first, count = sum(counts[:begin]), sum(counts[begin:])
        rows = min(ROWS, max(1, ROWS_BYTES * count // max(1, size)))
        groups = list(range(begin, end))
        for batch in parquet.iter_batches(rows, row_groups=groups, columns=[field], use_threads=False):
            for row, value in enumerate(_values(batch.column(0)), first):
                stats.records += 1
                stats.size += size / count
                if isinstance(value, bytes):
                    value, _, wrong, _ = _utf8(value, True)
                    if wrong:
                        stats.note("not UTF-8", file, row, wrong)
                yield from _documents(value, file, row, stats)
            first += len(batch)


def _column_sizes(parquet: Any, file: str, field: str) -> list[int]:
    schema, metadata = parquet.schema_arrow, parquet.metadata
    texts = [column.name for column in schema if _TEXT_TYPE.match(str(column.type))]
    if field not in texts:
        raise _no_text(file, field, schema.names, texts, str(schema.field(field).type) if field in schema.names else "")
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == field)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [max(1, group.column(column).total_uncompressed_size) if group.num_rows else 0 for group in groups]


def _parquet(file: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: Parquet needs pyarrow; pip install 'pretrain[data]'") from error
    remote = is_url(file)
    return pyarrow.parquet.ParquetFile(
        open_raw(file) if remote or _SURROGATE.search(file) else file,  # it takes no name that is not UTF-8
        metadata=_remote_footer(file) if remote else None,
        buffer_size=REMOTE_BUFFER if remote else CHUNK,
        # It would hold all of a row group's bytes, while a buffer holds as many as are being decoded.
        pre_buffer=False,
        page_checksum_verification=True,
    )


@lru_cache(maxsize=16)
def _remote_footer(url: str) -> Any:
    """The metadata of a remote file, kept, as each of its pieces needs it and it takes several requests."""
    import pyarrow.parquet

    with open_raw(url) as file:
        return pyarrow.parquet.read_metadata(file)


def _values(column: Any) -> list[Any]:
    """Give strings, bytes where the column holds bytes or strings that are not UTF-8, and None for null."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        scalars = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
        return [bytes(scalar.as_buffer()) if scalar.is_valid else None for scalar in scalars]
