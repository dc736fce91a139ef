"""From arguments to dataclasses, and one line about what is wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tyro

from pretrain.config import Config
from pretrain.errors import UsageError, did_you_mean

T = TypeVar("T")
Command = Callable[[list[str]], int]


def dispatch(args: list[str], commands: dict[str, Command], program: str) -> int:
    """Run the subcommand that the first argument names with the rest, or list them with their docstrings."""
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, commands)) + 2
        lines = "\n".join(f"  {name:<{width}}{(command.__doc__ or '').strip()}" for name, command in commands.items())
        print(f"usage: {program} COMMAND [ARGUMENTS]\n\n{lines}\n\nMore about each: {program} COMMAND --help")
        return 0
    if args[0] not in commands:
        raise UsageError(f"no command '{program} {args[0]}'{did_you_mean(args[0], commands)}")
    return commands[args[0]](args[1:])


def parse(kind: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """Parse arguments into a dataclass. What tyro would print as a box becomes a one-line UsageError."""
    start: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"pretrain {command}", args=args, **start)
    except SystemExit as stop:
        if not stop.code:
            raise
    except ValueError as error:  # from a __post_init__, which tyro lets through
        raise UsageError(str(error)) from None
    lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
    text = " ".join(line for line in lines[1:] if line.strip("-"))  # without Unicode the box is drawn with dashes
    message = re.split(r" (?:Perhaps you meant:|Argument helptext:|For full helptext)", text)[0]
    message = re.sub(r"^Error parsing (?:\w*Arguments: |[\w.]*: (?=\w+\.))", "", message)
    unknown = re.match(r"Unrecognized options: (--[\w.-]+)", message)
    if unknown:
        message = f"no option {unknown[1]}{did_you_mean(unknown[1], list(options(kind)))}"
    raise UsageError(f"{message}; see pretrain {command} --help")


def options(kind: Any, prefix: str = "--") -> Iterator[str]:
    """The options of an arguments dataclass, as typed."""
    for each in dataclasses.fields(kind):
        if each.name in ("config", "options"):  # nested dataclasses without a name of their own
            yield from options(each.default_factory)
        elif prefix == "--" and kind is Config:
            yield from options(each.default_factory, f"--{each.name}.")
        else:
            yield prefix + (each.name if "." in prefix else each.name.replace("_", "-"))


def value_of(args: list[str], option: str) -> str:
    """The value of an option in arguments that are not parsed yet."""
    for argument, following in zip(args, [*args[1:], ""], strict=False):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return ""
