"""Download files: complete, verified, and no byte twice.

    URL ──> FILE.part ──bytes as they come──> size, hashes, Parquet footer ──> synced ──> FILE
              └ FILE.part.note: what the server said of the file (ETag, size, hashes)

A file gets its name only when it is complete. A broken connection, Ctrl-C or kill -9 leaves FILE.part, and the next try
asks for the rest (Range) if the server still has the same file (If-Range). If two processes want the same file, one
downloads it and the other waits.

Files of the Hub are downloaded in the same way, with the addresses and the user's token from huggingface_hub: its own
hf_hub_download (2.4) keeps no partial file to resume from, and verifies no hash.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import email.utils
import errno
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Literal

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from pretrain.errors import DataError, UsageError
from pretrain.io import sync_folder, without_secrets, write_atomically
from pretrain.text.catalogue import hugging_face
from pretrain.text.opening import backoff

try:
    import fcntl
except ImportError:  # Windows: two processes must not download the same file
    fcntl = None

LONGEST_WAIT = 300  # seconds; if a server asks for more (Retry-After), the file fails
CONNECT_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try, and how long to wait."""

    tries: int = 5
    backoff: float = 1.0  # seconds before the second try, twice as long before each further one
    timeout: float = 30.0  # seconds without a byte after which a connection counts as broken


@dataclass
class Download:
    """A file to download, and how far it is. While ``download_all`` runs, its threads write and others may read."""

    url: str
    file: Path
    size: int = 0  # expected bytes; 0: unknown
    sha256: str = ""  # expected, in hexadecimal; empty: unknown
    limit: int = 0  # refuse a file of more bytes than this; 0: any size
    state: Literal["waiting", "running", "fetched", "kept", "failed"] = "waiting"  # kept: it was already complete
    done: int = 0  # bytes on the disk
    total: int = 0  # bytes of the whole file; an estimate until the server gives it; 0: unknown
    tries: int = 0
    problem: str = ""  # why it failed

    @property
    def part(self) -> Path:
        """Holds its bytes until it is complete."""
        return self.file.with_name(f"{self.file.name}.part")

    @property
    def note(self) -> Path:
        """Holds what the server said about the partial file."""
        return self.file.with_name(f"{self.file.name}.part.note")


def download(
    url: str, file: Path, *, size: int = 0, sha256: str = "", limit: int = 0, retry: RetryPolicy = RetryPolicy()
) -> Path:
    """Download one file, unless it is already there, and return its path. Folders are created.

    ``url`` is http:// or https://; the user's token is sent to Hugging Face (or HF_ENDPOINT) only. ``size``, ``sha256``
    and ``limit`` are those of Download. Raises DataError that says why it failed; the caller adds what to do about it.
    """
    item = Download(url, file, size, sha256, limit)
    download_all([item], 1, retry)
    if item.problem:
        raise DataError(f"{without_secrets(url)} cannot be fetched ({item.problem})")
    return file


def download_all(
    items: Sequence[Download],
    workers: int = 4,
    retry: RetryPolicy = RetryPolicy(),
    show: Callable[[], None] = lambda: None,
) -> None:
    """Download files in parallel. The outcome of each is in its ``state`` and ``problem``.

    ``show`` is called about ten times a second in the calling thread. KeyboardInterrupt stops the downloads; partial
    files stay for the next time. Raises DataError when no file can succeed: Unreachable, or the disk is full.
    """
    queue = iter(items)  # shared by all threads
    with httpx2.Client(
        follow_redirects=True,
        timeout=httpx2.Timeout(retry.timeout, connect=min(CONNECT_TIMEOUT, retry.timeout), pool=None),
        limits=httpx2.Limits(max_connections=workers),
        # Sizes, ranges and hashes are those of the file itself, not of a compressed form of it.
        headers={"Accept-Encoding": "identity", "User-Agent": "pretrain"},
    ) as client:
        downloader = _Downloader(client, retry)
        # Not concurrent.futures: at exit it would wait for its threads, even for one in a stalled connection.
        threads = [
            threading.Thread(target=downloader.work, args=(queue,), daemon=True)
            for _ in range(min(workers, len(items)))
        ]
        try:
            for thread in threads:
                thread.start()
            while running := [thread for thread in threads if thread.is_alive()]:
                show()
                running[0].join(0.1)
            show()
        finally:
            downloader.stop.set()
            deadline = time.monotonic() + 0.5
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))
    if downloader.fatal is not None:
        raise downloader.fatal


class Unreachable(DataError):
    """A host that never answered cannot be reached: no network, no such host. Waiting does not help."""


