import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.device import (
    GPUS,
    choose_precision,
    container_limit,
    free_memory,
    has_tf32,
    known_gpu,
    passing_memory,
    peak_flops,
    process_memory,
    reset_peak_memory,
    total_memory,
)

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


def test_memory_of_a_gpu_that_torch_keeps_is_free(monkeypatch):
    """30 bytes that nobody has, and 15 of those that torch keeps for tensors to come."""
    counts = {"mem_get_info": (30, 80), "memory_reserved": 50, "memory_allocated": 35, "max_memory_allocated": 48}
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert free_memory(torch.device("cuda")) == 45
    assert passing_memory(torch.device("cuda")) == 13
    assert passing_memory(CPU) == 0


@pytest.mark.gpu
def test_memory_that_a_pass_takes_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device, size = torch.device("cuda"), 2**26
    kept = torch.empty(size, dtype=torch.uint8, device=device)
    reset_peak_memory(device)
    free = free_memory(device)
    more = torch.empty(3 * size, dtype=torch.uint8, device=device)
    taken = free - free_memory(device)
    del more
    assert passing_memory(device) == 3 * size
    assert taken == pytest.approx(3 * size, rel=0.05)
    assert free_memory(device) == pytest.approx(free, abs=size / 4)
    del kept


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


NOTE_IMPORTS = """
import os, sys
def note(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
sys.addaudithook(note)
"""


@pytest.mark.parametrize(
    ("given", "code", "printed"),
    [
        (None, "import pretrain; pretrain.Run", "1"),
        (None, "from pretrain.model import GPT", "1"),
        (None, "from pretrain.cli import main; main(['sample', 'nowhere'])", "1"),
        ("0", "import pretrain.device", "0"),
    ],
)
def test_torch_finds_the_mps_fallback_when_it_loads(given: str | None, code: str, printed: str):
    """It reads the variable only then. What the user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    environment |= {} if given is None else {"PYTORCH_ENABLE_MPS_FALLBACK": given}
    command = [sys.executable, "-c", NOTE_IMPORTS + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == printed, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no expandable segments elsewhere")
@pytest.mark.parametrize(
    ("given", "release", "found"),
    [
        ({}, "6.8.0", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "6.8.0", "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "6.8.0", "None"),
        ({}, "5.15.90.1-microsoft-standard-WSL2", "None"),
    ],
)
def test_torch_finds_the_allocator_that_joins_memory_when_it_loads(given: dict[str, str], release: str, found: str):
    code = f"""
system, node, _, version, machine = os.uname()
os.uname = lambda: os.uname_result((system, node, {release!r}, version, machine))
import pretrain.device
"""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    command = [sys.executable, "-c", NOTE_IMPORTS.replace("PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_ALLOC_CONF") + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == found, done.stderr


def test_tf32_is_what_the_products_of_a_gpu_are_set_to(monkeypatch):
    cuda, said = torch.device("cuda"), []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for capability, found in (((7, 5), "fp32"), ((8, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert choose_precision("tf32", cuda).name == found
        assert choose_precision("fp32", cuda).name == "fp32"
        assert choose_precision("tf32", cuda).dtype == torch.float32
    for name in ("tf32", "fp32", "bf16"):
        choose_precision(name, cuda).set_products()
    choose_precision("tf32", CPU).set_products()
    assert said == ["high", "highest", "highest"]
    assert choose_precision("tf32", CPU).name == "fp32"


@pytest.mark.gpu
def test_products_in_tf32_round_more_than_in_full():
    cuda = torch.device("cuda")
    if not torch.cuda.is_available() or not has_tf32(cuda):
        pytest.skip("there is no GPU with TF32")
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    wanted, off = a.double() @ b.double(), {}
    for name in ("tf32", "fp32"):
        choose_precision(name, cuda).set_products()
        off[name] = float(((a.to(cuda) @ b.to(cuda)).cpu() - wanted).norm() / wanted.norm())
    assert off["fp32"] < 1e-6 < 1e-4 < off["tf32"] < 2e-3


@pytest.mark.parametrize(("first", "second", "said"), [("torch", "pretrain", 1), ("pretrain", "torch", 0)])
def test_a_fallback_that_comes_too_late_is_said_where_mps_is_chosen(first: str, second: str, said: int):
    code = f"""
import {first}, {second}
from pretrain.device import choose_device
torch.backends.mps.is_available = lambda: True
assert choose_device("cpu").type == "cpu"
print("cpu", file=sys.stderr)
assert choose_device("mps").type == "mps"
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    command = [sys.executable, "-c", "import sys" + code]
    error = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    before, _, after = error.partition("cpu\n")
    assert "pretrain" not in before
    assert after.count("torch was imported before pretrain, so operations that MPS lacks will fail") == said
