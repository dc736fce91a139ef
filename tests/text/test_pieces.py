import gzip
import json
import lzma
import pickle
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.config import DataConfig
from pretrain.errors import DataError
from pretrain.text import (
    PROBLEMS,
    Document,
    Piece,
    ReadStats,
    find_pieces,
    formats,
    pieces,
    read_documents,
    read_piece,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    zstd = pytest.importorskip("backports.zstd")


def zstd_compress(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})  # as the program zstd does


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd_compress}


def texts(*paths: str | Path, **options) -> list[str]:
    return [document.text for document in read_documents([str(path) for path in paths], **options)]


def refusal(path: str | Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        texts(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line


def rows_file(path: Path, rows: list, field: str = "text", **options) -> Path:
    pq.write_table(pa.table({"id": list(range(len(rows))), field: rows}), path, **options)
    return path


def lines_file(path: Path, rows: list) -> Path:
    compress = COMPRESS[path.suffix if path.suffix in COMPRESS else ""]
    path.write_bytes(compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


# Every type of file


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_json_lines_in_every_compression(tmp_path: Path, suffix: str):
    text = "Él\r\nfin 🙂\n"
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    (tmp_path / f"b.md{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    for name in ("c.jsonl", "d.ndjson", "e.json"):
        data = b"\xef\xbb\xbf" + json.dumps({"n": 1, "text": text}).encode() + b"\r\n\r\n" + b'{"text": "last"}'
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](data))
    assert texts(tmp_path / f"a.txt{suffix}", tmp_path / f"b.md{suffix}") == [text, text]
    for name in ("c.jsonl", "d.ndjson", "e.json"):
        assert texts(tmp_path / f"{name}{suffix}") == [text, "last"]


def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path: Path):
    for suffix, compress in COMPRESS.items():
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(compress(b"one ") + compress(b"two"))
        assert texts(file) == ["one two"]


def test_zstd_with_the_window_of_large_dumps(tmp_path: Path):
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    data = zstd.ZstdCompressor(options=options)  # without a known size the window is kept as asked
    (tmp_path / "a.txt.zst").write_bytes(data.compress(b"some text") + data.flush())
    assert texts(tmp_path / "a.txt.zst") == ["some text"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
)
def test_parquet_columns_of_every_kind_of_text(tmp_path: Path, kind):
    rows = ["one", "two é", None, "three", "one"] * 3
    column = pa.array(rows).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(rows).dictionary_encode()
    pq.write_table(pa.table({"body": column}), tmp_path / "a.parquet", row_group_size=4)
    stats = ReadStats()
    assert texts(tmp_path / "a.parquet", field="body", stats=stats) == [row for row in rows if row]
    assert stats.problems == {"null": 3}


def test_a_mixed_folder_is_one_text(tmp_path: Path):
    rows_file(tmp_path / "a.parquet", ["one", "two"])
    lines_file(tmp_path / "b.jsonl.gz", [{"text": "three"}])
    (tmp_path / "c.txt").write_text("four")
    assert list(read_documents([str(tmp_path)])) == [
        Document("one", f"{tmp_path}/a.parquet"),
        Document("two", f"{tmp_path}/a.parquet"),
        Document("three", f"{tmp_path}/b.jsonl.gz"),
        Document("four", f"{tmp_path}/c.txt"),
    ]


# Pieces


def test_no_paths_are_one_piece_of_the_embedded_corpus():
    (piece,) = find_pieces([])
    assert [document.text for document in read_piece(piece)] == texts()


def test_row_groups_are_joined_to_pieces_that_give_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [f"{n} " * (n % 50) + "x" for n in range(1000)]
    file = rows_file(tmp_path / "a.parquet", rows, row_group_size=30, use_dictionary=False)
    monkeypatch.setattr(pieces, "ROW_GROUPS_BYTES", 10_000)
    found = find_pieces([str(file)])
    assert found[0].begin == 0
    assert found[-1].end == 34  # 1000 / 30, rounded up
    assert [piece.begin for piece in found[1:]] == [piece.end for piece in found[:-1]]
    assert 3 < len(found) < 34
    assert all(piece.size <= 10_000 for piece in found)
    assert [document.text for piece in found for document in read_piece(piece)] == rows
    monkeypatch.setattr(pieces, "ROW_GROUPS_BYTES", 1)
    assert len(find_pieces([str(file)])) == 34


def test_pieces_are_small_hashable_and_picklable(tmp_path: Path):
    found = find_pieces([str(rows_file(tmp_path / "a.parquet", ["one"]))])
    assert pickle.loads(pickle.dumps(found)) == found
    assert len({*found, *found}) == 1
    assert len(pickle.dumps(found[0])) < 500


LINES = [
    {"text": "é" * n + "\u2028\n🙂"} if n % 3 else {"text": f"{n}"} for n in range(40)
]  # lengths from 14 to some 500 bytes


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("end_at_end", [True, False])
def test_ranges_of_json_lines_give_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: bytes, end_at_end: bool
):
    data = line_end.join(json.dumps(row, ensure_ascii=False).encode() for row in LINES)
    file = tmp_path / "a.jsonl"
    file.write_bytes(data + (line_end if end_at_end else b""))
    for size in [*range(1, 40), 64, 100, 333, 1000, len(data) - 1, len(data), len(data) + 1]:
        monkeypatch.setattr(pieces, "RANGE_BYTES", size)
        found = find_pieces([str(file)])
        assert len(found) == -(-file.stat().st_size // size)
        given = [document.text for piece in found for document in read_piece(piece)]
        assert given == [row["text"] for row in LINES], size


TEXTS = {
    "words": "The quick brown fox, 42 times.\r\nJumps \n\nover.\n" * 40,
    "scripts": "слово за слово\n漢字かな。\nなにもない。\n🙂 ñandú  x\n" * 30,
    "no good place": "漢字🙂é" * 100,
    "blanks": " " * 700 + "end",
    "blank start": "  \n" * 100 + "a b c " * 50,
}


def range_sizes(size: int) -> list[int]:
    return [*range(1, 20), 64, 100, 333, size - 1, size, size + 1]


@pytest.mark.parametrize("name", TEXTS)
def test_ranges_of_a_text_lose_nothing_and_cut_no_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    file = tmp_path / "a.txt"
    data = TEXTS[name].encode()
    file.write_bytes(data)
    for window in (16, formats.CUT_WINDOW):
        monkeypatch.setattr(formats, "CUT_WINDOW", window)
        for size in range_sizes(len(data)):
            monkeypatch.setattr(pieces, "RANGE_BYTES", size)
            stats = ReadStats()
            given = [doc for piece in find_pieces([str(file)]) for doc in read_piece(piece, "text", stats)]
            assert "".join(document.text for document in given) == TEXTS[name], (window, size)
            assert [document.continues for document in given] == [False] + [True] * (len(given) - 1)
            assert not stats.problems


def test_ranges_of_a_text_that_is_not_quite_utf_8_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = b"ok " * 6000 + b"\xff\x80\x80\x80\x80\x80\xe2\x82 \xf0\x9f\x99 x\xc3" + b"ok " * 6000
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    for size in range(17_990, 18_030):
        monkeypatch.setattr(pieces, "RANGE_BYTES", size)
        assert "".join(texts(file)) == data.decode("utf-8", "replace"), size


def test_good_places_are_found_in_every_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "RANGE_BYTES", 100)
    for name in ("words", "scripts"):
        (tmp_path / "a.txt").write_text(TEXTS[name], newline="")
        parts = texts(tmp_path / "a.txt")
        assert len(parts) > 5
        for before, after in pairwise(parts):
            assert (before[-1].isalnum() and after[0] in " \n") or (before[-1] == "\n" and not after[0].isspace())


