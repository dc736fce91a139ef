import struct
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.tokens.foreign import open_foreign, split_of, token_files
from pretrain.tokens.windows import TokenStream

VOCABULARY, LARGE_VOCABULARY = 50257, 128_256
GPT2, LLAMA3 = (20240520, 1), (20240801, 7)


def ids(count: int, vocab_size: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def write_llmc(path: Path, tokens: np.ndarray, kind: tuple[int, int] = GPT2, claimed: int | None = None) -> Path:
    """As llm.c's and modded-nanogpt's scripts do: 256 int32, then the tokens."""
    header = struct.pack("<3i", *kind, len(tokens) if claimed is None else claimed).ljust(1024, b"\0")
    path.write_bytes(header + tokens.astype("<u2" if kind == GPT2 else "<u4").tobytes())
    return path


def write_datatrove(path: Path, documents: list[np.ndarray], dtype: str, metadata: bool, index: bool) -> Path:
    """As datatrove's TokenizedFile does: tokens; the ends of documents as uint64; three lines of text."""
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    ends = np.cumsum([len(document) for document in documents])
    if index:
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        Path(f"{path}.metadata").write_text(f"gpt2|{np.dtype(dtype).itemsize}\n{ends[-1]}\n1.2 T")
    return path


def read(path: Path, vocab_size: int = VOCABULARY) -> list[int]:
    stream = TokenStream([open_foreign(path, vocab_size)[0]])
    return stream.windows(np.array([0]), len(stream))[0].tolist()


@pytest.mark.parametrize("count", [1, 3, 500, 5000, 100_001])
def test_nanogpts_headerless_file(tmp_path: Path, count: int):
    tokens = ids(count)
    tokens.astype(np.uint16).tofile(tmp_path / "train.bin")
    assert read(tmp_path / "train.bin") == tokens.tolist()


@pytest.mark.parametrize("vocab_size", [VOCABULARY, LARGE_VOCABULARY])
@pytest.mark.parametrize("count", [100, 100_001])
def test_a_headerless_file_of_uint32_is_known_by_its_upper_halves(tmp_path: Path, vocab_size: int, count: int):
    tokens = ids(count, vocab_size)
    tokens.astype(np.uint32).tofile(tmp_path / "train.bin")
    file, _ = open_foreign(tmp_path / "train.bin", vocab_size)
    assert (file.dtype, file.tokens) == ("uint32", count)
    assert read(tmp_path / "train.bin", vocab_size) == tokens.tolist()


@pytest.mark.parametrize(("kind", "vocab_size"), [(GPT2, VOCABULARY), (LLAMA3, LARGE_VOCABULARY)])
def test_llmcs_files_with_a_header(tmp_path: Path, kind: tuple[int, int], vocab_size: int):
    tokens = ids(30_001, vocab_size)
    file = write_llmc(tmp_path / "fineweb_train_000001.bin", tokens, kind)
    assert read(file, vocab_size) == tokens.tolist()


def test_a_torn_file_with_a_header(tmp_path: Path):
    file = write_llmc(tmp_path / "a_train.bin", ids(1000), claimed=1001)
    with pytest.raises(DataError, match="has 1,000 tokens, but its header says 1,001"):
        open_foreign(file, VOCABULARY)
    with pytest.raises(DataError, match="header says -5"):
        open_foreign(write_llmc(file, ids(10), claimed=-5), VOCABULARY)
    with pytest.raises(DataError, match="questions of an evaluation"):
        open_foreign(write_llmc(file, ids(1000), kind=(20240522, 1)), VOCABULARY)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize(("metadata", "index"), [(True, True), (True, False), (False, True), (False, False)])
def test_datatroves_files(tmp_path: Path, dtype: str, metadata: bool, index: bool):
    documents = [ids(400, seed=1), ids(601, seed=2)]
    file = write_datatrove(tmp_path / "00000_00000_shuffled.ds", documents, dtype, metadata, index)
    assert read(file) == np.concatenate(documents).tolist()


@pytest.mark.parametrize("beside", ["metadata", "index"])
def test_a_datatrove_file_that_is_not_what_is_noted_beside_it(tmp_path: Path, beside: str):
    file = write_datatrove(tmp_path / "a.ds", [ids(1000)], "uint16", beside == "metadata", beside == "index")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="not the 1,000 tokens noted beside it"):
        open_foreign(file, VOCABULARY)
    Path(f"{file}.metadata").write_text("gpt2")
    with pytest.raises(DataError, match=r"a\.ds\.metadata does not tell the number of tokens"):
        open_foreign(file, VOCABULARY)


