import errno
import hashlib
import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save

import pretrain.runs.checkpoint as checkpoint_module
from pretrain.config import CheckpointConfig
from pretrain.errors import CheckpointError, PeerError
from pretrain.runs.checkpoint import (
    COMMIT,
    CheckpointWriter,
    Part,
    PartOf,
    all_of_it,
    checkpoints,
    newest,
    not_finite,
    prune,
    save_checkpoint,
    shares,
)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(5, 3, generator=generator),
        "optim.a.step": torch.tensor(float(seed)),
        "random.cpu": torch.get_rng_state(),
    }


def test_what_is_saved_is_loaded(tmp_path: Path):
    saved = save_checkpoint(tmp_path, 7, tensors(1), {"seconds": 1.5})
    (found,) = checkpoints(tmp_path)
    assert found == saved
    assert found.state == {"step": 7, "seconds": 1.5}
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(2).items()}
    found.load(into)
    for name, tensor in tensors(1).items():
        assert torch.equal(into[name], tensor), name
    assert {path.suffix for path in found.folder.iterdir()} == {".safetensors", ".json", ""}  # nothing pickled
    assert found.broken() == ""


def test_without_the_marker_it_does_not_exist(tmp_path: Path):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    second = save_checkpoint(tmp_path, 2, tensors(2), {})
    (second.folder / COMMIT).unlink()
    assert [c.step for c in checkpoints(tmp_path)] == [1]
    again = save_checkpoint(tmp_path, 2, tensors(3), {})  # over what a killed save left
    assert [c.step for c in checkpoints(tmp_path)] == [1, 2]
    assert again.broken() == ""


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "at": (2,)}, [2, 5]),
        ({"keep_last": 0}, [1, 2, 3, 4, 5]),
        ({"keep_last": 2, "at": (4, 5)}, [2, 3, 4, 5]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 5]),
        ({"keep_last": 1, "keep_best": True}, [3, 5]),
        ({"keep_last": 1, "keep_every": 5}, [4, 5]),
    ],
)
def test_retention(tmp_path: Path, config: dict, left: list[int]):
    one = save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {})
    for step in range(2, 6):
        shutil.copytree(one.folder, tmp_path / f"step-{step:08d}")
    prune(tmp_path, CheckpointConfig(**config), {1: 3.0, 3: 2.0, 5: 2.5, 6: 1.0})
    assert [c.step for c in checkpoints(tmp_path)] == left


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path):
    """The marker included, and in the middle of each file."""
    save_checkpoint(tmp_path, 1, tensors(1), {})
    second = save_checkpoint(tmp_path, 2, tensors(2), {"seconds": 1.0})
    for file in second.folder.iterdir():
        good = file.read_bytes()
        for place in (0, len(good) // 2, len(good) - 2):
            file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            said: list[str] = []
            found = newest(tmp_path, said.append)
            assert found is not None
            assert found.step == 1, (file.name, place)
            assert said[0].startswith("skipping damaged checkpoint step-00000002")
        if file.name != COMMIT:
            assert file.name in second.broken()
            file.unlink()
            assert f"{file.name} is missing" in second.broken()
        file.write_bytes(good)
    assert newest(tmp_path, pytest.fail) == second


def test_a_marker_that_names_files_elsewhere_is_not_believed(tmp_path: Path):
    one = save_checkpoint(tmp_path, 1, tensors(1), {})
    hashes = json.loads((one.folder / COMMIT).read_text())
    (tmp_path / "outside").write_text("")
    hashes["../outside"] = hashlib.sha256(b"").hexdigest()
    (one.folder / COMMIT).write_text(json.dumps(hashes))
    assert "outside" in one.broken()


def test_the_writer_copies_first_and_tells_of_failures_once(tmp_path: Path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        go_on.wait(20)
        return save_checkpoint(*args)

    monkeypatch.setattr("pretrain.runs.checkpoint.save_checkpoint", slow)
    values, committed = {"a": torch.zeros(4)}, []
    writer.save(1, values, {}, lambda: committed.append(1))
    assert begun.wait(20)
    values["a"] += 1  # training goes on
    assert committed == []
    go_on.set()
    writer.wait()
    assert committed == [1]
    into = {"a": torch.ones(4)}
    checkpoints(tmp_path)[0].load(into)
    assert torch.equal(into["a"], torch.zeros(4))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrain.runs.checkpoint.save_checkpoint", fail)
    writer.save(2, values, {}, lambda: committed.append(2))
    with pytest.raises(OSError, match="No space"):
        writer.wait()
    writer.wait()
    assert committed == [1]


@pytest.mark.parametrize("call", ["_write_tensors", "_commit", "sync_folder", "write_atomically"])
def test_a_save_that_fails_leaves_nothing_of_itself(tmp_path: Path, monkeypatch, call: str):
    save_checkpoint(tmp_path, 1, tensors(1), {})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, call, fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, tensors(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path, pytest.fail) is not None


def test_a_step_saved_again_stays_until_the_new_one_is_written(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1), {})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_write_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, tensors(2), {})
    assert newest(tmp_path, pytest.fail) is not None