class _Failed(Exception):
    """Why a try failed; whether to retry, after at least ``wait`` seconds, and whether to restart at byte 0."""

    def __init__(self, why: str, retry: bool = True, wait: float = 0, restart: bool = False):
        super().__init__(why)
        self.retry, self.wait, self.restart = retry, wait, restart


class _Stopped(Exception):
    """Another thread asked to stop."""


class _Downloader:
    """State shared by the threads."""

    def __init__(self, client: httpx2.Client, retry: RetryPolicy):
        self.client = client
        self.retry = retry
        self.stop = threading.Event()
        self.fatal: BaseException | None = None
        self._reached: set[str] = set()  # hosts that have answered

    def work(self, queue: Iterator[Download]) -> None:
        """Take files from the queue until it is empty or the job stops."""
        try:
            for item in queue:
                self.get(item)
                if self.stop.is_set():
                    return
        except _Stopped:
            return
        except BaseException as error:
            self.fatal = self.fatal or error
            self.stop.set()

    def get(self, item: Download) -> None:
        """Download one file, with retries. Raises DataError for problems that would hit every other file too."""
        try:
            item.file.parent.mkdir(parents=True, exist_ok=True)
            part = self._open_part(item)
            if part is None:
                item.state, item.done = "kept", item.file.stat().st_size
                item.total = item.done
                return
            item.state = "running"
            retrying = Retrying(
                stop=stop_after_attempt(self.retry.tries),
                retry=retry_if_exception(lambda error: isinstance(error, _Failed) and error.retry),
                wait=self._pause,
                sleep=self._wait,
                reraise=True,
            )
            with part:
                try:
                    for attempt in retrying:
                        with attempt:
                            item.tries = attempt.retry_state.attempt_number
                            self._receive(item, part)
                    item.state = "fetched"
                except _Failed as failed:
                    item.state, item.problem = "failed", str(failed)
                finally:  # also on Ctrl-C: keep only what can be resumed
                    if item.state != "fetched" and (_size(part) == 0 or _read_note(item) is None):
                        item.part.unlink(missing_ok=True)
                        item.note.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"{item.file.parent}: no room left on the disk for {item.file.name}; free some, or give another"
                    f" folder, and run the same command again: it resumes where this one stopped"
                ) from None
            raise DataError(f"{item.file} cannot be written ({error.strerror}); give another folder") from None

    def _open_part(self, item: Download) -> FileIO | None:
        """Open and lock the partial file; None if the file is complete, perhaps thanks to another process."""
        while not _is_complete(item):
            part = FileIO(item.part, "ab")
            with contextlib.suppress(FileNotFoundError):  # the holder of the lock has completed and renamed it
                if _lock(part) and os.path.samestat(os.fstat(part.fileno()), item.part.stat()):
                    if not _is_complete(item):
                        return part
                    item.part.unlink()
            part.close()
            self._wait(0.1)
        return None

    def _pause(self, state: RetryCallState) -> float:
        """Seconds until the next try, at least what the server asks for."""
        failed = state.outcome.exception() if state.outcome else None
        asked = failed.wait if isinstance(failed, _Failed) else 0
        return max(asked, self.retry.backoff * backoff(state.attempt_number))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Stopped

    def _receive(self, item: Download, part: FileIO) -> None:
        """One try: request what is missing, write it, verify the whole file, rename it."""
        try:
            have = _size(part)
            info = _read_note(item) if have else None
            if info is None or have != info.size:  # else it was killed between the last byte and the rename
                info = self._request(item, part, have, info)
            item.done = _size(part)
            size = item.size or info.size
            digests = info.digests | ({"sha256": item.sha256} if item.sha256 else {})
            if defect := _defect(item.part, item.file.suffix, size, digests):
                raise _Failed(defect, retry=item.done > 0, restart=item.done >= size)
        except httpx2.TransportError as error:
            retry = isinstance(error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.ProtocolError))
            raise _Failed(self._explain(error, item), retry) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Failed(str(error), retry=False) from error
        except _Failed as failed:
            if failed.restart and _size(part):
                part.truncate(0)
            raise
        os.fsync(part.fileno())
        os.replace(item.part, item.file)
        item.note.unlink(missing_ok=True)
        sync_folder(item.file.parent)

    def _request(self, item: Download, part: FileIO, have: int, noted: _FileInfo | None) -> _FileInfo:
        """Write what the server sends to the partial file, after the ``have`` bytes there if it has ``noted`` still."""
        headers = _authorization(item.url)
        if noted is not None:
            headers |= {"Range": f"bytes={have}-", "If-Range": noted.validator}
        with self.client.stream("GET", item.url, headers=headers) as answer:
            self._reached.update(each.request.url.host for each in (*answer.history, answer))
            _refuse(answer, item)
            info = _file_info(item.url, answer)
            if answer.status_code == 206:
                if noted is None or not noted.continued_by(info, have, answer.headers.get("Content-Range", "")):
                    raise _Failed("the server continued with another file", restart=True)
                info = noted
            else:  # the whole file: as requested, or because it has changed or the server supports no ranges
                if have:
                    part.truncate(0)
                have = 0
                write_atomically(item.note, json.dumps(asdict(info)))
            most = item.size or item.limit
            expected = f"the {item.size:,} published" if item.size else f"at most {item.limit:,}"
            if info.size and (info.size != item.size if item.size else info.size > item.limit > 0):
                raise _Failed(f"the server's file has {info.size:,} bytes, not {expected}", retry=False)
            item.done, item.total = have, info.size or item.total or item.size
            for chunk in answer.iter_raw():
                if self.stop.is_set():
                    raise _Stopped
                rest = memoryview(chunk)
                while rest:
                    rest = rest[part.write(rest) :]
                item.done += len(chunk)
                if most and item.done > most:
                    raise _Failed(f"the server's file is longer than {expected}", retry=False, restart=True)
        return info

    def _explain(self, error: httpx2.TransportError, item: Download) -> str:
        """Say what went wrong with a connection. Raises Unreachable if its host has never answered."""
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx2.ConnectTimeout):
            why = "no answer"
        elif isinstance(error, httpx2.TimeoutException):
            why = f"nothing came for {self.retry.timeout:g} s"
        if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)):
            host = error.request.url.host
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, socket.gaierror):
                    why = "no network, or no such host"
                cause = cause.__cause__ or cause.__context__
            why = f"{host} cannot be reached: {why}"
            if host not in self._reached:
                raise Unreachable(f"{without_secrets(item.url)} cannot be fetched ({why})") from None
        return why