def test_ids_that_the_vocabulary_lacks(tmp_path: Path):
    ids(1000, 40_000).astype(np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(
        DataError, match=r"train\.bin has the token 39,\d+ \(read as uint16\).*ends at 255; give the one"
    ):
        open_foreign(tmp_path / "train.bin", 256)
    # Two ids of uint16 read as one of uint32, since the wrong number of tokens is noted beside them.
    file = write_datatrove(tmp_path / "a.ds", [ids(1000)], "uint16", True, False)
    Path(f"{file}.metadata").write_text("gpt2|4\n500\n500")
    with pytest.raises(DataError, match="read as uint32"):
        open_foreign(file, VOCABULARY)


@pytest.mark.parametrize("vocab_size", [300, VOCABULARY, LARGE_VOCABULARY])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("count", [100, 100_001])
def test_wider_integers_are_known_by_their_upper_halves(tmp_path: Path, dtype: str, count: int, vocab_size: int):
    tokens = ids(count, vocab_size)
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    assert read(tmp_path / "train.bin", vocab_size) == tokens.tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("name", ["train.npy", "train.bin"])
def test_what_numpy_saves(tmp_path: Path, dtype: str, name: str):
    tokens = ids(5000)
    with open(tmp_path / name, "wb") as out:
        np.save(out, tokens.astype(dtype))
    assert read(tmp_path / name) == tokens.tolist()
    with open(tmp_path / name, "ab") as out:
        out.write(b"12")
    with pytest.raises(DataError, match="does not hold the 5,000 tokens of its header"):
        open_foreign(tmp_path / name, VOCABULARY)


@pytest.mark.parametrize("array", [np.zeros((2, 3), "uint16"), np.zeros(5, "float32"), np.zeros(5, ">u2")])
def test_arrays_that_are_no_row_of_tokens(tmp_path: Path, array: np.ndarray):
    np.save(tmp_path / "train.npy", array)
    with pytest.raises(DataError, match="not a row of tokens; save ARRAY"):
        open_foreign(tmp_path / "train.npy", VOCABULARY)


@pytest.mark.parametrize(("code", "dtype"), [(4, "int32"), (5, "int64"), (8, "uint16")])
def test_megatrons_index_tells_the_dtype(tmp_path: Path, code: int, dtype: str):
    tokens = ids(7, 100)  # too few to see it
    tokens.astype(dtype).tofile(tmp_path / "a_train.bin")
    (tmp_path / "a_train.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code) + bytes(16))
    assert read(tmp_path / "a_train.bin") == tokens.tolist()
    (tmp_path / "a_train.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 7) + bytes(16))
    with pytest.raises(DataError, match="integers of another kind"):
        open_foreign(tmp_path / "a_train.bin", VOCABULARY)


def text_like(count: int, vocab_size: int) -> np.ndarray:
    """Ids as a tokenizer gives them: low ones often, high ones seldom."""
    return np.minimum(np.random.default_rng(0).zipf(1.2, count), vocab_size) - 1


@pytest.mark.parametrize(
    ("data", "vocab_size", "says"),
    [
        (
            text_like(20_000, 300).astype(">u2"),
            300,
            r"bytes are in the other order: numpy.fromfile\(FILE, dtype='>u2'\)",
        ),
        (text_like(20_000, VOCABULARY).astype(">u2"), VOCABULARY, "bytes are in the other order"),
        (text_like(20_000, LARGE_VOCABULARY).astype(">u4"), LARGE_VOCABULARY, "every second one is 0|other order"),
        (text_like(20_000, 60_000).astype(">u2"), LARGE_VOCABULARY, "bytes seem to be in the other order"),
        (text_like(20_000, VOCABULARY).astype("float32"), LARGE_VOCABULARY, "in float32"),
        (ids(20_000).astype("float32"), 300, "in float32"),
        (text_like(20_000, VOCABULARY).astype("float32"), VOCABULARY, "in float32"),
        (ids(20_000).astype(">i8"), VOCABULARY, "every second one is 0"),
        (np.frombuffer(b"Once upon a time\n" * 600, "u1"), VOCABULARY, "it is text"),
        (np.frombuffer("漢字かな交じり文。".encode() * 600, "u1"), LARGE_VOCABULARY, "it is text"),
        (np.array([20240520, 9, 100, *range(800)], "<i4"), VOCABULARY, "header of version 9, which is not known"),
        (np.frombuffer(b"PK\x03\x04" + bytes(996), "u1"), VOCABULARY, "is a zip archive"),
        (np.frombuffer(b"MMIDIDX\x00\x00" + bytes(991), "u1"), VOCABULARY, "is an index of Megatron-LM"),
        (np.where(np.arange(999) % 9, ids(999), -100).astype("int32"), VOCABULARY, "has the token"),
    ],
    ids=str,
)
def test_what_does_not_look_like_tokens_is_refused(tmp_path: Path, data: np.ndarray, vocab_size: int, says: str):
    data.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=says) as caught:
        open_foreign(tmp_path / "train.bin", vocab_size)
    assert "\n" not in str(caught.value)


def test_the_dtype_can_be_named(tmp_path: Path):
    tokens = np.zeros(1000, "<u2")
    tokens[::2] = 7
    tokens.tofile(tmp_path / "train.bin")  # as uint16 it looks implausible, and may yet be so
    assert open_foreign(tmp_path / "train.bin", VOCABULARY)[0].dtype == "uint32"
    file, _ = open_foreign(tmp_path / "train.bin", VOCABULARY, "uint16")
    assert (file.dtype, file.tokens) == ("uint16", 1000)
    (tmp_path / "train.bin").write_bytes(bytes(1002))
    with pytest.raises(DataError, match="no whole number of tokens of int64"):
        open_foreign(tmp_path / "train.bin", VOCABULARY, "int64")


@pytest.mark.parametrize("vocab_size", [5, 65, 257, 4096, VOCABULARY, LARGE_VOCABULARY])
def test_tokens_of_text_are_not_refused(tmp_path: Path, vocab_size: int):
    tokens = text_like(50_000, min(vocab_size, 2**16))
    tokens.astype("uint16").tofile(tmp_path / "train.bin")
    assert read(tmp_path / "train.bin", vocab_size) == tokens.tolist()


def test_files_that_hold_no_tokens(tmp_path: Path):
    file = tmp_path / "train.bin"
    with pytest.raises(DataError, match=r"train\.bin cannot be read \(No such file"):
        open_foreign(file, VOCABULARY)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="holds no tokens"):
        open_foreign(file, VOCABULARY)
    file.write_bytes(b"abc")
    with pytest.raises(DataError, match="has 3 bytes, which are no whole number of tokens"):
        open_foreign(file, VOCABULARY)


def test_the_hash_follows_size_and_sample(tmp_path: Path):
    tokens = ids(200_000).astype(np.uint16)
    (file := tmp_path / "train.bin").write_bytes(tokens.tobytes())
    _, first = open_foreign(file, VOCABULARY)
    assert open_foreign(file, VOCABULARY)[1] == first
    for changed in (tokens[:-1], np.append(tokens[:-1], np.uint16(7)), np.insert(tokens[1:], 0, 7)):
        file.write_bytes(changed.tobytes())
        assert open_foreign(file, VOCABULARY)[1] != first


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.bin", "train"),
        ("val.bin", "val"),
        ("fineweb_train_000001.bin", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("tiny-Validation.bin", "val"),
        ("evaluations.ds", "train"),
        ("000_interval.ds", "train"),
    ],
)
def test_names_tell_the_split(name: str, split: str):
    assert split_of(Path(name)) == split


def test_the_token_files_of_a_folder(tmp_path: Path):
    names = [
        "b_train_2.bin",
        "b_train_1.bin",
        "val.bin",
        "00000.ds",
        "00000.ds.index",
        "model.bin",
        "test.bin",
        "x.txt",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"12")
    (tmp_path / "train.ds").mkdir()
    assert [file.name for file in token_files(tmp_path)] == ["00000.ds", "b_train_1.bin", "b_train_2.bin", "val.bin"]