def test_what_is_not_finite_is_named():
    good = {"a": torch.randn(5), "b": torch.arange(3), "c": torch.zeros(0)}
    assert not_finite(good) == ""
    for bad in (math.nan, math.inf, -math.inf):
        assert not_finite({**good, "d": torch.tensor([1.0, bad])}) == "d"
    assert not_finite({**good, "d": torch.tensor([3e38, 3e38])}) == ""  # only their sum is not


class Together:
    """One of several processes that save and load together, here threads."""

    def __init__(self, rank: int, values: list, there: threading.Barrier):
        self.rank, self.size, self.values, self.there = rank, len(values), values, there

    def gather(self, value):
        self.values[self.rank] = value
        self.there.wait()
        values = list(self.values)
        self.there.wait()
        return values

    def collect(self, key: str, value):
        values = self.gather(value)
        return values if self.rank == 0 else [value]


def together(size: int, work) -> list:
    """What ``work(peers)`` gives in each of ``size`` processes, or the exception that it raises."""
    values, there = [None] * size, threading.Barrier(size, timeout=20)

    def alone(rank: int):
        try:
            return work(Together(rank, values, there))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(alone, range(size)))


ROWS = 7
WHOLE = {"model.a": torch.arange(ROWS * 3.0).view(ROWS, 3), "optim.a.moment": -torch.arange(ROWS * 3.0).view(ROWS, 3)}


