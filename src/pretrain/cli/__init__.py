"""The command line: a file for each command or topic, which reads its arguments and calls the packages below.

A command's module is imported when it runs, and what is heavy only after its arguments are read, so that ``--help``
answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import FrameType
from typing import Any

from pretrain.cli.launch import LOCAL_RANK, is_process
from pretrain.errors import Interrupted, PretrainError, UsageError, did_you_mean
from pretrain.io import signals_to_handle

SILENT_WAIT = 10.0
"""Seconds that a process with nothing to say waits before it exits with an error."""

COMMANDS = {
    "plan": ("plan.plan", "Parameters, memory, time and unusual settings of a training, before it begins."),
    "train": ("train.train", "Train a model, or resume a run that was stopped."),
    "eval": ("evaluate.evaluate", "Loss, perplexity, bits per byte and CORE of runs, side by side."),
    "sample": ("sample.sample", "Generate text with a run's model."),
    "export": ("export.export", "Write a run's model as a folder that Hugging Face transformers loads."),
    "report": ("report.report", "Write runs as one HTML page: curves, samples, and what they mean."),
    "watch": ("report.watch", "Show a run in the browser while it trains, and prompt its newest checkpoint."),
    "data": ("data.COMMANDS", "Download, prepare, verify or inspect data: 'pretrain data' lists the commands."),
    "tokenizer": ("tokenizer.COMMANDS", "Train or show a tokenizer: 'pretrain tokenizer' lists the commands."),
    "recipes": ("recipes.recipes", "List the recipes, or print one as TOML."),
    "doctor": ("doctor.doctor", "What this machine can do, what is missing, and the command that fixes it."),
}
"""Each command: its function in a module of this folder, or a table of subcommands, and its line in the help."""

HELP = f"""usage: pretrain COMMAND [ARGUMENTS]

Pretrain a GPT-style language model from raw text.

  pretrain train                       the main job: a small GPT from the embedded text, in minutes
  pretrain train --data FILE_OR_DIR    the same on your own text
  pretrain train RECIPE                a published recipe; any field is overridden as --model.layers 6
  pretrain COMMAND --help              everything about one command

commands:
{chr(10).join(f"  {name:<11}{summary}" for name, (_, summary) in COMMANDS.items())}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted and safely stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with _signals_interrupt():
            return _run(args)
    except PretrainError as error:
        if str(error):
            print(f"pretrain: {error}", file=sys.stderr)
        elif is_process() and error.exit_code != Interrupted.exit_code:
            # Another process says it. torchrun ends all when the first has gone, so let that be the other one.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(SILENT_WAIT)
        return error.exit_code
    except KeyboardInterrupt:
        if LOCAL_RANK == 0:
            print("pretrain: interrupted; what was saved is safe, and the same command resumes", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"pretrain: {error.strerror}{where}", file=sys.stderr)
        return 1


def _run(args: list[str]) -> int:
    name = args[0] if args else "help"
    if name in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if name == "--version":
        print(f"pretrain {version('pretrain')}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"no command 'pretrain {name}'{did_you_mean(name, COMMANDS)}")
    module, attribute = COMMANDS[name][0].split(".")
    command: Any = getattr(import_module(f"pretrain.cli.{module}"), attribute)
    if not isinstance(command, dict):
        return command(args[1:])

    from pretrain.cli.parsing import dispatch

    return dispatch(args[1:], command, f"pretrain {name}")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGUSR1 stop a command as Ctrl-C does; training has its own handlers."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = signals_to_handle("SIGTERM", "SIGHUP", "SIGUSR1")
    if threading.current_thread() is not threading.main_thread():  # where Python cannot install handlers
        numbers = []
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
