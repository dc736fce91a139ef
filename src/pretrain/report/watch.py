"""The report page of a run, served to this machine while it trains, and a box that prompts the newest checkpoint.

GET / → the page as it is now     GET /state → fingerprint of what the page shows, and how the run is     POST /prompt

The page asks for /state every two seconds, and reloads itself when the fingerprint has changed. Nothing is read and
nothing computed unless a page asks.

Who may ask: the server listens on 127.0.0.1 alone, and answers only requests addressed to this machine by its own
names, so that no other web page reaches it by a name that it made point here (DNS rebinding). A prompt must besides
come from the page itself: its origin, and a token that only the page knows.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.generation import SamplingOptions
from pretrain.io import duration
from pretrain.report.answers import Answerer
from pretrain.report.page import View, render
from pretrain.runs import Run
from pretrain.training.heartbeat import HEARTBEAT

HOST = "127.0.0.1"
NAMES = frozenset({"127.0.0.1", "localhost"})
"""What this machine may be called in a request; the port may be another, as of a tunnel."""
PROMPT_BYTES = 200_000
PROMPT_TOKENS = 2000
"""Tokens of an answer at most."""
PROMPT_FIELDS = {"prompt": str, "max_tokens": int, "temperature": (int, float), "top_k": int, "seed": int}
BEFORE_RUN = {"data", "data.tmp", "tokenizer.json", "lock", HEARTBEAT}
"""What may lie in a folder that is to become a run."""
SILENT_SECONDS, HUNG_SECONDS = 30, 300
"""Seconds without progress that the status mentions, and that it marks as bad."""


class Watcher(ThreadingHTTPServer):
    """The server of a run directory, or of the place where one is to be; ``port`` 0 takes any that is free.

    Raises CheckpointError when the folder is something else than a run, UsageError when the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        others = {path.name for path in folder.iterdir()} - BEFORE_RUN if folder.is_dir() else folder.exists()
        if others and not Run.exists(folder):
            raise CheckpointError(f"{folder} is not a run directory (it has no config.toml); give that of a run")
        self.view = View(folder)
        self.view.refresh()
        self.answerer = Answerer(folder)
        self.token = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(
                f"cannot serve on port {port} ({error.strerror}); --port 0 takes one that is free"
            ) from None

    def server_close(self) -> None:
        """Stop listening and end the process that answers."""
        super().server_close()
        self.answerer.close()

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> str:
        """The page as it is now."""
        with self._lock:
            self.view.refresh()
            return render([self.view], self.token)

    def state(self) -> dict[str, Any]:
        """The fingerprint of what the page shows, and how the run is: a sentence, and whether it is stuck."""
        with self._lock:
            self.view.refresh()
            text, stuck = status(self.view)
            return {"fingerprint": self.view.fingerprint, "status": text, "stuck": stuck}

    def prompt(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a prompt. Raises UsageError: it is not a prompt with options that can be."""
        clean: dict[str, Any] = {name: request.get(name) for name in PROMPT_FIELDS}
        for name, kind in PROMPT_FIELDS.items():
            if not isinstance(clean[name], kind) or isinstance(clean[name], bool):
                raise UsageError(f"{name} must be {'text' if kind is str else 'a number'}")
        if clean["max_tokens"] > PROMPT_TOKENS:
            raise UsageError(f"at most {PROMPT_TOKENS:,} tokens at once")
        try:
            SamplingOptions(**{name: value for name, value in clean.items() if name != "prompt"})
        except ValueError as error:
            raise UsageError(str(error)) from None
        return self.answerer.answer(clean)


def status(view: View) -> tuple[str, bool]:
    """How the run is, in a sentence; and whether it looks stuck."""
    if view.run is None:
        return f"{view.folder} has not begun yet; this page shows it when it does.", False
    if view.run.summary:
        return f"Finished after {view.curves.train.last('step') or 0:,.0f} steps.", False
    try:
        beat = json.loads((view.folder / HEARTBEAT).read_text(encoding="utf-8"))
        age, silent = max(0.0, time.time() - float(beat["time"])), float(beat["silent_seconds"])
        phase, step = str(beat["phase"]), int(beat["step"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        return "It has begun, and has not reported yet what it is doing.", False
    what = f"{phase[:1].upper()}{phase[1:]}, {step:,} of {view.run.config.train.steps:,} steps done"
    if age > SILENT_SECONDS:
        return f"{what}; no heartbeat for {duration(age)}: it was stopped, or hangs.", True
    if silent > SILENT_SECONDS:
        return f"{what}; no progress for {duration(silent)}.", silent > HUNG_SECONDS
    return f"{what}.", False


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "pretrain", ""
    timeout = 60

    @property
    def watcher(self) -> Watcher:
        """The server."""
        assert isinstance(self.server, Watcher), "made by it"
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what people do."""

    def do_GET(self) -> None:
        """The page, and whether it has changed."""
        path = urlsplit(self.path).path
        try:
            if not self._addressed_to_us():
                return
            if path == "/":
                self._reply(self.watcher.page(), "text/html")
            elif path == "/state":
                self._reply(json.dumps(self.watcher.state()), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except PretrainError as error:  # such as a config.toml that is damaged
            self._reply(str(error), "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_POST(self) -> None:
        """A prompt and its answer, both JSON."""
        if not self._addressed_to_us():
            return
        if urlsplit(self.path).path != "/prompt":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        ours = self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        given = self.headers.get("X-Pretrain-Token", "")
        if not ours or not hmac.compare_digest(given.encode(), self.watcher.token.encode()):
            self.send_error(HTTPStatus.FORBIDDEN, "Only the page itself may prompt; load it again")
            return
        try:
            size = int(self.headers.get("Content-Length", ""))
            request = json.loads(self.rfile.read(size)) if 0 <= size <= PROMPT_BYTES else None
        except ValueError:
            request = None
        if not isinstance(request, dict):
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            answer = self.watcher.prompt(request)
        except UsageError as error:
            answer = {"error": str(error)}
        self._reply(json.dumps(answer), "application/json")

    def _addressed_to_us(self) -> bool:
        with suppress(ValueError):  # no name at all
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname in NAMES:
                return True
        self.send_error(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost only")
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
