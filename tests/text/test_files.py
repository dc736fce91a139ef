import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.text import Document, ReadStats, embedded_documents, read_documents
from pretrain.text.files import find_files


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(*paths: str | Path) -> str:
    """The one line with which reading these paths is refused."""
    with pytest.raises(DataError) as caught:
        list(read_documents([str(path) for path in paths]))
    line = str(caught.value)
    assert "\n" not in line
    assert str(paths[0]) in line
    return line


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "deep/er/c.TXT", "deep/d.txt"):
        write(tmp_path / name, f"text of {name}")
    for name in (".hidden.txt", ".git/e.txt", "picture.png", "data.bin", "settings.json"):
        write(tmp_path / name, "not to be found")
    return tmp_path


def names(paths: list[str], root: Path) -> list[str]:
    return [str(Path(file.name).relative_to(root)) for file in find_files(paths)]


def test_a_folder_gives_its_text_files_at_any_depth_sorted_without_hidden_ones(library: Path):
    assert names([str(library)], library) == ["a.md", "b.txt", "deep/d.txt", "deep/er/c.TXT"]


def test_globs_files_and_folders_come_in_the_order_given_each_file_once(library: Path):
    given = [f"{library}/deep/**/*.txt", f"{library}/b.txt", str(library), f"{library}/deep/../b.txt"]
    assert names(given, library) == ["deep/d.txt", "b.txt", "a.md", "deep/er/c.TXT"]


def test_a_glob_passes_over_what_is_not_text(library: Path):
    assert names([f"{library}/*"], library) == ["a.md", "b.txt"]


def test_plain_json_beside_texts_counts_only_where_it_is_asked_for(library: Path):
    assert "settings.json" not in names([str(library)], library)
    assert names([f"{library}/*.json"], library) == ["settings.json"]
    assert names([f"{library}/settings.json"], library) == ["settings.json"]
    write(library / "c4.json.gz", "compressed, it is surely data")
    assert "c4.json.gz" in names([str(library)], library)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path):
    file = write(tmp_path / "poem [1].txt", "x")
    assert [found.name for found in find_files([str(file)])] == [str(file)]


def test_tilde_is_the_home_folder(library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(library))
    assert names(["~/b.txt", "~/deep/*.txt"], library) == ["b.txt", "deep/d.txt"]


def test_a_text_is_kept_to_the_character(tmp_path: Path):
    text = "one\r\ntwo\rthree\n\n\x0c\u2028\ttrailing  é🙂\ufeff \n"
    file = write(tmp_path / "a.txt", text)
    marked = write(tmp_path / "b.md", b"\xef\xbb\xbf" + text.encode())  # with a byte-order mark
    assert list(read_documents([str(file), str(marked)])) == [Document(text, str(file)), Document(text, str(marked))]


def test_no_paths_mean_the_embedded_corpus():
    assert next(read_documents([])) == next(embedded_documents())


def test_a_missing_file_is_named_with_the_nearest_one(library: Path):
    assert f"did you mean {library}/deep/d.txt ?" in refusal(library / "deep" / "d.text")
    assert f"did you mean {library}/deep ?" in refusal(library / "deeep" / "d.txt")
    assert "did you mean" not in refusal(library / "zzzzzzzz")
    refusal(library / "b.txt" / "inside-a-file.txt")


def test_folders_and_patterns_without_text_are_refused(library: Path):
    write(library / "pictures" / "cat.png", "x")
    assert "no text files there (only .png)" in refusal(library / "pictures")
    (library / "empty").mkdir()
    assert "no text files there;" in refusal(library / "empty")
    assert "no text files there" in refusal(library / "no*such.txt")


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "README", "a.parquet.gz", "a.gz", "a.txt.bz2"])
def test_types_that_are_not_read_say_what_is(tmp_path: Path, name: str):
    line = refusal(write(tmp_path / name, "x"))
    assert "not read; give .txt, .md, .jsonl, .ndjson, .json (each also .gz, .zst, .xz) or .parquet" in line