# The pre-tokenizers of GPT-2, GPT-4 (cl100k_base; Llama 3 and Qwen differ in digits only) and GPT-4o (o200k_base).
PATTERNS = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pre_tokenizers_end_a_word_at_every_good_place(pattern: str):
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    draw = random.Random(0)
    cuts = 0
    for _ in range(3000):
        text = "".join(draw.choice("aB7é漢 \n\n\r\t./'s。\u3000🙂") for _ in range(draw.randrange(2, 14)))
        words = [word for word, _ in split.pre_tokenize_str(text)]
        for cut in formats._GOOD_CUT.finditer(text):
            parts = (text[: cut.start()], text[cut.start() :])
            assert [word for part in parts for word, _ in split.pre_tokenize_str(part)] == words, (text, parts)
            cuts += 1
    assert cuts > 1000


# Documents between separators


def test_separated_documents_come_once_from_any_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(3)
    mark, file = "<|e|>", tmp_path / "a.txt"
    for number in range(60):
        texts = [
            "".join(draw.choice("ab <|e>漢\n") for _ in range(draw.randrange(40))) for _ in range(draw.randrange(1, 9))
        ]
        texts = [text.replace(mark, "").strip("\n") for text in texts]
        around = [draw.choice(["", "\n", "\r\n"]) for _ in range(2)]
        whole = mark.join(texts) if number % 2 else f"{around[0]}{mark}{around[1]}".join(texts)
        file.write_text(whole, newline="")
        wanted = [text for text in texts if text.strip()]
        for size in (1, 2, 3, 7, 20, 1000):
            monkeypatch.setattr(pieces, "RANGE_BYTES", size)
            monkeypatch.setattr(formats, "BLOCK", draw.randrange(1, 9))
            if not whole.strip():
                continue
            found = find_pieces([str(file)], separator=mark)
            given = [document.text for piece in found for document in read_piece(piece)]
            assert given == wanted, (whole, size)


