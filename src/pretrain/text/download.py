"""Files from the network onto the disk: whole, checked, and no byte twice.

    URL ──> FILE.part ──bytes as they come──> size, hashes, Parquet footer ──> synced ──> FILE
              └ FILE.part.note: what the server said of the file (ETag, size, hashes)

A file stands under its own name only when it is complete. What a broken connection, Ctrl-C or kill -9 leaves is
FILE.part, and the next try asks for the rest of it (Range), provided that the server still has the same file
(If-Range). Of two processes that want the same file one downloads it; the other waits and then has it.

httpx2 talks to the servers, Hugging Face's too: their own library checks no hashes, and its partial files are gone on
with only by itself. tenacity repeats what fails.
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
except ImportError:  # Windows: two processes with the same file are then the user's care
    fcntl = None

LONGEST_WAIT = 300  # seconds: a server that asks for more (Retry-After) is given up for now
CONNECT_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a file is tried."""

    tries: int = 5
    backoff: float = 1.0  # seconds before the second try, twice as long before each further one
    timeout: float = 30.0  # seconds without a byte after which a connection counts as broken


@dataclass
class Download:
    """A file to download, and how far it is. While ``download_all`` runs, its threads write and others may read."""

    url: str
    file: Path
    size: int = 0  # bytes that it must have; 0: not known beforehand
    sha256: str = ""  # that it must have, in hexadecimal; empty: not known beforehand
    limit: int = 0  # refuse a file of more bytes than this; 0: any size
    state: Literal["waiting", "running", "fetched", "kept", "failed"] = "waiting"  # kept: it was complete already
    done: int = 0  # bytes on the disk
    total: int = 0  # bytes of the whole file, about, until the server says it; 0: no idea
    tries: int = 0
    problem: str = ""  # why it failed

    @property
    def part(self) -> Path:
        """Where its bytes are until it is complete."""
        return self.file.with_name(f"{self.file.name}.part")

    @property
    def note(self) -> Path:
        """What the server said of the partial file."""
        return self.file.with_name(f"{self.file.name}.part.note")


