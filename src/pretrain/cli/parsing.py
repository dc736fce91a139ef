"""From arguments to a command, and one line about what is wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from pretrain.config import Config, GroupConfig, as_given, load_config
from pretrain.config.validate import checked
from pretrain.errors import UsageError


class Command:
    """Base of the dataclasses that are commands. Calling one runs it and gives the exit code."""

    typed: list[str]
    """The arguments as they were typed."""

    def __call__(self) -> int:
        raise NotImplementedError


C = TypeVar("C", bound=Command)


def parse(kind: type[C], args: list[str], name: str) -> C:
    """Read the options of the command ``name``. A UsageError of one line replaces the box that tyro would print.

    A field ``config`` starts from the recipe, or the run to resume, that the arguments name; beside a field ``run``
    from that of this run.
    """
    hints = get_type_hints(kind, include_extras=True)
    start: dict[str, Any] = {}
    place, recipe = "run" if "run" in hints else "recipe", ""
    if "config" in hints:
        recipe, config = _base_config(args, of_run=place == "run")
        start = {"default": kind(**{place: recipe, "config": config})}
    # --core may stand without its value, which tyro has no type for.
    pairs = zip(args, [*args[1:], "--"], strict=False)
    filled = [f"{a}=default" if a == "--core" and following.startswith("--") else a for a, following in pairs]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command = tyro.cli(kind, prog=f"pretrain {name}", args=_gathered(filled, dict(_lists(kind))), **start)
        for field in fields(kind):  # type: ignore[arg-type]
            checked(f"--{field.name.replace('_', '-')}", getattr(command, field.name), hints[field.name])
        if start and (first := getattr(command, place)) not in (recipe, *args[:1]):
            raise UsageError(f"the {place} comes first: pretrain {name} {first} ...")
        if start:
            command.config = as_given(command.config, typed_fields(args))  # type: ignore[attr-defined]
        command.typed = args
        return command
    except SystemExit as stop:
        if not stop.code:
            raise
    except ValueError as error:  # tyro lets through what a __post_init__ raises
        raise UsageError(str(error)) from None
    lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
    text = " ".join(line for line in lines[1:] if line.strip("-"))  # without Unicode the box is drawn with dashes
    near = re.search(r"Perhaps you meant: .*?(--[\w.-]+)", text)
    message = re.split(r" (?:Perhaps you meant:|Argument helptext:|For full helptext)", text)[0]
    message = re.sub(r"^Error parsing (?:[\w.]+: )?", "", message)
    message = re.sub(r"^Missing from [\w ]+: (\S+).*", r"\1 is missing", message)
    message = re.sub(r": invalid literal for int\(\) with base 10: (.*)", r" must be an integer, not \1", message)
    message = re.sub(r": could not convert string to float: (.*)", r" must be a number, not \1", message).rstrip(".")
    message = re.sub(r"^Unrecognized options: (--[\w.-]+).*", r"no option \1", message)
    hint = f"; did you mean '{near[1]}'?" if near else ""
    raise UsageError(f"{message}{hint}; see pretrain {name} --help")


def _lists(kind: type, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Each way to write an option that takes several values, with the option's name."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value, *extras = get_args(hint) if hasattr(hint, "__metadata__") else [hint]
        if is_dataclass(value):
            yield from _lists(value, prefix if value is Config else f"{prefix}{name}.")  # type: ignore[arg-type]
        appends = any(extra in (tyro.conf.Positional, tyro.conf.UseAppendAction) for extra in extras)
        if get_origin(value) is tuple and get_args(value)[-1] is ... and not appends:
            option = f"{prefix}{name}"
            for spelling in (option, *(alias for extra in extras for alias in getattr(extra, "aliases", None) or ())):
                yield spelling.replace("_", "-"), option


def _gathered(args: list[str], lists: dict[str, str]) -> list[str]:
    """The same arguments, all values of a list option behind one however often it is given: tyro keeps the last."""
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    taking = rest
    for word in args:
        option, equals, value = word.partition("=")
        name = lists.get(option.replace("_", "-")) if word.startswith("--") else None
        if name:
            taking = values.setdefault(name, [])
            taking.extend([value] if equals else [])
        else:
            taking = rest if word.startswith("--") or word == "-h" else taking
            taking.append(word)
    for name, given in values.items():  # with = a value may begin with a -
        rest += [f"{name}={given[0]}"] if len(given) == 1 else [name, *given]
    return rest


def typed_fields(args: list[str]) -> set[str]:
    """The options among the arguments, as fields: both ``--model.context-length`` and ``--model.context_length``."""
    options = {word.partition("=")[0] for word in args if word.startswith("--")}
    return {option.removeprefix("--").replace("-", "_") for option in options}


def _base_config(args: list[str], of_run: bool) -> tuple[str, Config]:
    """What the arguments override: the recipe, or run, they begin with, or the configuration of the run to resume.

    Without either it is the recipe fit if they name a text, else quickstart. Gives the name of recipe or run too.
    """
    recipe = args[0] if args and not args[0].startswith("-") else ""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--out", nargs="?")
    finder.add_argument("--checkpoint.copy-to", "--checkpoint.copy_to", nargs="?", dest="copy_to")
    found, copied = finder.parse_known_args(args)[0], None
    out, here = found.out, bool(found.out) and Path(found.out, "config.toml").is_file()
    if out and found.copy_to and not (here or recipe or of_run):  # a run that was begun on another machine
        from pretrain.runs.copy import RunCopy

        copied = RunCopy(found.copy_to).config()
    if copied:
        config = copied
    elif run := out if here and (of_run or not recipe) else recipe if of_run else "":
        from pretrain.runs.run import Run

        config = Run.open(run).config
    elif of_run:  # for the help alone
        config = Config()
    else:
        typed = typed_fields(args)
        fits = typed & {"data", "data.paths"} and not typed & {"init_from", "train.init_from"}
        recipe = recipe or ("fit" if fits else "quickstart")
        config = load_config(recipe)
    # tyro has options for the groups that are there already, so those that are named here have to be.
    named = re.findall(r"^--optim\.groups\.([\w-]+)\.", "\n".join(args), re.MULTILINE)
    groups = {name.replace("-", "_"): GroupConfig() for name in named} | config.optim.groups
    return recipe or "quickstart" * (not of_run), replace(config, optim=replace(config.optim, groups=groups))
