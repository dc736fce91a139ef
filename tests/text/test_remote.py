"""Text on other machines: real requests to servers on 127.0.0.1, and fsspec's memory:// for stores such as s3://."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fsspec.registry import _registry as filesystems

from pretrain.errors import DataError
from pretrain.text import find_pieces, formats, opening, pieces, read_documents, read_piece

pytest.importorskip("aiohttp")


class Server(ThreadingHTTPServer):
    """Serves ``files``; what it does wrong is set by its other attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # whether it answers with parts
        self.length = True  # whether it tells the length
        self.faults: list[str | int] = []  # for the next GETs beyond the first bytes: "drop", "short" or a status
        self.requests: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        server: Server = self.server
        asked = self.headers.get("Range", "")
        server.requests.append(f"{self.command} {asked}")
        body = server.files.get(self.path[1:].partition("?")[0])
        status = 404 if body is None else 200
        body = body or b""
        total, begin, end = len(body), 0, len(body)
        if asked and server.ranges and body:
            begin, last = map(int, re.findall(r"\d+", asked))
            end = min(last + 1, total)
            status, body = 206, body[begin:end]
        fault = server.faults.pop(0) if with_body and len(body) > 1 and server.faults else None
        if isinstance(fault, int):
            status, body = fault, b"sorry"
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(status)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        self.close_connection = fault == "drop" or not server.length


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between tries."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def texts(*urls: str) -> list[str]:
    return [document.text for document in read_documents(urls)]


def refusal(url: str) -> str:
    with pytest.raises(DataError) as caught:
        texts(url)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{url}: ")
    return line


def parquet(rows: list[str], **options: Any) -> bytes:
    pa = pytest.importorskip("pyarrow")
    out = pa.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": rows, "other": rows}), out, **options)
    return out.getvalue().to_pybytes()


# http


def test_every_type_of_file_is_read_over_http(server: Server):
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3)).encode()
    server.files |= {"a.txt": "é text".encode(), "b.jsonl": lines, "c.jsonl.gz": gzip.compress(lines)}
    server.files["d.parquet"] = parquet(["one", "two"])
    urls = [server.url(name) for name in server.files]
    assert texts(*urls) == ["é text", *(f"line {n}" for n in range(3)), *(f"line {n}" for n in range(3)), "one", "two"]
    assert texts(server.url("a.txt?download=true")) == ["é text"]
    assert next(read_documents(urls)).source == urls[0]


def test_a_large_remote_file_is_read_in_ranges(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "RANGE_BYTES", 1000)
    monkeypatch.setattr(opening, "REMOTE_BUFFER", 512)
    monkeypatch.setattr(formats, "BLOCK", 256)
    rows = [f"row {n} é" * (n % 9 + 1) for n in range(300)]
    server.files["a.jsonl"] = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    server.files["a.txt"] = " ".join(rows).encode()
    found = find_pieces([server.url("a.jsonl")])
    assert len(found) > 10
    assert [document.text for piece in found for document in read_piece(piece)] == rows
    assert "".join(texts(server.url("a.txt"))) == " ".join(rows)
    server.requests.clear()
    list(read_piece(found[5]))
    asked = [tuple(map(int, re.findall(r"\d+", request))) for request in server.requests if "bytes" in request]
    assert asked
    assert all(found[5].begin <= begin and end <= found[5].end + 1024 for begin, end in asked)


def test_only_the_column_of_a_remote_parquet_file_is_fetched(server: Server):
    rows = [f"{n} " + os.urandom(500).hex() for n in range(4000)]
    server.files["a.parquet"] = parquet(rows, row_group_size=1000, compression="none", use_dictionary=False)
    assert texts(server.url("a.parquet")) == rows
    fetched = [tuple(map(int, re.findall(r"\d+", request))) for request in server.requests if "bytes" in request]
    assert sum(end - begin + 1 for begin, end in fetched) < 0.6 * len(server.files["a.parquet"])


