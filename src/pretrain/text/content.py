"""What a file holds by its first bytes, whatever its name says."""

from __future__ import annotations

import codecs
import os
import re
import shlex
import unicodedata

from pretrain.errors import DataError

START = 300  # bytes that tell what a file is; a tar archive says so at byte 257

_COMPRESSIONS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz"}  # none is valid UTF-8
_OTHERS = {  # what it is, and what to do
    b"PAR1": ("Parquet", "give it a name that ends in .parquet: mv {file} {stem}.parquet"),
    b"BZh": ("compressed with bzip2", "decompress it: bzip2 -dc {file} > OUT"),
    b"PK\x03\x04": ("a zip archive (as .docx, .epub and .xlsx are)", "unpack it: unzip {file}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it: 7z x {file}"),
    b"Rar!\x1a\x07": ("a RAR archive", "unpack it: unrar x {file}"),
    b"%PDF-": ("a PDF", "extract its text: pdftotext {file} OUT.txt"),
    b"{\\rtf": ("RTF", "save it as plain text"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document", "save it as plain text"),
    b"SQLite format 3\0": ("an SQLite database", "write its text as JSON lines"),
    b"ARROW1\0\0": ("Arrow", "write it as Parquet"),
    b"\x93NUMPY": ("a NumPy array", "give plain text; tokens go in .bin files"),
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS, not the file itself",
        "fetch that: git lfs pull",
    ),
}
_WIDE: dict[
    tuple[bool, ...], str
] = {  # whether bytes 0 to 3 of four are nearly always NUL, in text that is mostly ASCII
    (False, True, True, True): "utf-32le",
    (True, True, True, False): "utf-32be",
    (False, True, False, True): "utf-16le",
    (True, False, True, False): "utf-16be",
}
# Encodings that are tried on what is not UTF-8, by names that Python and iconv share: where most letters are ASCII, and
# where nearly every byte is none.
_WESTERN = ("windows-1252", "macintosh", "windows-1250")
_OTHER_SCRIPTS = ("gb18030", "big5", "cp932", "euc-jp", "cp949", "windows-1251", "koi8-r", "windows-1250")
_BLANKS = "\t\n\x0b\x0c\r\x1b"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not tab, line ends, form feed and escape


def compression_of(start: bytes, named: str) -> str:
    """The compression of a file by its first bytes, as a suffix or ''; ``named`` is what its name says."""
    for magic, suffix in _COMPRESSIONS.items():
        if start.startswith(magic):
            return suffix
    return "" if named and _is_text(start) else named


def _is_text(start: bytes) -> bool:
    try:
        codecs.utf_8_decode(start, "strict", False)
    except UnicodeDecodeError:
        return False
    return bool(start) and not _CONTROL.search(start)


def refuse_what_is_not_text(file: str, start: bytes, kind: str) -> None:
    """A DataError if what a file begins with, decompressed, is no UTF-8 text: what it is, and what to do."""
    quoted, iconv = shlex.quote(file), f"-t utf-8 {shlex.quote(file)} > OUT"
    for magic, (what, fix) in _OTHERS.items():
        if start.startswith(magic) and not (magic in (b"PAR1", b"BZh") and _is_text(start[:20])):  # these may be words
            fix = fix.format(file=quoted, stem=shlex.quote(os.path.splitext(file)[0]))
            raise DataError(f"{file}: this file is {what}, whatever its name says; {fix}")
    if suffix := compression_of(start, ""):  # a remote file, whose name is believed, or what was compressed twice
        raise DataError(f"{file}: this file is compressed; give it under a name that ends in {suffix}")
    if start[257:262] == b"ustar":
        raise DataError(f"{file}: this file is a tar archive; unpack it: tar xf {quoted}")
    if encoding := _wide_encoding(start):
        raise DataError(f"{file}: this is {encoding[:6].upper()}, not UTF-8; convert it: iconv -f {encoding} {iconv}")
    if 100 * start.count(b"\0") > len(start):
        raise DataError(f"{file}: this file is binary (a NUL at byte {start.index(0)}); give plain {kind}")


def refuse_other_encoding(file: str, start: bytes, wrong: int, offset: int, kind: str) -> None:
    """Raise the DataError for a start of which ``wrong`` bytes, the first at ``offset``, are not UTF-8."""
    if 100 * len(_CONTROL.findall(start)) > len(start):
        raise DataError(
            f"{file}: this file is binary (byte 0x{start[offset]:02x} at offset {offset}); give plain {kind}"
        )
    fitting = [name for name in (_WESTERN if 5 * wrong < len(start) else _OTHER_SCRIPTS) if _fits(start, name)]
    which = f" (its beginning fits {', '.join(fitting)})" if fitting else ""
    raise DataError(
        f"{file}: not UTF-8 (byte 0x{start[offset]:02x} at offset {offset}) but another encoding, which is not known"
        f"{which}; convert it: iconv -f ENCODING -t utf-8 {shlex.quote(file)} > OUT"
    )


def _fits(start: bytes, codec: str) -> bool:
    """Whether bytes are text in this encoding, without control characters; they may end inside a character."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(start)
    except UnicodeDecodeError:
        return False
    return all(unicodedata.category(character) not in ("Cc", "Cn", "Co") for character in set(text) - set(_BLANKS))


def _wide_encoding(start: bytes) -> str:
    """The name of UTF-32 or UTF-16, if that is what this is; else ''."""
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),  # before that of UTF-16, with which it begins
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return encoding
    share = [start[place::4].count(0) / max(1, len(start) // 4) for place in range(4)]
    return _WIDE.get(tuple(each > 0.8 for each in share), "") if len(start) >= 16 else ""
