import errno
import hashlib
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch

import pretrain.runs.checkpoint as checkpoint_module
from pretrain.config import CheckpointConfig
from pretrain.runs.checkpoint import (
    COMMIT,
    CheckpointWriter,
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


@pytest.mark.parametrize("call", ["_write", "_commit", "sync_folder", "write_atomically"])
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

    monkeypatch.setattr(checkpoint_module, "_write", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, tensors(2), {})
    assert newest(tmp_path, pytest.fail) is not None


def test_what_is_not_finite_is_named():
    good = {"a": torch.randn(5), "b": torch.arange(3), "c": torch.zeros(0)}
    assert not_finite(good) == ""
    for bad in (math.nan, math.inf, -math.inf):
        assert not_finite({**good, "d": torch.tensor([1.0, bad])}) == "d"
    assert not_finite({**good, "d": torch.tensor([3e38, 3e38])}) == ""  # only their sum is not


def test_each_process_saves_its_share_of_what_all_have():
    """Every name once, by one that has it, and evenly; what one alone has it saves."""
    same = {f"layer.{i}": 100 + i for i in range(40)}
    holdings = [{**same, f"random.cpu.{rank}": 5056, **({"moment": 7} if rank == 2 else {})} for rank in range(4)]
    given = shares(holdings)
    assert sorted(name for names in given for name in names) == sorted({name for held in holdings for name in held})
    assert all(names <= holdings[rank].keys() for rank, names in enumerate(given))
    sizes = [sum(holdings[rank][name] for name in names) for rank, names in enumerate(given)]
    assert max(sizes) - min(sizes) <= 139