# What the server says about a file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileInfo:
    """What the server says about a file, stored with the partial file so that only the same file is resumed."""

    url: str
    validator: str  # a strong ETag, or Last-Modified; empty: it cannot be resumed
    size: int  # 0: unknown
    digests: dict[str, str] = field(default_factory=dict)  # name in hashlib -> hexadecimal digits

    def continued_by(self, now: _FileInfo, have: int, content_range: str) -> bool:
        """Whether a partial answer is the rest of this file, from byte ``have``."""
        match = re.match(r"bytes (\d+)-", content_range)
        same = now.validator in (self.validator, "") and now.size in (self.size, 0)
        same = same and all(self.digests.get(name, digest) == digest for name, digest in now.digests.items())
        return match is not None and int(match[1]) == have and same


def _read_note(item: Download) -> _FileInfo | None:
    """What the server said about the partial file; None if it cannot be resumed."""
    try:
        info = _FileInfo(**json.loads(item.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return info if info.validator and info.url == without_secrets(item.url) else None


def _file_info(url: str, answer: httpx2.Response) -> _FileInfo:
    # Hugging Face sends the size and SHA-256 of a large file with the redirect to its store, whose own ETag may be
    # another hash. Elsewhere an ETag of 64 digits need not be a hash of the content: GitHub's is not.
    redirects = httpx2.Headers()
    for each in (answer, *reversed(answer.history)):  # the first answer counts
        redirects.update(each.headers)
    etag = answer.headers.get("ETag", "")
    tag = redirects.get("X-Linked-ETag") or (redirects["ETag"] if "X-Repo-Commit" in redirects else "")
    digests = _digests(answer.headers)
    if match := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag):
        digests["sha256"] = match[1]
    size = redirects.get("X-Linked-Size") or answer.headers.get("Content-Range", "").rpartition("/")[2]
    if answer.status_code == 200:
        size = size or answer.headers.get("Content-Length", "")
    validator = answer.headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    return _FileInfo(without_secrets(url), validator, int(size) if size.isdecimal() else 0, digests)


def _digests(headers: httpx2.Headers) -> dict[str, str]:
    """Hashes of the whole file: Repr-Digest (RFC 9530), Digest (RFC 3230), and Content-MD5 if no part was asked for."""
    names = {"sha-256": "sha256", "sha-512": "sha512", "md5": "md5"}
    both = f"{headers.get('Repr-Digest', '')},{headers.get('Digest', '')}"
    found = re.findall(r"([A-Za-z0-9-]+)=:?([A-Za-z0-9+/]+=*):?", both)
    if "Content-Range" not in headers:
        found.append(("md5", headers.get("Content-MD5", "")))
    digests = {}
    for name, text in found:
        algorithm = names.get(name.lower(), "")
        with contextlib.suppress(binascii.Error, ValueError):
            raw = base64.b64decode(text, validate=True)
            if algorithm and len(raw) == hashlib.new(algorithm, usedforsecurity=False).digest_size:
                digests[algorithm] = raw.hex()
    return digests


def _refuse(answer: httpx2.Response, item: Download) -> None:
    """Raise _Failed for an answer without the file."""
    code, headers = answer.status_code, answer.headers
    if code in (200, 206):
        if headers.get("Content-Type", "").startswith("text/html") and not item.file.name.endswith((".html", ".htm")):
            raise _Failed("a web page came instead of the file, perhaps the login page of a network", retry=False)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _Failed(f"the server sends it only as Content-Encoding: {headers['Content-Encoding']}", retry=False)
        return
    why = f"HTTP {code} {answer.reason_phrase}".strip()
    if code == 416:  # the file has become shorter
        raise _Failed(why, restart=True)
    if code in (401, 403) and _is_hugging_face(item.url):
        given = "Authorization" in (*answer.history, answer)[0].request.headers
        where = "HF_TOKEN or hf auth login"
        why += f"; your token ({where}) is not accepted" if given else f"; it may need a token: {where}"
    wait = _retry_after(headers.get("Retry-After", ""))
    if wait > LONGEST_WAIT:
        raise _Failed(f"{why}; the server asks to come back in {wait:,.0f} s", retry=False)
    raise _Failed(why, retry=code in (408, 425, 429) or code >= 500, wait=wait)


def _retry_after(text: str) -> float:
    """Seconds to wait, given as a number or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _is_hugging_face(url: str) -> bool:
    """Whether scheme, host and port are those of Hugging Face; another port may be another's server."""
    given, hub = httpx2.URL(url), httpx2.URL(hugging_face())
    return (given.scheme, given.host, given.port) == (hub.scheme, hub.host, hub.port)


def _authorization(url: str) -> dict[str, str]:
    """The header with the user's token, for Hugging Face only; httpx2 drops it on a redirect to another host."""
    if not _is_hugging_face(url):
        return {}
    from huggingface_hub import get_token

    token = get_token()  # from HF_TOKEN or hf auth login
    if token is None:
        return {}
    if not re.fullmatch(r"[!-~]+", token):  # or it would be printed as an illegal header
        raise UsageError("HF_TOKEN holds characters that no token has; set it again, or unset it")
    return {"Authorization": f"Bearer {token}"}


# On the disk ----------------------------------------------------------------------------------------------------------


def _size(part: FileIO) -> int:
    return os.fstat(part.fileno()).st_size


def _lock(part: FileIO) -> bool:
    """Lock the file; False if another process has it. File systems without locks always allow it."""
    if fcntl is not None:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _is_complete(item: Download) -> bool:
    """Whether the file is there and complete, as far as can be known without the server."""
    digests = {"sha256": item.sha256} if item.sha256 else {}
    return item.file.is_file() and not _defect(item.file, item.file.suffix, item.size, digests)


def _defect(file: Path, suffix: str, expected: int, digests: dict[str, str]) -> str:
    """Why this is not the complete file of that size (0: any), suffix and hashes; empty if it is."""
    size = file.stat().st_size
    if size == 0:
        return "the server sent an empty file"
    if expected and size != expected:
        return f"{size:,} of {expected:,} bytes came"
    for algorithm, digest in digests.items():
        with open(file, "rb") as data:
            actual = hashlib.file_digest(data, lambda name=algorithm: hashlib.new(name, usedforsecurity=False))
        if actual.hexdigest() != digest:
            return f"altered on the way: {algorithm} {actual.hexdigest()[:12]}… instead of {digest[:12]}…"
    if suffix == ".parquet" and (problem := _parquet_problem(file)):
        return f"not a complete Parquet file: {problem}"
    return ""


def _parquet_problem(file: Path) -> str:
    """Why this is not a complete Parquet file; empty if its footer is there and, with pyarrow, can be read."""
    size = file.stat().st_size
    with open(file, "rb") as data:
        head = data.read(4)
        data.seek(max(0, size - 8))
        tail = data.read()
    if size < 12 or head != b"PAR1" or tail[4:] != b"PAR1":
        return "it does not begin and end with PAR1"
    if int.from_bytes(tail[:4], "little") + 12 > size:
        return "its footer is cut"
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError:
        return ""
    try:
        pyarrow.parquet.read_metadata(file)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
