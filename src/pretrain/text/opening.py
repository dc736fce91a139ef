"""The bytes of a file, wherever it is and however it is compressed.

    path or URL ──open_raw──> its bytes as they are ──open_bytes──> the bytes of the text
    URL ──expand_url──> (URL, size), ...

``format_of`` gives the format by the name. fsspec and the package of each protocol read https://, hf://, s3://,
gs:// and others; for runs of days, a range that does not arrive complete is requested again. Errors become one line for
the user (``one_line``, ``one_line_remote``).
"""

from __future__ import annotations

import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from pretrain.errors import DataError, PretrainError
from pretrain.text.content import START, compression_of

if TYPE_CHECKING:
    from tenacity import Retrying

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

LOCAL_BUFFER = 1024 * 1024
REMOTE_BUFFER = 8 * 1024 * 1024  # bytes per request; with less, latency would dominate
TRIES = 5  # for each range of bytes
CONNECT_SECONDS, READ_SECONDS = 10, 60  # a try without a byte for so long has failed

# The packages whose exceptions mean that the bytes they were given are damaged.
_DECODERS = ("pyarrow", "backports", "compression", "_zstd")
_HTTP = ("http", "https")
# The extra of pretrain that installs what a protocol needs besides fsspec.
_EXTRAS = {"http": "data", "https": "data", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def is_url(path: str) -> bool:
    """Whether this is the address of something remote."""
    return "://" in path


def format_of(file: str) -> tuple[str, str] | None:
    """What a file holds, by its name: TEXT, JSON_LINES or PARQUET, and the suffix of its compression or ''.

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
    """Open a file unbuffered, its bytes as they are. Raises DataError if that is not possible."""
    if is_url(file):
        return cast(BinaryIO, _RemoteFile(file))
    try:
        return cast(BinaryIO, open(file, "rb", buffering=0))
    except OSError as error:
        raise unreadable(file, error) from error


def open_bytes(file: str, buffer: int = 0) -> io.BufferedReader:
    """Open a file for buffered reading, decompressed if it is compressed, whatever its name says.

    ``buffer``: bytes read at once, if not as usual.

    Raises DataError if that is not possible, or if a package for the compression is missing.
    """
    stream = io.BufferedReader(cast(Any, open_raw(file)), buffer or (REMOTE_BUFFER if is_url(file) else LOCAL_BUFFER))
    compression = (format_of(file) or ("", ""))[1]
    if compression or not is_url(file):  # of a remote file to look would take another request
        compression = compression_of(stream.peek(START)[:START], compression)
    if not compression:
        return stream
    if compression == ".gz":
        import gzip

        text: Any = gzip.GzipFile(fileobj=stream)
    elif compression == ".xz":
        text = lzma.LZMAFile(stream)  # noqa: SIM115
    else:
        try:
            if sys.version_info >= (3, 14):
                from compression import zstd  # type: ignore[import-not-found]
            else:
                from backports import zstd  # type: ignore[import-not-found]
        except ImportError as error:
            raise DataError(f"{file}: .zst needs backports.zstd; pip install 'pretrain[data]'") from error
        # Large dumps are often compressed with windows of up to 2 GiB (zstd --long=31); by default these are refused.
        text = zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: 31})
    return io.BufferedReader(text, buffer or LOCAL_BUFFER)


def is_compressed(file: str) -> bool:
    """Whether a file is compressed: on this machine by its first bytes, whatever its name says, elsewhere by its name.

    Raises DataError if it cannot be opened.
    """
    named = (format_of(file) or ("", ""))[1]
    if is_url(file):
        return bool(named)
    with open_raw(file) as stream:
        return bool(compression_of(stream.read(START), named))


@contextmanager
def one_line(file: str) -> Iterator[None]:
    """Turn what is raised while a file is read and decoded into DataError: which file, what is wrong, how to fix it."""
    try:
        yield
    except PretrainError:
        raise
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        damaged = isinstance(error, (EOFError, zlib.error, lzma.LZMAError)) or module in _DECODERS
        # An OSError without a number is not the system's: BadGzipFile, or pyarrow for a page that does not decode.
        if damaged or (isinstance(error, OSError) and error.errno is None):
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{file}: this file is damaged or cut short ({why}); copy or download it again") from error
        if isinstance(error, OSError):
            raise unreadable(file, error) from error
        raise


def unreadable(file: str, error: OSError) -> DataError:
    """Say why a file on this machine cannot be read."""
    return DataError(f"{file}: cannot be read ({error.strerror or error}); is it still there, and may you read it?")


# Remote files ---------------------------------------------------------------------------------------------------------


def expand_url(url: str) -> list[tuple[str, int | None]]:
    """List the files that a URL stands for, sorted, each with its size in bytes if the server gives it.

    A file stands for itself, a folder for all files in it at any depth (hidden ones left out), a pattern for what it
    matches. Over http a URL is one file. Raises DataError if it is not there or not to be reached, or a package is
    missing.
    """
    if protocol_of(url) in _HTTP:
        return [(url, _size_and_ranges(url)[0])]
    with one_line_remote(url):
        fs, path = filesystem(url)
        if any(character in path for character in "*?["):
            found = fs.glob(path, detail=True)
        else:
            info = fs.info(path)
            if info["type"] == "file":
                return [(url, info["size"])]
            found = fs.find(path, detail=True)
            found = {name: info for name, info in found.items() if "/." not in name.removeprefix(path)}
    return sorted((fs.unstrip_protocol(name), info["size"]) for name, info in found.items() if info["type"] == "file")


def retrying(again: Callable[[BaseException], bool], tries: int = TRIES) -> Retrying:
    """Tries a call up to so often, after pauses that grow, while ``again`` is true of the error that it raises."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

    return Retrying(
        stop=stop_after_attempt(tries),
        wait=wait_exponential() + wait_random(0, 1),
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and again(error)),
        reraise=True,
    )


