"""Token shards on disk: raw little-endian integers in ``.bin`` files, described by ``manifest.json``.

The ``.bin`` files have no header, so that they are what nanoGPT writes and reads as ``train.bin`` and ``val.bin``. The
manifest says what they are: format version, dtype, vocabulary size, tokenizer fingerprint, and for each shard its
split, tokens, documents, bytes of text and content hash. It is written last, so a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pretrain.errors import DataError
from pretrain.io import write_atomically
from pretrain.tokenizer import Tokenizer

FORMAT = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"
"""What is being made in a folder, from the beginning on (prepare.py)."""
MANIFEST_BYTES = 100 * 2**20
"""The largest manifest that is read: that of about 400,000 shards, or 40 trillion tokens."""

BUFFERED_TOKENS = 2**18
"""Tokens hashed and written at once."""


@dataclass(frozen=True)
class Shard:
    """One ``.bin`` file, as the manifest describes it."""

    file: str
    split: str
    tokens: int
    documents: int
    """Documents that begin in it. One too large for memory may go on from the shard before."""
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
    boundary: int | None = None
    """The token with which each document begins; None: the vocabulary has none."""
    problems: dict[str, int] = field(default_factory=dict)
    """What of the text was mended or left out, and how often."""

    @property
    def fingerprint(self) -> str:
        """A hash of all contents: two datasets with the same one hold the same tokens in the same shards."""
        tree = asdict(self)
        del tree["problems"]
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
        """Read ``manifest.json``; a DataError says what is wrong with it."""
        file = folder / MANIFEST
        try:
            if file.stat().st_size > MANIFEST_BYTES:
                raise DataError(
                    f"{file} is larger than any manifest ({MANIFEST_BYTES:,} bytes); prepare the data again"
                )
            tree = json.loads(file.read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise DataError(f"{file} has a format this version cannot read; prepare the data again")
            manifest = Manifest(shards=tuple(Shard(**shard) for shard in tree.pop("shards")), **tree)
            _check(manifest)
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{folder} has no {MANIFEST}: it is not a finished folder of token shards") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file} is damaged ({error}); prepare the data again") from None


def _check(manifest: Manifest) -> None:
    """A ValueError for values that no manifest of ours has, such as a shard outside the folder."""
    numbers = [("vocab_size", manifest.vocab_size), ("boundary", manifest.boundary or 0)]
    names = set()
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {manifest.dtype!r}")
    for shard in manifest.shards:
        name = shard.file
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\:\0"):
            raise ValueError(f"a shard is named {name!r}")
        if name in names:
            raise ValueError(f"{name} is listed twice")
        names.add(name)
        if shard.split not in ("train", "val"):
            raise ValueError(f"{name} is of split {shard.split!r}")
        numbers += [(f"{what} of {name}", getattr(shard, what)) for what in ("tokens", "documents", "text_bytes")]
    for what, number in numbers:
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{what} is {number!r}")
    if not isinstance(manifest.problems, dict):
        raise ValueError("problems is not a table")


class ShardWriter:
    """Write one shard. Its file takes its name when it is whole and safe on the disk, in :meth:`close`."""

    def __init__(self, folder: Path, file: str, split: str, tokenizer: Tokenizer):
        self.path, self.split = folder / file, split
        self.tokens = self.documents = self.text_bytes = 0
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._boundary = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=self._dtype)
        self._digest = hashlib.sha256()
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        # A name of its own, should another process be at the same work (on a cluster, one that is believed dead).
        self._temporary = self.path.with_name(f"{file}.{uuid.uuid4().hex}.tmp")
        self._out = open(self._temporary, "wb")  # noqa: SIM115 - closed in close or discard

    def write(self, ids: np.ndarray, text_bytes: int, begins: bool = True) -> int:
        """Add the tokens of a document, or of its next part (``begins`` False); gives how many tokens it added."""
        if begins:
            self._buffer.append(self._boundary)
            self.documents += 1
        self._buffer.append(ids)
        added = len(ids) + begins * len(self._boundary)
        self.tokens += added
        self.text_bytes += text_bytes
        self._buffered += added
        if self._buffered >= BUFFERED_TOKENS:
            self._flush()
        return added

    def _flush(self) -> None:
        data = np.concatenate([self._boundary[:0], *self._buffer]).astype(self._dtype, copy=False).data
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

    def discard(self) -> None:
        """Remove what there is of an unfinished file."""
        self._out.close()
        self._temporary.unlink(missing_ok=True)


def write_shard(folder: Path, split: str, index: int, texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """Tokenize documents into one shard; each begins with the boundary token, if the vocabulary has one."""
    writer = ShardWriter(folder, f"{split}-{index:05d}.bin", split, tokenizer)
    try:
        for text, ids in tokenizer.encode_documents((text, text) for text in texts):
            writer.write(ids, utf8_bytes(text))
        return writer.close()
    except BaseException:
        writer.discard()
        raise


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
