"""What a run learns from, as it was at its beginning, so that it is known again, also at another place.

    origin.json    the fingerprint of the tokens; of text also each file on this machine: its size, time and hash

A file whose size and time are as before is not read. One whose time differs is, so that to touch or to copy it is no
change. What is behind URLs is not asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from pretrain.config import DataConfig
from pretrain.errors import DataError
from pretrain.io import cores, read_bounded, sha256_of, write_atomically
from pretrain.text.files import find_files
from pretrain.text.opening import is_url, unreadable
from pretrain.tokens.shards import PLAN
from pretrain.tokens.stream import hash_of_ends

ORIGIN = "origin.json"
ORIGIN_BYTES = 2**31  # the largest that is read: of about ten million files


@dataclass(frozen=True)
class TextFile:
    """A file of text on this machine."""

    name: str
    size: int  # bytes
    changed: int  # when, in nanoseconds since 1970
    sha256: str = ""  # of all of it, or for a stream of both ends; empty: not known


@dataclass(frozen=True)
class Origin:
    """What a run learns from. Of a run that was made before this was recorded, as far as it says so."""

    tokens: str = ""  # the fingerprint of its corpus; empty: not known
    stream: str = ""  # that of its live text
    whole: bool = False  # as ReadStats.whole, of its live text; earlier versions do not say it
    text: tuple[TextFile, ...] = ()  # those that data.paths names
    validation: tuple[TextFile, ...] = ()  # those that data.val_paths names

    def save(self, folder: Path) -> None:
        """Write ``origin.json`` atomically."""
        write_atomically(folder / ORIGIN, json.dumps(asdict(self)) + "\n")

    @staticmethod
    def load(folder: Path) -> Origin:
        """That of a run directory. Raises DataError if it is damaged."""
        file = folder / ORIGIN
        try:
            return msgspec.convert(json.loads(read_bounded(file, ORIGIN_BYTES)), Origin)
        except FileNotFoundError:
            return _of_plan(folder / "data" / PLAN)
        except (ValueError, msgspec.MsgspecError) as error:
            raise DataError(f"{file} is damaged ({error}); delete it to go on without what it says") from None


def _of_plan(file: Path) -> Origin:
    """What a plan of token shards says of their text; nothing if there is none."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        sides = [plan[side] for side in ("text", "validation text")]
        text, validation = (tuple(TextFile(*each) for each in side if each[2]) for side in sides)  # URLs have no time
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return Origin()
    return Origin(text=text, validation=validation)


def text_now(data: DataConfig) -> Origin:
    """The files of text that ``data`` names now, not read yet. Raises DataError as ``find_files`` does."""

    def listed(paths: Sequence[str]) -> tuple[TextFile, ...]:
        names = [file.name for file in find_files([path for path in paths if not is_url(path)])]
        return tuple(TextFile(name, (status := os.stat(name)).st_size, status.st_mtime_ns) for name in names)

    return Origin(text=listed(data.paths), validation=listed(data.val_paths))


def with_hashes(origin: Origin, stream: bool) -> Origin:
    """The same with the hash of each file. Raises DataError if one changed since it was listed."""
    files = [*origin.text, *origin.validation]
    hashed = [replace(file, sha256=sha256) for file, sha256 in zip(files, _hashes(files, stream), strict=True)]
    for file in files:
        status = os.stat(file.name)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
            raise DataError(f"{file.name} changed while it was prepared; start again with another --out")
    return replace(origin, text=tuple(hashed[: len(origin.text)]), validation=tuple(hashed[len(origin.text) :]))


def difference(before: Origin, now: Origin, stream: bool) -> tuple[str, list[str], Origin]:
    """What differs between the files of two origins, by content; empty if nothing does.

    Files correspond by their order and names, wherever they are. Also gives those of which that is not known, since
    their times differ and no hash was recorded, and ``now`` with all that ``before`` had recorded.
    """
    unknown: list[str] = []
    for then, there in ((before.text, now.text), (before.validation, now.validation)):
        if not before.tokens:  # a plan does not list files without text, nor copies of what is held out
            there = [file for file in there if file.name in {file.name for file in then}]
        if [Path(file.name).name for file in then] != [Path(file.name).name for file in there]:
            lost = sorted({file.name for file in then} - {file.name for file in there})
            more = sorted({file.name for file in there} - {file.name for file in then})
            return (f"{more[0]} is new" if more else f"{lost[0]} is gone" if lost else "the order is another"), [], now
        for old, new in zip(then, there, strict=True):
            if old.size != new.size:
                return f"{new.name} has {new.size:,} bytes and had {old.size:,}", [], now
        touched = [(old, new) for old, new in zip(then, there, strict=True) if old.changed != new.changed]
        unknown += [new.name for old, new in touched if not old.sha256]
        touched = [(old, new) for old, new in touched if old.sha256]
        for (old, new), sha256 in zip(touched, _hashes([new for _, new in touched], stream), strict=True):
            if old.sha256 != sha256:
                return f"{new.name} has other content", [], now

    if not before.tokens:
        return "", unknown, now

    def recorded(then: Sequence[TextFile], there: Sequence[TextFile]) -> tuple[TextFile, ...]:
        return tuple(replace(new, sha256=old.sha256) for old, new in zip(then, there, strict=True))

    text, validation = recorded(before.text, now.text), recorded(before.validation, now.validation)
    return "", unknown, replace(before, text=text, validation=validation)


def _hashes(files: Sequence[TextFile], stream: bool) -> list[str]:
    def hash_of(file: TextFile) -> str:
        try:
            return hash_of_ends(file.name).hex() if stream else sha256_of(Path(file.name))
        except OSError as error:
            raise unreadable(file.name, error) from error

    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(hash_of, files))
