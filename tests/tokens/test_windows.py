from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.tokens.windows import TokenFile, TokenStream


def write(path: Path, tokens: np.ndarray, header: bytes = b"") -> TokenFile:
    path.write_bytes(header + tokens.tobytes())
    return TokenFile(path, len(tokens), tokens.dtype.name, len(header))


def naive(tokens: np.ndarray, starts: np.ndarray, length: int) -> list[list[int]]:
    return [tokens[start : start + length].tolist() for start in starts]


@pytest.mark.parametrize("dtypes", [["uint16"], ["uint32"], ["uint16"] * 5, ["uint32"] * 3, ["uint16", "uint32"] * 2])
@pytest.mark.parametrize("header", [b"", b"x" * 1024, b"odd"])
def test_windows_are_the_naive_ones(tmp_path: Path, dtypes: list[str], header: bytes):
    draw = np.random.default_rng(len(dtypes))
    parts = [draw.integers(0, 2**16, draw.integers(1, 60)).astype(dtype) for dtype in dtypes]
    parts[-1] = np.append(parts[-1], parts[-1].dtype.type(2**16 - 1))  # the largest that all hold
    stream = TokenStream([write(tmp_path / f"{i}.bin", part, header) for i, part in enumerate(parts)])
    tokens = np.concatenate([part.astype(np.int64) for part in parts])
    assert len(stream) == len(tokens)
    for length in (1, 7, len(tokens) // 2, len(tokens)):
        starts = np.arange(len(tokens) - length + 1)
        draw.shuffle(starts)
        windows = stream.windows(starts, length)
        assert windows.dtype == np.int64
        assert windows.tolist() == naive(tokens, starts, length)
        out = np.full((len(starts), length), -1)
        assert stream.windows(starts, length, out) is out
        assert np.array_equal(out, windows)
    assert stream.windows(np.empty(0, dtype=np.int64), 3).shape == (0, 3)


def test_files_without_tokens_are_passed_over(tmp_path: Path):
    empty = write(tmp_path / "empty.bin", np.empty(0, dtype=np.uint16))
    full = write(tmp_path / "full.bin", np.arange(5, dtype=np.uint16))
    assert TokenStream([empty, full, empty]).windows(np.array([0]), 5).tolist() == [[0, 1, 2, 3, 4]]
    assert len(TokenStream([empty])) == 0
    assert len(TokenStream([])) == 0


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.tokens.windows._most_open", lambda: 3)
    files = [write(tmp_path / f"{i}.bin", np.arange(i * 10, i * 10 + 10, dtype=np.uint16)) for i in range(50)]
    stream = TokenStream(files)
    starts = np.random.default_rng(0).permutation(500 - 4)
    assert stream.windows(starts, 4).tolist() == [[s, s + 1, s + 2, s + 3] for s in starts.tolist()]
    assert sum(view is not None for view in stream._maps) == 3


def test_what_happened_to_a_file_is_said(tmp_path: Path):
    file = write(tmp_path / "a.bin", np.arange(10, dtype=np.uint16))
    file.check()
    stream = TokenStream([file])
    file.path.write_bytes(b"12345678")
    with pytest.raises(DataError, match="has 8 bytes, not 20"):
        file.check()
    with pytest.raises(DataError, match="has become shorter"):
        stream.windows(np.array([0]), 2)
    file.path.unlink()
    with pytest.raises(DataError, match="is missing"):
        file.check()
    with pytest.raises(DataError, match="cannot be read any more"):
        stream.windows(np.array([0]), 2)