class _RemoteFile(io.RawIOBase):
    """A remote file, unbuffered: each read is one request for exactly these bytes, tried up to TRIES times.

    A server that knows no byte ranges is read as one stream, forwards only, and tried once. Raises DataError if the
    file is not there, cannot be reached, or the bytes do not come.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.size, self.has_ranges = _size_and_ranges(url)
        self.file = _open(url, self.size if self.has_ranges else None)
        # After these a second request would get the same answer.
        self.retrying = retrying(
            lambda error: _status(error) not in (400, 401, 403, 404, 410, 416), TRIES if self.has_ranges else 1
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.has_ranges

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.has_ranges:
            raise DataError(f"{self.url}: its server gives files only as a whole; download it and give the file")
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        begin = self.tell()
        wanted = len(view) if self.size is None else min(len(view), max(0, self.size - begin))

        def read() -> bytes:
            if self.has_ranges:
                self.file.seek(begin)  # an earlier try may have moved it
            data = self.file.read(wanted)
            if (self.has_ranges and len(data) < wanted) or (not data and wanted and self.size is not None):
                raise EOFError(f"{len(data):,} bytes came instead of {wanted:,}")
            return data

        with one_line_remote(self.url):
            data = self.retrying(read)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


def protocol_of(url: str) -> str:
    """The protocol of a URL."""
    return url.partition("://")[0].lower()


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path in it."""
    from fsspec.core import url_to_fs

    protocol = protocol_of(url)
    options: dict[str, Any] = {}
    if protocol in _HTTP:
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS),
            # Ranges must be those of the file itself, not of a compressed form of it.
            "headers": {"Accept-Encoding": "identity"},
            "trust_env": True,  # proxies
        }
    elif protocol == "hf":
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:  # or the library refuses at once
            _reach(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    elif protocol in ("gs", "gcs"):
        import gcsfs  # type: ignore[import-not-found]  # noqa: F401  # report first if it is missing

        _reach(os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"))
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"max_attempts": 2},
        }
    return url_to_fs(url, **options)


@lru_cache
def _reach(server: str) -> None:
    """Check once that a server answers: the libraries of hf:// and gs:// would retry for 23 and 50 seconds."""
    import httpx2

    httpx2.head(server, timeout=CONNECT_SECONDS)


def _open(url: str, size: int | None) -> Any:
    """Open for reading by ranges; over http with size None, as a stream."""
    options: dict[str, Any] = {"cache_type": "none"}
    if protocol_of(url) in _HTTP:
        options = {"block_size": 0} if size is None else {"size": size, **options}
    with one_line_remote(url):
        fs, path = filesystem(url)
        return fs.open(path, "rb", **options)


@lru_cache(maxsize=4096)
def _size_and_ranges(url: str) -> tuple[int | None, bool]:
    """Ask for the size of a file, and whether any part of it can be read by itself. Tries only once."""
    with one_line_remote(url):
        fs, path = filesystem(url)
        info = fs.info(path)
        size = info["size"]
        ranges = size is not None and info.get("partial", True)
        if size and ranges and protocol_of(url) in _HTTP:
            with _open(url, size) as file:
                try:
                    file.seek(1)
                    file.read(1)
                except ValueError:  # how fsspec says that the server answered with the whole file
                    ranges = False
        return size, ranges


def _chain(error: BaseException | None) -> list[BaseException]:
    return [error, *_chain(error.__cause__ or error.__context__)] if error else []


def _status(error: BaseException) -> int | None:
    """The HTTP status for which something failed."""
    for each in _chain(error):
        status = getattr(each, "status", None) or getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


@contextmanager
def one_line_remote(url: str) -> Iterator[None]:
    """Turn the exceptions of a protocol's package into DataError: what they mean, and what to do."""
    try:
        yield
    except PretrainError:
        raise
    except Exception as error:
        chain = _chain(error)
        names = {type(each).__name__ for each in chain}
        why = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:200]
        protocol, status = protocol_of(url), _status(error)
        if isinstance(error, ImportError):
            fix = f"; pip install 'pretrain[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
            text = f"{protocol}:// needs another package ({error}){fix}"
        elif isinstance(error, ValueError) and "not known" in str(error):
            text = f"{protocol}:// is not a known protocol; give https://, hf://, s3:// or gs://"
        elif status in (401, 403) or names & {"PermissionError", "NoCredentialsError", "GatedRepoError"}:
            hint = " (a public bucket needs none: export FSSPEC_S3='{\"anon\": true}')" if protocol[:2] == "s3" else ""
            text = f"access is refused ({why}); check the address, or give credentials{hint}"
        # fsspec says of everything over http that it is not there, also without a network.
        elif status in (404, 410) or (isinstance(error, FileNotFoundError) and protocol not in _HTTP):
            text = "no such file or folder; check the address"
        else:
            text = f"cannot be reached ({why}); check the address and the network, or try again later"
        raise DataError(f"{url}: {text}") from error