def test_separated_documents_of_a_compressed_file_and_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(
        gzip.compress(b"\xef\xbb\xbfone\n<|endoftext|>\n\n<|endoftext|>\n" + b"two " * 50 + b"\n<|endoftext|>\n")
    )
    monkeypatch.setattr(formats, "PART_CHARACTERS", 50)
    monkeypatch.setattr(formats, "CUT_WINDOW", 20)
    (piece,) = find_pieces([str(file)], separator="<|endoftext|>")
    stats = ReadStats()
    given = list(read_piece(piece, stats=stats))
    assert given[0].text == "one"
    assert "".join(document.text for document in given[1:]) == "two " * 50
    assert [document.continues for document in given] == [False, False, True, True, True]
    assert stats.problems == {"empty": 1}


def test_a_separator_must_come_and_not_overlap_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.txt"
    file.write_text("words " * 100)
    monkeypatch.setattr(formats, "LINE_BYTES", 300)
    monkeypatch.setattr(formats, "BLOCK", 50)
    with pytest.raises(DataError, match=r"begins at byte 0 is longer than 300 bytes; is '<\|x\|>' what stands between"):
        list(read_piece(find_pieces([str(file)], separator="<|x|>")[0]))
    with pytest.raises(ValueError, match=r"data\.separator '---' ends as it begins"):
        DataConfig(separator="---")


# Long texts in bounded memory


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(TEXTS[name].encode()))
    monkeypatch.setattr(formats, "CHUNK", 17)
    for part, window in [(50, 20), (1, 1), (200, 500)]:
        monkeypatch.setattr(formats, "PART_CHARACTERS", part)
        monkeypatch.setattr(formats, "CUT_WINDOW", window)
        given = list(read_documents([str(file)]))
        assert "".join(document.text for document in given) == TEXTS[name]
        assert all(0 < len(document.text) <= part + window for document in given)
        assert [document.continues for document in given] == [False] + [True] * (len(given) - 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_long_row_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    texts = ["short", *TEXTS.values(), "short too"]
    name = tmp_path / f"a.{kind}"
    file = lines_file(name, [{"text": text} for text in texts]) if kind == "jsonl" else rows_file(name, texts)
    monkeypatch.setattr(formats, "PART_CHARACTERS", 50)
    monkeypatch.setattr(formats, "CUT_WINDOW", 20)
    given = list(read_documents([str(file)]))
    begins = [i for i, document in enumerate(given) if not document.continues]
    joined = ["".join(each.text for each in given[i:j]) for i, j in pairwise([*begins, len(given)])]
    assert joined == texts
    assert all(0 < len(document.text) <= 70 for document in given)


PEAK = """
import sys, tracemalloc
from pretrain.text import (find_pieces, read_piece)
pieces = find_pieces([sys.argv[1]])
tracemalloc.start()
print(sum(len(document.text) for piece in pieces for document in read_piece(piece)), tracemalloc.get_traced_memory()[1])
"""


def peak(file: Path) -> tuple[int, int]:
    """Read a file in a process of its own; give its characters and the most bytes of Python's held."""
    answer = subprocess.run([sys.executable, "-c", PEAK, file], capture_output=True, text=True, check=True)
    characters, most = answer.stdout.split()
    return int(characters), int(most)


def test_memory_does_not_grow_with_a_compressed_text(tmp_path: Path):
    block = ("All work and no play makes Jack a dull boy. " * 25_000).encode()  # 1.1 MB
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(block, compresslevel=1) * 50)
    characters, most = peak(tmp_path / "a.txt.gz")
    assert characters == 50 * len(block)
    assert most < 24 * 1024 * 1024


