"""The page of a run, live, from a small server on this machine.

metrics.jsonl, samples.jsonl, heartbeat.json, ... → View → GET / (the page), /data (what is new), /facts (the tables)
                                           POST /prompt → Answerer (a process of its own) → pieces of text, as they come

Nothing is read and nothing computed unless a page asks, every two seconds while somebody looks at it.

Who may ask: the server listens on 127.0.0.1 alone, and answers only requests that were addressed to this machine by its
own names, so that no other web page reaches it by a name that it made point here (DNS rebinding). A prompt must
besides come from the page itself: its origin, and a token that only the page knows.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.generation import SamplingOptions
from pretrain.report.answers import Answerer
from pretrain.report.page import View, render, render_facts
from pretrain.runs import Run
from pretrain.training.heartbeat import HEARTBEAT

HOST = "127.0.0.1"
NAMES = frozenset({"127.0.0.1", "localhost"})
"""What this machine may be called in a request; the port may be another, as of a tunnel."""
PROMPT_BYTES = 200_000
PROMPT_TOKENS = 2000
"""Tokens of an answer at most."""
BEFORE_RUN = {"data", "data.tmp", "tokenizer.json", "lock", HEARTBEAT}
"""What may lie in a folder that is to become a run."""


class Watcher:
    """The server, while entered.

    Args:
        folder: a run directory, or the place where one is to be.
        port: where to listen; 0 for any port that is free.

    Raises:
        CheckpointError: the folder is something else than a run.
        UsageError: the port is taken.
    """

    def __init__(self, folder: Path, port: int = 0):
        if folder.exists() and not Run.exists(folder) and not _may_become_a_run(folder):
            raise CheckpointError(f"{folder} is not a run directory (it has no config.toml); give that of a run")
        self.view = View(folder)
        self.view.refresh()
        self.answerer = Answerer(folder)
        self.token = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._facts: tuple[Any, str, str] = (None, "", "")
        try:
            self.server = ThreadingHTTPServer((HOST, port), lambda *args: Handler(self, *args))
        except OSError as error:
            raise UsageError(
                f"cannot serve on port {port} ({error.strerror}); --port 0 takes one that is free"
            ) from None
        self.server.daemon_threads = True

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.server_close()
        self.answerer.close()

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server.server_address[1]}/"

    @property
    def begun(self) -> bool:
        """Whether the run has begun."""
        return self.view.run is not None

    def serve(self) -> None:
        """Answer until :meth:`stop` or Ctrl-C."""
        with suppress(KeyboardInterrupt):
            self.server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End :meth:`serve`, from another thread."""
        self.server.shutdown()

    # What is asked for -------------------------------------------------------------------------------------------

    def page(self) -> str:
        """The page as it is now."""
        with self._lock:
            self.view.refresh()
            return render([self.view], self.token)

    def data(self, asked: dict[str, int]) -> dict[str, Any]:
        """What is new since what the page has.

        Args:
            asked: ``generation`` and ``after``, the step up to which it has the numbers; ``samples`` and ``events``,
                which state of those it has.
        """
        view = self.view
        with self._lock:
            view.refresh()
            news = view.news(asked.get("after", 0), asked.get("generation", 0))
            beat = heartbeat(view.folder)
            # Of what was there at the last look, and not just how many: a resume may have replaced some.
            samples, events = _seen(view.samples), _seen(view.events)
            stats = view.stats()
            return news | view.constants() | {
                "skipped": view.curves.skipped,
                "stats": stats,
                "samples": view.shown_samples() if asked.get("samples") != samples else None,
                "samples_seen": samples,
                "events": view.shown_events() if asked.get("events") != events else None,
                "events_seen": events,
                "beat": beat,
                "status": status(view, stats, beat),
                "facts": self._refreshed_facts()[0],
            }  # fmt: skip

    def facts(self) -> str:
        """The tables."""
        with self._lock:
            self.view.refresh()
            return self._refreshed_facts()[1]

    def _refreshed_facts(self) -> tuple[str, str]:
        """The tables, made anew only when something was measured or configured; and a name for this state of them."""
        view = self.view
        known = (view.known, view.curves.generation, len(view.curves.val))
        if known != self._facts[0]:
            text = render_facts([view] if view.run else [])
            self._facts = (known, hashlib.sha256(text.encode()).hexdigest()[:16], text)
        return self._facts[1:]

    def prompt(self, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The answer to a prompt, piece by piece.

        Raises:
            UsageError: the request is not a prompt with options that can be.
        """
        fields = {"prompt": str, "max_tokens": int, "temperature": (int, float), "top_k": int, "seed": int}
        clean: dict[str, Any] = {name: request.get(name) for name in fields}
        for name, kind in fields.items():
            if not isinstance(clean[name], kind) or isinstance(clean[name], bool):
                raise UsageError(f"{name} must be {'text' if kind is str else 'a number'}")
        if clean["max_tokens"] > PROMPT_TOKENS:
            raise UsageError(f"at most {PROMPT_TOKENS:,} tokens at once")
        try:
            SamplingOptions(**{name: value for name, value in clean.items() if name != "prompt"})
        except ValueError as error:
            raise UsageError(str(error)) from None
        return self.answerer.answer(clean)


def _may_become_a_run(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= BEFORE_RUN


def heartbeat(folder: Path) -> dict[str, Any] | None:
    """What training last said of itself, with its ``age`` in seconds; None before it said anything."""
    try:
        beat = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
        return {
            "phase": str(beat["phase"]),
            "step": int(beat["step"]),
            "silent_seconds": float(beat["silent_seconds"]),
            "age": round(max(0.0, time.time() - float(beat["time"])), 1),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def status(view: View, stats: dict[str, Any], beat: dict[str, Any] | None) -> str:
    """How the run is, in a sentence."""
    if view.run is None:
        return f"{view.folder} has not begun yet; this page shows it when it does."
    if stats["finished"]:
        return f"Finished after {stats['step'] or 0:,.0f} steps."
    if beat is None:
        return "It has begun, and has not told yet what it does."
    what = f"{beat['phase'][:1].upper()}{beat['phase'][1:]}, {beat['step']:,} of {stats['steps']:,} steps done"
    if beat["age"] > 30:
        return f"{what}; no sign of life for {_ago(beat['age'])}: it was stopped, or hangs."
    quiet = f"; nothing moved for {_ago(beat['silent_seconds'])}" if beat["silent_seconds"] > 30 else ""
    return f"{what}{quiet}."


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _seen(records: list[dict[str, Any]]) -> int:
    """A number that tells one state of a list of records from another; 0 for none."""
    return int.from_bytes(hashlib.sha256(repr((len(records), records[-1])).encode()).digest()[:6]) if records else 0


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "pretrain", ""
    timeout = 60

    def __init__(self, watcher: Watcher, *args: Any):
        self.watcher = watcher
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what people do."""

    def do_GET(self) -> None:
        """The page and what it asks for."""
        if not self._addressed_to_us():
            return
        url = urlsplit(self.path)
        try:
            if url.path == "/":
                self._reply(self.watcher.page(), "text/html")
            elif url.path == "/facts":
                self._reply(self.watcher.facts(), "text/html")
            elif url.path == "/data":
                asked = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
                self._reply(json.dumps(self.watcher.data(asked), ensure_ascii=False), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
        except PretrainError as error:  # such as a config.toml that is damaged
            self._reply(str(error), "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_POST(self) -> None:
        """A prompt; its answer is a line of JSON for each piece."""
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
            if not 0 <= size <= PROMPT_BYTES:
                raise ValueError
            request = json.loads(self.rfile.read(size))
            if not isinstance(request, dict):
                raise ValueError
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            answer = self.watcher.prompt(request)
        except UsageError as error:
            self._reply(json.dumps({"error": str(error)}) + "\n", "application/x-ndjson")
            return
        self._begin("application/x-ndjson", HTTPStatus.OK)
        with suppress(ConnectionError), closing(answer):  # closed before its end, the answer stops
            for piece in answer:
                self.wfile.write(json.dumps(piece).encode() + b"\n")

    def _addressed_to_us(self) -> bool:
        with suppress(ValueError):  # no name at all
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname in NAMES:
                return True
        self.send_error(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost only")
        return False

    def _begin(self, kind: str, code: HTTPStatus) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()

    def _reply(self, text: str, kind: str, code: HTTPStatus = HTTPStatus.OK) -> None:
        self._begin(kind, code)
        with suppress(ConnectionError):  # the page was closed
            self.wfile.write(text.encode(errors="replace"))
