"""Small shared things: atomic writes, JSON lines, signals to handle, durations, tables, URLs without secrets."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomically(file: Path, text: str, sync: bool = True) -> None:
    """Write a small file, so that it is there whole or not at all; with ``sync`` safe on the disk on return.

    Names of files that are not UTF-8, which Python holds with surrogates, become the bytes that they are.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as out:
            out.write(text)
            if sync:
                out.flush()
                os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(file.parent)


def sync_file(file: Path) -> None:
    """Make the contents of a file safe on the disk."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe on the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_bounded(file: Path, limit: int) -> str:
    """The text of a file of at most ``limit`` bytes. Raises ValueError if it is larger, before it is read."""
    if (size := file.stat().st_size) > limit:
        raise ValueError(f"it has {size:,} bytes, more than any such file ({limit:,})")
    return file.read_text(encoding="utf-8")


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a file such as metrics.jsonl; a last line that a crash cut short is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines would cut at U+2028 too
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def append_jsonl(file: Path, *records: dict[str, Any]) -> None:
    """Append records, one line each, or nothing at all. JSON has no NaN or infinity: they become null."""
    lines = []
    for record in records:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        lines.append(json.dumps(clean, ensure_ascii=False) + "\n")
    data = memoryview("".join(lines).encode(errors="surrogateescape"))
    with file.open("ab", buffering=0) as out:
        size = out.tell()
        try:
            while data:
                data = data[out.write(data) :]
        except OSError:  # such as a full disk: half a line would spoil the next one
            os.truncate(file, size)
            raise


def keep_steps(file: Path, up_to: int) -> None:
    """Drop the records of steps after ``up_to``, which a run that goes on from there will write again."""
    if file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        append_jsonl(temporary, *(record for record in read_jsonl(file) if record["step"] <= up_to))
        sync_file(temporary)
        os.replace(temporary, file)


def cache_folder() -> Path:
    """Where what was measured on this machine is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not home.is_absolute():  # a container may know neither a home nor the user
        home = Path(tempfile.gettempdir(), f"cache-{os.getuid() if hasattr(os, 'getuid') else ''}")
    return home / "pretrain"


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~user`` replaced by the home directory; unchanged where there is no such home."""
    return Path(os.path.expanduser(path))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


FILES_EACH, OTHER_FILES = 4, 256
"""Files that may be open for each of the processes that train together (sockets to it: of gloo's groups on CPUs; and in
torchrun, which keeps the store), and all others."""


def allow_open_files(processes: int) -> tuple[int, int, int]:
    """Let this process open as many files as one of ``processes`` that train together may need, or as many as it may.

    Returns how many that is, and the limit before and now.
    """
    needed = FILES_EACH * processes + OTHER_FILES
    try:
        import resource
    except ImportError:  # not a Unix
        return needed, needed, needed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed, needed, needed
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return needed, soft, most


def print_anything() -> None:
    """Let standard output take any text: a character that its encoding lacks is written as an escape, not refused."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Output:
    """Standard output for what may be lost: where nobody reads it any more or its disk is full, it is silent."""

    def __init__(self) -> None:
        print_anything()
        self.stream = sys.stdout or io.StringIO()  # None where it was closed before Python began

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write as much as can be written."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; once the reader has left, as `head` does, all later output is dropped."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:
            pass


LONGEST_GRACE = 600.0
"""Seconds after a signal in which a process leaves, saved or not, unless ``guard.grace_seconds`` is longer."""


def signals_to_handle(*names: str) -> list[int]:
    """The named signals that this system has, without those that are ignored: nohup ignores SIGHUP, and it stays so."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def duration(seconds: float) -> str:
    """A length of time for people: ``8 s``, ``90 s``, ``3.8 min``, ``2.3 h``, ``4.0 days``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as lines of columns: the first cell of each to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True)]
        lines.append("  ".join([f"{name:<{first}}", *aligned]).rstrip())
    return "\n".join(lines)


def without_secrets(value: Any) -> Any:
    """The same plain values, with user names, passwords and queries (signatures, tokens) taken out of URLs."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"://[^/?#\s'\"<>@]+@", "://", value)  # user name and password
        # The query ends with the word; quotes, brackets and commas at the very end belong to the text around the URL.
        value = re.sub(r"(://[^\s?#\"<>]*)[?#][^\s\"<>]*?(?=['),.:;]*(?:[\s\"<>]|$))", r"\1", value)
    return value
