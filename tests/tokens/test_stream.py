"""Live streams: what is read, in which order, and that they go on exactly, in any number of processes."""

import gzip
import itertools
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pretrain.cli import main
from pretrain.config import DataConfig, load_config
from pretrain.errors import DataError, UsageError
from pretrain.text import ReadStats
from pretrain.text.pieces import Piece
from pretrain.text.split import SIDES, TEST, TRAIN, VAL, Part, Shares, side_by_hash
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens import TokenStream, prepare, prepared_dataset, validation_batches
from pretrain.tokens import stream as stream_module
from pretrain.tokens.stream import (
    Assignment,
    LiveBatches,
    LiveText,
    find_text,
    merge_states,
    prepare_stream,
    reader_count,
)

BYTES = build_tokenizer("byte", 0, [])
BOS = BYTES.bos_id


class MadeText(LiveText):
    """Text that is in no file: the parts of each piece."""

    def __init__(self, pieces: list[list[Part]]):
        train = [Piece(f"{n}.txt", sum(len(part.text) for part in parts)) for n, parts in enumerate(pieces)]
        super().__init__(tuple(train), (), "text")
        self.__dict__["made"] = dict(zip(self.train, pieces, strict=True))
        self.__dict__["fingerprint"] = "made"

    def parts(self, piece: Piece, side: str = TRAIN, stats: ReadStats | None = None) -> Iterator[Part]:
        yield from self.__dict__["made"][piece]


def made_text(seed: int = 0, pieces: int = 9) -> MadeText:
    """Numbered documents of all lengths, some empty, some held out, some in parts; one piece is empty."""
    draw = random.Random(seed)
    made: list[list[Part]] = []
    for piece in range(pieces):
        parts: list[Part] = []
        for document in range(0 if piece == 4 else draw.randrange(1, 9)):
            body = "x" * draw.choice([0, 1, 5, 20, 60, 200])
            split = VAL if draw.random() < 0.2 else TRAIN
            parts.append(Part(f"{piece}.{document}:{body}" if draw.random() < 0.9 else "", split, True))
            parts += [Part(f"+{n}", split, False) for n in range(draw.choice([0, 0, 0, 3]))]
        made.append(parts)
    return MadeText(made)


def stream(
    text: LiveText, packing: str = "concatenate", readers: int = 4, order: str = "shuffled", **how
) -> LiveBatches:
    data = DataConfig(stream=True, packing=packing, readers=readers, order=order)
    return LiveBatches(text, BYTES, data, **{"rows": 8, "length": 16, "seed": 7, **how})


def take(batches: LiveBatches, first: int, count: int) -> list[torch.Tensor]:
    """Rows (rows of the rank, T + 1) of each step."""
    taken = []
    for step in range(first, first + count):
        inputs, targets = batches.batch(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert inputs.dtype == torch.int64
        taken.append(torch.cat([inputs, targets[:, -1:]], dim=1))
    return taken


@pytest.fixture(autouse=True)
def small_packings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_module, "PACKED_TOKENS", 400)
    monkeypatch.setattr(stream_module, "PACKED_ROWS", 3)


PACKINGS = pytest.mark.parametrize("packing", ["concatenate", "best_fit"])


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_document_comes_once_an_epoch(readers: int, order: str):
    text = made_text()
    batches = stream(text, readers=readers, order=order)
    assert batches.readers == readers
    expected = Counter[str]()
    for piece in text.train:
        for part in text.parts(piece):
            if part.split == TRAIN and part.text:
                expected[part.text] += 1
    taken = take(batches, 0, 300)
    assignment = Assignment([piece.size for piece in text.train], readers, order == "shuffled", seed=7)
    for reader in range(readers):
        # What the reader gave: its rows joined, each without the token that it shares with the one before.
        rows = [row for step in taken for row in step[reader::readers]]
        joined = torch.cat([rows[0], *(row[1:] for row in rows[1:])]).numpy()
        found = bytes(np.where(joined == BOS, 255, joined).astype(np.uint8)).decode("latin1")
        read = []
        for epoch in itertools.count():
            for number in assignment.pieces(epoch, reader):
                parts = [p for p in text.parts(text.train[number]) if p.split == TRAIN and p.text]
                for place, part in enumerate(parts):
                    read.append("ÿ" * (part.begins or place == 0) + part.text)
            if sum(map(len, read)) > len(found):
                break
        assert found == "".join(read)[: len(found)]
        assert len(found) > 3 * sum(map(len, expected)) / readers
    for epoch in range(3):
        numbers = [number for reader in range(readers) for number in assignment.pieces(epoch, reader)]
        assert sorted(numbers) == list(range(len(text.train)))
        assert (numbers == sorted(numbers)) == (order == "sequential" and readers == 1)
    batches.close()


