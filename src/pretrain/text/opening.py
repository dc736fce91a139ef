"""The bytes of a file, wherever it lies and however it is compressed.

    file ──open_raw──> its bytes as they are ──open_bytes──> the bytes of the text

``format_of`` knows by the name what is inside. Whatever goes wrong while the bytes are read, ``one_line`` turns into a
line for the user.
"""

from __future__ import annotations

import io
import lzma
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from pretrain.errors import DataError, PretrainError
from pretrain.text.remote import RemoteFile, is_url

TEXT, JSON_LINES, PARQUET = "text", "JSON lines", "Parquet"
FORMATS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_LINES,
    ".parquet": PARQUET,
}
COMPRESSIONS = (".gz", ".zst", ".xz")
COMPRESSION_RATIO = 3  # bytes of text to a byte of a compressed file, about

LOCAL_BUFFER = 1024 * 1024
REMOTE_BUFFER = 8 * 1024 * 1024  # bytes asked for at once; smaller would wait more than read

# The packages whose exceptions mean that the bytes they were given are damaged.
_DECODERS = ("pyarrow", "backports", "compression", "_zstd")


def format_of(file: str) -> tuple[str, str] | None:
    """What a file holds, by its name: (TEXT, JSON_LINES or PARQUET; the suffix of its compression or '').

    None if it is of no type that is read.
    """
    name = urlsplit(file).path if file.startswith(("http://", "https://")) else file
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = FORMATS.get(suffix)
    return None if kind is None or (kind == PARQUET and compression) else (kind, compression)


def supported() -> str:
    """The types of file that are read, for error messages."""
    plain = [suffix for suffix, kind in FORMATS.items() if kind != PARQUET]
    return f"{', '.join(plain)} (each also {', '.join(COMPRESSIONS)}) or .parquet"


def open_raw(file: str) -> BinaryIO:
    """Open a file without a buffer of ours, its bytes as they are. Raises DataError if that is not possible."""
    if is_url(file):
        return cast(BinaryIO, RemoteFile(file))
    try:
        return open(file, "rb", buffering=0)  # type: ignore[return-value]
    except OSError as error:
        raise unreadable(file, error) from error


def open_bytes(file: str, buffer: int = 0) -> BinaryIO:
    """Open a file for buffered reading of its text's bytes, decompressed. ``buffer``: bytes read at once, if not usual.

    Raises DataError if that is not possible, or if a package for the compression is missing.
    """
    compression = (format_of(file) or ("", ""))[1]
    raw = cast(Any, open_raw(file))
    stream = io.BufferedReader(raw, buffer or (REMOTE_BUFFER if is_url(file) else LOCAL_BUFFER))
    if not compression:
        return stream
    return io.BufferedReader(_decompressed(file, stream, compression), buffer or LOCAL_BUFFER)


@contextmanager
def one_line(file: str) -> Iterator[None]:
    """Turn what is raised while a file is read and decoded into DataError with its name and the mend."""
    try:
        yield
    except PretrainError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _DECODERS:
            raise _damaged(file, error) from error
        if isinstance(error, OSError):
            if error.errno is None:  # not the system's: BadGzipFile, or pyarrow for a page that does not decode
                raise _damaged(file, error) from error
            raise unreadable(file, error) from error
        raise


def unreadable(file: str, error: OSError) -> DataError:
    """Say why a file on this machine cannot be read."""
    if isinstance(error, PermissionError):
        mend = f"mend its permissions: chmod u+r {shlex.quote(file)}"
    else:
        mend = "is it still there, and its disk in order?"
    return DataError(f"{file}: cannot be read ({error.strerror or error}); {mend}")


def _decompressed(file: str, stream: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=stream)
    if compression == ".xz":
        return lzma.LZMAFile(stream)
    try:
        try:
            from compression import zstd  # type: ignore[import-not-found]  # Python 3.14 has it
        except ImportError:
            from backports import zstd  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(f"{file}: .zst needs backports.zstd; pip install 'pretrain[data]'") from error
    # Large dumps are often compressed with windows of up to 2 GiB (zstd --long=31); by default these are refused.
    return zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: 31})


def _damaged(file: str, error: Exception) -> DataError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{file}: this file is damaged or cut short ({why}); copy or download it again")
