"""Find the files that paths name: files, folders, patterns and URLs, in the same order on every machine."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pretrain.errors import DataError
from pretrain.text.opening import expand_url, format_of, is_url, open_raw, supported, unreadable


@dataclass(frozen=True)
class SourceFile:
    """A file to be read."""

    name: str  # its path as the user gave it, or URL
    size: int | None  # bytes; None: unknown
    named: bool  # whether the user named this very file, rather than a folder or pattern in which it was found


# What is in folders that pretrain makes: runs, token shards (finished or not), exported models. None of it is text to
# learn from, though it has files such as samples.jsonl and README.md.
_MADE_HERE = (
    {"config.toml", "tokenizer.json", "environment.json"},
    {"manifest.json", "tokenizer.json"},
    {"plan.json", "unfinished"},
    {"config.json", "tokenizer.json", "model.safetensors"},
)

Say = Callable[[str], None]
"""Called with each line to show."""


def find_files(paths: Sequence[str], say: Say = lambda _: None) -> list[SourceFile]:
    """List the files of text that these paths name, each once; those on this machine are known to open.

    A path is a file, a folder (its files of text at any depth, hidden ones left out), a glob pattern, in which ``**``
    stands for any number of folders, or a URL of any of these (over http only of a file); ``~`` is the home folder.
    The order is that of ``paths``, sorted within a folder or pattern. Links are followed, to each file and each folder
    once. Folders inside that pretrain made itself are left out, and ``say`` is told so.

    Raises DataError, naming the path, if it is missing, holds no text files, is of a type that is not read, or may not
    be read; and for an empty file that was named itself.
    """
    found: dict[str, SourceFile] = {}  # resolved path -> the file; a dict keeps the order
    for given in paths:
        if not given.strip():
            raise DataError("data.paths holds an empty path; name a file, folder or pattern such as 'books/**/*.txt'")
        for file in _remote(given) if is_url(given) else _local(given, say):
            if file.named and file.size == 0:
                raise DataError(f"{file.name}: this file is empty; delete it or give another")
            key = file.name if is_url(file.name) else str(Path(file.name).resolve())
            found.setdefault(key, file)
    return list(found.values())


def _remote(url: str) -> list[SourceFile]:
    sizes = dict(expand_url(url))
    if [*sizes] == [url]:
        _check_type(url)
        return [SourceFile(url, sizes[url], named=True)]
    return [SourceFile(name, sizes[name], named=False) for name in _choose([*sizes], url)]


def _local(given: str, say: Say) -> list[SourceFile]:
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        names = _choose(list(_walk(path, say)), given)
    elif os.path.lexists(path) or not glob.has_magic(given):  # a file whose name holds a * or [ is still that file
        return [SourceFile(str(path), _size(str(path)), named=True)]
    else:
        names = _choose(_matches(os.path.expanduser(given), say), given)
    return [SourceFile(name, _size(name), named=False) for name in names]


def _matches(pattern: str, say: Say) -> list[str]:
    """The files that a pattern matches.

    ``**`` is not left to glob, which follows links to a folder above again and again.
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return [str(Path(match)) for match in glob.glob(pattern) if not os.path.isdir(match)]
    deep = parts.index("**")
    before = os.sep.join([*parts[:deep], ""])
    found = []
    for folder in glob.glob(before) if before else [os.curdir]:
        inside = ((file, os.path.relpath(file, folder).split(os.sep)) for file in _walk(Path(folder), say))
        found += [file for file, names in inside if _fits(names, parts[deep:])]
    return found


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which ``**`` stands for any number of parts."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[first:], pattern[1:]) for first in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatch(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _walk(folder: Path, say: Say) -> Iterator[str]:
    """The files in a folder at any depth, hidden ones left out; those behind links to folders come last.

    No folder is entered twice, by whatever links, so that each ends.
    """

    def stop(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: this folder cannot be read ({error.strerror}); fix its permissions")

    folders, seen = [str(folder)], set[str]()  # links to folders are added to these
    made_here, nowhere = [], []
    for top in folders:
        for parent, subfolders, names in os.walk(top, onerror=stop):
            real = os.path.realpath(parent)
            made = parent != str(folder) and any(files <= {*subfolders, *names} for files in _MADE_HERE)
            if made and real not in seen:
                made_here.append(parent)
            if made or real in seen:
                seen.add(real)
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            links = (os.path.join(parent, name) for name in subfolders)
            folders += filter(os.path.islink, links)
            for name in names:
                file = str(Path(parent, name))
                if name.startswith("."):
                    continue
                if not format_of(name) and os.path.islink(file) and not os.path.exists(file):
                    nowhere.append(file)
                yield file
    for left_out, what in (
        (made_here, "made by pretrain itself (runs, token shards, models)"),
        (nowhere, "links to what is not there"),
    ):
        if left_out:
            such = ", ".join(sorted(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
            say(f"left out  {such}: {what}")


def _choose(files: list[str], given: str) -> list[str]:
    """Keep the files of a folder or pattern that are read, sorted. Other files beside them are not an error.

    A plain .json file counts only if the pattern asks for it: in a folder of texts it is usually something else.
    """
    json_asked = given.lower().endswith(".json")
    chosen = [file for file in files if format_of(file) and (json_asked or not file.lower().endswith(".json"))]
    if not chosen:
        others = sorted({os.path.splitext(file)[1].lower() or os.path.basename(file) for file in files})[:5]
        beside = f" (only {', '.join(others)})" if others else ""
        literal = given.replace("[", "[[]")  # in a pattern brackets stand for one of the characters in them
        if literal != given and not is_url(given) and next(glob.iglob(os.path.expanduser(literal)), None):
            beside = f", as [...] stands for one of the characters in it; for names with brackets give '{literal}'"
        raise DataError(f"{given}: no text files there{beside}; put {supported()} files there or give another path")
    # As paths, part by part: '/' comes before every other character.
    return sorted(chosen, key=lambda file: file.split("/") if is_url(file) else Path(file).parts)


def _size(file: str) -> int:
    """Give the size of a file that is known to open."""
    try:
        status = os.stat(file)
    except PermissionError as error:
        raise unreadable(file, error) from error
    except OSError as error:
        raise DataError(f"{file}: no such file or folder{_nearest(Path(file))}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: not a regular file; give {supported()} files or a folder of them")
    _check_type(file)
    open_raw(file).close()
    return status.st_size


def _check_type(file: str) -> None:
    if not format_of(file):
        suffix = os.path.splitext(file)[1]
        kind = f"{suffix} files are" if suffix else "a file without a suffix is"
        raise DataError(f"{file}: {kind} not read; give {supported()} (plain text under another name: rename it)")


def _nearest(missing: Path) -> str:
    """Say what is wrong with the first part of a path that is not there: a broken link, or near to another name."""
    part = next(part for part in reversed([missing, *missing.parents]) if not os.path.exists(part) or part == missing)
    if os.path.islink(part):
        return f"; {part} is a link to {os.readlink(part)}, which is not there; restore that, or remove the link"
    try:
        near = difflib.get_close_matches(part.name, os.listdir(part.parent), n=1)
    except OSError:
        return ""
    return f"; did you mean {part.parent / near[0]} ?" if near else ""