@PACKINGS
def test_resumes_at_any_step_in_any_number_of_processes(packing: str):
    text = made_text(1)
    whole = take(stream(text, packing), 0, 90)
    draw = random.Random(packing)
    for _ in range(12):
        step, states = 0, [{}]
        for world in draw.sample([1, 2, 4, 3], 4):
            ranks = [stream(text, packing, rank=rank, world=world) for rank in range(world)]
            for batches in ranks:
                batches.restore(merge_states(states) if step else {})
            count = draw.randrange(1, 20)
            taken = [take(batches, step, count) for batches in ranks]
            for number in range(count):
                for rank in range(world):
                    assert torch.equal(taken[rank][number], whole[step + number][rank::world])
            step += count
            # Through JSON, as a checkpoint does it; the threads are ahead of the step by now.
            states = [json.loads(json.dumps(batches.state(step))) for batches in ranks]
            for batches in ranks:
                batches.close()


@PACKINGS
def test_reading_ahead_does_not_show(packing: str):
    text = made_text(2)
    batches = stream(text, packing)
    first = take(batches, 0, 5)
    assert all(torch.equal(*pair) for pair in zip(take(batches, 3, 2), first[3:], strict=True))  # asked for again
    deadline = time.monotonic() + 30
    while batches._ahead._made.qsize() < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    states = {step: batches.state(step) for step in (4, 5)}
    following = take(batches, 5, 3)
    for step, state in states.items():
        again = stream(text, packing)
        again.restore(state)
        expected = [*first, *following][step:]
        assert all(torch.equal(*pair) for pair in zip(take(again, step, len(expected)), expected, strict=True))
        again.close()
    batches.restore(states[4])  # the same object goes back
    assert torch.equal(take(batches, 4, 1)[0], first[4])
    batches.close()


def test_best_fit_rows_begin_with_a_document_and_are_full_of_text():
    batches = stream(made_text(3), "best_fit", length=64)
    taken = torch.cat(take(batches, 0, 200))
    assert (taken[:, 0] == BOS).all()
    assert (taken >= 0).all()
    assert (taken == BOS).sum() > 500
    batches.close()


def test_a_seed_decides_the_order():
    text = made_text(4)
    rows = {}
    for name, how in {"a": {}, "same": {}, "seed": {"seed": 8}, "order": {"order": "sequential"}}.items():
        batches = stream(text, **how)
        rows[name] = torch.cat(take(batches, 0, 20))
        batches.close()
    assert torch.equal(rows["a"], rows["same"])
    assert not torch.equal(rows["a"], rows["seed"])
    assert not torch.equal(rows["a"], rows["order"])


def test_readers_get_equally_much_over_the_epochs():
    sizes = [random.Random(5).randrange(1, 100) for _ in range(40)]
    assignment = Assignment(sizes, 6, shuffled=True, seed=1)
    loads = [0] * 6
    epochs = []
    for epoch in range(30):
        assigned = [assignment.pieces(epoch, reader) for reader in range(6)]
        assert sorted(itertools.chain(*assigned)) == list(range(40))
        epochs.append(assigned)
        loads = [load + sum(sizes[piece] for piece in pieces) for load, pieces in zip(loads, assigned, strict=True)]
        assert max(loads) - min(loads) <= max(sizes)
    for epoch in (29, 3, 17):  # also asked for again, and out of order
        assert [Assignment(sizes, 6, True, 1).pieces(epoch, reader) for reader in range(6)] == epochs[epoch]
        assert [assignment.pieces(epoch, reader) for reader in range(6)] == epochs[epoch]
    equal = Assignment([7] * 4, 4, shuffled=False, seed=1)
    assert {equal.pieces(epoch, 0)[0] for epoch in range(4)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sizes", "most", "rows", "readers"),
    [
        ([10] * 100, 16, 64, 16),
        ([10] * 100, 16, 24, 12),
        ([10] * 3, 16, 64, 2),
        ([10], 16, 64, 1),
        ([1000] + [10] * 20, 16, 64, 1),  # others would begin it again in later epochs meanwhile
        ([12, 10, 9, 11, 10, 13, 9, 10], 16, 8, 8),
        ([10] * 100, 16, 31, 1),
    ],
)
def test_number_of_readers(sizes: list[int], most: int, rows: int, readers: int):
    text = LiveText(tuple(Piece(f"{n}.txt", size) for n, size in enumerate(sizes)), (), "text")
    assert reader_count(text, most, rows) == readers


