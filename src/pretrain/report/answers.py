"""Answers to prompts, from a child process that hardly disturbs training: lowest priority, one thread, the CPU.

Answerer: prompt and options → stdin of python -m pretrain.report.answers RUN → stdout: text and step, or an error
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from pretrain.generation import sample_text
from pretrain.model import GPT
from pretrain.runs import Run
from pretrain.runs.checkpoint import Checkpoint, checkpoints
from pretrain.tokenizer import Tokenizer

IDLE_SECONDS = 300.0
"""The child ends when no prompt came for so long, so that its memory is free again."""

BUSY_SECONDS = 10.0
"""A prompt waits for the answer before it at most so long."""


class Answerer:
    """The child process as the server sees it, one prompt at a time; it starts with the first prompt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """``text`` and the ``step`` of the checkpoint that wrote it, or ``error``; waits a while for the one before."""
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            return {"error": "Another prompt is still being answered; try again later, or ask for fewer tokens."}
        try:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "pretrain.report.answers", str(self.folder)],
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
            self._lock.release()

    def close(self) -> None:
        """End the child."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def serve(folder: Path) -> None:
    """Answer each line of standard input with one of standard output, until it ends or is idle for IDLE_SECONDS."""
    torch.set_num_threads(1)
    loaded: tuple[Checkpoint, GPT, Tokenizer] | None = None
    while True:
        idle = threading.Timer(IDLE_SECONDS, os._exit, [0])
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:  # the server is gone
            return
        try:
            if loaded is None or checkpoints(folder / "checkpoints")[-1:] != [loaded[0]]:
                loaded = None  # before the next one takes memory
                run = Run.open(folder)
                newest = run.newest_checkpoint()
                loaded = newest, run.load_model(torch.device("cpu"), newest), run.tokenizer()
                loaded[1].activation_dtype = torch.float32
            checkpoint, model, tokenizer = loaded
            answer = {"text": "".join(sample_text(model, tokenizer, **json.loads(line))), "step": checkpoint.step}
        except Exception as error:  # such as a checkpoint that training removes meanwhile
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(19)
    serve(Path(sys.argv[1]))