def download(
    url: str, file: Path, *, size: int = 0, sha256: str = "", limit: int = 0, retry: RetryPolicy = RetryPolicy()
) -> Path:
    """Download one file, unless it is there already. Give its path.

    ``url`` is http:// or https://; to Hugging Face (or HF_ENDPOINT), and nowhere else, the user's token goes along.
    Folders are made. ``size``, ``sha256`` and ``limit`` are those of Download.

    Raises DataError if it cannot be had: the line says why, and the caller adds what to do about it.
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
    """Download files side by side. What became of each is in its ``state`` and ``problem``.

    ``show`` is called about ten times a second in the calling thread. A KeyboardInterrupt there stops the downloads;
    partial files stay for the next time.

    Raises DataError as soon as going on is useless for all files: Unreachable, or the disk is full.
    """
    queue = iter(items)  # which all threads share
    with httpx2.Client(
        follow_redirects=True,
        timeout=httpx2.Timeout(retry.timeout, connect=min(CONNECT_TIMEOUT, retry.timeout), pool=None),
        limits=httpx2.Limits(max_connections=workers),
        # Lengths, ranges and hashes are of the bytes of the file, so they must come as they are.
        headers={"Accept-Encoding": "identity", "User-Agent": "pretrain"},
    ) as client:
        downloader = _Downloader(client, retry)
        # Not concurrent.futures: at exit it waits for its threads, even for one that hangs in a stalled connection.
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
    """A host cannot be reached from here: no network, no such host, nobody listens. Waiting does not help."""


class _Failed(Exception):
    """Why a try failed; ``again`` if another may succeed, after at least ``wait`` seconds; ``anew``: from byte 0."""

    def __init__(self, why: str, again: bool = True, wait: float = 0, anew: bool = False):
        super().__init__(why)
        self.again, self.wait, self.anew = again, wait, anew


class _Stopped(Exception):
    """Another thread asked to stop."""


class _Downloader:
    """What the threads of a job share."""

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
        """Download a file with all the tries it takes. Raises DataError for what would hit every other file too."""
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
                retry=retry_if_exception(lambda error: isinstance(error, _Failed) and error.again),
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
                finally:  # also on Ctrl-C: nothing stays that cannot be gone on with
                    if item.state != "fetched" and (_size(part) == 0 or _read_note(item) is None):
                        item.part.unlink(missing_ok=True)
                        item.note.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"{item.file.parent}: no room left on the disk for {item.file.name}; free some, or give another"
                    f" folder, and run the same command again: it goes on where this one stopped"
                ) from None
            raise DataError(f"{item.file} cannot be written ({error.strerror}); give another folder") from None

    def _open_part(self, item: Download) -> FileIO | None:
        """Open the partial file for this process alone; None if the file is complete, perhaps by another process."""
        while not _is_complete(item):
            part = FileIO(item.part, "ab")
            with contextlib.suppress(FileNotFoundError):  # who had the lock may have completed and renamed it
                if _lock(part) and os.path.samestat(os.fstat(part.fileno()), item.part.stat()):
                    if not _is_complete(item):
                        return part
                    item.part.unlink()
            part.close()
            self._wait(0.1)
        return None

    def _pause(self, state: RetryCallState) -> float:
        """Seconds until the next try, no less than the server asks for."""
        failed = state.outcome.exception() if state.outcome else None
        asked = failed.wait if isinstance(failed, _Failed) else 0
        return max(asked, self.retry.backoff * backoff(state.attempt_number))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Stopped

    def _receive(self, item: Download, part: FileIO) -> None:
        """One try: ask for what is missing, write it, check the whole, and give it its name."""
        try:
            have = _size(part)
            told = _read_note(item) if have else None
            if told is None or have != told.size:  # else it was killed between its last byte and its renaming
                told = self._request(item, part, have, told)
            item.done = _size(part)
            size = item.size or told.size
            digests = told.digests | ({"sha256": item.sha256} if item.sha256 else {})
            if defect := _defect(item.part, item.file.suffix, size, digests):
                raise _Failed(defect, again=item.done > 0, anew=item.done >= size)
        except httpx2.TransportError as error:
            again = isinstance(error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.ProtocolError))
            raise _Failed(self._explain(error, item), again) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Failed(str(error), again=False) from error
        except _Failed as failed:
            if failed.anew and _size(part):
                part.truncate(0)
            raise
        os.fsync(part.fileno())
        os.replace(item.part, item.file)
        item.note.unlink(missing_ok=True)
        sync_folder(item.file.parent)

    def _request(self, item: Download, part: FileIO, have: int, told: _Told | None) -> _Told:
        headers = _authorization(item.url)
        if told is not None:
            headers |= {"Range": f"bytes={have}-", "If-Range": told.validator}
        with self.client.stream("GET", item.url, headers=headers) as answer:
            self._reached.update(each.request.url.host for each in (*answer.history, answer))
            _refuse(answer, item)
            now = _what_is_told(item.url, answer)
            if answer.status_code == 206:
                if told is None or not told.goes_on_with(now, have, answer.headers.get("Content-Range", "")):
                    raise _Failed("the server went on with another file", anew=True)
            else:  # the whole: asked for, or because the file has changed or the server knows no ranges
                if have:
                    part.truncate(0)
                have, told = 0, now
                write_atomically(item.note, json.dumps(asdict(told)))
            most = item.size or item.limit
            expected = f"the {item.size:,} published" if item.size else f"at most {item.limit:,}"
            if told.size and (told.size != item.size if item.size else told.size > item.limit > 0):
                raise _Failed(f"the server's file has {told.size:,} bytes, not {expected}", again=False)
            item.done, item.total = have, told.size or item.total or item.size
            for chunk in answer.iter_raw():
                if self.stop.is_set():
                    raise _Stopped
                rest = memoryview(chunk)
                while rest:
                    rest = rest[part.write(rest) :]
                item.done += len(chunk)
                if most and item.done > most:
                    raise _Failed(f"the server's file is longer than {expected}", again=False, anew=True)
        return told

    def _explain(self, error: httpx2.TransportError, item: Download) -> str:
        """What went wrong with a connection. Raises Unreachable if its host never answered before."""
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


# What the server says -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What the server said of a file; kept beside the partial file, so that only the same file is gone on with."""

    url: str
    validator: str  # a strong ETag, or the time of its last change; empty: no way to know the file again
    size: int  # 0: not said
    digests: dict[str, str] = field(default_factory=dict)  # name in hashlib -> hexadecimal digits

    def goes_on_with(self, now: _Told, have: int, content_range: str) -> bool:
        """Whether a partial answer is the rest of this file, from byte ``have`` on."""
        match = re.match(r"bytes (\d+)-", content_range)
        same = now.validator in (self.validator, "") and now.size in (self.size, 0)
        same = same and all(self.digests.get(name, digest) == digest for name, digest in now.digests.items())
        return match is not None and int(match[1]) == have and same