def test_pieces_without_text_for_training_are_passed_over():
    held_out = [Part("held out", VAL, True)]
    for order in ("shuffled", "sequential"):
        batches = stream(MadeText([held_out, [Part("text", TRAIN, True)], held_out, []]), order=order)
        tokens = torch.cat(take(batches, 0, 30)).flatten().tolist()
        assert set(tokens) == {*b"text", BOS}
        batches.close()
    with pytest.raises(DataError, match="no text to train on"):
        stream(MadeText([held_out, []]))


def test_text_that_is_gone_later_is_an_error_and_not_an_endless_search():
    text = made_text(5)
    batches = stream(text)
    for piece in text.train:
        text.__dict__["made"][piece] = []
    for _ in range(2):  # and it stays one
        with pytest.raises(DataError, match="no text to train on"):
            batches.batch(0)
    batches.close()


def test_what_goes_wrong_in_the_thread_reaches_the_trainer():
    text = made_text(6)
    batches = stream(text, readers=1)

    def broken(piece: Piece, *_: object) -> Iterator[Part]:
        yield Part("y" * 1000, TRAIN, True)
        raise DataError(f"{piece.file}: damaged")

    text.__dict__["parts"] = broken
    with pytest.raises(DataError, match="damaged"):
        take(batches, 0, 1000)
    batches.close()


def test_the_thread_ends_with_the_object():
    text, original = made_text(7), MadeText.parts

    def slow(piece: Piece, *_: object) -> Iterator[Part]:
        time.sleep(0.2)
        yield from original(text, piece)

    text.__dict__["parts"] = slow
    batches = stream(text)
    batches.batch(0)
    assert batches._ahead is not None
    thread = batches._ahead.thread
    assert thread.daemon
    assert batches._ahead.close.atexit
    del batches
    assert not thread.is_alive()  # a process that ends while a thread is inside of a library is aborted


def test_waiting_lets_signal_handlers_run():
    text = made_text(8)
    batches = stream(text)
    heard, original = threading.Event(), text.parts

    def slow(piece: Piece, *_: object) -> Iterator[Part]:
        heard.wait(30)  # until the handler has run, in the main thread, which waits for this one
        yield from original(piece)

    text.__dict__["parts"] = slow
    previous = signal.signal(signal.SIGUSR1, lambda *_: heard.set())
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    try:
        timer.start()
        batches.batch(0)
        assert heard.is_set()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
        batches.close()


