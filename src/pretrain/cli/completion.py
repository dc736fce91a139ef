"""``pretrain completion``: a script with which a shell completes our commands, recipes and options.

    COMMANDS and the dataclasses of their arguments  →  {"data prepare": Place, ...}  →  one script for a shell

The script asks nobody when the Tab key is pressed: it holds all names, and is made anew after an update.
"""

from __future__ import annotations

import ast
import inspect
import shlex
import typing
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal

import tyro

from pretrain.cli.parsing import Command, options, parse
from pretrain.config import recipe_names, recipe_summary


@dataclass
class CompletionArguments:
    """Print a script with which a shell completes commands, recipes and options.

    bash:  pretrain completion bash > ~/.local/share/bash-completion/completions/pretrain
    zsh:   pretrain completion zsh > ~/.zfunc/_pretrain    (a folder of fpath, before compinit)
    fish:  pretrain completion fish > ~/.config/fish/completions/pretrain.fish
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def completion(args: list[str]) -> int:
    """Print a script with which bash, zsh or fish completes these commands."""
    shell = parse(CompletionArguments, args, "completion").shell
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](places()), end="")
    return 0


@dataclass
class Option:
    """An option of a command."""

    names: list[str]
    """All that may be typed: --data and --data.paths, or --json and --no-json."""
    help: str
    """The first sentence of its help."""
    takes_value: bool
    """False for a switch."""
    values: list[str]
    """All values there are, where these are few; else files are completed."""


@dataclass
class Place:
    """What may follow a command, such as ``data prepare``."""

    help: str
    """What the command does."""
    words: dict[str, str] = field(default_factory=dict)
    """What may stand right after it, with help: commands, recipes, sets of text."""
    options: list[Option] = field(default_factory=list)
    """Its options."""


def places() -> dict[str, Place]:
    """What may follow each command; under "" what follows ``pretrain`` itself."""
    from pretrain.cli import COMMANDS

    found = {"": Place("", _helps(COMMANDS))}
    for name, command in COMMANDS.items():
        kind = _arguments(name, command.__module__) or _arguments(name, f"pretrain.cli.{name}")
        if kind:
            found[name] = Place(_help(command), _words(name), list(_options(kind)))
            continue
        table = import_module(f"pretrain.cli.{name}").COMMANDS  # a group, such as data
        found[name] = Place(_help(command), _helps(table))
        for inner, command in table.items():
            path, kind = f"{name} {inner}", _arguments(inner, command.__module__)
            found[path] = Place(_help(command), _words(path), list(_options(kind)))
    return found


def _arguments(name: str, module: str) -> type | None:
    """The dataclass of a command's arguments: it stands beside the command and is named after it."""
    return getattr(import_module(module), f"{name.capitalize()}Arguments", None)


def _words(path: str) -> dict[str, str]:
    if path in ("train", "plan", "recipes"):
        return {name: recipe_summary(name) for name in recipe_names()}
    if path == "data download":
        from pretrain.text.catalogue import CATALOGUE

        return {name: text_set.about for name, text_set in CATALOGUE.items()}
    return dict.fromkeys(("bash", "zsh", "fish"), "") if path == "completion" else {}


def _options(kind: Any) -> typing.Iterator[Option]:
    for name, owner, each in options(kind):
        hint = typing.get_type_hints(owner, include_extras=True)[each.name]
        extras = getattr(hint, "__metadata__", ())
        if set(extras) & set(tyro.conf.Positional[str].__metadata__):  # type: ignore[attr-defined]
            continue
        aliases = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        plain = hint.__origin__ if extras else hint
        names = [*aliases, name]
        if plain is bool:
            before, _, last = name.rpartition(".")
            names.append(f"{before}.no-{last}" if before else f"--no-{name.removeprefix('--')}")
        values = [str(value) for value in typing.get_args(plain)] if typing.get_origin(plain) is Literal else []
        yield Option(names, _field_help(owner).get(each.name, ""), plain is not bool, values)


