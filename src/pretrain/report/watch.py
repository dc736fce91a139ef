"""The report page of a run, served to this machine while it trains, and a box that prompts the newest checkpoint.

GET /         → the page as it is now
GET /state    → a fingerprint of what the page shows, and how the run is
POST /prompt  → a line to the child process → a line from it: text and step, or an error

The page asks for /state every two seconds, and reloads itself when the fingerprint has changed. Nothing is read and
nothing computed unless a page asks. The child hardly disturbs training: lowest priority, one thread, the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import torch

from pretrain.errors import PretrainError, UsageError
from pretrain.generation import sample_text
from pretrain.io import duration
from pretrain.report.page import View, fingerprint, render
from pretrain.runs import Run
from pretrain.runs.checkpoint import checkpoints
from pretrain.runs.run import HEARTBEAT

HOST, NAMES = "127.0.0.1", {"127.0.0.1", "localhost"}
"""Where it listens, and what this machine may be called in a request; the port may be another, as of a tunnel."""
PROMPT_BYTES = 200_000
SILENT_SECONDS, HUNG_SECONDS = 30, 300
"""Seconds without progress that the status mentions, and that it marks as bad."""
BUSY_SECONDS, IDLE_SECONDS = 10.0, 300.0
"""How long a prompt waits at most for the answer before it, and how long the child keeps its memory without one."""


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

    def __init__(self, folder: Path, port: int = 0):
        beginning = {"data", "data.tmp", "tokenizer.json", "lock", HEARTBEAT}  # what comes before config.toml
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= beginning):
            Run.open(folder)
        self.view = View(folder)
        self.process: subprocess.Popen[str] | None = None
        self.rendering, self.answering = threading.Lock(), threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UsageError(
                f"cannot serve on port {port} ({error.strerror}); --port 0 takes one that is free"
            ) from None
        self.address = f"http://{HOST}:{self.server_port}/"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """``text`` and the ``step`` of the checkpoint that wrote it, or ``error``; the first call starts the child."""
        if not self.answering.acquire(timeout=BUSY_SECONDS):
            return {"error": "Another prompt is still being answered; try again later, or ask for fewer tokens."}
        try:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "pretrain.report.watch", str(self.view.folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                    start_new_session=True,  # so that Ctrl-C in the terminal is the server's alone
                )
            assert self.process.stdin is not None, "piped"
            assert self.process.stdout is not None, "piped"
            try:
                print(json.dumps(request), file=self.process.stdin, flush=True)
                return json.loads(self.process.stdout.readline())
            except (OSError, ValueError):  # it ended at this moment, or while it wrote
                code = self.process.wait()
            return {"error": f"The process that answers ended (exit code {code}); is there memory for a second model?"}
        finally:
            self.answering.release()

    def server_close(self) -> None:
        """Stop listening and end the child."""
        super().server_close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Watcher  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "pretrain", ""
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what people do."""

    def parse_request(self) -> bool:
        """Refuse what is not addressed to this machine by its own names, and prompts that the page did not send.

        So no other web page reaches the server by a name that it made point here (DNS rebinding); and its origin, which
        a prompt must have, browsers state and pages cannot choose.
        """
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "").lower()
        by_page = self.headers.get("Origin", "").lower() == f"http://{host}"
        allowed = host.partition(":")[0] in NAMES and (self.command != "POST" or by_page)
        if not allowed:
            self.send_error(HTTPStatus.FORBIDDEN, "Only this machine's own page, on 127.0.0.1 or localhost, may ask")
        return allowed

    def do_GET(self) -> None:
        """The page, and whether it has changed."""
        view, path = self.server.view, urlsplit(self.path).path
        try:
            if path == "/":
                with self.server.rendering:
                    view.refresh()
                    page = render([view], live=True)
                self._reply(page, "text/html")
            elif path == "/state":
                sentence, stuck = status(view.folder)
                state = {"fingerprint": fingerprint(view.folder), "status": sentence, "stuck": stuck}
                self._reply(json.dumps(state), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except PretrainError as error:  # such as a config.toml that is damaged
            self._reply(str(error), "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_POST(self) -> None:
        """A prompt and its answer, both JSON."""
        if urlsplit(self.path).path != "/prompt":
            return self.send_error(HTTPStatus.NOT_FOUND)
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > PROMPT_BYTES:
            return self.send_error(HTTPStatus.BAD_REQUEST)
        try:
            prompt = msgspec.json.decode(self.rfile.read(int(size)), type=Prompt)
        except ValueError as error:
            return self._reply(str(error), "text/plain", HTTPStatus.BAD_REQUEST)
        self._reply(json.dumps(self.server.answer(msgspec.structs.asdict(prompt))), "application/json")

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


def answer_prompts(folder: Path) -> None:
    """The child: answer each line of standard input, until there are no more or none came for IDLE_SECONDS."""
    torch.set_num_threads(1)
    loaded = None
    while True:
        idle = threading.Timer(IDLE_SECONDS, os._exit, [0])
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:  # the server is gone
            return
        try:
            newest = checkpoints(folder / "checkpoints")[-1:], (folder / "summary.json").is_file()  # its end chooses
            if loaded is None or loaded[0] != newest:
                loaded = None  # before the next one takes memory
                run = Run.open(folder)
                intact = run.model_checkpoint()
                loaded = newest, intact, run.load_model(torch.device("cpu"), intact), run.tokenizer()
            _, checkpoint, model, tokenizer = loaded
            answer = {"text": "".join(sample_text(model, tokenizer, **json.loads(line))), "step": checkpoint.step}
        except Exception as error:  # such as a checkpoint that training removes meanwhile
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(19)
    answer_prompts(Path(sys.argv[1]))
