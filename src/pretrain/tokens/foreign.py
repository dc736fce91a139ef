"""Token files of other tools, read as they are.

    nanoGPT                train.bin, val.bin          uint16 without a header
    llm.c, modded-nanogpt  NAME_train_000001.bin       256 int32: magic, version, tokens; then uint16 or uint32
    datatrove              NAME.ds                     uint16 or uint32 without a header; NAME.ds.metadata and .index
    Megatron-LM            NAME_train.bin              without a header; the dtype is in NAME_train.idx
    numpy.save             train.npy                   one dimension of integers

None of them names its vocabulary in a way that can be checked, so it has to be given, and a sample of the ids is
checked against it. Where a file does not name its dtype either, it is the widest of which all values are ids; a sample
that looks like no tokens at all is refused. Sources: nanoGPT's data/*/prepare.py, llm.c's dev/data/data_common.py,
datatrove's pipeline/tokens, Megatron-LM's core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from pretrain.errors import DataError
from pretrain.tokens.windows import TokenFile

SUFFIXES = (".bin", ".ds", ".npy")

HEADER_BYTES = 256 * 4
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # magic number and version of llm.c: dtype after it
MAGICS = {magic for magic, _ in HEADERS}
LLMC_EXAMPLES = 20240522  # the magic number of llm.c's files of multiple-choice questions, which are no token stream
DTYPES = ("uint16", "uint32", "int32", "int64")
SAMPLE_BLOCKS, SAMPLE_BYTES = 16, 4096  # read when a file is opened: evenly spaced, the first and last included

NUMPY = b"\x93NUMPY"
MEGATRON = b"MMIDIDX\x00\x00"  # begins its .idx; the dtype is byte 17 of it
MEGATRON_DTYPES = {4: "int32", 5: "int64", 8: "uint16"}
OTHER_FILES = {
    b"PK\x03\x04": "a zip archive, or what torch.save wrote",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"GGUF": "the weights of a model",
    MEGATRON: "an index of Megatron-LM",
}
FEW, MANY = 64, 1000  # tokens in a sample, below which nothing is said of how they look, or how often each is there

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


def open_foreign(path: Path, vocab_size: int, dtype: str = "auto") -> tuple[TokenFile, str]:
    """A file of another tool, and a hash of its size and a sample of it.

    ``dtype`` is that of a file which does not name its own; ``auto``: found by its values.

    Raises DataError if it is missing, cut short or no token file by its looks, or has ids that the vocabulary lacks.
    """
    try:
        file = _describe(path, vocab_size, dtype)
        sample = _sample(path, file.offset, max(4, file.itemsize))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give another path or fix its permissions") from None
    if not file.tokens:
        raise DataError(f"{path} holds no tokens; leave it out")
    ids = _values(sample, file.dtype)
    wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
    known = 0 <= wrong < vocab_size
    why = _implausible(ids, sample) if dtype == "auto" else ""
    if why and (known or "order" not in why):
        raise DataError(
            f"{path} does not look like tokens: {why} (read as {file.dtype}); write it as uint16 or uint32,"
            f" or name what it is with --data.dtype"
        )
    if not known:
        fix = "give the one it was made with: --tokenizer.kind gpt2 or its tokenizer.json"
        if _values(sample, file.dtype, ">").max() < vocab_size and len(ids) >= FEW:
            order = f"dtype='>{np.dtype(file.dtype).str[1:]}'"
            fix = f"its bytes are in the other order: numpy.fromfile(FILE, {order}).astype('{file.dtype}').tofile(NEW)"
        elif wrong < 0:
            fix = "write only ids, as uint16 or uint32"
        which = f"the token {wrong:,} (read as {file.dtype}), but the vocabulary ends at {vocab_size - 1:,}"
        raise DataError(f"{path} has {which}; {fix}")
    return file, hashlib.sha256(f"{file.dtype} {file.tokens} ".encode() + sample).hexdigest()


def _implausible(ids: np.ndarray, sample: bytes) -> str:
    """Why a sample of ids is hardly one of tokens, in words; empty if it may well be."""
    if len(ids) < FEW:
        return ""
    for start in (0, 1):
        if np.mean(ids[start::2] == 0) > 0.9 and np.mean(ids[1 - start :: 2] == 0) < 0.7:
            return "every second one is 0, as where wider numbers are read"
    with np.errstate(invalid="ignore"):  # NaN that signal
        floats = _values(sample, "float32").astype(np.float64)
    if floats.any() and ((floats >= 0) & (floats < 2**31) & (floats % 1 == 0)).all():
        return "it is whole numbers in float32"
    with suppress(UnicodeDecodeError):
        if min(codecs.utf_8_decode(sample[:SAMPLE_BYTES], "strict", False)[0]) >= "\t":
            return "it is text"
    if ids.itemsize == 2 and len(ids) >= MANY:
        lower, upper = (np.bincount(half, minlength=256) / len(ids) for half in (ids & 255, ids >> 8))
        if (lower**2).sum() > 2 * (upper**2).sum():  # frequent ids are low: it is the upper halves that are alike
            return "its bytes seem to be in the other order"
    return ""


def _values(sample: bytes, dtype: str, order: Literal["<", ">"] = "<") -> np.ndarray:
    whole = len(sample) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
    return np.frombuffer(sample[:whole], np.dtype(dtype).newbyteorder(order))


def _describe(path: Path, vocab_size: int, wanted: str) -> TokenFile:
    """Find where a file's tokens begin, how many there are, and their dtype."""
    size = path.stat().st_size
    with open(path, "rb") as source:
        start = source.read(16)
        magic, version, tokens = np.frombuffer(start[:12].ljust(12, b"\0"), "<i4").tolist()
        if start.startswith(NUMPY):
            return _numpy_array(path, source, size)
    for begin, what in OTHER_FILES.items():
        if start.startswith(begin):
            raise DataError(f"{path} is {what}, not a file of tokens; write its ids with numpy.ndarray.tofile")
    if magic == LLMC_EXAMPLES:
        raise DataError(f"{path} holds llm.c's questions of an evaluation, not text; leave it out")
    if dtype := HEADERS.get((magic, version)):
        found = (size - HEADER_BYTES) / np.dtype(dtype).itemsize
        if found != tokens:
            raise DataError(f"{path} has {found:,.0f} tokens, but its header says {tokens:,}; copy it again")
        return TokenFile(path, tokens, dtype, HEADER_BYTES)
    if magic in MAGICS:
        raise DataError(f"{path} has llm.c's header of version {version}, which is not known; write it as version 1")
    noted = _tokens_beside(path) if path.suffix == ".ds" else None
    if noted is not None:
        if size not in (noted * 2, noted * 4):
            raise DataError(f"{path} has {size:,} bytes, not the {noted:,} tokens noted beside it; copy it again")
        return TokenFile(path, noted, "uint32" if size == noted * 4 else "uint16")
    dtype = _megatron_dtype(path) or (wanted if wanted != "auto" else _dtype_by_values(path, size, vocab_size))
    width = np.dtype(dtype).itemsize
    if size % width:
        raise DataError(f"{path} has {size:,} bytes, which are no whole number of tokens of {dtype}; copy it again")
    return TokenFile(path, size // width, dtype)


def _dtype_by_values(path: Path, size: int, vocab_size: int) -> str:
    """The widest integers of which all upper halves can be those of ids; never so in narrower tokens of text."""
    for dtype, width in (("int64", 8), ("uint32", 4)):
        values = _values(_sample(path, 0, width), f"uint{8 * width}")
        if size % width == 0 and len(values) and int(values.max()) >> 16 <= (vocab_size - 1) >> 16:
            return dtype
    return "uint16"


def _numpy_array(path: Path, source: BinaryIO, size: int) -> TokenFile:
    """The tokens of a file that numpy.save wrote."""
    source.seek(0)
    try:
        version = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(source)
    except ValueError as error:
        raise DataError(f"{path} has a damaged header of numpy ({error}); write it again") from None
    if len(shape) != 1 or dtype.newbyteorder("=").name not in DTYPES or dtype.byteorder == ">":
        raise DataError(
            f"{path} is an array {shape} of {dtype}, not a row of tokens; save ARRAY.ravel().astype('uint32'),"
            f" or 'uint16' if no id is above 65,535"
        )
    if source.tell() + shape[0] * dtype.itemsize != size:
        raise DataError(f"{path} does not hold the {shape[0]:,} tokens of its header; copy it again")
    return TokenFile(path, shape[0], dtype.name, source.tell())


def _megatron_dtype(path: Path) -> str:
    """The dtype of a .bin file by the index beside it, if that is Megatron-LM's; else empty."""
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return ""
    with open(index, "rb") as source:
        start = source.read(18)
    if len(start) < 18 or not start.startswith(MEGATRON):
        return ""
    if start[17] not in MEGATRON_DTYPES:
        raise DataError(f"{index} says that {path.name} has integers of another kind (code {start[17]}) than tokens")
    return MEGATRON_DTYPES[start[17]]


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


def _sample(path: Path, offset: int, width: int = 4) -> bytes:
    """Evenly spaced blocks of a file's tokens, each beginning at a whole one of ``width`` bytes."""
    length = path.stat().st_size - offset
    last = max(0, length - SAMPLE_BYTES)
    begins = sorted({last * block // (SAMPLE_BLOCKS - 1) // width * width for block in range(SAMPLE_BLOCKS)})
    with open(path, "rb") as source:
        parts = []
        for begin in begins:
            source.seek(offset + begin)
            parts.append(source.read(SAMPLE_BYTES))
    return b"".join(parts)
