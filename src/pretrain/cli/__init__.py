"""The command line: a file for each command or topic.

A command is a dataclass: its fields are the options, its docstring is the help, and calling it runs it. Its module is
imported when it is asked for, and what is heavy only when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile

from pretrain.cli.launch import LOCAL_RANK, is_process
from pretrain.errors import Interrupted, PeerError, PretrainError, UsageError, did_you_mean
from pretrain.io import print_anything, signals_to_handle

COMMANDS = {
    "plan": ("plan.Plan", "Parameters, memory, time and unusual settings of a training, before it begins."),
    "train": ("train.Train", "Train a model, or resume a run that was stopped."),
    "sweep": ("sweep.Sweep", "Train several settings with several seeds, and say which ends best."),
    "fork": (
        "fork.Fork",
        "Begin a new run in the middle of another, with another schedule, data or settings.",
    ),
    "eval": ("evaluate.Evaluate", "Loss, perplexity, bits per byte and CORE of runs, side by side."),
    "compare": ("compare.Compare", "Which settings are better, as far as several seeds, or one, can show."),
    "sample": ("sample.Sample", "Generate text with a run's model."),
    "export": ("export.Export", "Write a run's model as a folder that Hugging Face transformers loads."),
    "report": ("report.Report", "Write runs as one HTML page: curves, samples, and what they mean."),
    "watch": ("report.Watch", "Show a run in the browser while it trains, and prompt its newest checkpoint."),
    "forecast": ("forecast.Forecast", "The loss that a larger run would reach, from a ladder of small ones."),
    "data download": ("download.DownloadCommand", "Download a public set of text, or files by their URLs."),
    "data prepare": ("data.Prepare", "Tokenize text into shards."),
    "data verify": ("data.Verify", "Find damaged, missing or mismatched token shards."),
    "data inspect": ("data.Inspect", "Show what token shards hold."),
    "data at": ("data.At", "Show the exact text that a step of a run trained on."),
    "tokenizer train": ("tokenizer.Train", "Train a tokenizer on text."),
    "tokenizer show": ("tokenizer.Show", "Show how a tokenizer splits a text."),
    "recipes": ("recipes.Recipes", "List the recipes, or print one as TOML."),
    "doctor": ("doctor.Doctor", "What this machine can do, what is missing, and the command that fixes it."),
}
"""Each command: its dataclass in a module of this folder, and its line in the help."""

HELP = """usage: pretrain COMMAND [ARGUMENTS]

Pretrain a GPT-style language model from raw text.

  pretrain train                       a small GPT from the included text, in minutes
  pretrain train --data FILE_OR_DIR    one from your own text, with settings that fit it
  pretrain train RECIPE                a published recipe; any field is overridden as --model.layers 6
  pretrain COMMAND --help              everything about one command

commands:
"""


class _Stopped(KeyboardInterrupt):
    """Not KeyboardInterrupt itself: if that is raised within exec, as dataclasses call it while modules are imported, a
    Python started with -m kills itself by SIGINT at its end, whatever exit code it was given.
    """


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted and safely stopped."""
    if argv is None:  # all these stop a command as Ctrl-C does; training has its own handlers
        for number in signals_to_handle("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            signal.signal(number, _stop)
    print_anything()
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except PretrainError as error:
        if str(error):
            print(f"pretrain: {error}", file=sys.stderr)
        elif is_process() and error.exit_code != Interrupted.exit_code:
            # Another process says it. torchrun ends all when the first has gone, so let that be the other one.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(10)
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
    if args == ["--version"]:
        from importlib.metadata import version

        print(f"pretrain {version('pretrain')}")
        return 0
    words = list(takewhile(lambda word: word not in ("-h", "--help", "help"), args[:2]))
    name = next((name for name in (" ".join(words), *words[:1]) if name in COMMANDS), "")
    if not name:
        listed = {command: line for command, (_, line) in COMMANDS.items() if command.split()[: len(words)] == words}
        if not listed:
            raise UsageError(f"no command 'pretrain {' '.join(words)}'{did_you_mean(' '.join(words), COMMANDS)}")
        print(HELP + "\n".join(f"  {command:<17}{line}" for command, line in listed.items()))
        return 0

    from pretrain.cli.parsing import parse

    module, kind = COMMANDS[name][0].split(".")
    try:
        command = parse(getattr(import_module(f"pretrain.cli.{module}"), kind), args[len(name.split()) :], name)
    except PretrainError as error:
        if LOCAL_RANK:  # all processes were given the same arguments: the first one says what is wrong
            raise PeerError(error.exit_code) from None
        raise
    return command()
