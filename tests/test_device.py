import json
import mmap
from pathlib import Path

import pytest
import torch

from pretrain.device import GPUS, container_limit, known_gpu, peak_flops, process_memory, total_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_gpus_are_known_by_what_drivers_call_them(name: str, key: str):
    assert known_gpu(name) is GPUS[key]


def test_an_unknown_gpu_is_not_taken_for_another():
    assert known_gpu("NVIDIA L400") is None
    assert known_gpu("NVIDIA GeForce GTX 1080") is None


def test_a_measured_peak_is_remembered(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return 1e9 * len(measured)

    monkeypatch.setattr("pretrain.device.matmul_flops", measure)
    assert [peak_flops(CPU, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)] == [1e9, 2e9, 1e9]
    assert measured == [torch.float32, torch.bfloat16]
    file = tmp_path / "pretrain" / "peak.json"
    assert len(json.loads(file.read_text())) == 2
    file.write_text("spoilt")
    assert peak_flops(CPU, torch.float32) == 3e9
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert peak_flops(CPU, torch.float32) == 4e9


def test_memory_is_that_of_this_process():
    before = process_memory(CPU)
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(b"1" * 50_000_000)
        assert 40e6 < process_memory(CPU) - before < 120e6
    assert process_memory(CPU) < total_memory(CPU)
    assert total_memory(CPU) <= (container_limit() or 2**60)
