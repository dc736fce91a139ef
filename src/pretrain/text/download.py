"""Download files: complete, verified, and no byte twice.

    URL ──> FILE.part ──bytes as they come──> size, hash, Parquet footer ──> synced ──> FILE
              ├ FILE.part.note: what the server said of the file (ETag, size, hash)
              └ FILE.part.lock: held by the process that downloads it; others wait

A file gets its name only when it is complete. A broken connection, Ctrl-C or kill -9 leaves FILE.part, and the next try
asks for the rest (Range) if the server still has the same file (If-Range).

Files of the Hub are downloaded in the same way, with the addresses and the user's token from huggingface_hub: its own
hf_hub_download (2.4) keeps no partial file to resume from, and verifies no hash.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2
from filelock import FileLock
from huggingface_hub import get_token
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from pretrain.errors import DataError, UsageError
from pretrain.io import sync_folder, without_secrets, write_atomically
from pretrain.text.catalogue import hugging_face

BACKOFF = 1.0  # seconds before the second try, twice as long before each further one, and up to a second more
LONGEST_WAIT = 300  # seconds; if a server asks for more (Retry-After), the file fails
CONNECT_TIMEOUT = 10  # seconds
_PASSING = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.ProtocolError, httpx2.ProxyError)  # try again


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


def download(url: str, file: Path, limit: int = 0) -> Path:
    """Download one file, unless it is already there, and return its path. Folders are created.

    ``url`` is http:// or https://; the user's token is sent to Hugging Face (or HF_ENDPOINT) only. A file of more than
    ``limit`` bytes (0: any size) is refused. Raises DataError that says why it failed; the caller adds what to do.
    """
    item = Download(url, file, limit=limit)
    download_all([item])
    if item.problem:
        raise DataError(f"{without_secrets(url)} cannot be fetched ({item.problem})")
    return file


def download_all(
    items: Sequence[Download],
    workers: int = 4,
    tries: int = 5,
    timeout: float = 30.0,
    finished: Callable[[Download], None] = lambda item: None,
) -> None:
    """Download files in parallel. The outcome of each is in its ``state`` and ``problem``.

    A connection without a byte for ``timeout`` seconds counts as broken. ``finished`` is called with each file, in the
    calling thread. KeyboardInterrupt stops the downloads; partial files stay for the next time. Raises DataError when
    no file can succeed: a host that has never answered cannot be reached, or the disk is full.
    """
    client = httpx2.Client(
        follow_redirects=True,
        timeout=httpx2.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout), pool=None),
        # Sizes, ranges and hashes are those of the file itself, not of a compressed form of it.
        headers={"Accept-Encoding": "identity", "User-Agent": "pretrain"},
    )
    downloader = _Downloader(client, tries)
    # Not concurrent.futures: at exit it would wait for its threads, even for one in a stalled connection.
    with client, ThreadPool(min(workers, len(items))) as pool:
        try:
            for item in pool.imap_unordered(downloader.fetch, items):
                finished(item)
        except BaseException:
            downloader.stop.set()
            time.sleep(0.5)  # for the other threads to tidy up; one in a stalled connection is left behind
            raise


class _Failed(Exception):
    """Why a try failed, and whether to try again, after at least ``wait`` seconds."""

    def __init__(self, why: str, retry: bool = True, wait: float = 0):
        super().__init__(why)
        self.retry, self.wait = retry, wait


class _Downloader:
    """What the threads share."""

    def __init__(self, client: httpx2.Client, tries: int):
        self.client = client
        self.stop = threading.Event()
        self.hosts: set[str] = set()  # that have answered
        backoff = wait_exponential(BACKOFF) + wait_random(0, BACKOFF)
        self.retrying = Retrying(
            stop=stop_after_attempt(tries),
            retry=retry_if_exception(lambda error: getattr(error, "retry", isinstance(error, _PASSING))),
            wait=lambda state: backoff(state) + getattr(state.outcome and state.outcome.exception(), "wait", 0),
            sleep=self._wait,
            reraise=True,
        )

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _Failed("stopped", retry=False)

    def fetch(self, item: Download) -> Download:
        """Download one file, with retries, if it is not there. Raises DataError if no other file can succeed either."""
        if self.stop.is_set():
            return item
        try:
            if not _is_complete(item):
                item.file.parent.mkdir(parents=True, exist_ok=True)
                with _lock(item):
                    if not _is_complete(item):  # another process may have completed it meanwhile
                        self._download(item)
            if item.state == "waiting":
                item.state, item.done = "kept", item.file.stat().st_size
                item.total = item.done
        except OSError as error:
            raise DataError(
                f"{item.file} cannot be written ({error.strerror}); free some space or give another folder, and run"
                f" the same command again: it resumes where this one stopped"
            ) from None
        return item

    def _download(self, item: Download) -> None:
        item.state = "running"
        with open(item.part, "ab") as part:
            try:
                self.retrying(self._try, item, part)
                item.state = "fetched"
            except (_Failed, httpx2.HTTPError, httpx2.InvalidURL) as error:
                item.state, item.problem = "failed", _line(error)
            finally:  # keep only what can be resumed
                if item.state != "fetched" and (item.part.stat().st_size == 0 or _read_note(item) is None):
                    item.part.unlink()
                    item.note.unlink(missing_ok=True)

    def _try(self, item: Download, part: BinaryIO) -> None:
        """Request what is missing, verify the whole file, rename it."""
        item.tries += 1
        item.done = item.part.stat().st_size
        facts = _read_note(item) if item.done else None
        if facts is None or facts.size != item.done:  # else it was killed between the last byte and the renaming
            try:
                facts = self._request(item, part, facts)
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
                if (host := error.request.url.host) in self.hosts:
                    raise
                why = f"{host} cannot be reached: {_line(error)}; check the network; behind a proxy, set HTTPS_PROXY"
                raise DataError(f"{without_secrets(item.url)} cannot be fetched ({why})") from None
        digest = f"sha256:{item.sha256}" if item.sha256 else facts.digest
        if defect := _defect(item.part, item.file.suffix, item.size or facts.size, digest):
            part.truncate(0)
            raise _Failed(defect)
        os.fsync(part.fileno())
        os.replace(item.part, item.file)
        item.note.unlink(missing_ok=True)
        sync_folder(item.file.parent)

    def _request(self, item: Download, part: BinaryIO, noted: _Facts | None) -> _Facts:
        """Write what the server sends to the partial file: the rest of it, if the server still has ``noted``."""
        headers = _authorization(item.url)
        if noted is not None:
            headers |= {"Range": f"bytes={item.done}-", "If-Range": noted.validator}
        with self.client.stream("GET", item.url, headers=headers) as answer:
            self.hosts.update(each.request.url.host for each in (*answer.history, answer))
            if answer.status_code == 416:  # the file has become shorter
                part.truncate(0)
            _refuse(answer, item)
            facts = _facts(item.url, answer)
            if answer.status_code == 206:
                at_the_end = answer.headers.get("Content-Range", "").startswith(f"bytes {item.done}-")
                # An answer with a part need not repeat everything.
                if not (noted and at_the_end and all(a in (b, "", 0) for a, b in zip(facts, noted, strict=True))):
                    part.truncate(0)
                    raise _Failed("the server continued with another file")
                facts = noted
            else:  # the whole file: as requested, or because it has changed or the server supports no ranges
                if item.done:
                    part.truncate(0)
                    item.done = 0
                write_atomically(item.note, json.dumps(facts._asdict()))
            most = item.size or item.limit or sys.maxsize
            if facts.size > most or (item.size and facts.size not in (0, item.size)):
                raise _Failed(f"the server's file has {facts.size:,} bytes, not the {most:,} expected", retry=False)
            item.total = facts.size or item.total or item.size
            for chunk in answer.iter_raw():
                if self.stop.is_set():
                    raise _Failed("stopped", retry=False)
                part.write(chunk)
                part.flush()
                item.done += len(chunk)
                if item.done > most:
                    part.truncate(0)
                    raise _Failed(f"the server's file is longer than the {most:,} bytes expected", retry=False)
        return facts


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# What the server says about a file ------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What the server says about a file, kept with the partial file so that only the same file is resumed."""

    url: str
    validator: str  # a strong ETag, or Last-Modified; empty: it cannot be resumed
    size: int  # 0: unknown
    digest: str  # algorithm:hexadecimal; empty: unknown


