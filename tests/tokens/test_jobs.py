"""Preparing in many jobs: the same bytes from any number of processes, and whatever kills them."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from pretrain.config import DataConfig, TokenizerConfig
from pretrain.errors import DataError, Interrupted, UsageError
from pretrain.text import Document, Piece, ReadStats, find_pieces, formats, read_documents
from pretrain.text.split import SIDES, TEST, TRAIN, VAL, Shares, Tail, side_by_hash
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens import Manifest, jobs, prepared_dataset, source
from pretrain.tokens.jobs import Job, plan_jobs, read_commits, tokenize_job
from pretrain.tokens.prepare import prepare_text
from pretrain.tokens.progress import Progress
from pretrain.tokens.verify import verify

prepare_module = importlib.import_module("pretrain.tokens.prepare")  # the name is that of a function, too

BYTE, BPE = TokenizerConfig("byte"), TokenizerConfig("bpe", 300)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 texts of different length and a JSONL file of 300."""
    folder = tmp_path_factory.mktemp("library")
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.randrange(1, 8))) for _ in range(300)] + ["né", "王"]

    def text(words_at_most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randrange(1, words_at_most)))

    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(text(400), encoding="utf-8")
    lines = [json.dumps({"body": text(80)}) + "\n" for _ in range(300)]
    (folder / "more.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def data_of(library: Path, **changes) -> DataConfig:
    return DataConfig(**{"paths": (str(library),), "field": "body", "val_fraction": 0.2, **changes})


@pytest.fixture(scope="module")
def shards(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as about 30 shards, made by one worker."""
    folder = tmp_path_factory.mktemp("shards") / "deep" / "down"
    prepare_text(data_of(library), BPE, folder, shard_tokens=2000, workers=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the plan, which tells where the text was."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "plan.json"}


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, out of its tokens."""
    tokenizer, stream = Tokenizer.load(folder / "tokenizer.json"), prepared_dataset(folder).stream(split)
    if not len(stream):
        return []
    tokens = stream.windows(np.array([0]), len(stream))[0]
    begins = np.flatnonzero(tokens == tokenizer.bos_id)
    assert begins[0] == 0
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, begins[1:])]


def texts_of(library: Path) -> list[str]:
    return [document.text for document in read_documents([str(library)], "body")]


# The same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_writes_the_same_bytes(workers: int, library: Path, shards: Path, tmp_path: Path):
    made = prepare_text(data_of(library), BPE, tmp_path / "out", shard_tokens=2000, workers=workers)
    assert contents(tmp_path / "out") == contents(shards)
    assert len(made.manifest.shards) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert verify(tmp_path / "out") == []


def test_one_process_writes_the_same_tokens_as_many(library: Path, shards: Path, tmp_path: Path):
    here = prepare_text(data_of(library), BPE, tmp_path / "out").manifest  # so little is one job, done in this process
    many = Manifest.load(shards)
    assert len(here.shards) == 2
    assert here.tokenizer == many.tokenizer
    for split in ("train", "val"):
        assert documents_of(tmp_path / "out", split) == documents_of(shards, split)
        assert here.documents(split) == many.documents(split)


# Splits -----------------------------------------------------------------------------------------------------------


def test_the_tail_of_many_jobs_is_that_of_the_whole_text(library: Path, shards: Path):
    texts = texts_of(library)
    train = documents_of(shards, "train")
    assert train + documents_of(shards, "val") == texts
    cut = int(0.8 * sum(map(len, texts)))
    assert sum(map(len, train)) >= cut > sum(map(len, train[:-1]))


def test_documents_held_out_by_hash(library: Path, tmp_path: Path):
    texts = texts_of(library)
    made = prepare_text(data_of(library, split="hash"), BYTE, tmp_path / "out", shard_tokens=5000, workers=2)
    for split in (TRAIN, VAL):
        expected = [text for text in texts if side_by_hash(text, Shares(0.2)) == split]
        assert documents_of(tmp_path / "out", split) == expected
        assert made.manifest.documents(split) == len(expected)