def test_an_empty_path_is_not_the_current_folder(library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(library)
    assert "empty path" in refusal("")


def test_empty_and_blank_files_are_refused(tmp_path: Path):
    assert "is empty" in refusal(write(tmp_path / "empty.txt", ""))
    assert "only white space" in refusal(write(tmp_path / "blank.txt", " \n\t\u3000\n"))
    assert "only white space" in refusal(write(tmp_path / "mark.txt", b"\xef\xbb\xbf"))


def test_in_a_folder_empty_and_blank_files_are_left_out_and_counted(library: Path):
    whole = list(read_documents([str(library)]))
    write(library / "empty.txt", "")
    write(library / "empty.md.gz", "")
    write(library / "blank.txt", " \n")
    stats = ReadStats()
    assert list(read_documents([str(library)], stats=stats)) == whole
    assert stats.problems == {"empty": 3}


def test_a_binary_file_is_refused_where_its_first_nul_is(tmp_path: Path):
    assert "binary (a NUL at byte 5)" in refusal(write(tmp_path / "a.txt", b"\x7fELF\x01\x00\x00"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_told_from_binary(tmp_path: Path, encoding: str):
    file = write(tmp_path / "a b.txt", "\ufeffhello".encode(encoding))
    assert f"iconv -f utf-16 -t utf-8 '{file}' > OUT" in refusal(file)


@pytest.mark.parametrize(("before", "offset"), [(b"caf", 3), (b"\xef\xbb\xbfcaf", 6), (b"x" * 900, 900)])
def test_text_of_another_encoding_is_refused_at_its_first_wrong_byte(tmp_path: Path, before: bytes, offset: int):
    file = write(tmp_path / "latin.txt", before + "é and more".encode("latin1"))
    line = refusal(file)
    assert f"byte 0xe9 at offset {offset})" in line
    assert f"macintosh, windows-1250); convert it: iconv -f ENCODING -t utf-8 {file} > OUT" in line


@pytest.mark.parametrize("size", [4_000, 64 * 1024 - 1, 64 * 1024, 3_000_000])
def test_single_wrong_bytes_become_u_fffd_and_are_counted(tmp_path: Path, size: int):
    stats = ReadStats()
    file = write(tmp_path / "a.txt", b"x" * size + b"\xe9 \xf0\x9f\x99\x82 \xf0\x9f")
    (document,) = read_documents([str(file)], stats=stats)
    assert document.text == "x" * size + "\ufffd 🙂 \ufffd"
    assert stats.problems == {"not UTF-8": 3}  # bytes, not documents
    assert stats.places() == {"not UTF-8": f"{file}, line 1"}


def test_single_nuls_are_kept_and_counted(tmp_path: Path):
    stats = ReadStats()
    file = write(tmp_path / "a.txt", "x" * 1000 + "\0")
    assert [document.text for document in read_documents([str(file)], stats=stats)] == ["x" * 1000 + "\0"]
    assert stats.problems == {"NUL character": 1}


def test_a_file_that_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")  # to open it would wait for ever
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")


@contextmanager
def as_ordinary_user() -> Iterator[Path]:
    """A folder of its own, and no right of root's to read everything."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_files_and_folders_without_permission_are_refused():
    with as_ordinary_user() as folder:
        file = write(folder / "secret.txt", "x")
        inside = write(folder / "closed" / "a.txt", "x")
        file.chmod(0)
        inside.parent.chmod(0)
        assert f"{file}: cannot be read (Permission denied); is it still there, and may you read it?" in refusal(file)
        assert "cannot be read (Permission denied)" in refusal(inside)
        assert "cannot be read (Permission denied)" in refusal(inside.parent)
        inside.parent.chmod(0o700)


def test_text_needs_nothing_heavy():
    heavy = "{'torch', 'tokenizers', 'numpy', 'pyarrow', 'fsspec', 'aiohttp', 'huggingface_hub'}"
    code = f"import sys, pretrain.text; print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


# Links, and what pretrain made ------------------------------------------------------------------------------------


def test_linked_folders_are_read_once_whatever_their_loops(tmp_path: Path):
    """The issue: a folder with a link to another folder read 1 of 3 files."""
    text, other = tmp_path / "text", tmp_path / "other"
    for file in (text / "a.txt", other / "b.txt", other / "deep" / "c.txt", text / "real" / "d.txt"):
        write(file, file.name)
    (text / "more").symlink_to(other)
    (text / "again").symlink_to(other)
    (text / "real2").symlink_to(text / "real")  # in the tree already: the real name counts
    (text / "above").symlink_to(text)
    (other / "back").symlink_to(text)
    (other / "deep" / "loop").symlink_to(other)
    (text / "real" / "b-too.txt").symlink_to(other / "b.txt")
    expected = ["a.txt", "again/b.txt", "again/deep/c.txt", "real/d.txt"]
    assert names([str(text)], text) == expected
    assert names([f"{text}/**/*.txt"], text) == expected
    assert names([f"{text}/**"], text) == expected
    assert names([f"{text}/**/deep/*.txt"], text) == ["again/deep/c.txt"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "only").symlink_to(other)
    behind = ["b.txt", "back/a.txt", "back/real/d.txt", "deep/c.txt"]
    assert names([str(tmp_path / "links")], tmp_path) == [f"links/only/{name}" for name in behind]


def test_a_broken_link_is_called_one(tmp_path: Path):
    write(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    for paths in (tmp_path / "b.txt", tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(DataError) as caught:
            find_files([str(paths)])
        assert f"b.txt is a link to {tmp_path}/gone.txt, which is not there; restore that" in str(caught.value)
        assert "did you mean" not in str(caught.value)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "part2").symlink_to(tmp_path / "unmounted")
    said: list[str] = []
    assert [Path(file.name).name for file in find_files([str(tmp_path)], said.append)] == ["a.txt"]
    assert said == [f"left out  {tmp_path}/part2: links to what is not there"]
    assert "part2 is a link to" in refusal(tmp_path / "part2" / "a.txt")


def test_a_pattern_with_brackets_says_how_to_write_them(tmp_path: Path):
    write(tmp_path / "poems [1]" / "a.txt", "x")
    line = refusal(f"{tmp_path}/poems [1]/*.txt")
    assert f"give '{tmp_path}/poems [[]1]/*.txt'" in line
    assert len(find_files([f"{tmp_path}/poems [[]1]/*.txt"])) == 1


def test_what_pretrain_made_is_not_text(tmp_path: Path):
    """The issue: ``--data .`` took runs/ in."""
    write(tmp_path / "a.txt", "x")
    for folder, files in {
        "runs/first": ("config.toml", "tokenizer.json", "environment.json", "samples.jsonl", "hang.txt"),
        "tokens": ("manifest.json", "tokenizer.json", "notes.txt"),
        "begun": ("plan.json", "unfinished/lock", "x.txt"),
        "exported": ("config.json", "tokenizer.json", "model.safetensors", "README.md"),
        "kept": ("config.toml", "b.txt"),
    }.items():
        for name in files:
            write(tmp_path / folder / name, "{}")
    said: list[str] = []
    files = find_files([str(tmp_path)], said.append)
    assert [file.name for file in files] == [f"{tmp_path}/a.txt", f"{tmp_path}/kept/b.txt"]
    listed = f"{tmp_path}/begun, {tmp_path}/exported, {tmp_path}/runs/first, ..."
    assert said == [f"left out  {listed}: made by pretrain itself (runs, token shards, models)"]
    assert names([str(tmp_path / "exported")], tmp_path) == ["exported/README.md"]  # asked for by its name
