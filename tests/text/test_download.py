"""Downloads from a real server on this machine that misbehaves in every way that servers do."""

import base64
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import constants

from pretrain.cli import main
from pretrain.errors import DataError, UsageError
from pretrain.text import download as downloading
from pretrain.text.download import Download, _Downloader, download, download_all

BODY = random.Random(1).randbytes(300_000)


@dataclass
class Fault:
    """What is wrong with one answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop: int = -1
    """Close the connection after so many bytes of the body."""
    stall: int = -1
    """Send nothing more after so many bytes of the body."""
    lie: int = 0
    """Say that the body is so much longer than it is."""
    flip: bool = False
    """Change a byte in the middle."""
    whole: bool = False
    """Ignore the Range."""
    careless: bool = False
    """Ignore the If-Range."""
    chunked: bool = False
    """Do not say the length."""
    meanwhile: Callable[[], object] = lambda: None
    """Done before answering."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.headers: dict[str, dict[str, str]] = {}  # of every answer for a path
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent: Counter[str] = Counter()
        self.released = threading.Event()  # ends the stalls

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"

    def ranges(self, path: str) -> list[str]:
        return [headers.get("Range", "") for asked, headers in self.asked if asked == path]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients are killed here


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((path, dict(self.headers)))
        faults = server.faults.get(path)
        fault = faults.pop(0) if faults else Fault()
        fault.meanwhile()
        body = server.files.get(path)
        status, first = fault.status or (200 if body is not None else 404), 0
        body = body or b""
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        given = server.headers.get(path, {}) | fault.headers
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = fault.careless or self.headers.get("If-Range") in (None, given.get("ETag", etag))
        if status == 200 and match and same and not fault.whole:
            first = int(match[1])
            status = 206 if first < len(body) else 416
        if status not in (200, 206):
            body = b""
        self.send_response(status)
        rest = body[first:]
        headers = {"Content-Length": str(len(rest) + fault.lie), "ETag": etag, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        if fault.chunked:
            headers |= {"Connection": "close", "Content-Length": ""}
        for name, value in (headers | given).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if fault.flip:
            middle = len(rest) // 2
            rest = rest[:middle] + bytes([rest[middle] ^ 1]) + rest[middle + 1 :]
        stop = min(each for each in (fault.drop, fault.stall, len(rest)) if each >= 0)
        for begin in range(0, stop, 16_384):
            piece = rest[begin : min(begin + 16_384, stop)]
            self.wfile.write(piece)
            server.sent[path] += len(piece)
        if fault.stall >= 0:
            server.released.wait(60)
        if fault.drop >= 0 or fault.stall >= 0 or fault.lie or fault.chunked:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/none")  # a login of who runs the tests
    with Server() as server:
        server.files["/a.txt"] = BODY
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out/a.txt"


def fetch(url: str, file: Path, *, tries: int = 5, timeout: float = 5, **known) -> Path:
    """As download(), with what the catalogue knows of a file."""
    item = Download(url, file, **known)
    download_all([item], tries=tries, timeout=timeout)
    if item.problem:
        raise DataError(f"{url} cannot be fetched ({item.problem})")
    return file


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloading, "BACKOFF", 0.01)


def only(file: Path) -> bool:
    """Whether the file stands there whole and alone."""
    return file.read_bytes() == BODY and [each.name for each in file.parent.iterdir()] == [file.name]


# One file ----------------------------------------------------------------------------------------------------------


def test_a_file_comes_whole_and_only_once(server: Server, file: Path):
    for _ in range(2):
        assert fetch(server.url("/a.txt"), file) == file
        assert only(file)
    assert server.ranges("/a.txt") == [""]
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


def test_without_length_it_is_complete_when_the_body_ends(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(chunked=True)]
    fetch(server.url("/a.txt"), file)
    assert only(file)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_errors_are_tried_again(server: Server, file: Path, status: int):
    server.faults["/a.txt"] = [Fault(status)] * 4
    fetch(server.url("/a.txt"), file)
    assert only(file)
    assert len(server.asked) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204])