def _read_note(item: Download) -> _Told | None:
    """What was told of the partial file; None if that is of no use for going on with it."""
    try:
        told = _Told(**json.loads(item.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return told if told.validator and told.url == without_secrets(item.url) else None


def _what_is_told(url: str, answer: httpx2.Response) -> _Told:
    # Hugging Face tells the size and SHA-256 of a large file where it redirects to its store, whose own ETag may be
    # another hash. Elsewhere an ETag of 64 digits need not be a hash of the content: GitHub's is not.
    redirects = httpx2.Headers()
    for each in (answer, *reversed(answer.history)):  # the first to say it is right
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
    return _Told(without_secrets(url), validator, int(size) if size.isdecimal() else 0, digests)


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
    """Raise _Failed for an answer that does not bring the file."""
    code, headers = answer.status_code, answer.headers
    if code in (200, 206):
        if headers.get("Content-Type", "").startswith("text/html") and not item.file.name.endswith((".html", ".htm")):
            raise _Failed("a web page came instead of the file, perhaps the login page of a network", again=False)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _Failed(f"the server sends it only as Content-Encoding: {headers['Content-Encoding']}", again=False)
        return
    why = f"HTTP {code} {answer.reason_phrase}".strip()
    if code == 416:  # there is no such rest: the file is shorter than it was
        raise _Failed(why, anew=True)
    if code in (401, 403) and _is_hugging_face(item.url):
        given = "Authorization" in (*answer.history, answer)[0].request.headers
        why += "; the token (HF_TOKEN) is not accepted" if given else "; it may need a token: HF_TOKEN or hf auth login"
    wait = _retry_after(headers.get("Retry-After", ""))
    if wait > LONGEST_WAIT:
        raise _Failed(f"{why}; the server asks to come back in {wait:,.0f} s", again=False)
    raise _Failed(why, again=code in (408, 425, 429) or code >= 500, wait=wait)


def _retry_after(text: str) -> float:
    """Seconds to wait, from a number of them or a date."""
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
    """The header with the user's token, for Hugging Face only. On a redirect to another host httpx2 drops it."""
    if not _is_hugging_face(url):
        return {}
    from huggingface_hub import get_token

    token = get_token()  # of HF_TOKEN or hf auth login
    if token is None:
        return {}
    if not re.fullmatch(r"[!-~]+", token):  # or it would be printed as an illegal header
        raise UsageError("HF_TOKEN holds characters that no token has; set it again, or unset it")
    return {"Authorization": f"Bearer {token}"}


# On the disk ----------------------------------------------------------------------------------------------------------


def _size(part: FileIO) -> int:
    return os.fstat(part.fileno()).st_size


def _lock(part: FileIO) -> bool:
    """Take the file for this process; False if another has it. On file systems without locks it is always free."""
    if fcntl is not None:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _is_complete(item: Download) -> bool:
    """Whether the file is there and whole, as far as that can be known without asking the server."""
    digests = {"sha256": item.sha256} if item.sha256 else {}
    return item.file.is_file() and not _defect(item.file, item.file.suffix, item.size, digests)


def _defect(file: Path, suffix: str, expected: int, digests: dict[str, str]) -> str:
    """Why this is not the whole file of so many bytes (0: any), these hashes and this suffix; empty if it is."""
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
        return f"not a whole Parquet file: {problem}"
    return ""


def _parquet_problem(file: Path) -> str:
    """Why this is not a whole Parquet file; empty if it is: its footer is there and, with pyarrow, can be read."""
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