def _read_note(item: Download) -> _Facts | None:
    """What the server said about the partial file; None if it cannot be resumed."""
    try:
        facts = _Facts(**json.loads(item.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return facts if facts.validator and facts.url == without_secrets(item.url) else None


def _facts(url: str, answer: httpx2.Response) -> _Facts:
    # Hugging Face sends the size and SHA-256 of a large file with the redirect to its store, whose own ETag may be
    # another hash. Elsewhere an ETag of 64 digits need not be a hash of the content: GitHub's is not.
    redirects = httpx2.Headers()
    for each in (answer, *reversed(answer.history)):  # the first answer counts
        redirects.update(each.headers)
    tag = redirects.get("X-Linked-ETag") or (redirects.get("ETag", "") if "X-Repo-Commit" in redirects else "")
    sha256 = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag)
    headers = answer.headers
    size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    size = redirects.get("X-Linked-Size", size)
    etag = headers.get("ETag", "")
    return _Facts(
        without_secrets(url),
        validator=headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag,
        size=int(size) if size.isdecimal() else 0,
        digest=f"sha256:{sha256[1]}" if sha256 else _digest(headers),
    )


def _digest(headers: httpx2.Headers) -> str:
    """A hash of the whole file: Repr-Digest (RFC 9530), Digest (RFC 3230), Content-MD5 if no part was asked for."""
    stated = f"{headers.get('Repr-Digest', '')},{headers.get('Digest', '')}"
    if "Content-Range" not in headers:
        stated += f",md5={headers.get('Content-MD5', '')}"
    for name, length in (("sha-512", "{86}=="), ("sha-256", "{43}="), ("md5", "{22}==")):  # of each in base64
        if found := re.search(rf"\b{name}=:?([A-Za-z0-9+/]{length})", stated, re.IGNORECASE):
            return f"{name.replace('-', '')}:{base64.b64decode(found[1]).hex()}"
    return ""


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
    if code in (401, 403) and _is_hugging_face(item.url):
        why += "; check your access and your token (HF_TOKEN or hf auth login)"
    wait = _retry_after(headers.get("Retry-After", ""))
    if wait > LONGEST_WAIT:
        raise _Failed(f"{why}; the server asks to come back in {wait:,.0f} s", retry=False)
    raise _Failed(why, retry=code in (408, 416, 425, 429) or code >= 500, wait=wait)


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
    return urlsplit(url)[:2] == urlsplit(hugging_face())[:2]


def _authorization(url: str) -> dict[str, str]:
    """The header with the user's token, for Hugging Face only; httpx2 drops it on a redirect to another host."""
    token = get_token() if _is_hugging_face(url) else None  # from HF_TOKEN or hf auth login
    if token is None:
        return {}
    if not re.fullmatch(r"[!-~]+", token):  # or it would be printed as an illegal header
        raise UsageError("HF_TOKEN holds characters that no token has; set it again, or unset it")
    return {"Authorization": f"Bearer {token}"}


# On the disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def _lock(item: Download) -> Iterator[None]:
    """Wait until no other process downloads this file."""
    file = item.file.with_name(f"{item.file.name}.part.lock")
    lock = FileLock(file)
    try:
        lock.acquire(poll_interval=0.1)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK):  # file systems without locks
            raise
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is released: who waits for it sees that it is gone
        lock.release()


def _is_complete(item: Download) -> bool:
    """Whether the file is there and complete, as far as can be known without the server."""
    digest = f"sha256:{item.sha256}" if item.sha256 else ""
    return item.file.is_file() and not _defect(item.file, item.file.suffix, item.size, digest)


def _defect(file: Path, suffix: str, expected: int, digest: str) -> str:
    """Why this is not the complete file of that size (0: any), suffix and hash (empty: any); empty if it is."""
    size = file.stat().st_size
    if size == 0:
        return "the server sent an empty file"
    if expected and size != expected:
        return f"{size:,} of {expected:,} bytes came"
    if digest:
        name, _, right = digest.partition(":")
        with open(file, "rb") as data:
            actual = hashlib.file_digest(data, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
        if actual != right:
            return f"altered on the way: {name} {actual[:12]}… instead of {right[:12]}…"
    if suffix == ".parquet" and find_spec("pyarrow"):
        import pyarrow.parquet  # type: ignore[import-not-found]

        try:
            pyarrow.parquet.read_metadata(file)
        except (OSError, ValueError) as error:
            return f"not a complete Parquet file: {' '.join(str(error).split())}"
    return ""