def rows_of(rank: int, size: int) -> tuple[dict[str, torch.Tensor], PartOf]:
    """What a process has of WHOLE, by rows, and beside it what all have alike; the last of many processes has none."""
    each = -(-ROWS // size)
    first = min(rank * each, ROWS)
    held = {name: tensor[first : first + each].clone() for name, tensor in WHOLE.items()}

    def part(name: str, tensor: torch.Tensor) -> Part:
        return Part((first, 0), (ROWS, 3)) if name in WHOLE else all_of_it(name, tensor)

    return held | {"guard.mean": torch.tensor(3.0)}, part


def save_together(folder: Path, step: int, size: int, copies: int = 1) -> list:
    """Save with ``size`` processes, of which each ``copies`` have the same rows; what each saved, or its error."""

    def work(peers: Together):
        held, part = rows_of(peers.rank // copies, size // copies)
        writer = CheckpointWriter(folder, part, peers)
        writer.save(step, held, {}, lambda: None)
        writer.wait()
        return sorted(writer._copies)

    return together(size, work)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are hashed or whose header is read, in any thread."""
    files: list[str] = []
    header, sha256 = checkpoint_module._header, checkpoint_module.sha256_of
    monkeypatch.setattr(checkpoint_module, "_header", lambda folder, file: files.append(file) or header(folder, file))
    monkeypatch.setattr(checkpoint_module, "sha256_of", lambda file: files.append(file.name) or sha256(file))
    return files


@pytest.mark.parametrize(("before", "copies"), [(1, 1), (3, 1), (8, 1), (4, 2), (3, 3)])
def test_several_save_and_others_load(tmp_path: Path, before: int, copies: int):
    """Rows over all, some of which have none, or groups that have the same; each part is in one file."""
    saved = save_together(tmp_path, 4, before, copies)
    names = [name for names in saved for name in names]
    parts = before // copies
    assert names.count("model.a") == parts
    assert names.count("guard.mean") == 1
    if copies > 1:  # each saves a share of what it has
        assert max(len(names) for names in saved) < 3
    checkpoint = newest(tmp_path, pytest.fail)
    assert checkpoint is not None
    for after in (1, 2, 5, before):

        def work(peers: Together):
            held, part = rows_of(peers.rank, peers.size)
            into = {name: torch.full_like(tensor, torch.nan) for name, tensor in held.items()}
            checkpoint.load(into, part, checkpoint.index(peers))
            assert all(torch.equal(into[name], held[name]) for name in held)

        assert together(after, work) == [None] * after


def test_each_file_is_hashed_by_its_writer_and_read_by_one(tmp_path: Path, read: list[str]):
    save_together(tmp_path, 4, 3)
    files = [f"shard-{number:05d}.safetensors" for number in (1, 2, 3)]
    assert sorted(read) == [*files, "state.json"]
    for work, files_read in (
        (lambda peers: newest(tmp_path, pytest.fail, peers), [*[COMMIT] * 3, *files, "state.json"]),
        (lambda peers: checkpoints(tmp_path)[0].index(peers), files),
    ):
        read.clear()
        first, *others = together(3, work)
        assert first
        assert all(other == first for other in others)
        assert sorted(read) == files_read


@pytest.mark.parametrize("damaged", ["shard-00001.safetensors", "shard-00003.safetensors", "state.json", COMMIT])
def test_what_one_finds_damaged_all_skip(tmp_path: Path, damaged: str):
    save_together(tmp_path, 4, 3)
    save_together(tmp_path, 8, 3)
    file = tmp_path / "step-00000008" / damaged
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    said: list[tuple[int, str]] = []
    found = together(3, lambda peers: newest(tmp_path, lambda text: said.append((peers.rank, text)), peers))
    assert [checkpoint.step for checkpoint in found] == [4] * 3
    assert len(said) == 3
    assert all(f"{damaged} is not what was written" in text for _, text in said)
    shutil.rmtree(tmp_path / "step-00000004")
    first, *others = together(3, lambda peers: newest(tmp_path, lambda text: None, peers))
    assert isinstance(first, CheckpointError)
    assert all(isinstance(other, PeerError) for other in others)  # it is said once


@pytest.mark.parametrize("where", [0, 2])
def test_one_that_cannot_write_leaves_nothing_of_the_others(tmp_path: Path, monkeypatch, where: int):
    save_together(tmp_path, 4, 3)
    write = checkpoint_module._write_tensors

    def full(file: Path, *rest):
        if file.name == f"shard-{where + 1:05d}.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, *rest)

    monkeypatch.setattr(checkpoint_module, "_write_tensors", full)
    assert isinstance(save_together(tmp_path, 8, 3)[0], OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_what_a_save_by_more_processes_left_is_not_taken(tmp_path: Path):
    save_together(tmp_path, 4, 3)
    (tmp_path / "step-00000004" / COMMIT).unlink()
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.tmp")  # as if it had been killed
    save_together(tmp_path, 4, 2)
    (checkpoint,) = checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert len(list(checkpoint.folder.glob("*.safetensors"))) == 2
    assert not checkpoint.broken()


def test_another_model_is_refused(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path, 1, tensors(1), {})
    for name, shape, problem in (
        ("model.a", (4, 3), "the shape"),
        ("model.a", (5,), "the shape"),
        ("b", (1,), "there"),
    ):
        with pytest.raises(CheckpointError, match=f"is of another model: {name} .*{problem}"):
            checkpoint.load({name: torch.zeros(shape)})


@pytest.mark.parametrize("of_torch", [False, True])
def test_the_format_is_that_of_torch(tmp_path: Path, of_torch: bool):
    """Which wrote older checkpoints; each reads what the other writes."""
    values = {**tensors(1), "half": torch.randn(4, 2).bfloat16()}
    if of_torch:
        folder = tmp_path / "step-00000001"
        save(values, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
        (folder / COMMIT).write_text(json.dumps({file.name: "" for file in folder.iterdir()}))
    else:
        folder = save_checkpoint(tmp_path, 1, values, {}).folder
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    if of_torch:
        checkpoints(tmp_path)[0].load(into)
    else:
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(into[name], tensor) for name, tensor in values.items())


def test_each_process_saves_its_share_of_what_all_have():
    """Every name once, by one that has it, and evenly; what one alone has it saves."""
    same = {f"layer.{i}": 100 + i for i in range(40)}
    holdings = [{**same, f"random.cpu.{rank}": 5056, **({"moment": 7} if rank == 2 else {})} for rank in range(4)]
    given = shares(holdings)
    assert sorted(name for names in given for name in names) == sorted({name for held in holdings for name in held})
    assert all(names <= holdings[rank].keys() for rank, names in enumerate(given))
    sizes = [sum(holdings[rank][name] for name in names) for rank, names in enumerate(given)]
    assert max(sizes) - min(sizes) <= 139
