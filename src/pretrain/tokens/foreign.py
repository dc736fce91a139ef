"""Token files of other tools, read as they are.

    nanoGPT                train.bin, val.bin          uint16 without a header
    llm.c, modded-nanogpt  NAME_train_000001.bin       256 int32: magic, version, tokens; then uint16 or uint32
    datatrove              NAME.ds                     uint16 or uint32 without a header; NAME.ds.metadata and .index

None of them names its vocabulary in a way that can be checked, so it has to be given, and a sample of the ids is
checked against it. Sources: nanoGPT's data/*/prepare.py, llm.c's dev/data/data_common.py, datatrove's pipeline/tokens.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from pretrain.errors import DataError
from pretrain.tokens.windows import TokenFile

SUFFIXES = (".bin", ".ds")

HEADER_BYTES = 256 * 4
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # magic number and version of llm.c: dtype after it
LLMC_EXAMPLES = 20240522  # the magic number of llm.c's files of multiple-choice questions, which are no token stream
SAMPLE_BLOCKS, SAMPLE_BYTES = 16, 4096  # read when a file is opened: evenly spaced, the first and last included

_VALIDATION = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")
_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")


def split_of(path: Path) -> str:
    """The split of a token file by its name: ``val`` if that is a word in it, else ``train``."""
    return "val" if _VALIDATION.search(path.stem.lower()) else "train"


def token_files(folder: Path) -> list[Path]:
    """The token files of other tools in a folder, sorted: .ds files, and .bin files named for a split."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); fix its permissions") from None
    return [
        file
        for file in files
        if file.suffix == ".ds" or _VALIDATION.search(file.stem.lower()) or _TRAINING.search(file.stem.lower())
    ]


def open_foreign(path: Path, vocab_size: int) -> tuple[TokenFile, str]:
    """A file of another tool, and a hash of its size and a sample of it.

    Raises DataError if it is missing, cut short or no token file, or has ids that the vocabulary lacks.
    """
    try:
        file = _describe(path, vocab_size)
        sample = _sample(path, file.offset)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give another path or fix its permissions") from None
    if not file.tokens:
        raise DataError(f"{path} holds no tokens; leave it out")
    largest = int(np.frombuffer(sample, np.dtype(file.dtype).newbyteorder("<")).max())
    if largest >= vocab_size:
        raise DataError(
            f"{path} has the token {largest:,} (read as {file.dtype}), but the vocabulary ends at {vocab_size - 1:,};"
            f" give the one it was made with: --tokenizer.kind gpt2 or its tokenizer.json"
        )
    return file, hashlib.sha256(f"{file.dtype} {file.tokens} ".encode() + sample).hexdigest()


def _describe(path: Path, vocab_size: int) -> TokenFile:
    """Find where a file's tokens begin, how many there are, and their dtype."""
    size = path.stat().st_size
    with open(path, "rb") as source:
        magic, version, tokens = np.frombuffer(source.read(12).ljust(12, b"\0"), "<i4").tolist()
    if magic == LLMC_EXAMPLES:
        raise DataError(f"{path} holds llm.c's questions of an evaluation, not text; leave it out")
    if dtype := HEADERS.get((magic, version)):
        found = (size - HEADER_BYTES) / np.dtype(dtype).itemsize
        if found != tokens:
            raise DataError(f"{path} has {found:,.0f} tokens, but its header says {tokens:,}; copy it again")
        return TokenFile(path, tokens, dtype, HEADER_BYTES)
    noted = _tokens_beside(path) if path.suffix == ".ds" else None
    if noted is not None and size not in (noted * 2, noted * 4):
        raise DataError(f"{path} has {size:,} bytes, not the {noted:,} tokens noted beside it; copy it again")
    if size % 2:
        raise DataError(f"{path} has {size:,} bytes, which are no whole number of tokens; copy it again")
    if noted is not None:
        wide = size == noted * 4
    else:  # uint32 if every second uint16 can be the upper half of an id; never so in uint16 tokens of text
        upper_halves = np.frombuffer(_sample(path, 0), "<u2")[1::2]
        wide = size % 4 == 0 and len(upper_halves) > 0 and int(upper_halves.max()) <= (vocab_size - 1) >> 16
    return TokenFile(path, size // 4, "uint32") if wide else TokenFile(path, size // 2, "uint16")


def _tokens_beside(path: Path) -> int | None:
    """The number of tokens in a .ds file by its .metadata (second line), or its .index (the last document's end)."""
    metadata, index = Path(f"{path}.metadata"), Path(f"{path}.index")
    if metadata.is_file():
        lines = metadata.read_bytes().splitlines()
        if len(lines) < 2 or not lines[1].isdigit():
            raise DataError(f"{metadata} does not tell the number of tokens in its second line; remove it")
        return int(lines[1])
    if index.is_file() and len(ends := np.fromfile(index, "<u8")):
        return int(ends[-1])
    return None


def _sample(path: Path, offset: int) -> bytes:
    """Evenly spaced blocks of a file's tokens, each beginning at a whole token."""
    length = path.stat().st_size - offset
    last = max(0, length - SAMPLE_BYTES)
    begins = sorted({last * block // (SAMPLE_BLOCKS - 1) // 4 * 4 for block in range(SAMPLE_BLOCKS)})
    with open(path, "rb") as source:
        parts = []
        for begin in begins:
            source.seek(offset + begin)
            parts.append(source.read(SAMPLE_BYTES))
    return b"".join(parts)
