"""Files on other machines: https://, hf://, s3://, gs:// and whatever else fsspec knows.

    URL ──expand_url──> (URL, size), ...        URL ──RemoteFile──> bytes, by ranges

fsspec and the package of each protocol do the talking. Added here is what reading for days needs: a range that does
not come, or not whole, is asked for again, and what cannot be reached is said at once and in one line.
"""

from __future__ import annotations

import io
import os
import random
import time
from functools import lru_cache
from typing import Any

from pretrain.errors import DataError

TRIES = 5  # for each range of bytes; about 1, 2, 4 and 8 seconds lie between them
CONNECT_SECONDS, READ_SECONDS = 10, 60  # a try has failed when nothing has come for so long

_HTTP = ("http", "https")
# What a protocol needs beside fsspec, and the extra of pretrain in which that comes.
_PACKAGES = {
    **dict.fromkeys(_HTTP, ("aiohttp", "data")),
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
}


def is_url(path: str) -> bool:
    """Whether this is the address of something remote."""
    return "://" in path


def expand_url(url: str) -> list[tuple[str, int | None]]:
    """List the files that a URL stands for, sorted, each with its size in bytes where the server tells it.

    A file stands for itself, a folder for all files in it at any depth (hidden ones left out), a pattern for what it
    matches. Over http a URL is one file. Raises DataError if it is not there or not to be reached, or a package is
    missing.
    """
    fs, path = _filesystem(url)
    if _protocol(url) in _HTTP:
        return [(url, _size_and_ranges(url)[0])]
    try:
        if any(character in path for character in "*?["):
            found = fs.glob(path, detail=True)
        else:
            info = fs.info(path)
            if info["type"] == "file":
                return [(url, info["size"])]
            found = {
                name: info
                for name, info in fs.find(path, detail=True).items()
                if "/." not in name.removeprefix(path)  # hidden below the folder
            }
    except Exception as error:  # each protocol has exceptions of its own
        raise _explained(url, error) from error
    files = [(fs.unstrip_protocol(name), info["size"]) for name, info in found.items() if info["type"] == "file"]
    return sorted(files)


class RemoteFile(io.RawIOBase):
    """A remote file, unbuffered: each read is one request for exactly these bytes, tried up to TRIES times.

    A server that knows no byte ranges is read as one stream, forwards only, and not tried again.

    Attributes:
        url: where it is.
        size: its bytes, or None if the server does not tell.
        has_ranges: whether any part can be read by itself.
    """

    def __init__(self, url: str) -> None:
        """Open it. Raises DataError if it is not there or cannot be reached."""
        super().__init__()
        self.url = url
        self._fs, self._path = _filesystem(url)
        self.size, self.has_ranges = _size_and_ranges(url)
        self._position = 0
        self._file = _open(self._fs, self._path, url, self.size if self.has_ranges else None)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Whether any part can be read by itself."""
        return self.has_ranges

    def tell(self) -> int:
        """Give the offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte. Raises DataError if the server knows no ranges."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size or 0}[whence]
        if not self.has_ranges and base + offset != self._position:
            raise DataError(
                f"{self.url}: its server gives files only as a whole, and this one is needed in parts; download it "
                f"and give the file"
            )
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as there is. Raises DataError if the bytes do not come."""
        view = memoryview(buffer).cast("B")
        wanted = len(view) if self.size is None else min(len(view), max(0, self.size - self._position))
        data = self._fetch(wanted) if wanted else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _fetch(self, wanted: int) -> bytes:
        problem: Exception | None = None
        for attempt in range(TRIES if self.has_ranges else 1):
            if attempt:
                time.sleep(random.uniform(0.75, 1.25) * 2 ** (attempt - 1))
            try:
                if not self.has_ranges:
                    data = self._file.read(wanted)
                    if not data and self.size is not None:
                        raise EOFError(f"it ended after {self._position:,} of {self.size:,} bytes")
                    return data
                self._file.seek(self._position)
                data = self._file.read(wanted)
                if len(data) == wanted:
                    return data
                problem = EOFError(f"{len(data):,} bytes came instead of {wanted:,}")
            except Exception as error:
                problem = error
                if _status(error) in (400, 401, 403, 404, 410, 416):  # the answer will not change
                    break
        assert problem is not None
        raise _explained(self.url, problem) from problem


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _filesystem(url: str) -> tuple[Any, str]:
    """Give fsspec's file system for a URL, and the path in it."""
    from fsspec.core import url_to_fs

    protocol = _protocol(url)
    options: dict[str, Any] = {}
    try:
        if protocol in _HTTP:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            # A server that compresses on the way would count other bytes than those of the file.
            options["client_kwargs"] = {
                "timeout": timeout,
                "headers": {"Accept-Encoding": "identity"},
                "trust_env": True,  # proxies
            }
        elif protocol == "hf":
            _reach_hub()
        elif protocol in ("gs", "gcs"):
            _reach_google()
        elif protocol in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": 2},
            }
        return url_to_fs(url, **options)
    except DataError:
        raise
    except ImportError as error:
        package, extra = _PACKAGES.get(protocol, (error.name or "another package", ""))
        install = f"pretrain[{extra}]" if extra else package
        raise DataError(f"{url}: {protocol}:// needs {package}; pip install '{install}'") from error
    except Exception as error:
        if isinstance(error, ValueError) and "not known" in str(error):
            raise DataError(
                f"{url}: {protocol}:// is not a known protocol; give https://, hf://, s3:// or gs://"
            ) from error
        raise _explained(url, error) from error


