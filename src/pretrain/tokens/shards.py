"""Token shards on disk: raw little-endian integers in ``SPLIT-00000.bin``, described by ``manifest.json``.

The ``.bin`` files have no header, so that they are what nanoGPT writes and reads as ``train.bin`` and ``val.bin``. The
manifest says what they are: format version, dtype, vocabulary size, tokenizer fingerprint, and for each shard its
split, tokens, documents, bytes of text and content hash. It is written last, so a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pretrain.errors import DataError
from pretrain.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One ``.bin`` file, as the manifest describes it."""

    file: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds."""

    dtype: str
    vocab_size: int
    tokenizer: str
    """The tokenizer's fingerprint."""
    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of all contents: two datasets with the same one hold the same tokens in the same order."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for, on average over the training shards."""
        return sum(s.text_bytes for s in self.shards if s.split == "train") / max(1, self.tokens("train"))

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically."""
        temporary = folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read ``manifest.json``; a DataError says what is wrong with it."""
        try:
            tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise DataError(f"{folder / MANIFEST} has a format this version cannot read; prepare the data again")
            shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
            return Manifest(shards=shards, **tree)
        except FileNotFoundError:
            raise DataError(f"{folder} has no {MANIFEST}: it is not a finished folder of token shards") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST} is damaged ({error}); prepare the data again") from None


def write_shard(folder: Path, split: str, index: int, texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """Tokenize documents into one shard; each begins with the boundary token, if the vocabulary has one."""
    file = f"{split}-{index:05d}.bin"
    digest = hashlib.sha256()
    tokens = documents = text_bytes = 0
    boundary = np.array([] if tokenizer.boundary_id is None else [tokenizer.boundary_id], dtype=tokenizer.dtype)
    texts = list(texts)
    with open(folder / file, "wb") as out:
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            data = np.concatenate((boundary, ids)).astype(ids.dtype.newbyteorder("<")).tobytes()
            out.write(data)
            digest.update(data)
            tokens += len(boundary) + len(ids)
            documents += 1
            text_bytes += len(text.encode())
    return Shard(file, split, tokens, documents, text_bytes, digest.hexdigest())


class TokenStream:
    """The tokens of one split as a single stream over its memory-mapped shards.

    Args:
        folder: where the shards and their manifest are.
        split: ``train`` or ``val``.
    """

    def __init__(self, folder: Path, split: str):
        manifest = Manifest.load(folder)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.shards = [shard for shard in manifest.shards if shard.split == split and shard.tokens]
        self.arrays: list[np.ndarray] = []
        for shard in self.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else -1
            if size != shard.tokens * dtype.itemsize:
                what = "is missing" if size < 0 else f"has {size} bytes, not {shard.tokens * dtype.itemsize}"
                raise DataError(f"{path} {what}; prepare the data again")
            self.arrays.append(np.memmap(path, dtype=dtype, mode="r"))
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if self.arrays else 0

    def __len__(self) -> int:
        return self.tokens

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """``length`` tokens from each of ``starts`` (N): an int64 array (N, length)."""
        out = np.empty((len(starts), length), dtype=np.int64)
        if len(self.arrays) == 1:
            out[...] = np.lib.stride_tricks.sliding_window_view(self.arrays[0], length)[starts]
            return out
        for row, start in zip(out, starts, strict=True):
            filled = 0
            while filled < length:  # a window may run over the edge of a shard
                shard = int(np.searchsorted(self.ends, start + filled, side="right"))
                begin = start + filled - (self.ends[shard] - len(self.arrays[shard]))
                part = self.arrays[shard][begin : begin + length - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
        return out
