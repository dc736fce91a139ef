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
