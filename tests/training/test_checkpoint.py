import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.training.checkpoint import COMMIT, checkpoints, newest, retire, save_checkpoint


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


def test_any_flipped_bit_is_found_and_the_one_before_is_used(tmp_path: Path):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    second = save_checkpoint(tmp_path, 2, tensors(2), {})
    for name in json.loads((second.folder / COMMIT).read_text()):
        file = second.folder / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        said: list[str] = []
        found = newest(tmp_path, said.append)
        assert found is not None
        assert found.step == 1
        assert name in said[0]
        file.unlink()
        assert "missing" in second.broken()
        file.write_bytes(good)
    assert newest(tmp_path, pytest.fail) == second


@pytest.mark.parametrize(
    ("keep_last", "keep", "left"),
    [(2, (), [4, 5]), (1, (2,), [2, 5]), (0, (), [1, 2, 3, 4, 5]), (2, (4, 5), [2, 3, 4, 5])],
)
def test_retention(tmp_path: Path, keep_last: int, keep: tuple[int, ...], left: list[int]):
    one = save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {})
    for step in range(2, 6):
        shutil.copytree(one.folder, tmp_path / f"step-{step:08d}")
    retire(tmp_path, keep_last, keep)
    assert [c.step for c in checkpoints(tmp_path)] == left
