"""Windows of tokens out of memory-mapped files: the one place where tokens on disk become arrays.

    TokenFile, TokenFile, ...  →  TokenStream: one long sequence  →  windows(starts, length): int64 (N, length)

A file is raw little-endian integers after an optional header. Files are mapped when first read, and only a limited
number stays open: a data set may have more of them than a process may open.
"""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.errors import DataError


@dataclass(frozen=True)
class TokenFile:
    """Token ids in a file."""

    path: Path
    tokens: int
    dtype: str  # uint16, uint32, int32 or int64, little-endian
    offset: int = 0  # bytes before the first token

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return np.dtype(self.dtype).itemsize

    def holds(self, id: int | None) -> bool:
        """Whether a token is among them; read up to the first one."""
        with open(self.path, "rb") as source:
            source.seek(self.offset)
            while len(ids := np.fromfile(source, np.dtype(self.dtype).newbyteorder("<"), count=2**20)):
                if (ids == id).any():
                    return True
        return False

    def check(self) -> None:
        """Raise DataError unless the file exists and ends with its tokens."""
        wanted = self.offset + self.tokens * self.itemsize
        try:
            size = self.path.stat().st_size
        except OSError:
            raise DataError(f"{self.path} is missing; prepare or download the data again") from None
        if size != wanted:
            raise DataError(f"{self.path} has {size} bytes, not {wanted}; prepare or download the data again")


class TokenStream:
    """The tokens of several files, whose sizes were checked, as one sequence."""

    def __init__(self, files: Sequence[TokenFile]):
        self.files = [file for file in files if file.tokens]
        sizes = [file.tokens for file in self.files]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._begins = self._ends - np.array(sizes, dtype=np.int64)
        dtypes = {np.dtype(file.dtype).newbyteorder("<") for file in self.files}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None  # None: they differ
        self._maps: list[memoryview | None] = [None] * len(self.files)
        self._open: deque[int] = deque()
        self._most_open = _most_open()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.files else 0

    def windows(self, starts: np.ndarray, length: int, out: np.ndarray | None = None) -> np.ndarray:
        """``length`` tokens from each of ``starts`` (N), which must fit: int64 (N, length), in ``out`` if given."""
        out = np.empty((len(starts), length), dtype=np.int64) if out is None else out
        if not len(starts):
            return out
        if self._dtype:
            np.copyto(out, self._gather(starts, length, self._dtype))
        else:
            for row, start in zip(out, starts.tolist(), strict=True):
                self._copy(row, start)
        return out

    def _gather(self, starts: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
        """The windows in the dtype that all files have."""
        item, wide = dtype.itemsize, length * dtype.itemsize
        if len(self.files) == 1:
            # Each window is one opaque item of `wide` bytes, and these items overlap: numpy then copies whole windows
            # instead of single tokens, in one call.
            places = np.ndarray((len(self) - length + 1,), f"V{wide}", self._map(0), strides=(item,))
            return places[starts].view(dtype).reshape(len(starts), length)
        numbers = self._ends.searchsorted(starts, "right")
        begins = (starts - self._begins[numbers]) * item
        maps = self._maps
        parts = [
            (maps[number] or self._map(number))[begin : begin + wide]
            for number, begin in zip(numbers.tolist(), begins.tolist(), strict=True)
        ]
        joined = b"".join(parts)
        if len(joined) != len(starts) * wide:  # some windows run over the edges of their files
            for i, start in enumerate(starts.tolist()):
                if len(parts[i]) != wide:
                    row = np.empty(length, dtype)
                    self._copy(row, start)
                    parts[i] = row.data
            joined = b"".join(parts)
        return np.frombuffer(joined, dtype).reshape(len(starts), length)

    def _copy(self, row: np.ndarray, start: int) -> None:
        """Fill a row from ``start`` on, over as many files as it takes."""
        number = int(self._ends.searchsorted(start, "right"))
        begin, filled = start - int(self._begins[number]), 0
        while filled < len(row):
            tokens = np.frombuffer(self._map(number), np.dtype(self.files[number].dtype).newbyteorder("<"))
            part = tokens[begin : begin + len(row) - filled]
            row[filled : filled + len(part)] = part
            number, begin, filled = number + 1, 0, filled + len(part)

    def _map(self, number: int) -> memoryview:
        """The bytes of a file's tokens; the file opened first is closed when too many are open."""
        view = self._maps[number]
        if view is None:
            if len(self._open) >= self._most_open:
                self._maps[self._open.popleft()] = None
            file = self.files[number]
            # Before Python 3.13 a map keeps its file open too.
            options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            try:
                with open(file.path, "rb") as source:
                    whole = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ, **options)
            except (OSError, ValueError) as error:
                raise DataError(f"{file.path} cannot be read any more ({error})") from error
            view = memoryview(whole)[file.offset : file.offset + file.tokens * file.itemsize]
            if len(view) != file.tokens * file.itemsize:
                raise DataError(f"{file.path} has become shorter; prepare or download the data again")
            self._maps[number] = view
            self._open.append(number)
        return view


def _most_open() -> int:
    """Files to keep mapped: half of those that the process may open where a map keeps its file open, else many."""
    if sys.version_info >= (3, 13):
        return 32_000
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which has no such limit
        return 32_000
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 32_000 if soft == resource.RLIM_INFINITY else max(1, min(32_000, soft // 2))