def _field_help(owner: type) -> dict[str, str]:
    """The first sentences of the docstrings below the fields of a dataclass."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        node.target.id: _sentence(following.value.value)
        for node, following in pairwise(tree.body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }


def _helps(commands: dict[str, Command]) -> dict[str, str]:
    return {name: _help(command) for name, command in commands.items()}


def _help(command: Command) -> str:
    return _sentence(command.__doc__ or "")


def _sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].partition("; ")[0].removesuffix(".")


def _groups(all_places: dict[str, Place]) -> list[str]:
    return sorted({path.split()[0] for path in all_places if " " in path})


def _bash(all_places: dict[str, Place]) -> str:
    what, values = [], []
    for path, place in all_places.items():
        names = " ".join(name for option in place.options for name in option.names)
        what.append(f"""        "{path}") words="{" ".join(place.words)}" options="{names}" ;;""")
        for option in filter(lambda option: option.takes_value, place.options):
            keys = "|".join(f'"{path} {name}"' for name in option.names)
            values.append(f"""        {keys}) values="{" ".join(option.values)}" wanted=value ;;""")
    return f"""\
# Completion of pretrain for bash, made by: pretrain completion bash
_pretrain() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}"
    local command="" words="" options="" values="" wanted="" depth=1
    if ((COMP_CWORD > 1)); then
        command="${{COMP_WORDS[1]}}" depth=2
        case "$command" in
            {"|".join(_groups(all_places))}) ((COMP_CWORD > 2)) && command+=" ${{COMP_WORDS[2]}}" depth=3 ;;
        esac
    fi
    case "$command" in
{chr(10).join(what)}
    esac
    case "$command $before" in
{chr(10).join(values)}
    esac
    # What is not found here, readline completes as a file.
    if [[ $wanted ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options --help" -- "$word"))
    elif ((COMP_CWORD == depth)); then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=()
    fi
}}
complete -o bashdefault -o default -F _pretrain pretrain
"""


def _zsh(all_places: dict[str, Place]) -> str:
    def described(pairs: typing.Iterable[tuple[str, str]]) -> str:
        return " ".join(shlex.quote(f"{name}:{help}" if help else name) for name, help in pairs)

    what, values = [], []
    for path, place in all_places.items():
        names = described((name, option.help) for option in place.options for name in option.names)
        what.append(f'        "{path}") place=({described(place.words.items())}) options=({names}) ;;')
        for option in filter(lambda option: option.takes_value, place.options):
            keys = "|".join(f'"{path} {name}"' for name in option.names)
            values.append(f"        {keys}) values=({' '.join(option.values)}) wanted=value ;;")
    return f"""\
#compdef pretrain
# Completion of pretrain for zsh, made by: pretrain completion zsh
_pretrain() {{
    local command="" before="$words[CURRENT-1]" wanted="" depth=2
    local -a place options values
    if ((CURRENT > 2)); then
        command="$words[2]" depth=3
        case "$command" in
            {"|".join(_groups(all_places))}) ((CURRENT > 3)) && command+=" $words[3]" && depth=4 ;;
        esac
    fi
    case "$command" in
{chr(10).join(what)}
    esac
    case "$command $before" in
{chr(10).join(values)}
    esac
    if [[ -n $wanted ]]; then
        (($#values)) && compadd -a values || _files
    elif [[ $PREFIX == -* ]]; then
        _describe -o option options
    elif ((CURRENT == depth && $#place)); then
        _describe word place || _files
    else
        _files
    fi
}}
if [[ "$funcstack[1]" == _pretrain ]]; then _pretrain "$@"; else compdef _pretrain pretrain; fi
"""


def _fish(all_places: dict[str, Place]) -> str:
    lines = []
    for path, place in all_places.items():
        files = "" if path in ("train", "plan") else "-f "  # these take a path in the place of a recipe
        for word, help in place.words.items():
            about = f" -d {shlex.quote(help)}" if help else ""
            lines.append(f"complete -c pretrain -n '__pretrain_before {path}' {files}-a {word}{about}")
        for option in place.options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            wants = f" -x -a '{' '.join(option.values)}'" if option.values else " -r" if option.takes_value else ""
            about = f" -d {shlex.quote(option.help)}" if option.help else ""
            lines.append(f"complete -c pretrain -n '__pretrain_at {path}' {names}{wants}{about}")
    return f"""\
# Completion of pretrain for fish, made by: pretrain completion fish
function __pretrain_before -d 'Whether exactly these words stand before the cursor'
    set -l given (commandline -opc)
    set -e given[1]
    test "$given" = "$argv"
end
function __pretrain_at -d 'Whether the command line begins with these words'
    set -l given (commandline -opc)
    set -e given[1]
    string match -q -- "$argv *" "$given "
end
{chr(10).join(lines)}
"""
