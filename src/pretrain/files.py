"""Small files that must be whole, and safe on the disk."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a small file, so that it is there whole or not at all, and safe on the disk when this returns."""
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


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