@pytest.mark.parametrize("faults", [["drop"], ["short", "short"], [503, 429, "drop", 500]])
def test_what_does_not_come_whole_is_asked_for_again(server: Server, waits: list[float], faults: list):
    server.files["a.txt"] = b"some text " * 100_000
    found = find_pieces([server.url("a.txt")])
    server.faults += faults
    assert "".join(document.text for piece in found for document in read_piece(piece)) == "some text " * 100_000
    assert not server.faults
    assert len(waits) == len(faults)
    assert all(2**n <= wait <= 2**n + 1 for n, wait in enumerate(waits))


def test_a_server_that_stays_broken_is_given_up(server: Server, waits: list[float]):
    server.files["a.txt"] = b"some text " * 100
    (piece,) = find_pieces([server.url("a.txt")])
    server.faults += [503] * 100
    with pytest.raises(DataError, match=r"cannot be reached \(.*503.*try again later"):
        list(read_piece(piece))
    assert len(waits) == opening.TRIES - 1
    server.faults[:] = ["short"] * 100
    with pytest.raises(DataError, match=r"cannot be reached.*500 bytes came instead of 1,000"):
        list(read_piece(piece))


def test_a_refused_range_is_not_asked_for_again(server: Server, waits: list[float]):
    server.files["a.txt"] = b"some text"
    (piece,) = find_pieces([server.url("a.txt")])
    server.faults += [403]
    with pytest.raises(DataError, match="access is refused"):
        list(read_piece(piece))
    assert not waits