def write_texts(folder: Path, count: int = 12, size: int = 600) -> Path:
    """A folder of text files of different words."""
    folder.mkdir()
    for number in range(count):
        draw = random.Random(number)
        words = " ".join(draw.choice(["Ada", "sees", "Noël", "the", "fox"]) for _ in range(size // 5))
        (folder / f"{number:02}.txt").write_text(f"{number}: {words}.\n", encoding="utf-8")
    return folder


def settings(folder: Path, **how) -> DataConfig:
    return DataConfig(**{"paths": (str(folder),), "stream": True, "split": "last_file", **how})


def test_a_sequential_stream_of_one_reader_is_the_prepared_shards(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    config = load_config(**{"data.paths": [str(folder)], "data.split": "last_file", "tokenizer.kind": "byte"})
    prepared = prepare(config, tmp_path / "data")
    expected = prepared_dataset(prepared.folder).stream("train")
    batches = stream(find_text(settings(folder)), readers=1, order="sequential")
    rows = torch.cat(take(batches, 0, 20))
    joined = torch.cat([rows[0], rows[1:, 1:].flatten()])
    assert joined.tolist() == expected.windows(np.array([0]), len(joined))[0].tolist()
    batches.close()


def write_row_groups(folder: Path) -> list[Path]:
    """Parquet files of several row groups each, as nanochat's data sets are, but small."""
    folder.mkdir()
    files = []
    for number, groups in enumerate((5, 3, 4, 2)):
        rows = [f"row {number} {row} " + "abc " * (row * 7 % 11) for row in range(groups * 3)]
        files.append(folder / f"shard_{number:05d}.parquet")
        pq.write_table(pa.table({"text": rows}), files[-1], row_group_size=3)
    return files


def nanochats_tokens(files: list[Path]) -> Iterator[int]:
    """The stream of nanochat's loader of October 2025 in one process, from its source: files, row groups and rows in
    order, each row with BOS before it, again and again."""
    while True:
        for file in files:
            shard = pq.ParquetFile(file)
            for group in range(shard.num_row_groups):
                for text in shard.read_row_group(group).column("text").to_pylist():
                    yield 256
                    yield from text.encode()


@pytest.mark.parametrize("recipe", ["nanochat-d20", "nanochat"])
def test_row_groups_come_in_the_order_of_nanochat(recipe: str, tmp_path: Path):
    """Its last file is held out. In several processes its order differs: there each takes every n-th row group."""
    files = write_row_groups(tmp_path / "shards")
    assert pq.ParquetFile(files[0]).num_row_groups == 5
    data = load_config(recipe, **{"data.paths": [str(tmp_path / "shards")]}).data
    text = find_text(data)
    assert {piece.file for piece in text.val} == {str(files[-1])}
    assert list(dict.fromkeys(piece.file for piece in text.train)) == [str(file) for file in files[:-1]]
    how = {"rows": 4, "length": 50, "seed": 1}
    batches = LiveBatches(text, BYTES, data, **how)
    assert batches.readers == 1
    inputs, targets = zip(*map(batches.batch, range(30)), strict=True)
    batches.close()
    if data.packing == "best_fit":
        assert all((part[:, 0] == BOS).all() for part in inputs)
        return
    rows = torch.cat([torch.cat((x[:, :1], y), 1) for x, y in zip(inputs, targets, strict=True)])
    joined = torch.cat([rows[0], rows[1:, 1:].flatten()])
    assert len(joined) > 2 * sum(len(text) for file in files[:-1] for text in pq.read_table(file)["text"].to_pylist())
    assert joined.tolist() == list(itertools.islice(nanochats_tokens(files[:-1]), len(joined)))
    for rank in range(2):  # here the rows are dealt out, and the batch of all together stays the same
        shared = LiveBatches(text, BYTES, data, **how, rank=rank, world=2)
        assert torch.equal(
            torch.cat([shared.batch(step)[1] for step in range(5)]), torch.cat([y[rank::2] for y in targets[:5]])
        )
        shared.close()


def test_nanochats_recipes_need_a_folder(tmp_path: Path, capsys):
    """Without one, training says so and planning goes on; token shards are no stream."""
    out = str(tmp_path / "run")
    assert main(["train", "nanochat", "--out", out]) == 1
    assert capsys.readouterr().err == (
        "pretrain: data.split last_file needs two files or more; give more with --data, or use --data.split hash or"
        " --data.val_paths\n"
    )
    small = ["--model.depth", "2", "--model.context_length", "128", "--train.batch_tokens", "1024", "--no-measure"]
    assert main(["plan", "nanochat", *small, "--train.steps", "100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert any(
        "Training will refuse this: data.split last_file needs two files" in each for each in planned["warnings"]
    )
    assert main(["plan", "nanochat", *small, "--train.tokens_per_parameter", "2000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"][0].startswith("No text is given, and the embedded corpus")
    write_row_groups(tmp_path / "shards")
    given = ["--data", str(tmp_path / "shards"), "--tokenizer.kind", "byte"]
    assert main(["plan", "nanochat", *small, "--train.steps", "100", *given, "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["data"]
    assert tokens["val_tokens"] / tokens["train_tokens"] == pytest.approx(2 / 12, rel=0.2)

    shards = str(tmp_path / "tokens")
    assert main(["data", "prepare", str(tmp_path / "shards"), "--tokenizer", "byte", "--out", shards]) == 0
    capsys.readouterr()
    assert main(["train", "nanochat", "--data", shards, "--out", out]) == 2
    assert capsys.readouterr().err.endswith(
        "tokens holds tokens already, which need no data.stream; use --data.no-stream\n"
    )
    assert not Path(out).exists()


def test_the_rest_of_a_file_goes_on_only_after_its_part_before():
    parts = [[Part("abc", TRAIN, True)], [Part("def", TRAIN, False)], [Part("ghi", TRAIN, False)]]
    text = MadeText(parts)
    text.__dict__["train"] = tuple(Piece("one.txt", 3, begin, begin + 3) for begin in (0, 3, 6))
    text.__dict__["made"] = dict(zip(text.train, parts, strict=True))
    batches = stream(text, readers=1, order="sequential")
    assert BYTES.decode(take(batches, 0, 1)[0][0].tolist(), show_special=True).startswith(
        "<|endoftext|>abcdefghi<|endof"
    )
    shuffled = stream(text, readers=1, rows=1, length=400)
    tokens = BYTES.decode(take(shuffled, 0, 1)[0][0].tolist(), show_special=True)
    runs = set(tokens.split("<|endoftext|>")[1:-1])
    assert {"abc", "def", "ghi", "abcdef", "defghi", "abcdefghi"} >= runs > {"abc", "def", "ghi"}
    assert "ghi<|endoftext|>def" in tokens or "ghi<|endoftext|>abc" in tokens
    for each in (batches, shuffled):
        each.close()


def test_validation_by_val_paths_last_file_and_tail(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    last = str(folder / "11.txt")
    for how in (
        {"split": "last_file"},
        {"split": "tail", "val_fraction": 0.1},
        {"split": "tail", "val_paths": (last,)},  # which is in the folder too, and is left out of training
    ):
        text = find_text(settings(folder, **how))
        assert [Path(piece.file).name for piece in text.val] == ["11.txt"]
        assert len(text.train) == 11
    text = find_text(settings(folder, split="tail", val_fraction=0.26))
    assert [Path(piece.file).name for piece in text.val] == ["09.txt", "10.txt", "11.txt"]
    nothing = find_text(settings(folder, split="tail", val_fraction=0.0))
    assert (len(nothing.train), nothing.val) == (12, ())


def test_validation_by_hash_is_what_training_leaves_out(tmp_path: Path):
    folder = write_texts(tmp_path / "text", count=60, size=100)
    data = settings(folder, split="hash", val_fraction=0.3)
    config = load_config(
        **{"data.paths": list(data.paths), "data.split": "hash", "data.val_fraction": 0.3, "tokenizer.kind": "byte"}
    )
    text = find_text(data)
    prepared = prepare_stream(config, text, tmp_path / "data")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    held_out = [texts[name] for name in sorted(texts) if side_by_hash(texts[name], Shares(0.3)) == VAL]
    assert 5 < len(held_out) < 40
    val = prepared_dataset(prepared.folder).stream("val")
    tokens = val.windows(np.array([0]), len(val))[0]
    assert BYTES.decode(tokens, show_special=True) == "".join(f"<|endoftext|>{text}" for text in held_out)
    batches = stream(text, rows=8, length=64)
    tokens = torch.cat(take(batches, 0, 60)).flatten().tolist()
    seen = BYTES.decode(tokens, show_special=True)
    beginnings = Counter(f"{part.split(':')[0]}:" for part in seen.split("<|endoftext|>")[1:] if ":" in part)
    assert not any(text.startswith(f"{begin}") for begin in beginnings for text in held_out)
    assert len(beginnings) > 15
    batches.close()


def test_the_test_of_a_stream(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    for how, test, val in (
        ({"split": "last_file", "test_fraction": 0.1}, ["11.txt"], ["10.txt"]),
        ({"split": "tail", "val_fraction": 0.2, "test_fraction": 0.1}, ["11.txt"], ["09.txt", "10.txt"]),
        ({"split": "tail", "val_fraction": 0.0, "test_fraction": 0.1}, ["11.txt"], []),
        ({"split": "tail", "val_paths": (str(folder / "11.txt"),), "test_fraction": 0.1}, ["10.txt"], ["11.txt"]),
    ):
        text = find_text(settings(folder, **how))
        assert [Path(piece.file).name for piece in text.test] == test
        assert [Path(piece.file).name for piece in text.val] == val
        assert len(text.train) == 12 - len(test) - len(val)
    plain, tested = (find_text(settings(folder, split="hash", val_fraction=0.3, test_fraction=t)) for t in (0.0, 0.2))
    assert plain.fingerprint != tested.fingerprint


@pytest.mark.parametrize("by_name", [False, True])
def test_the_test_of_a_stream_by_hash(tmp_path: Path, by_name: bool):
    folder = write_texts(tmp_path / "text", count=60, size=100)
    fields = {"data.paths": [str(folder)], "data.split": "hash", "data.val_fraction": 0.3, "data.test_fraction": 0.2}
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    shares = Shares(0.3, 0.2)
    expected = {side: [t for _, t in sorted(texts.items()) if side_by_hash(t, shares) == side] for side in SIDES}
    if by_name:  # a file that the hash would put elsewhere
        named = next(name for name, text in sorted(texts.items()) if text in expected[TEST])
        fields["data.val_paths"] = [str(folder / named)]
        rest = {name: text for name, text in texts.items() if name != named}
        expected = {
            TRAIN: [t for _, t in sorted(rest.items()) if side_by_hash(t, Shares(0.0, 0.2)) == TRAIN],
            VAL: [texts[named]],
            TEST: [t for _, t in sorted(rest.items()) if side_by_hash(t, Shares(0.0, 0.2)) == TEST],
        }
    config = load_config(**fields, **{"tokenizer.kind": "byte"})
    text = find_text(config.data)
    prepared = prepare_stream(config, text, tmp_path / "data")
    for side in (VAL, TEST):
        tokens = (found := prepared_dataset(prepared.folder).stream(side)).windows(np.array([0]), len(found))[0]
        assert BYTES.decode(tokens, show_special=True) == "".join(f"<|endoftext|>{text}" for text in expected[side])
    assert [part.text for part in text.training(text.train)] == expected[TRAIN]


def test_prepared_stream_validates_as_shards_do(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    said: list[str] = []
    config = load_config(
        **{"data.paths": [str(folder)], "data.split": "last_file", "tokenizer.kind": "bpe", "tokenizer.vocab_size": 265}
    )
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "tokenizer.json").touch()  # of an attempt that failed before the run was there
    prepared = prepare_stream(config, find_text(config.data), tmp_path / "run" / "data", said.append)
    assert prepared.manifest.tokens("train") == 0
    assert prepared.tokenizer.vocab_size == 265
    assert Tokenizer.load(tmp_path / "run" / "data" / "tokenizer.json").fingerprint == prepared.tokenizer.fingerprint
    val: TokenStream = prepared_dataset(prepared.folder).stream("val")
    # Far shorter than a batch, and even than a row.
    targets = [targets[targets >= 0] for _, targets in validation_batches(val, 4096, 8)]
    decoded = prepared.tokenizer.decode(torch.cat(targets).tolist())
    assert decoded == (folder / "11.txt").read_text(encoding="utf-8")
    assert said[0].startswith(f"text      {folder}: about 0.0 MB in 11 pieces")
    assert "1 document" in said[1]
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "data"]


def test_prepared_stream_without_validation(tmp_path: Path):
    config = load_config(**{"data.paths": [str(write_texts(tmp_path / "text"))], "data.val_fraction": 0})
    config = load_config(**{"data.paths": list(config.data.paths), "data.val_fraction": 0, "tokenizer.kind": "byte"})
    prepared = prepare_stream(config, find_text(config.data), tmp_path / "data")
    assert prepared.manifest.shards == ()
    assert len(prepared_dataset(prepared.folder).stream("val")) == 0


def test_the_embedded_corpus_streams_by_hash(tmp_path: Path):
    text = find_text(DataConfig(stream=True, split="hash", val_fraction=0.01))
    batches = stream(text)
    assert 0.9 < batches.bytes_per_token <= 1.0
    first = torch.cat(take(batches, 0, 3))
    assert batches.readers == 1
    assert BYTES.decode(first[0].tolist()).startswith("In the beginning")
    assert 0 < batches.epoch(100) < 0.02
    batches.close()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"order": "random"}, UsageError, "data.order random needs token shards"),
        ({"stride": 4}, UsageError, "data.stride needs token shards"),
        ({"weights": (1.0,)}, UsageError, "data.weights needs token shards"),
        ({"split": "tail", "val_fraction": 0.01}, DataError, "--data.split hash"),
        ({"paths": ("nowhere",)}, DataError, "nowhere"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path: Path, change: dict, error: type[Exception], words: str):
    folder = write_texts(tmp_path / "text", count=3)
    with pytest.raises(error, match=words) as raised:
        find_text(settings(folder, **change))
    assert "\n" not in str(raised.value)


def test_last_file_of_one(tmp_path: Path):
    folder = write_texts(tmp_path / "text", count=1)
    with pytest.raises(DataError, match=r"needs two files or more; .*--data.val_paths"):
        find_text(settings(folder))
    with pytest.raises(DataError, match="hold less of it out"):
        find_text(settings(folder, val_paths=(str(folder / "00.txt"),)))


def test_preparing_a_stream_refuses(tmp_path: Path):
    folder = write_texts(tmp_path / "text", count=3)
    config = load_config(**{"data.paths": [str(folder)], "data.split": "last_file", "tokenizer.kind": "char"})
    with pytest.raises(UsageError, match="char needs the whole text"):
        prepare_stream(config, find_text(config.data), tmp_path / "data")
    config = load_config(
        **{
            "data.paths": [str(folder)],
            "data.split": "hash",
            "data.val_fraction": 1e-6,
            "tokenizer.kind": "byte",
        }
    )
    with pytest.raises(DataError, match="no text is left for validation"):
        prepare_stream(config, find_text(config.data), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_changed_text_is_refused_and_a_moved_one_is_not(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    batches = stream(find_text(settings(folder)))
    expected = take(batches, 0, 4)[3]
    state = batches.state(3)
    batches.close()
    moved = folder.rename(tmp_path / "moved")
    again = stream(find_text(settings(moved)))
    again.restore(state)
    assert torch.equal(take(again, 3, 1)[0], expected)
    again.close()
    file = moved / "03.txt"
    file.write_bytes(file.read_bytes().replace(b"fox", b"FOX"))
    with pytest.raises(DataError, match="not what the run was trained on"):
        stream(find_text(settings(moved))).restore(state)
    file.unlink()
    with pytest.raises(DataError, match="not what the run was trained on"):
        stream(find_text(settings(moved))).restore(state)


@PACKINGS
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_streams_of_real_files(tmp_path: Path, packing: str, kind: str):
    """Files of several documents; of Parquet with several row groups. Resumed in the middle by two processes."""
    draw = random.Random(9)
    texts = [[f"{f}/{n} " + "word " * draw.randrange(40) for n in range(50)] for f in range(4)]
    for number, documents in enumerate(texts):
        file = tmp_path / f"{number}.{kind}"
        if kind == "parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pytest.importorskip("pyarrow").table({"text": documents})
            parquet.write_table(table, file, row_group_size=7)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
            file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    text = find_text(DataConfig(paths=(str(tmp_path),), stream=True, split="hash", val_fraction=0.1))
    training = {text for documents in texts for text in documents if side_by_hash(text, Shares(0.1)) == TRAIN}
    batches = stream(text, packing, length=256)
    taken = take(batches, 0, 30)
    state = batches.state(30)
    whole = take(batches, 30, 5)
    batches.close()
    ranks = [stream(text, packing, length=256, rank=rank, world=2) for rank in range(2)]
    for rank, batches in enumerate(ranks):
        batches.restore(state)
        for rows, expected in zip(take(batches, 30, 5), whole, strict=True):
            assert torch.equal(rows, expected[rank::2])
        batches.close()
    if packing == "best_fit":
        found = Counter(
            part
            for row in torch.cat(taken).tolist()
            for part in BYTES.decode(row, show_special=True).split("<|endoftext|>")[1:]
        )
        assert len(training & found.keys()) > 0.8 * len(training)
        assert not found.keys() & {text for documents in texts for text in documents if text not in training}