def test_lasting_errors_are_not(server: Server, file: Path, status: int):
    server.faults["/a.txt"] = [Fault(status)]
    with pytest.raises(DataError, match=rf"a\.txt cannot be fetched \(HTTP {status} [A-Z]"):
        fetch(server.url("/a.txt"), file)
    assert len(server.asked) == 1
    assert list(file.parent.iterdir()) == []


def test_five_tries_then_it_is_given_up(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(503)] * 9
    with pytest.raises(DataError, match="HTTP 503 Service Unavailable"):
        fetch(server.url("/a.txt"), file)
    assert len(server.asked) == 5


def test_the_waits_grow_and_keep_to_retry_after(server: Server, file: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(_Downloader, "_wait", lambda self, seconds: waits.append(seconds))
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    server.faults["/a.txt"] = [
        Fault(503),
        Fault(503),
        Fault(429, {"Retry-After": "7"}),
        Fault(503, {"Retry-After": date}),
    ]
    monkeypatch.setattr(downloading, "BACKOFF", 1)
    download(server.url("/a.txt"), file)
    assert 1 <= waits[0] <= 2 <= waits[1] <= 3
    assert 7 + 4 <= waits[2] <= 7 + 5
    assert 90 + 8 < waits[3] <= 100 + 9
    file.unlink()
    server.faults["/a.txt"] = [Fault(503, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"})]  # of a clock that is wrong
    download(server.url("/a.txt"), file)
    assert 1 <= waits.pop() <= 2
    server.faults["/a.txt"] = [Fault(429, {"Retry-After": "3600"})]
    file.unlink()
    with pytest.raises(DataError, match="HTTP 429 Too Many Requests; the server asks to come back in 3,600 s"):
        download(server.url("/a.txt"), file)
    assert len(waits) == 4


def test_a_connection_that_drops_is_gone_on_with_where_it_broke(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(drop=100_000), Fault(drop=50_000), Fault(503), Fault(drop=0)]
    fetch(server.url("/a.txt"), file)
    assert only(file)
    assert server.ranges("/a.txt") == ["", "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150000-"]
    assert all(headers["If-Range"] == f'"{hashlib.md5(BODY).hexdigest()}"' for _, headers in server.asked[1:])
    assert server.sent["/a.txt"] == len(BODY)


def test_a_stalled_connection_counts_as_broken(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(stall=70_000)]
    fetch(server.url("/a.txt"), file, timeout=0.3)
    assert only(file)
    assert server.ranges("/a.txt") == ["", "bytes=70000-"]
    server.faults["/a.txt"] = [Fault(stall=0)]
    file.unlink()
    with pytest.raises(DataError, match="timed out"):
        fetch(server.url("/a.txt"), file, tries=1, timeout=0.2)


def test_what_is_left_is_gone_on_with_the_next_time(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(drop=120_000)]
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(server.url("/a.txt"), file, tries=1)
    assert sorted(each.name for each in file.parent.iterdir()) == ["a.txt.part", "a.txt.part.note"]
    fetch(server.url("/a.txt?signature=changes"), file)
    assert only(file)
    assert server.sent["/a.txt"] == len(BODY)


def leave_partial(server: Server, file: Path, size: int = 120_000) -> None:
    server.faults["/a.txt"] = [Fault(drop=size)]
    with pytest.raises(DataError):
        fetch(server.url("/a.txt"), file, tries=1)


@pytest.mark.parametrize(
    "way", ["etag", "etag while it is read", "range ignored", "shorter", "note lost", "note torn", "elsewhere"]
)
def test_another_file_is_begun_anew(server: Server, file: Path, way: str):
    old = random.Random(2).randbytes(len(BODY))
    server.files["/a.txt"] = old
    leave_partial(server, file)
    url = "/a.txt"
    if way == "etag while it is read":
        server.faults["/a.txt"] = [Fault(drop=1000, meanwhile=lambda: server.files.update({"/a.txt": BODY}))]
    elif way == "range ignored":
        server.files["/a.txt"] = BODY
        server.faults["/a.txt"] = [Fault(whole=True)]
    elif way == "shorter":  # and the server does not look at If-Range
        server.headers["/a.txt"] = {"ETag": f'"{hashlib.md5(old).hexdigest()}"'}
        server.files["/a.txt"] = BODY[:100]
    elif way.startswith("note"):
        note = file.with_name("a.txt.part.note")
        note.unlink() if way == "note lost" else note.write_text('{"url": ')
        server.files["/a.txt"] = BODY
    elif way == "elsewhere":
        url = "/b.txt"
        server.files[url] = BODY
        server.headers[url] = {"ETag": f'"{hashlib.md5(old).hexdigest()}"'}
    else:
        server.files["/a.txt"] = BODY
    fetch(server.url(url), file)
    assert file.read_bytes() == server.files[url]
    assert len(list(file.parent.iterdir())) == 1


def base64_of(algorithm: str, data: bytes = BODY) -> str:
    return base64.b64encode(hashlib.new(algorithm, data).digest()).decode()


OTHERS = {
    "ETag": ({"ETag": '"another"'}, b""),
    "range": ({"Content-Range": "bytes 7-9/300000"}, b""),
    "no range": ({"Content-Range": "bytes"}, b""),
    "size": ({}, b"more"),
    "hash": ({"X-Linked-ETag": f'"{"0" * 64}"'}, b""),
}


@pytest.mark.parametrize(("headers", "more"), OTHERS.values(), ids=OTHERS)
def test_a_server_that_goes_on_with_another_file_is_found_out(
    server: Server, file: Path, headers: dict[str, str], more: bytes
):
    old = bytes(len(BODY))
    server.files["/a.txt"] = old
    server.headers["/a.txt"] = {"X-Linked-ETag": hashlib.sha256(old).hexdigest()} if "X-Linked-ETag" in headers else {}
    leave_partial(server, file)
    server.files["/a.txt"] = BODY + more
    server.headers["/a.txt"] = {"ETag": f'"{hashlib.md5(old).hexdigest()}"'}
    server.faults["/a.txt"] = [Fault(headers=headers, careless=True)]
    fetch(server.url("/a.txt"), file)
    assert file.read_bytes() == BODY + more
    assert server.ranges("/a.txt") == ["", "bytes=120000-", ""]


def test_a_mirror_of_the_hub_without_tags(server: Server, file: Path):
    server.headers["/a.txt"] = {"X-Repo-Commit": "0" * 40, "ETag": ""}
    fetch(server.url("/a.txt"), file)
    assert only(file)


def test_a_hash_of_a_part_is_not_one_of_the_file(server: Server, file: Path):
    whole, rest = ({"Content-MD5": base64_of("md5", data)} for data in (BODY, BODY[1000:]))
    server.faults["/a.txt"] = [Fault(headers=whole, drop=1000), Fault(headers=rest)]
    fetch(server.url("/a.txt"), file)
    assert only(file)
    assert server.ranges("/a.txt") == ["", "bytes=1000-"]


def test_without_a_strong_validator_nothing_is_gone_on_with(server: Server, file: Path):
    for headers, again in (
        ({"ETag": 'W/"weak"'}, ""),
        ({"ETag": ""}, ""),
        ({"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "bytes=120000-"),
    ):
        server.headers["/a.txt"] = headers
        leave_partial(server, file)
        assert list(file.parent.iterdir()) == [] or again
        if again:  # this server compares If-Range with its ETag only
            server.headers["/a.txt"]["ETag"] = headers["Last-Modified"]
        fetch(server.url("/a.txt"), file)
        assert only(file)
        assert server.ranges("/a.txt")[-1] == again
        file.unlink()


def test_killed_between_the_last_byte_and_the_renaming(server: Server, file: Path):
    leave_partial(server, file, len(BODY) - 1)
    with open(file.with_name("a.txt.part"), "ab") as part:
        part.write(BODY[-1:])
    asked = len(server.asked)
    fetch(server.url("/a.txt"), file)
    assert only(file)
    assert len(server.asked) == asked


def test_lengths_that_are_lies(server: Server, file: Path):
    server.faults["/a.txt"] = [Fault(lie=1000)]  # it closes before what it promised; the rest is asked for
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(server.url("/a.txt"), file, tries=1)
    file.with_name("a.txt.part").unlink()
    server.headers["/a.txt"] = {"X-Linked-Size": str(len(BODY) + 1)}
    with pytest.raises(DataError, match="300,000 of 300,001 bytes came"):
        fetch(server.url("/a.txt"), file)
    server.headers.clear()
    with pytest.raises(DataError, match="the server's file has 300,000 bytes, not the 299,999 expected"):
        fetch(server.url("/a.txt"), file, size=len(BODY) - 1)
    server.faults["/a.txt"] = [Fault(chunked=True)] * 2
    with pytest.raises(DataError, match="longer than the 299,999 bytes expected"):
        fetch(server.url("/a.txt"), file, size=len(BODY) - 1)
    with pytest.raises(DataError, match="longer than the 1,000 bytes expected"):
        fetch(server.url("/a.txt"), file, limit=1000)
    with pytest.raises(DataError, match="has 300,000 bytes, not the 1,000 expected"):
        fetch(server.url("/a.txt"), file, limit=1000)
    server.files["/a.txt"] = b""
    with pytest.raises(DataError, match="an empty file"):
        fetch(server.url("/a.txt"), file)
    assert list(file.parent.iterdir()) == []


SHA256 = hashlib.sha256(BODY).hexdigest()
HASHES = {
    "Hugging Face, large file": {"X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": str(len(BODY))},
    "Hugging Face's mirror": {"X-Repo-Commit": "1", "ETag": f'"{SHA256}"'},
    "Content-MD5": {"Content-MD5": base64_of("md5")},
    "Digest": {"Digest": f"unknown=abcd,SHA-256={base64_of('sha256')}"},
    "Repr-Digest": {"Repr-Digest": f"sha-512=:{base64_of('sha512')}:"},
}


@pytest.mark.parametrize("headers", HASHES.values(), ids=HASHES)
def test_a_flipped_byte_is_found_by_the_servers_hash(server: Server, file: Path, headers: dict[str, str]):
    server.headers["/a.txt"] = headers
    server.faults["/a.txt"] = [Fault(flip=True), Fault(drop=200_000, flip=True)]
    fetch(server.url("/a.txt"), file)
    assert only(file)
    assert server.ranges("/a.txt") == ["", "", "bytes=200000-", ""]
    file.unlink()
    server.faults["/a.txt"] = [Fault(flip=True)] * 5
    with pytest.raises(
        DataError, match=r"altered on the way: (sha256|sha512|md5) [0-9a-f]{12}… instead of [0-9a-f]{12}…"
    ):
        fetch(server.url("/a.txt"), file)
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize(
    "headers",
    [{"ETag": f'"{"0" * 64}"'}, {"Content-MD5": "0" * 22 + "="}, {"Content-MD5": "0" * 32}, {"Digest": "sha-256=é=="}],
)
def test_what_only_looks_like_a_hash_is_none(server: Server, file: Path, headers: dict[str, str]):
    server.headers["/a.txt"] = headers
    fetch(server.url("/a.txt"), file)
    assert only(file)


def test_the_published_hash_and_size_decide_what_is_complete(server: Server, file: Path):
    file.parent.mkdir()
    for there, known in ((BODY[:-1], {}), (bytes(len(BODY)), {"sha256": SHA256}), (b"", {})):
        file.write_bytes(there)
        fetch(server.url("/a.txt"), file, size=len(BODY), **known)
        assert only(file)
    asked = len(server.asked)
    fetch(server.url("/a.txt"), file, size=len(BODY), sha256=SHA256)
    assert len(server.asked) == asked == 3
    server.faults["/a.txt"] = [Fault(flip=True)]
    file.unlink()
    fetch(server.url("/a.txt"), file, sha256=SHA256)
    assert only(file)


def parquet_bytes(rows: int = 1000) -> bytes:
    if find_spec("pyarrow") is None:
        footer = b"\0" * 50
        return b"PAR1" + random.Random(rows).randbytes(rows) + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"row {random.Random(row).random()}" for row in range(rows)]})
    pyarrow.parquet.write_table(table, out := io.BytesIO())
    return out.getvalue()


def test_a_parquet_file_must_open(server: Server, tmp_path: Path):
    file, good = tmp_path / "a.parquet", parquet_bytes()
    for bad in (good[:-1], b"PAR1", good[:4] + good[-8:], b"<html>"):
        file.write_bytes(bad)  # one that is there already is no better
        server.files["/a.parquet"] = bad
        with pytest.raises(DataError, match="not a complete Parquet file: "):
            fetch(server.url("/a.parquet"), file)
        server.files["/a.parquet"] = good
        fetch(server.url("/a.parquet"), file)
        assert file.read_bytes() == good
    asked = len(server.asked)
    fetch(server.url("/a.parquet"), file)
    assert len(server.asked) == asked
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_a_parquet_footer_is_read(server: Server, tmp_path: Path):
    good = parquet_bytes()
    length = int.from_bytes(good[-8:-4], "little")
    server.files["/a.parquet"] = good[: -8 - length] + bytes(length) + good[-8:]
    with pytest.raises(DataError, match="not a complete Parquet file: "):
        fetch(server.url("/a.parquet"), tmp_path / "a.parquet")


def test_a_login_page_is_not_taken_for_the_file(server: Server, file: Path):
    server.headers["/a.txt"] = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(DataError, match="a web page came instead of the file"):
        fetch(server.url("/a.txt"), file)
    server.headers["/a.txt"] = {"Content-Encoding": "gzip"}
    with pytest.raises(DataError, match="Content-Encoding: gzip"):
        fetch(server.url("/a.txt"), file)
    assert len(server.asked) == 2


# Hosts, tokens and networks ---------------------------------------------------------------------------------------


TOKEN = "hf_secretsecret"


def tokens(server: Server) -> list[str]:
    return [headers.get("Authorization", "") for _, headers in server.asked]


def test_the_token_goes_to_hugging_face_only(server: Server, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    fetch(server.url("/a.txt"), file)
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    server.files["/redirected"] = b""
    server.faults["/redirected"] = [
        Fault(302, {"Location": "/a.txt"}),  # the same host
        Fault(302, {"Location": server.url("/a.txt", "localhost")}),
    ]
    for _ in range(2):
        file.unlink()
        fetch(server.url("/redirected"), file)
        assert only(file)
    bearer = f"Bearer {TOKEN}"
    assert tokens(server) == ["", bearer, bearer, bearer, ""]
    assert not any(TOKEN in each.read_text("latin-1") for each in file.parent.iterdir())


def test_the_token_of_a_login_is_used(server: Server, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch(server.url("/a.txt"), file)
    assert tokens(server) == [f"Bearer {TOKEN}"]


def test_a_redirect_brings_size_and_hash(server: Server, file: Path):
    server.files["/linked"] = b""
    headers = {"Location": server.url("/a.txt", "localhost"), "X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": "300000"}
    server.faults["/linked"] = [Fault(302, headers)] * 3
    server.faults["/a.txt"] = [Fault(flip=True), Fault(drop=100_000)]
    fetch(server.url("/linked"), file)
    assert only(file)
    assert server.ranges("/a.txt") == ["", "", "bytes=100000-"]


def test_errors_never_tell_the_token_or_a_password(server: Server, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.faults["/a.txt"] = [Fault(401), Fault(403)]
    with pytest.raises(
        DataError, match=r"HTTP 401 Unauthorized; check your access and your token \(HF_TOKEN or hf auth login\)"
    ) as caught:
        fetch(server.url("/a.txt"), file)
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError, match=r"HTTP 403 Forbidden; check your access and your token"):
        fetch(server.url("/a.txt"), file)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\nX-Header: 1")
    with pytest.raises(UsageError, match="HF_TOKEN holds characters") as caught:
        fetch(server.url("/a.txt"), file)
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError) as caught:
        download(server.url("/none").replace("//", "//user:secret@"), file)
    assert "secret" not in str(caught.value)
    assert tokens(server)[-1].startswith("Basic ")
    leave_partial(server, file)
    assert "secret" not in file.with_name("a.txt.part.note").read_text()


@pytest.mark.parametrize("url", ["/loop", "/ftp"])
def test_redirects_to_nowhere(server: Server, file: Path, url: str):
    server.files |= {"/loop": b"", "/ftp": b""}
    where = {"/loop": "/loop", "/ftp": "ftp://127.0.0.1/a"}[url]
    server.faults[url] = [Fault(302, {"Location": where})] * 100
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(server.url(url), file)
    assert len(server.asked) < 30


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()[1]


def no_names(*_: object, **__: object):
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_without_a_network_it_is_said_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(_Downloader, "_wait", lambda self, seconds: waits.append(seconds))
    with pytest.raises(DataError, match=r"127\.0\.0\.1 cannot be reached: .*refused"):
        download(f"http://127.0.0.1:{closed_port()}/a.txt", tmp_path / "a.txt")
    server.faults["/a.txt"] = [Fault(302, {"Location": f"http://localhost:{closed_port()}/a.txt"})]
    with pytest.raises(DataError, match=r"localhost cannot be reached"):  # the store behind it
        download(server.url("/a.txt"), tmp_path / "a.txt")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(DataError, match=r"data\.example cannot be reached: .*name resolution"):
        download("http://data.example/a.txt", tmp_path / "a.txt")
    assert waits == []
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_has_answered_is_waited_for(server: Server, file: Path, monkeypatch: pytest.MonkeyPatch):
    find = socket.getaddrinfo
    server.faults["/a.txt"] = [Fault(drop=1000, meanwhile=lambda: monkeypatch.setattr(socket, "getaddrinfo", no_names))]
    waits = []

    def wait(self: _Downloader, seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            monkeypatch.setattr(socket, "getaddrinfo", find)

    monkeypatch.setattr(_Downloader, "_wait", wait)
    download(server.url("/a.txt"), file)
    assert only(file)
    assert len(waits) == 2


# The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(server: Server, file: Path):
    file.parent.mkdir()
    file.with_name("a.txt.part").symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=r"a\.txt cannot be written \(No space left on device\); free some space or give another folder"
    ):
        fetch(server.url("/a.txt"), file)
    assert len(server.asked) == 1


def test_a_place_that_cannot_be_written(server: Server, file: Path):
    file.parent.parent.joinpath("out").write_text("not a folder")
    with pytest.raises(
        DataError, match=r"a\.txt cannot be written \((File exists|Not a directory)\); .* give another folder"
    ):
        fetch(server.url("/a.txt"), file)
    file.parent.unlink()
    file.mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.txt cannot be written \(Is a directory\)"):
        fetch(server.url("/a.txt"), file)


# Many files ------------------------------------------------------------------------------------------------------


def items_of(server: Server, folder: Path, count: int) -> list[Download]:
    for number in range(count):
        server.files[f"/{number}"] = random.Random(number).randbytes(1000 + number)
    return [Download(server.url(f"/{number}"), folder / str(number)) for number in range(count)]


def test_files_come_side_by_side(server: Server, tmp_path: Path):
    items = items_of(server, tmp_path, 6)
    together = threading.Barrier(3, timeout=30)  # an answer waits for two others
    for item in range(6):
        server.faults[f"/{item}"] = [Fault(meanwhile=together.wait)]
    download_all(items, workers=3)
    assert [item.state for item in items] == ["fetched"] * 6
    assert all(item.file.read_bytes() == server.files[f"/{number}"] for number, item in enumerate(items))
    assert [(item.done, item.total, item.tries) for item in items] == [(1000 + n, 1000 + n, 1) for n in range(6)]


def test_one_worker_is_one_at_a_time(server: Server, tmp_path: Path):
    items = items_of(server, tmp_path, 3)
    running: list[int] = []
    for number in range(3):
        server.faults[f"/{number}"] = [
            Fault(meanwhile=lambda: running.append(sum(item.state == "running" for item in items)))
        ]
    download_all(items, workers=1)
    assert running == [1, 1, 1]


def test_what_fails_does_not_keep_the_others(server: Server, tmp_path: Path):
    items = items_of(server, tmp_path, 5)
    del server.files["/1"]
    server.faults["/3"] = [Fault(503)] * 5
    (tmp_path / "4").write_bytes(b"there")
    download_all(items)
    assert [item.state for item in items] == ["fetched", "failed", "fetched", "failed", "kept"]
    assert [(item.tries, item.problem) for item in items if item.problem] == [
        (1, "HTTP 404 Not Found"),
        (5, "HTTP 503 Service Unavailable"),
    ]


def test_two_jobs_for_the_same_files_share_the_work(server: Server, tmp_path: Path):
    jobs = [items_of(server, tmp_path, 8) for _ in range(2)]
    threads = [threading.Thread(target=download_all, args=(items, 2)) for items in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(server.sent[f"/{number}"] for number in range(8)) == sum(1000 + number for number in range(8))
    for one, other in zip(*jobs, strict=True):
        assert {one.state, other.state} == {"fetched", "kept"}
        assert one.file.read_bytes() == server.files[f"/{one.file.name}"]
    assert len(list(tmp_path.iterdir())) == 8


def test_an_error_in_the_calling_thread_ends_the_job(server: Server, tmp_path: Path):
    items = items_of(server, tmp_path, 3)
    server.faults["/0"] = [Fault(stall=500)]

    def finished(item: Download) -> None:
        wait_for(lambda: items[0].done == 500)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_all(items, workers=2, finished=finished)
    assert (tmp_path / "0.part").stat().st_size == 500
    assert items[0].state == "running"
    server.released.set()
    wait_for(lambda: items[0].state == "failed")
    assert (tmp_path / "0.part").stat().st_size == 500


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stories(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with a small set in the layout of the shuffled ones, in Hugging Face's place."""
    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    for number in (*range(4), 6542):
        server.files[f"/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_{number:05d}.parquet"] = (
            parquet_bytes(100 + number)
        )
    return server


def test_the_command(stories: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "mix"
    arguments = ["data", "download", "climbmix-400b-shuffle", "-n", "3", "--out", str(folder)]
    assert main(arguments) == 0
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", "shard_06542.parquet"]
    assert sorted(each.name for each in folder.iterdir()) == names
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-4:] == [
        "shard_06542.parquet, the last of them, is to validate on.",
        "Next:",
        f"  pretrain data prepare {folder} --split last_file --out {folder}-tokens",
        f"  pretrain train --data {folder} --data.split last_file",
    ]
    for name in names:
        assert name in printed.err
    asked = len(stories.asked)
    assert main([*arguments[:4], "4", *arguments[5:]]) == 0
    assert len(stories.asked) == asked + 1
    assert "5 of 5 files, 4 of them there before" in capsys.readouterr().out


def test_the_command_says_what_failed(stories: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, mirror = tmp_path / "mix", stories.url("/mirror")
    for path, data in list(stories.files.items()):
        stories.files["/mirror/" + path.rpartition("/")[2]] = data
    del stories.files["/mirror/shard_00001.parquet"]
    stories.faults["/mirror/shard_06542.parquet"] = [Fault(503)]
    arguments = ["data", "download", "climbmix-400b-shuffle", "-n", "3", "--out", str(folder)]
    assert main([*arguments, "--base-url", mirror, "--tries", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-3:] == [
        "shard_00001.parquet  HTTP 404 Not Found (tries: 1)",
        "shard_06542.parquet  HTTP 503 Service Unavailable (tries: 1)",
        f"pretrain: 2 of 4 files could not be downloaded to {folder}, for the reasons above;"
        " the same command tries them again",
    ]
    assert main(arguments) == 0
    assert len(list(folder.iterdir())) == 4


def test_urls(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    server.files["/b%20c.txt"] = b"text"
    urls = [server.url("/a.txt?x=y"), server.url("/b%20c.txt")]
    assert main(["data", "download", *urls, "--out", str(tmp_path / "a b")]) == 0
    assert {each.name: each.stat().st_size for each in (tmp_path / "a b").iterdir()} == {"a.txt": 300_000, "b c.txt": 4}
    assert f"pretrain train --data '{tmp_path / 'a b'}'\n" in capsys.readouterr().out


def test_small_sets_have_names_of_their_own(server: Server, tmp_path: Path, shared_data: Path):
    server.files["/x/input.txt"] = (shared_data / "tinyshakespeare.txt").read_bytes()
    arguments = ["data", "download", "tinyshakespeare", "--out", str(tmp_path), "--base-url", server.url("/x")]
    assert main(arguments) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["tinyshakespeare.txt"]


def test_the_command_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert main(["data", "download", "fineweb-edu-100b-shuffle", "-n", "20", "--out", str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"pretrain: http://127\.0\.0\.1:\d+/datasets/\S+ cannot be fetched \(127\.0\.0\.1 cannot be reached: .*;"
        r" check the network; behind a proxy, set HTTPS_PROXY\)\n",
        line,
    )
    assert list(tmp_path.iterdir()) == []


# Processes -------------------------------------------------------------------------------------------------------


def start(server: Server, folder: Path, *urls: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "data", "download", *map(server.url, urls), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_PROXY": "*"},
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.slow
def test_killed_it_goes_on_by_range(server: Server, tmp_path: Path):
    body = server.files["/big.txt"] = random.Random(3).randbytes(3_000_000)
    part = tmp_path / "big.txt.part"
    got = []
    for stall in (1_000_000, 700_000):
        server.faults["/big.txt"] = [Fault(stall=stall)]
        process = start(server, tmp_path, "/big.txt")
        wait_for(lambda: size_of(part) == server.sent["/big.txt"] > sum(got))
        wait_for(lambda stall=stall: size_of(part) == sum(got) + stall)
        process.kill()
        process.communicate()
        got.append(stall)
    assert not (tmp_path / "big.txt").exists()
    process = start(server, tmp_path, "/big.txt")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "pretrain train" in out) == (0, True), err
    assert (tmp_path / "big.txt").read_bytes() == body
    assert server.ranges("/big.txt") == ["", "bytes=1000000-", "bytes=1700000-"]
    assert server.sent["/big.txt"] == len(body)
    assert [each.name for each in tmp_path.iterdir()] == ["big.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_and_keeps_what_it_has(server: Server, tmp_path: Path, number: int):
    server.files["/b.txt"] = BODY
    server.faults["/a.txt"] = [Fault(stall=100_000)]
    process = start(server, tmp_path, "/a.txt", "/b.txt")
    wait_for(lambda: size_of(tmp_path / "a.txt.part") == 100_000 and (tmp_path / "b.txt").exists())
    process.send_signal(number)
    out, err = process.communicate(timeout=10)  # well before the 30 s after which a connection counts as broken
    assert process.returncode == 130
    assert out == ""
    assert (
        err.splitlines()[-1]
        == f"pretrain: interrupted: 1 of 2 files are in {tmp_path}; the same command resumes from here"
    )
    assert "Traceback" not in err
    assert json.loads((tmp_path / "a.txt.part.note").read_text())["size"] == len(BODY)
    assert main(["data", "download", server.url("/a.txt"), "--out", str(tmp_path)]) == 0
    assert server.ranges("/a.txt") == ["", "bytes=100000-"]