@pytest.mark.parametrize("split", ["tail", "hash", "last_file"])
def test_a_test_of_many_jobs_is_that_of_one(library: Path, tmp_path: Path, split: str):
    texts = texts_of(library)
    data = data_of(library, split=split, test_fraction=0.1)
    many = prepare_text(data, BYTE, tmp_path / "many", shard_tokens=5000, workers=2)
    one = prepare_text(data, BYTE, tmp_path / "one").manifest
    found = {side: documents_of(many.folder, side) for side in SIDES}
    assert found == {side: documents_of(tmp_path / "one", side) for side in SIDES}
    if split == "hash":
        assert found == {side: [t for t in texts if side_by_hash(t, Shares(0.2, 0.1)) == side] for side in SIDES}
    else:
        assert [*found[TRAIN], *found[VAL], *found[TEST]] == texts
    if split == "last_file":
        assert (found[VAL], found[TEST]) == (texts[59:60], texts[60:])
    else:
        assert 0.05 < sum(map(len, found[TEST])) / sum(map(len, texts)) < 0.15
    assert all(one.documents(side) == len(found[side]) for side in SIDES)
    assert verify(many.folder) == []
    with pytest.raises(UsageError, match="another test_fraction"):
        prepare_text(data_of(library, split=split), BYTE, tmp_path / "one")


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_files_to_validate_on_and_a_test_of_the_rest(library: Path, tmp_path: Path, kind: str):
    texts = texts_of(library)
    data = data_of(library, val_paths=(str(library / "07.txt"),), test_fraction=0.1)
    prepare_text(data, TokenizerConfig(kind), tmp_path / "out")
    assert documents_of(tmp_path / "out", VAL) == texts[7:8]
    rest = texts[:7] + texts[8:]
    train, test = (documents_of(tmp_path / "out", side) for side in (TRAIN, TEST))
    assert "".join(train + test) == "".join(rest)
    assert sum(map(len, train)) >= int(0.9 * sum(map(len, rest))) > sum(map(len, train[:-1]))


def test_a_folder_made_before_there_were_tests_is_complete(library: Path, tmp_path: Path):
    made = prepare_text(data_of(library), BYTE, tmp_path / "out").manifest
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan.pop("test_fraction") == 0
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    assert prepare_text(data_of(library), BYTE, tmp_path / "out").manifest == made
    with pytest.raises(UsageError, match="another test_fraction"):
        prepare_text(data_of(library, test_fraction=0.1), BYTE, tmp_path / "out")


def test_the_last_file_held_out(library: Path, tmp_path: Path):
    texts = texts_of(library)
    prepare_text(data_of(library, split="last_file"), BYTE, tmp_path / "out", shard_tokens=5000, workers=2)
    assert documents_of(tmp_path / "out", "train") == texts[:60]
    assert documents_of(tmp_path / "out", "val") == texts[60:]
    one = data_of(library / "more.jsonl", split="last_file")
    with pytest.raises(DataError, match="last_file needs two files or more"):
        prepare_text(one, BYTE, tmp_path / "one")


