"""Answers to prompts, from a process of its own that hardly disturbs training: lowest priority, one thread, the CPU.

Answerer ──{"prompt": ..., options}──> stdin   python -m pretrain.report.answers RUN   stdout ──{"text": ...}──> pieces

The process begins with the first prompt and ends when none has come for IDLE_SECONDS, so that its memory is free again.
It loads the newest checkpoint, and loads anew when there is a newer one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

IDLE_SECONDS = 300.0
WAIT_SECONDS = 10.0
"""How long a prompt waits for the one before it."""
CANCEL = {"cancel": True}


class Answerer:
    """The process that answers, as the server sees it: one prompt at a time.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """What comes back for a prompt: ``note`` (what is going on), ``text`` (a piece), at last ``done`` or ``error``.

        Closed before its end, the answer stops.
        """
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            yield {"error": "Another prompt is being answered; try again when it is done."}
            return
        ended = False
        try:
            process = self._running()
            assert process.stdin is not None, "piped"
            assert process.stdout is not None, "piped"
            try:
                _send(process.stdin, request)
                for line in process.stdout:
                    message = json.loads(line)
                    ended = "done" in message or "error" in message
                    yield message
                    if ended:
                        return
            except BrokenPipeError:
                pass
            ended = True
            code = process.wait()
            yield {"error": f"The process that answers ended (exit code {code}); is there memory for a second model?"}
        finally:
            if not ended:
                self._cancel()
            self._lock.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.report.answers", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # so that Ctrl-C in the terminal is this process's alone
            )
        return self._process

    def _cancel(self) -> None:
        """Stop the answer under way, and take what still comes of it."""
        process = self._process
        if process is None or not process.stdin or not process.stdout:
            return
        with suppress(OSError, ValueError):
            _send(process.stdin, CANCEL)
            for line in process.stdout:
                message = json.loads(line)
                if "done" in message or "error" in message:
                    return

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _send(stream: IO[bytes], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


# The process -----------------------------------------------------------------------------------------------------


class Cancelled(Exception):
    """Nobody wants the rest of the answer."""


class Model:
    """The newest checkpoint of a run, loaded when it is first needed."""

    def __init__(self, folder: Path):
        self.folder, self.step = folder, -1
        self._loaded: tuple[Any, Any] | None = None

    @property
    def stale(self) -> bool:
        """Whether there is a checkpoint newer than what is loaded."""
        return self._loaded is None or max(self._steps(), default=0) > self.step

    def _steps(self) -> list[int]:
        from pretrain.runs.checkpoint import checkpoints

        return [checkpoint.step for checkpoint in checkpoints(self.folder / "checkpoints")]

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer.

        Raises:
            PretrainError: there is no run yet, or no whole checkpoint.
        """
        if not self.stale:
            assert self._loaded is not None, "else it is stale"
            return self._loaded
        self._loaded = None  # before the next one takes memory
        while True:
            there = self._steps()
            try:
                self._loaded = self._load_newest()
                return self._loaded
            except Exception:
                if self._steps() == there:  # otherwise training removed what was being read, and has a newer one
                    raise

    def _load_newest(self) -> tuple[Any, Any]:
        import torch

        from pretrain.runs import Run

        run = Run.open(self.folder)
        checkpoint = run.newest_checkpoint()
        model = run.load_model(torch.device("cpu"), checkpoint)
        model.activation_dtype = torch.float32
        self.step = checkpoint.step
        return model, run.tokenizer()


def serve(folder: Path) -> None:
    """Answer the requests on standard input until it ends, or nothing comes for IDLE_SECONDS."""
    import torch

    from pretrain.errors import PretrainError
    from pretrain.generation import sample_text

    torch.set_num_threads(1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    cancelled = threading.Event()

    def read() -> None:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if request == CANCEL:
                cancelled.set()
            else:
                cancelled.clear()
                requests.put(request)
        os._exit(0)  # the server is gone

    threading.Thread(target=read, daemon=True).start()
    model, out = Model(folder), sys.stdout.buffer
    while True:
        try:
            request = requests.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return
        try:
            if model.stale:
                _send(out, {"note": "Loading the newest checkpoint."})
            loaded, tokenizer = model.load()
            _send(out, {"note": f"The model after step {model.step:,} writes.", "step": model.step})
            for piece in sample_text(loaded, tokenizer, **request):
                if cancelled.is_set():
                    raise Cancelled
                _send(out, {"text": piece})
            _send(out, {"done": True, "note": f"Written by the model after step {model.step:,}."})
        except Cancelled:
            _send(out, {"done": True, "note": "Stopped."})
        except (PretrainError, ValueError) as error:
            _send(out, {"error": str(error)})
        except MemoryError:
            _send(out, {"error": "There is no memory for a second model beside the one that trains."})


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(19)
    serve(Path(sys.argv[1]))
