"""Files, folders and globs as documents. One function finds the files, one reads them, one table knows the types."""

import difflib
import glob
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from pretrain.errors import DataError
from pretrain.text.document import Document
from pretrain.text.embedded import embedded_documents

BINARY_PROBE = 64 * 1024  # bytes at the start of a file in which a NUL means that it is not text


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Give the documents of these files, folders and globs in order; with no paths, those of the embedded corpus.

    A .txt or .md file is one document and keeps every character it has, line ends included; only a byte-order mark at
    its start goes. Raises DataError as ``find_files`` does, and for a file that is binary, not UTF-8 or blank.
    """
    if not paths:
        yield from embedded_documents()
    for file in find_files(paths):
        yield from READERS[file.suffix.lower()](file)


def find_files(paths: Sequence[str]) -> list[Path]:
    """List the text files that these paths name, each once, every one of them known to open.

    A path is a file, a folder (its .txt and .md files at any depth, hidden ones left out) or a glob pattern, in which
    ``**`` stands for any number of folders; ``~`` is the home folder. The order is that of ``paths``, sorted within
    a folder or pattern.

    Raises DataError, naming the path, if it is missing, holds no text files, is of a type not read yet, is empty or
    may not be read.
    """
    found: dict[Path, Path] = {}  # resolved path -> the path as given; a dict keeps the order
    for given in paths:
        for file in _expand(given):
            _check_readable(file)
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _expand(given: str) -> list[Path]:
    if not given.strip():
        raise DataError("data.paths holds an empty path; name a file, a folder or a pattern such as 'books/**/*.txt'")
    if "://" in given:
        raise DataError(f"{given}: remote text is not read yet; download it and give the file, one of {_supported()}")
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        return _choose(_walk(path), f"{given}: this folder")
    if os.path.lexists(path) or not glob.has_magic(given):  # a file whose name holds a * or [ is still that file
        return [path]
    matches = [Path(match) for match in glob.glob(os.path.expanduser(given), recursive=True)]
    return _choose([match for match in matches if not match.is_dir()], f"{given}: this pattern")


def _walk(folder: Path) -> list[Path]:
    def stop(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: this folder cannot be read ({error.strerror}); mend its permissions")

    files: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return files


def _choose(files: list[Path], where: str) -> list[Path]:
    """Keep the files of a folder or pattern that can be read, sorted. What else lies beside them is not an error."""
    chosen = sorted(file for file in files if file.suffix.lower() in READERS)
    if not chosen:
        others = sorted({file.suffix.lower() or file.name for file in files})[:5]
        beside = f" (only {', '.join(others)})" if others else ""
        raise DataError(f"{where} holds no text files{beside}; put {_supported()} files there or give another path")
    return chosen


def _check_readable(file: Path) -> None:
    try:
        size = file.stat().st_size
    except PermissionError as error:
        raise _unreadable(file, error) from error
    except OSError as error:
        raise DataError(f"{file}: no such file or folder{_nearest(file)}") from error
    if not file.is_file():
        raise DataError(f"{file}: not a regular file; give {_supported()} files or a folder of them")
    if file.suffix.lower() not in READERS:
        kind = f"{file.suffix} files are" if file.suffix else "a file without a suffix is"
        raise DataError(f"{file}: {kind} not read yet; give {_supported()} (plain text under another name: rename it)")
    if size == 0:
        raise DataError(f"{file}: this file is empty; delete it or give another")
    try:
        open(file, "rb").close()
    except OSError as error:
        raise _unreadable(file, error) from error


def _nearest(missing: Path) -> str:
    """Find, for a path that is not there, the existing name nearest to the first part of it that is missing."""
    for part in reversed([missing, *missing.parents]):
        if not os.path.exists(part):
            try:
                names = os.listdir(part.parent)
            except OSError:
                return ""
            near = difflib.get_close_matches(part.name, names, n=1)
            return f"; did you mean {part.parent / near[0]} ?" if near else ""
    return ""


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be read ({error.strerror}); mend its permissions: chmod u+r {_quoted(file)}")


def _read_text(file: Path) -> Iterator[Document]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{file}: this is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8 {_quoted(file)} > OUT"
        )
    nul = data.find(b"\0", 0, BINARY_PROBE)
    if nul >= 0:
        raise DataError(f"{file}: this file is binary (a NUL at byte {nul}); give plain text, {_supported()}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
            f"convert it from what it is, e.g.: iconv -f latin1 -t utf-8 {_quoted(file)} > OUT"
        ) from error
    if not text or text.isspace():
        raise DataError(f"{file}: this file holds only white space; delete it or give another")
    yield Document(text, str(file))


def _quoted(file: Path) -> str:
    return shlex.quote(str(file))


def _supported() -> str:
    return " or ".join(READERS)


# How each type of file is read: suffix -> a function from the path to its documents.
READERS: dict[str, Callable[[Path], Iterator[Document]]] = {".txt": _read_text, ".md": _read_text}
