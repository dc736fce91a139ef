"""Token shards on disk: raw little-endian integers in ``.bin`` files, described by ``manifest.json``.

The files have no header, as nanoGPT's ``train.bin`` and ``val.bin``. The manifest is written last, so a folder without
one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from pretrain.errors import DataError
from pretrain.io import read_bounded, write_atomically
from pretrain.text import ReadStats, problem_lines
from pretrain.tokenizer import Tokenizer

FORMAT = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"  # what is being made in a folder, from the beginning on (prepare.py)
MANIFEST_BYTES = 100 * 2**20  # the largest manifest that is read: of about 400,000 shards, or 40 trillion tokens
BUFFERED_TOKENS = 2**18  # hashed and written at once

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Split = Annotated[str, msgspec.Meta(pattern=r"\A(train|val|test)\Z")]
Dtype = Annotated[str, msgspec.Meta(pattern=r"\A(uint16|uint32)\Z")]
FileName = Annotated[str, msgspec.Meta(pattern=r"\A[^./\\:\0][^/\\:\0]*\Z")]  # a shard is in the manifest's folder


@dataclass(frozen=True)
class Shard:
    """One ``.bin`` file, as the manifest describes it."""

    file: FileName
    split: Split
    tokens: Count
    documents: Count  # that begin in it; one too large for memory may go on from the shard before
    text_bytes: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds."""

    dtype: Dtype
    vocab_size: Count
    tokenizer: str  # its fingerprint
    shards: tuple[Shard, ...]
    boundary: Count | None = None  # the BOS token with which each document begins; None: there is none, or data.bos off
    problems: dict[str, int] = field(default_factory=dict)  # what of the text was fixed or skipped, and how often
    first: dict[str, str] = field(default_factory=dict)  # where each of these problems is first
    records: Count = 0  # lines, rows, files that were read, with those skipped; 0: not known

    @staticmethod
    def of(tokenizer: Tokenizer, shards: Iterable[Shard], read: ReadStats | None = None) -> Manifest:
        """The manifest of shards made with a tokenizer from text that was ``read``."""
        read = read or ReadStats()
        return Manifest(
            tokenizer.dtype.name,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            tuple(shards),
            tokenizer.bos_id,
            dict(sorted(read.problems.items())),
            read.places(),
            read.records,
        )

    def problem_lines(self) -> list[str]:
        """A line for each problem of the text."""
        return problem_lines(self.problems, self.first, self.records)

    @property
    def fingerprint(self) -> str:
        """A hash of all contents: two datasets with the same one hold the same tokens in the same shards."""
        tree = asdict(self)
        for name in ("problems", "first", "records"):
            del tree[name]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def documents(self, split: str) -> int:
        """Documents of a split."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for, on average over the training shards."""
        return sum(s.text_bytes for s in self.shards if s.split == "train") / max(1, self.tokens("train"))

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically."""
        write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read ``manifest.json``. Raises DataError if it is missing, damaged or not one of ours."""
        file = folder / MANIFEST
        try:
            tree = msgspec.json.decode(read_bounded(file, MANIFEST_BYTES))
            if tree.pop("format") != FORMAT:
                raise DataError(f"{file} has a format this version cannot read; prepare the data again")
            manifest = msgspec.convert(tree, Manifest)
            if unknown := tree.keys() - asdict(manifest).keys():
                raise ValueError(f"unknown {', '.join(unknown)}")
            if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
                raise ValueError("a shard is listed twice")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{folder} has no {MANIFEST}: it is not a finished folder of token shards") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
            raise DataError(f"{file} is damaged ({error}); prepare the data again") from None


class ShardWriter:
    """Write one shard. Its file takes its name when it is whole and safe on the disk, in :meth:`close`."""

    def __init__(self, folder: Path, file: str, split: str, tokenizer: Tokenizer):
        self.path, self.split = folder / file, split
        self.tokens = self.documents = self.text_bytes = 0
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=self._dtype)
        self._digest = hashlib.sha256()
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        # A unique name, should another process be at the same work (on a cluster, one that is believed dead).
        self._temporary = self.path.with_name(f"{file}.{uuid.uuid4().hex}.tmp")
        self._out = open(self._temporary, "wb")  # noqa: SIM115 - closed in close or discard

    def write(self, ids: np.ndarray, text_bytes: int, begins: bool = True) -> int:
        """Add the tokens of a document, or of its next part (``begins`` False); gives how many tokens it added."""
        if begins:
            self._buffer.append(self._bos)
            self.documents += 1
        self._buffer.append(ids)
        added = len(ids) + begins * len(self._bos)
        self.tokens += added
        self.text_bytes += text_bytes
        self._buffered += added
        if self._buffered >= BUFFERED_TOKENS:
            self._flush()
        return added

    def _flush(self) -> None:
        data = np.concatenate([self._bos[:0], *self._buffer]).astype(self._dtype, copy=False).data
        self._out.write(data)
        self._digest.update(data)
        self._buffer, self._buffered = [], 0

    def close(self) -> Shard:
        """Finish the file."""
        self._flush()
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        os.replace(self._temporary, self.path)
        digest = self._digest.hexdigest()
        return Shard(self.path.name, self.split, self.tokens, self.documents, self.text_bytes, digest)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file if it is unfinished."""
        self._out.close()
        self._temporary.unlink(missing_ok=True)


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def bytes_per_token(texts: Sequence[str], tokenizer: Tokenizer) -> float:
    """UTF-8 bytes that a token of these documents stands for on average, their BOS tokens counted."""
    tokens = sum(len(ids) for _, ids in tokenizer.encode_documents(enumerate(texts)))
    tokens += len(texts) if tokenizer.bos_id is not None else 0
    return sum(map(utf8_bytes, texts)) / max(1, tokens)