def test_files_held_out_by_name(library: Path, tmp_path: Path):
    data = data_of(library / "more.jsonl", val_paths=(str(library / "07.txt"), str(library / "03.txt")))
    prepare_text(data, TokenizerConfig("char"), tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == texts_of(library)[60:]
    assert documents_of(tmp_path / "out", "val") == [(library / f"{n}.txt").read_text() for n in ("07", "03")]


def test_a_file_held_out_of_its_folder_is_not_trained_on(library: Path, tmp_path: Path):
    texts = texts_of(library)
    prepare_text(data_of(library, val_paths=(str(library / "07.txt"),)), BYTE, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == texts[:7] + texts[8:]
    assert documents_of(tmp_path / "out", "val") == [texts[7]]


def test_nothing_held_out(library: Path, tmp_path: Path):
    made = prepare_text(data_of(library, val_fraction=0), BYTE, tmp_path / "out", shard_tokens=50_000, workers=2)
    assert (made.manifest.tokens("val"), made.manifest.documents("train")) == (0, 360)


def parts_of(texts: list[list[str]]) -> list[Document]:
    """Documents in parts."""
    return [Document(part, "x", number > 0) for parts in texts for number, part in enumerate(parts)]


def test_a_document_over_several_jobs_is_on_one_side(monkeypatch: pytest.MonkeyPatch):
    """Only a plain text is longer than a piece: its pieces are parts of one document."""
    pieces = [Piece("big", 10, begin=i, end=i + 1) for i in range(4)] + [Piece("small", 10)]
    held_out = next(f"text {i}" for i in range(100) if side_by_hash(f"text {i}", Shares(0.5)) == VAL)
    trained = next(f"text {i}" for i in range(100) if side_by_hash(f"text {i}", Shares(0.5)) == TRAIN)
    for first, last in ((held_out, trained), (trained, held_out)):
        texts = {("big", 0): first, ("big", 1): " and", ("big", 2): " so", ("big", 3): " on", ("small", 0): last}

        def read(piece: Piece, field: str, stats: ReadStats, texts=texts) -> Iterator[Document]:
            yield Document(texts[piece.file, piece.begin], piece.file, continues=piece.begin > 0)

        monkeypatch.setattr(source, "read_piece", read)
        planned = plan_jobs(pieces, "hash", shard_tokens=5, shares=Shares(0.5))
        assert [len(job.pieces) for job in planned] == [2, 2, 1]
        parts = [part for job in planned for part in job.parts(ReadStats())]
        side = side_by_hash(first, Shares(0.5))
        assert "".join(part.text for part in parts if part.split == side) == first + " and so on"
        assert [part.begins for part in parts] == [True, False, False, False, True]


def test_a_text_in_parts_is_one_document_cut_at_one_character(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(formats, "PART_CHARACTERS", 10_000)
    monkeypatch.setattr(formats, "CUT_WINDOW", 1_000)
    text = "".join(f"{number} and " for number in range(40_000))
    file = tmp_path / "a.txt"
    file.write_text(text)
    data = DataConfig(paths=(str(file),), val_fraction=0.1)
    made = prepare_text(data, BYTE, tmp_path / "out", shard_tokens=150_000).manifest
    cut = int(0.9 * len(text))
    assert documents_of(tmp_path / "out", "train") == [text[:cut]]
    assert documents_of(tmp_path / "out", "val") == [text[cut:]]
    train = [shard for shard in made.shards if shard.split == "train"]
    assert [shard.documents for shard in train] == [1] + [0] * (len(train) - 1)
    assert len(train) == 3


# Jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_hold_every_piece_once_in_order():
    draw = random.Random(1)
    for _ in range(100):
        pieces = [Piece(str(draw.randrange(3)), draw.randrange(100), n, n + 1) for n in range(draw.randrange(1, 40))]
        planned = plan_jobs(pieces, TRAIN, shard_tokens=draw.randrange(1, 50), first=3)
        assert [piece for job in planned for piece in job.pieces] == pieces
        assert [job.number for job in planned] == list(range(3, 3 + len(planned)))
        assert all(job.pieces for job in planned)


def test_a_job_goes_on_from_its_last_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"document number {number}" for number in range(100)]
    tokenizer = build_tokenizer("byte", 0, [])
    piece = Piece("x", 2000)
    job = Job(0, (piece,), "tail", tail=Tail(10**9, 0, 10**9))
    given: list[int] = []

    def reader(stop: int):
        def read(piece: Piece, field: str, stats: ReadStats) -> Iterator[Document]:
            for number, text in enumerate(texts):
                if number == stop:
                    raise KeyboardInterrupt
                given.append(number)
                stats.note("seen", piece.file, 0)
                yield Document(text, "x")

        return read

    class OneByOne(Tokenizer):
        """Takes no text ahead, and counts."""

        taken = 0

        def encode_documents(self, documents, threads=0, expected=0):
            for document in documents:
                self.taken += 1
                yield from tokenizer.encode_documents([document])

    whole, folders = [], []
    for stops in ((100,), (40, 77, 100)):
        folder = tmp_path / str(len(stops))
        (folder / jobs.WORK).mkdir(parents=True)
        counting = OneByOne(tokenizer.hf.to_str())
        monkeypatch.setattr(jobs, "load_tokenizer", lambda *_, counting=counting: counting)
        for stop in stops:
            monkeypatch.setattr(jobs, "read_piece", reader(stop))
            try:
                whole.append(tokenize_job(folder, job, 300, tmp_path, True, 1, lambda *_: None))
            except KeyboardInterrupt:
                commits = read_commits(folder, 0)
                assert not any(folder.glob("*.tmp"))
                assert {file.name for file in folder.glob("*.bin")} == {s.file for c in commits for s in c.shards}
                assert 0 < commits[-1].parts <= stop
        folders.append({file.name: file.read_bytes() for file in folder.glob("*.bin")})
        assert counting.taken <= 100 + 14 * (len(stops) - 1)  # at most a shard is done again
    assert whole[0] == whole[1]
    assert folders[0] == folders[1]
    assert whole[0][-1].read.problems == {"seen": 100}


def test_parquet_files_are_done_side_by_side(library: Path, tmp_path: Path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts, source = texts_of(library), tmp_path / "in"
    source.mkdir()
    for number in range(4):
        table = pa.table({"body": texts[number * 90 : (number + 1) * 90]})
        pq.write_table(table, source / f"{number}.parquet", row_group_size=30)
    made = prepare_text(data_of(source, split="hash"), BYTE, tmp_path / "out", shard_tokens=5000, workers=2)
    assert documents_of(tmp_path / "out", "val") == [text for text in texts if side_by_hash(text, Shares(0.2)) == VAL]
    assert made.manifest.documents("train") + made.manifest.documents("val") == len(texts)
    assert {shard.file[-13:-8] for shard in made.manifest.shards} == {"00000", "00001", "00002", "00003"}


# Killed ------------------------------------------------------------------------------------------------------------


def command(library: Path, out: Path, *more: str) -> list[str]:
    options = "--tokenizer bpe --vocab-size 300 --field body --val-fraction 0.2 --shard-tokens 2000 --workers 2"
    start = [sys.executable, "-m", "pretrain", "data", "prepare", str(library), "--out", str(out)]
    return [*start, *options.split(), *more]


def start(library: Path, out: Path) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(library, out), start_new_session=True, text=True, stdout=pipe, stderr=pipe)


def committed(out: Path) -> dict[str, tuple[int, int]]:
    """Shards of commit records, with what changes if they are written again."""
    files = [
        shard["file"]
        for record in (out / jobs.WORK).glob("[0-9]*.json")
        for shard in json.loads(record.read_text())["shards"]
    ]
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in files}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(library: Path, shards: Path, tmp_path: Path):
    """20 times the whole process group is killed by SIGKILL, most of them while shards are being written."""
    draw = random.Random(5)
    kills, with_shards, out, kept = 0, 0, tmp_path / "out", {}
    while kills < 20:
        process = start(library, out)
        if kills % 4 == 0:  # while it starts, counts or learns
            time.sleep(draw.uniform(0.05, 0.6))
        else:  # soon after the next shard
            before = len(list(out.glob("*.bin")))
            while process.poll() is None and len(list(out.glob("*.bin"))) <= before:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        if (out / "manifest.json").exists():  # it was done before it was killed: begin again
            assert subprocess.run(command(library, out), capture_output=True).returncode == 0  # its records are removed
            assert contents(out) == contents(shards)
            out, kept = tmp_path / f"out{kills}", {}
            continue
        now = committed(out) if (out / jobs.WORK).is_dir() else {}
        assert {name: now.get(name) for name in kept} == kept  # nothing committed was done again
        kept = now
        with_shards += bool(now)
    result = subprocess.run(command(library, out), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept
    assert contents(out) == contents(shards)
    assert with_shards >= 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_says_how_to_go_on(number: signal.Signals, library: Path, shards: Path, tmp_path: Path):
    out = tmp_path / "an out"
    process = start(library, out)
    while not any(out.glob("*.bin")):
        time.sleep(0.002)
        assert process.poll() is None, process.communicate()
    os.kill(process.pid, number)
    printed, error = process.communicate()
    assert (process.returncode, error.count("\n")) == (130, 1), (printed, error)
    assert f"Resume with: pretrain data prepare {library} --out '{out}' --tokenizer bpe" in error
    assert not (out / "manifest.json").exists()
    assert not any(out.glob("*.tmp"))
    assert subprocess.run(command(library, out), capture_output=True).returncode == 0
    assert contents(out) == contents(shards)


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find the workers")
def test_workers_end_with_a_parent_that_is_killed(library: Path, tmp_path: Path):
    process = start(library, tmp_path / "out")
    while not any((tmp_path / "out").glob("*.bin")):
        time.sleep(0.002)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.communicate()
    assert workers
    for worker in workers:
        while Path(f"/proc/{worker}/stat").is_file() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_is_committed_stays(library: Path, shards: Path, small_disk: Path):
    out = small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 680_000)
    result = subprocess.run(command(library, out), capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "no space left on device; free some space and give the same command again" in result.stderr
    before = committed(out)
    assert before
    assert not any(out.glob("*.tmp"))
    filler.unlink()
    assert subprocess.run(command(library, out), capture_output=True, text=True).returncode == 0
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before} == before
    assert contents(out) == contents(shards)


# What is in the folder already ---------------------------------------------------------------------------------------


class StopOnceCommitted(Progress):
    """Stops the work, as a signal would."""

    def __init__(self, out: Path):
        super().__init__()
        self.out = out

    def add(self, size: int, tokens: int = 0) -> None:
        if any((self.out / jobs.WORK).glob("0*.json")):
            raise KeyboardInterrupt


def begun(library: Path, out: Path, **changes) -> Path:
    """A folder in which something is committed."""
    with pytest.raises(Interrupted, match="give the same command again"):
        prepare_text(
            data_of(library, **changes), BYTE, out, shard_tokens=2000, workers=2, progress=StopOnceCommitted(out)
        )
    assert any((out / jobs.WORK).glob("0*.json"))
    return out


def test_another_plan_is_refused_once_something_is_committed(library: Path, tmp_path: Path):
    out = begun(library, tmp_path / "out")
    before = contents_of_files(out)
    for data, tokenizer, message in (
        (data_of(library, val_fraction=0.1), BYTE, r"\(another val_fraction\); choose another folder, or delete"),
        (data_of(library / "more.jsonl"), BYTE, "another text, another pieces"),
        (data_of(library), TokenizerConfig("bpe", 300), "another tokenizer"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare_text(data, tokenizer, out, shard_tokens=2000, workers=2)
        assert contents_of_files(out) == before
    finished = prepare_text(data_of(library), BYTE, out, shard_tokens=2000, workers=2)
    assert verify(out) == []
    before = contents_of_files(out)
    with pytest.raises(UsageError, match="another split"):
        prepare_text(data_of(library, split="hash"), BYTE, out, shard_tokens=2000)
    said: list[str] = []
    again = prepare_text(data_of(library), BYTE, out, shard_tokens=2000, progress=Progress(said.append))
    assert again.manifest == finished.manifest
    assert said == [f"{out} is complete; nothing left to prepare"]
    assert contents_of_files(out) == before


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_text_that_changed_meanwhile_is_refused(library: Path, tmp_path: Path):
    file = tmp_path / "text.jsonl"
    file.write_bytes((library / "more.jsonl").read_bytes())
    out = begun(file, tmp_path / "out")
    with open(file, "a") as more:
        more.write('{"body": "one more"}\n')
    with pytest.raises(UsageError, match="another text"):
        prepare_text(data_of(file), BYTE, out, shard_tokens=2000)


@pytest.mark.slow
def test_with_nothing_committed_another_plan_begins_anew(library: Path, tmp_path: Path):
    out = tmp_path / "out"

    class StopCounting(Progress):
        def add(self, size: int, tokens: int = 0) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prepare_text(data_of(library), BYTE, out, shard_tokens=2000, workers=2, progress=StopCounting())
    assert (out / "plan.json").is_file()
    made = prepare_text(data_of(library, split="hash"), BYTE, out, shard_tokens=2000, workers=2)
    assert json.loads((out / "plan.json").read_text())["split"] == "hash"
    assert verify(out) == []
    assert made.manifest.documents("val")


def test_folders_of_others_are_left_alone(library: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="has files, but none of unfinished token shards"):
        prepare_text(data_of(library), BYTE, tmp_path)
    with pytest.raises(UsageError, match="cannot write to"):
        prepare_text(data_of(library), BYTE, tmp_path / "thesis.tex" / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once_are_refused(library: Path, tmp_path: Path):
    out = begun(library, tmp_path / "out")
    before = contents_of_files(out)
    with (
        FileLock(out / jobs.WORK / "lock"),
        pytest.raises(UsageError, match="another process is preparing"),
    ):
        prepare_text(data_of(library), BYTE, out, shard_tokens=2000)
    assert contents_of_files(out) == before


# Whatever the text holds -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strange_documents_are_kept_or_counted(tmp_path: Path):
    kept = [
        " " * 1_000_000 + "x",
        "a" * 20_000_000,
        "b" * 70_000 + "\0",
        "c" * 70_000 + "� here",
        "\ufeff kept",
        "\r\n",
        "fin",
    ]
    source = tmp_path / "in"
    source.mkdir()
    for number, text in enumerate(kept[:3]):
        (source / f"{number}.txt").write_bytes(text.encode())
    (source / "3.txt").write_bytes(b"c" * 70_000 + b"\xff here")
    (source / "4.txt").write_bytes(b" \n ")
    lines = [json.dumps({"text": text}) for text in ["\ufeff kept", "", "fin"]]
    lines += ['{"text": null}', "{broken", '{"other": 1}', '{"text": 7}', '{"text": "half \\ud83d of a pair"}']
    (source / "5.jsonl").write_text("\n".join(lines))
    data = DataConfig(paths=(str(source),), val_fraction=0)
    made = prepare_text(data, BYTE, tmp_path / "out", shard_tokens=4_000_000, workers=2)
    expected = [*kept[:4], "\ufeff kept", "fin", "half � of a pair"]
    assert documents_of(tmp_path / "out", "train") == expected
    assert made.manifest.problems == {
        "NUL character": 1,
        "empty": 2,
        "not UTF-8": 1,
        "half surrogate": 1,
        "no field": 1,
        "not JSON": 1,
        "not text": 1,
        "null": 1,
    }
    documents = made.manifest.documents("train")
    left_out = sum(made.manifest.problems[name] for name in ("empty", "no field", "not JSON", "not text", "null"))
    assert documents + left_out == 5 + len(lines)


def test_a_bad_file_in_a_fresh_folder_leaves_nothing(library: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("not JSON at all\n" * 10)
    data = data_of(library, paths=(str(library), str(tmp_path / "bad.jsonl")))
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        prepare_text(data, BYTE, tmp_path / "a" / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("split", ["tail", "last_file"])
def test_a_folder_without_any_text_is_one_line(split: str, tmp_path: Path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in" / "a.parquet")
    with pytest.raises(DataError, match="there is no text to train on"):
        prepare_text(DataConfig(paths=(str(tmp_path / "in"),), split=split), BYTE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path):
    """A process that tokenizes 60 MB in one job grows by far less than that."""
    file = tmp_path / "big.jsonl"
    line = json.dumps({"text": "some words that are often there, and others. " * 40}) + "\n"
    with open(file, "w") as out:
        for _ in range(60_000_000 // len(line)):
            out.write(line)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pretrain.tokens.jobs import *\n"
        "from pretrain.text import find_pieces\n"
        "from pretrain.tokenizer import build_tokenizer\n"
        "build_tokenizer('byte', 0, []).save(sys.argv[2] + '.json')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "Path(sys.argv[2], WORK).mkdir(parents=True)\n"
        "job = Job(0, tuple(find_pieces([sys.argv[1]])), 'train')\n"
        "tokenize_job(Path(sys.argv[2]), job, 10**9, Path(sys.argv[2] + '.json'), True, 1, lambda *_: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'torch' in sys.modules)\n"
    )
    arguments = [sys.executable, "-c", code, str(file), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    kilobytes, torch = result.stdout.split()
    assert int(kilobytes) < 25_000
    assert torch == "False"


def test_the_tokenizer_learns_from_all_of_a_long_text_evenly(library: Path, tmp_path: Path, monkeypatch):
    seen: list[str] = []

    def build(kind, vocab_size, texts, pattern, fewer):
        seen.extend(texts)
        return build_tokenizer("byte", 0, [])

    monkeypatch.setattr(prepare_module, "build_tokenizer", build)
    monkeypatch.setattr(prepare_module, "LEARN_BYTES", 30_000)
    pieces = find_pieces([str(library)], "body")
    planned = plan_jobs(pieces, TRAIN, shard_tokens=2000, field="body")
    prepare_module.learn_bpe(tmp_path, planned, 300, "gpt2", False, lambda *_: None)
    texts = texts_of(library)
    assert len(set(seen)) == len(seen)
    places = [texts.index(text) for text in seen]
    assert places == sorted(places)
    assert places[0] == 0
    assert len([place for place in places if place < 60]) > 10
    assert (
        30_000 <= sum(len(text.encode()) for text in seen) < 30_000 + sum(max(len(t) for t in texts) for _ in planned)
    )
    assert len(seen) < len(texts) * 0.8