def test_a_server_without_ranges_is_read_as_a_stream(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "RANGE_BYTES", 1000)
    server.ranges = False
    rows = [f"row {n}" for n in range(500)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    server.files |= {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.parquet": parquet(rows)}
    assert len(find_pieces([server.url("a.jsonl")])) == 1
    assert texts(server.url("a.jsonl")) == rows
    assert texts(server.url("a.jsonl.gz")) == rows
    assert "its server gives files only as a whole" in refusal(server.url("a.parquet"))
    server.length = False
    server.files["b.jsonl"] = lines
    assert texts(server.url("b.jsonl")) == rows


def test_a_stream_that_breaks_off_is_not_the_end_of_the_text(server: Server):
    server.ranges = False
    server.files["a.txt"] = b"some text " * 100_000
    (piece,) = find_pieces([server.url("a.txt")])
    server.faults += ["drop"]
    with pytest.raises(DataError, match="cannot be reached"):
        list(read_piece(piece))


def test_remote_files_that_cannot_be_are_refused_at_once(server: Server, waits: list[float]):
    server.files |= {"a.pdf": b"x", "empty.txt": b"", "a.jsonl": b'{"body": "x"}', "page.txt": b"\xff\xfeh\0i\0"}
    assert "no such file or folder" in refusal(server.url("missing.txt"))
    assert ".pdf files are not read" in refusal(server.url("a.pdf"))
    assert "is empty" in refusal(server.url("empty.txt"))
    assert "did you mean body ?" in refusal(server.url("a.jsonl"))
    assert "UTF-16" in refusal(server.url("page.txt"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "cannot be reached" in refusal(f"http://127.0.0.1:{unused.getsockname()[1]}/a.txt")
    assert not waits


# Stores: buckets and their like


@contextmanager
def bucket(**files: bytes) -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    name = f"bucket-{next(_numbers)}"
    for path, data in files.items():
        fs.pipe(f"/{name}/{path.replace('__', '/').replace('_', '.')}", data)
    yield f"memory://{name}"
    fs.rm(f"/{name}", recursive=True)


_numbers = count()


def test_folders_and_patterns_of_a_store():
    lines = b'{"text": "line"}\n'
    with bucket(
        a_txt=b"text", data__b_jsonl=lines, data__deep__c_parquet=parquet(["row"]), _git__d_txt=b"x", e_png=b"x"
    ) as url:
        assert [piece.file.removeprefix("memory://").lstrip("/") for piece in find_pieces([url])] == [
            f"{url.removeprefix('memory://')}/{name}" for name in ("a.txt", "data/b.jsonl", "data/deep/c.parquet")
        ]
        assert texts(url) == ["text", "line", "row"]
        assert texts(f"{url}/data/**/*.parquet", f"{url}/data/*") == ["row", "line"]
        assert texts(f"{url}/a.txt") == ["text"]
        assert "no such file or folder" in refusal(f"{url}/nothing.txt")
        assert "no text files there (only .png)" in refusal(f"{url}/*.png")
        assert "no text files" in refusal(f"{url}/*.txtt")


def test_a_large_file_of_a_store_is_read_in_ranges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "RANGE_BYTES", 100)
    rows = [f"row {n}" for n in range(100)]
    with bucket(a_jsonl="".join(json.dumps({"text": row}) + "\n" for row in rows).encode()) as url:
        assert len(find_pieces([f"{url}/a.jsonl"])) > 10
        assert texts(f"{url}/a.jsonl") == rows


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/a.txt", "s3fs", "s3"), ("gs://b/a.txt", "gcsfs", "gs"), ("https://x.invalid/a.txt", "aiohttp", "data")],
)
def test_a_missing_package_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(filesystems, opening.protocol_of(url), raising=False)  # of an earlier test
    line = refusal(url)
    assert package in line
    assert line.endswith(f"pip install 'pretrain[{extra}]'")


def test_an_unknown_protocol_is_refused():
    assert "htps:// is not a known protocol" in refusal("htps://example.com/a.txt")


# The hub of Hugging Face


def ask_hub(url: str, **environment: str) -> str:
    """Read text of the hub in a process of its own; give what it printed, its last line if it was refused."""
    code = (
        "import sys, time; from pretrain.text import read_documents\n"
        "time.sleep = lambda seconds: sys.exit(f'slept {seconds}')\n"
        "try: print([document.text for document in read_documents(sys.argv[1:])])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    answer = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, env={**kept, **environment}, check=False
    )
    return answer.stdout.strip() or answer.stderr


def test_files_and_folders_of_the_hub(server: Server):
    data = "hub text é " * 100
    server.files |= {
        "api/datasets/o/n": json.dumps({"id": "o/n", "sha": "0" * 40, "siblings": []}).encode(),
        "api/datasets/o/n/tree/main": json.dumps(
            [{"type": "file", "path": "a.txt", "size": len(data.encode()), "oid": "0" * 40}]
        ).encode(),
        "datasets/o/n/resolve/main/a.txt": data.encode(),
    }
    for name in ("api/datasets/o/n", "api/datasets/o/n/tree/main"):  # where other versions of the library ask
        server.files |= {f"{name}/": server.files[name], f"{name}/revision/main": server.files[name]}
    endpoint = server.url("").rstrip("/")
    assert ask_hub("hf://datasets/o/n/a.txt", HF_ENDPOINT=endpoint) == str([data])
    assert ask_hub("hf://datasets/o/n", HF_ENDPOINT=endpoint) == str([data])
    assert "hf://datasets/o/missing: no such" in ask_hub("hf://datasets/o/missing", HF_ENDPOINT=endpoint)


def test_without_the_hub_the_refusal_comes_at_once(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        said = ask_hub("hf://datasets/o/n/a.txt", HF_ENDPOINT=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert said.startswith("DataError hf://datasets/o/n/a.txt: cannot be reached (")
    said = ask_hub("hf://datasets/o/n/a.txt", HF_HUB_OFFLINE="1")
    assert said.startswith("DataError hf://datasets/o/n/a.txt: cannot be reached (")
    assert "HF_HUB_OFFLINE" in said


def test_without_google_the_refusal_comes_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", ModuleType("gcsfs"))  # which would be used only after the server answers
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "cannot be reached" in refusal("gs://bucket/a.txt")