def test_memory_does_not_grow_with_json_lines_or_row_groups(tmp_path: Path):
    rows = ["x y " * 250] * 30_000  # 30 MB
    lines_file(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    rows_file(tmp_path / "a.parquet", rows, use_dictionary=False)
    for name in ("a.jsonl", "a.parquet"):
        characters, most = peak(tmp_path / name)
        assert characters == 30_000_000
        assert most < 16 * 1024 * 1024


# Text that is not as it should be


def test_every_pathological_row_is_fixed_or_left_out_and_counted(tmp_path: Path):
    good = "a good one"
    lines: list[bytes] = [
        json.dumps({"text": good}).encode(),
        b'{"text": "pair \\ud83d\\ude42, half \\ud83d, other \\uDE42 \xc3\xa9"}',
        b'{"text": "bytes \xff\xfe"}',
        b'{"text": "fine", "other": "\xff"}',
        b'{"text": "nul \\u0000 here"}',
        b'{"text": "raw\ttab"}',
        b'{"text": ""}',
        b'{"text": " \\n\\t\\u3000"}',
        json.dumps({"text": " " * 1_000_000}).encode(),
        b'{"text": null}',
        b'{"text": 12}',
        b'{"text": ["a"]}',
        b'{"body": "a"}',
        b'["text"]',
        b'{"text": "torn',
        b"not json at all",
        b"[" * 200_000,
        b'{"n": ' + b"1" * 10_000 + b', "text": "number"}',
        json.dumps({"text": "long" * 1_000_000}).encode(),
    ]
    # The start of the file looks like text, so that single wrong bytes are no reason to refuse it.
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([lines[0]] * 50 + lines))
    stats = ReadStats()
    assert texts(file, stats=stats)[50:] == [
        good,
        "pair 🙂, half \ufffd, other \ufffd é",
        "bytes \ufffd\ufffd",
        "fine",
        "nul \0 here",
        "raw\ttab",
        "long" * 1_000_000,
    ]
    assert stats.problems == {
        "half surrogate": 2,
        "not UTF-8": 2,
        "NUL character": 1,
        "empty": 3,
        "null": 1,
        "not text": 2,
        "no field": 1,
        "not JSON": 5,
    }
    assert {*stats.problems, "no separator", "cut"} == set(PROBLEMS)
    assert stats.records == 50 + len(lines)
    assert stats.places() == {
        "half surrogate": f"{file}, line 52",
        "not UTF-8": f"{file}, line 53",
        "NUL character": f"{file}, line 55",
        "empty": f"{file}, line 57",
        "null": f"{file}, line 60",
        "not text": f"{file}, line 61",
        "no field": f"{file}, line 63",
        "not JSON": f"{file}, line 64",
    }


def test_parquet_strings_that_are_not_utf_8_are_fixed(tmp_path: Path):
    rows = [b"good \xc3\xa9", b"bad \xff", None, b"", b"nul \0", b" \n"]
    for number, column in enumerate([pa.array(rows), pa.array(rows).view(pa.string())]):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": column}), file)
        stats = ReadStats()
        assert texts(file, stats=stats) == ["good é", "bad \ufffd", "nul \0"]
        assert stats.problems == {"not UTF-8": 1, "null": 1, "empty": 2, "NUL character": 1}
        assert (stats.records, stats.places()["not UTF-8"]) == (6, f"{file}, row 2")


def test_the_wrong_field_is_said_with_those_there_are(tmp_path: Path):
    lines = lines_file(tmp_path / "a.jsonl", [{"id": 1, "content": "x", "contents": [1]}])
    table = rows_file(tmp_path / "a.parquet", ["x"], field="content")
    assert (
        "it has no 'text' (it has id, content, contents); did you mean content ? Say so with --data.field"
        in refusal(lines)
    )
    assert "it has no 'contnet' (it has id, content); did you mean content ? Say so with --data.field" in refusal(
        table, field="contnet"
    )
    assert "'contents' is a list, not text (it has id, content, contents); did you mean content ?" in refusal(
        lines, field="contents"
    )
    assert "'id' is int64, not text (it has id, content); did you mean" in refusal(table, field="id")
    nested = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": [{"en": "x"}], "turns": [["x"]]}), nested)
    assert "'text' is struct<en: string>, not text (it has text, turns); none of them holds text" in refusal(nested)
    lists = "'turns' is list<element: string>, not text (it has text, turns); none of them holds text; join each list"
    assert f"{lists} into one text and write the file again" in refusal(nested, field="turns")
    assert "'text' is a list, not text (it has text); none of them" in refusal(
        lines_file(tmp_path / "b.jsonl", [{"text": ["x", "y"]}])
    )


