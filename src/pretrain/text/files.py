"""Find the files that paths name: files, folders, patterns and URLs, in the same order on every machine."""

from __future__ import annotations

import difflib
import glob
import os
import stat
from collections.abc import Sequence
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


def find_files(paths: Sequence[str]) -> list[SourceFile]:
    """List the files of text that these paths name, each once; those on this machine are known to open.

    A path is a file, a folder (its files of text at any depth, hidden ones left out), a glob pattern, in which ``**``
    stands for any number of folders, or a URL of any of these (over http only of a file); ``~`` is the home folder.
    The order is that of ``paths``, sorted within a folder or pattern.

    Raises DataError, naming the path, if it is missing, holds no text files, is of a type that is not read, or may not
    be read; and for an empty file that was named itself.
    """
    found: dict[str, SourceFile] = {}  # resolved path -> the file; a dict keeps the order
    for given in paths:
        if not given.strip():
            raise DataError("data.paths holds an empty path; name a file, folder or pattern such as 'books/**/*.txt'")
        for file in _remote(given) if is_url(given) else _local(given):
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


def _local(given: str) -> list[SourceFile]:
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        names = _choose(_walk(path), given)
    elif os.path.lexists(path) or not glob.has_magic(given):  # a file whose name holds a * or [ is still that file
        return [SourceFile(str(path), _size(str(path)), named=True)]
    else:
        matches = glob.glob(os.path.expanduser(given), recursive=True)
        names = _choose([str(Path(match)) for match in matches if not os.path.isdir(match)], given)
    return [SourceFile(name, _size(name), named=False) for name in names]


def _walk(folder: Path) -> list[str]:
    def stop(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: this folder cannot be read ({error.strerror}); fix its permissions")

    files: list[str] = []
    for parent, subfolders, names in os.walk(folder, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [str(Path(parent, name)) for name in names if not name.startswith(".")]
    return files


def _choose(files: list[str], given: str) -> list[str]:
    """Keep the files of a folder or pattern that are read, sorted. Other files beside them are not an error.

    A plain .json file counts only if the pattern asks for it: in a folder of texts it is usually something else.
    """
    json_asked = given.lower().endswith(".json")
    chosen = [file for file in files if format_of(file) and (json_asked or not file.lower().endswith(".json"))]
    if not chosen:
        others = sorted({os.path.splitext(file)[1].lower() or os.path.basename(file) for file in files})[:5]
        beside = f" (only {', '.join(others)})" if others else ""
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
    """Find, for a path that is not there, the existing name nearest to the first part of it that is missing."""
    part = next(part for part in reversed([missing, *missing.parents]) if not os.path.exists(part) or part == missing)
    try:
        near = difflib.get_close_matches(part.name, os.listdir(part.parent), n=1)
    except OSError:
        return ""
    return f"; did you mean {part.parent / near[0]} ?" if near else ""