def _open(fs: Any, path: str, url: str, size: int | None) -> Any:
    """Open for reading by ranges; over http with size None, as a stream."""
    options: dict[str, Any] = {"cache_type": "none"}
    if _protocol(url) in _HTTP:
        options = {"block_size": 0} if size is None else {"size": size, **options}
    try:
        return fs.open(path, "rb", **options)
    except Exception as error:
        raise _explained(url, error) from error


@lru_cache(maxsize=4096)
def _size_and_ranges(url: str) -> tuple[int | None, bool]:
    """Ask for the size of a file, and whether any part of it can be read by itself. Tries only once."""
    fs, path = _filesystem(url)
    try:
        info = fs.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(path)
        size = info["size"]
        if _protocol(url) not in _HTTP or size is None:
            return size, size is not None
        if not info.get("partial", True):
            return size, False
        with _open(fs, path, url, size) as file:
            try:
                file.seek(min(1, size))
                file.read(1)
            except ValueError:  # how fsspec says that the server answered with the whole file
                return size, False
        return size, True
    except DataError:
        raise
    except Exception as error:
        raise _explained(url, error) from error


@lru_cache(maxsize=1)
def _reach_hub() -> None:
    """Try whether the hub answers, once: its library would try for 23 seconds before it says no."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, timeout=CONNECT_SECONDS)


@lru_cache(maxsize=1)
def _reach_google() -> None:
    """Try whether Google's storage answers, once: gcsfs would try for 50 seconds before it says no."""
    import contextlib
    import urllib.error
    import urllib.request

    import gcsfs  # type: ignore[import-not-found]  # noqa: F401  # if it is missing, that is to be said first

    server = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    with contextlib.suppress(urllib.error.HTTPError):  # a status is an answer
        urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=CONNECT_SECONDS).close()


def _chain(error: BaseException | None) -> list[BaseException]:
    return [error, *_chain(error.__cause__ or error.__context__)] if error else []


def _status(error: BaseException) -> int | None:
    """The HTTP status for which something failed."""
    for each in _chain(error):
        status = getattr(each, "status", None) or getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _explained(url: str, error: Exception) -> DataError:
    """Say in one line what an exception of a protocol's package means, and what to do."""
    chain = _chain(error)
    names = {type(each).__name__ for each in chain}
    status = _status(error)
    why = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:200]
    if "OfflineModeIsEnabled" in names:
        return DataError(f"{url}: cannot be read, as HF_HUB_OFFLINE is set; unset it, or give files that you have")
    if "RepositoryNotFoundError" in names:
        return DataError(f"{url}: no such repository, or a private one; check the name, or log in: hf auth login")
    if status in (401, 403) or names & {"PermissionError", "NoCredentialsError", "GatedRepoError"}:
        hint = " (a public bucket needs none: export FSSPEC_S3='{\"anon\": true}')" if url.startswith("s3") else ""
        return DataError(f"{url}: access is refused ({why}); give credentials{hint}")
    # fsspec says of everything over http that it is not there, also without a network.
    missing = isinstance(error, FileNotFoundError) and _protocol(url) not in _HTTP
    if missing or status in (404, 410):
        return DataError(f"{url}: no such file or folder; check the address")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{url}: a folder where a file was expected")
    if status is not None:
        return DataError(f"{url}: its server answers with status {status}; try again later, or check the address")
    return DataError(f"{url}: cannot be reached ({why}); check the address and the network")
