"""What a file holds counts, not what its name says."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.errors import DataError
from pretrain.text import find_pieces, read_documents

TEXT = "The storks come back in March, and nest on chimneys. é\n" * 40


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents([str(file)]))
    return str(caught.value)


def zipped(text: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", text)
    return out.getvalue()


def tarred(text: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(text.encode())
        archive.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def parquet(text: str) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), out)
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz"])
@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bytes])
def test_compressed_or_not_by_content(tmp_path: Path, name: str, compress):
    file = tmp_path / name
    file.write_bytes(compress(TEXT.encode()))
    assert [document.text for document in read_documents([str(file)])] == [TEXT]


def test_a_large_file_compressed_under_a_plain_name_is_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.text.pieces.RANGE_BYTES", 64)
    file = tmp_path / "a.txt"
    file.write_bytes(gzip.compress(TEXT.encode()))
    assert file.stat().st_size > 64
    (piece,) = find_pieces([str(file)])
    assert piece.end == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped(TEXT), "a zip archive (as .docx, .epub and .xlsx are), whatever its name says; unpack it: unzip"),
        (bz2.compress(TEXT.encode()), "compressed with bzip2, whatever its name says; decompress it: bzip2 -dc"),
        (parquet(TEXT), "Parquet, whatever its name says; give it a name that ends in .parquet: mv"),
        (tarred(TEXT), "a tar archive; unpack it: tar xf"),
        (gzip.compress(tarred(TEXT)), "a tar archive; unpack it"),
        (gzip.compress(gzip.compress(TEXT.encode())), "this file is compressed; give it under a name that ends in .gz"),
        (b"%PDF-1.7\n" + bytes(range(256)), "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "fetch that: git lfs pull"),
        (TEXT.encode("utf-32"), "this is UTF-32, not UTF-8; convert it: iconv -f utf-32 -t utf-8"),
        (TEXT.encode("utf-32-be"), "this is UTF-32, not UTF-8; convert it: iconv -f utf-32be -t utf-8"),
        (TEXT.encode("utf-16"), "this is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8"),
        (TEXT.encode("utf-16-le"), "this is UTF-16, not UTF-8; convert it: iconv -f utf-16le -t utf-8"),
        (TEXT.encode("utf-16-be"), "this is UTF-16, not UTF-8; convert it: iconv -f utf-16be -t utf-8"),
        (
            "Wróćże, bądź — żółć".encode("cp1250") * 20,
            "(its beginning fits windows-1251, koi8-r, windows-1250); convert it: iconv -f ENCODING",
        ),
        (
            "Die Störche kommen im März.\n".encode("latin1") * 20,
            "fits windows-1252, macintosh, windows-1250); convert it",
        ),
        (
            "Die Störche kommen im März.\n".encode("mac_roman") * 20,
            "which is not known (its beginning fits windows-1252, mac",
        ),
        ("私は本を読むのが好きです。\n".encode("euc_jp") * 20, "(its beginning fits gb18030, big5, euc-jp, cp949,"),
        ("私は本を読むのが好きです。\n".encode("shift_jis") * 20, "(its beginning fits gb18030, cp932, windows-1251,"),
        (
            "春眠不觉晓，处处闻啼鸟。\n".encode("gb18030") * 20,
            "which is not known (its beginning fits gb18030, big5, cp949, windows-1251, koi8-r, windows-1250)",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_is_not_text_is_named_with_the_fix(tmp_path: Path, suffix: str, data: bytes, words: str):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(data)
    line = refusal(file)
    assert line.startswith(f"{file}: ")
    assert words in line


def test_binary_data_is_not_to_be_converted(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(byte or 1 for byte in range(256)) * 20)
    assert "this file is binary (byte 0x80 at offset 128)" in refusal(file)
    assert "iconv" not in refusal(file)


def test_a_pointer_named_parquet(tmp_path: Path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "a pointer of Git LFS, not the file itself" in refusal(file)


@pytest.mark.parametrize("start", ["PAR1 of the manual", "BZh, he said", "%PD"])
def test_words_that_look_like_magic_are_words(tmp_path: Path, start: str):
    file = tmp_path / "a.txt"
    file.write_text(start + TEXT, encoding="utf-8")
    assert [document.text for document in read_documents([str(file)])] == [start + TEXT]
