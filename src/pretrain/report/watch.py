"""The report page of a run, served to this machine while it trains, and a box that prompts the newest checkpoint.

GET / → the page as it is now     GET /state → fingerprint of what the page shows, and how the run is     POST /prompt

The page asks for /state every two seconds, and reloads itself when the fingerprint has changed. Nothing is read and
nothing computed unless a page asks.

Who may ask: the server listens on 127.0.0.1 alone, and answers only requests addressed to this machine by its own
names, so that no other web page reaches it by a name that it made point here (DNS rebinding). A prompt must besides
have the page's own origin, which browsers state and pages cannot choose.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from pretrain.errors import PretrainError, UsageError
from pretrain.io import duration
from pretrain.report.answers import Answerer
from pretrain.report.page import View, fingerprint, render
from pretrain.runs import Run
from pretrain.runs.run import HEARTBEAT

HOST, NAMES = "127.0.0.1", {"127.0.0.1", "localhost"}
"""Where it listens, and what this machine may be called in a request; the port may be another, as of a tunnel."""
PROMPT_BYTES = 200_000
SILENT_SECONDS, HUNG_SECONDS = 30, 300
"""Seconds without progress that the status mentions, and that it marks as bad."""


class Prompt(msgspec.Struct):
    """What the page's form sends: a text, and those of ``pretrain.generation.SamplingOptions`` that it offers."""

    prompt: str
    max_tokens: Annotated[int, msgspec.Meta(le=2000)]
    temperature: float
    top_k: int
    seed: int


class Watcher(ThreadingHTTPServer):
    """The server of a run directory, or of the place where one is to be; ``port`` 0 takes any that is free.

    Raises a PretrainError when the folder is something else than a run, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        beginning = {"data", "data.tmp", "tokenizer.json", "lock", HEARTBEAT}  # what comes before config.toml
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= beginning):
            Run.open(folder)
        self.view = View(folder)
        self.view.refresh()
        self.answerer = Answerer(folder)
        self.rendering = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(
                f"cannot serve on port {port} ({error.strerror}); --port 0 takes one that is free"
            ) from None
        self.address = f"http://{HOST}:{self.server_port}/"

    def server_close(self) -> None:
        """Stop listening and end the process that answers."""
        super().server_close()
        self.answerer.close()


def status(folder: Path) -> tuple[str, bool]:
    """How the run is, in a sentence; and whether it looks stuck."""
    if not Run.exists(folder):
        return f"{folder} has not begun yet; this page shows it when it does.", False
    run = Run.open(folder)
    if run.summary:
        return f"Finished after {run.summary['steps']:,} steps.", False
    try:
        beat = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged
        return "It has begun, and has not reported yet what it is doing.", False
    phase = beat["phase"]
    what = f"{phase[:1].upper()}{phase[1:]}, {beat['step']:,} of {run.config.train.steps:,} steps done"
    age, silent = time.time() - beat["time"], beat["silent_seconds"]
    if age > SILENT_SECONDS:
        return f"{what}; no heartbeat for {duration(age)}: it was stopped, or hangs.", True
    if silent > SILENT_SECONDS:
        return f"{what}; no progress for {duration(silent)}.", silent > HUNG_SECONDS
    return f"{what}.", False


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Watcher  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "pretrain", ""
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what people do."""

    def do_GET(self) -> None:
        """The page, and whether it has changed."""
        if not self._is_addressed_to_us():
            return self.send_error(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost only")
        server, path = self.server, urlsplit(self.path).path
        try:
            if path == "/":
                with server.rendering:
                    server.view.refresh()
                    page = render([server.view], live=True)
                self._reply(page, "text/html")
            elif path == "/state":
                sentence, stuck = status(server.view.folder)
                state = {"fingerprint": fingerprint(server.view.folder), "status": sentence, "stuck": stuck}
                self._reply(json.dumps(state), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except PretrainError as error:  # such as a config.toml that is damaged
            self._reply(str(error), "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_POST(self) -> None:
        """A prompt and its answer, both JSON."""
        from_us = self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        if not (self._is_addressed_to_us() and from_us):
            return self.send_error(HTTPStatus.FORBIDDEN, "Only the page itself may prompt")
        if urlsplit(self.path).path != "/prompt":
            return self.send_error(HTTPStatus.NOT_FOUND)
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > PROMPT_BYTES:
            return self.send_error(HTTPStatus.BAD_REQUEST)
        try:
            prompt = msgspec.json.decode(self.rfile.read(int(size)), type=Prompt)
        except ValueError as error:
            return self._reply(str(error), "text/plain", HTTPStatus.BAD_REQUEST)
        answer = self.server.answerer.answer(msgspec.structs.asdict(prompt))
        self._reply(json.dumps(answer), "application/json")

    def _is_addressed_to_us(self) -> bool:
        with suppress(ValueError):  # no name at all
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in NAMES
        return False

    def _reply(self, text: str, kind: str, code: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        with suppress(ConnectionError):  # the page was closed
            self.wfile.write(text.encode(errors="replace"))