def test_a_first_row_without_text_is_not_the_wrong_field(tmp_path: Path):
    file = lines_file(tmp_path / "a.jsonl", [{"text": None}, {"text": "x"}, {"text": 1}])
    stats = ReadStats()
    assert texts(file, stats=stats) == ["x"]
    assert stats.problems == {"null": 1, "not text": 1}


@pytest.mark.parametrize("data", ['{\n"text": "x"}', '{"text": "x"}{"text": "y"}', '{"text": "x"} {"text": "y"}\n'])
def test_objects_that_are_no_lines_are_refused(tmp_path: Path, data: str):
    (tmp_path / "a.jsonl").write_text(data)
    fix = f"write each object on a line of its own: jq -c . {tmp_path}/a.jsonl > OUT.jsonl"
    assert refusal(tmp_path / "a.jsonl").endswith(f"its first line is not one whole JSON object; {fix}")


@pytest.mark.parametrize("data", ['[{"text": "x"}]', '[\n{"text": "x"}\n]', "once upon a time"])
def test_what_is_no_json_lines_is_refused(tmp_path: Path, data: str):
    (tmp_path / "a.jsonl").write_text(data)
    assert "its first line is not a JSON object; give one such as" in refusal(tmp_path / "a.jsonl")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = lines_file(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y" * 1000}])
    monkeypatch.setattr(formats, "LINE_BYTES", 500)
    monkeypatch.setattr(formats, "BLOCK", 50)
    assert "begins at byte 14 is longer than 500 bytes; give one such as" in refusal(lines)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_compressed_files_are_one_line(tmp_path: Path, suffix: str, kind: str):
    text = " ".join(str(random.Random(1).random()) for _ in range(20)) + " é " + str(list(range(30_000)))
    good = COMPRESS[suffix](json.dumps({"text": text}).encode())
    file = tmp_path / f"a.{kind}{suffix}"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    for bad in (good[:-1], good[: len(good) // 2], b"\xffno magic here", bytes(flipped)):
        file.write_bytes(bad)
        assert "damaged or cut short" in refusal(file)
    file.write_bytes(good)
    assert len(texts(file)) == 1


def test_damaged_parquet_files_are_one_line(tmp_path: Path):
    rows = [f"{random.Random(n).random()} text" for n in range(5000)]
    file = rows_file(tmp_path / "a.parquet", rows, write_page_checksum=True, compression="snappy")
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x01
    for bad in (good[:-1], good[: len(good) // 2], b"PAR1", b"\xffno magic here", bytes(flipped)):
        file.write_bytes(bad)
        assert "damaged or cut short" in refusal(file)
    file.write_bytes(good)
    assert texts(file) == rows


def test_parquet_without_rows(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "has no rows" in refusal(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("x")
    assert texts(tmp_path) == ["x"]


def test_problems_are_found_before_the_first_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("fine")
    lines_file(tmp_path / "b.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match=r"did you mean body"):
        find_pieces([str(tmp_path)])


def test_a_file_that_goes_away_is_one_line(tmp_path: Path):
    for file in (rows_file(tmp_path / "a.parquet", ["x"]), lines_file(tmp_path / "a.jsonl", [{"text": "x"}])):
        (piece,) = find_pieces([str(file)])
        file.unlink()
        with pytest.raises(DataError, match=r"cannot be read \(.*\); is it still there"):
            list(read_piece(piece))


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("backports", "a.txt.zst")])
def test_a_missing_package_is_said_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
):
    (tmp_path / name).write_bytes(b"\xff")
    for module in [module for module in sys.modules if module.partition(".")[0] in (package, "compression")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    assert "pip install 'pretrain[data]'" in refusal(tmp_path / name)


def test_a_piece_is_a_range_or_the_whole():
    assert Piece("a.txt", 5) == Piece("a.txt", 5, 0, 0)
