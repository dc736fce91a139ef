import json
import os
import shutil
from pathlib import Path

import pytest

from pretrain.cli import doctor as module
from pretrain.cli import main
from pretrain.cli.doctor import Finding, examine


def findings(quick: bool = True) -> dict[str, Finding]:
    return {found.name: found for found in examine(quick)}


def test_every_finding_on_this_machine(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "")
    assert main(["doctor", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"python", "torch", "gpu", "memory", "precision", "compiler", "disk"} <= set(found)
    assert all(set(finding) == {"name", "status", "text", "fix"} for finding in found.values())
    assert {finding["status"] for finding in found.values()} <= {"ok", "warn"}
    assert "GFLOP/s" in found["precision"]["text"]
    assert str(tmp_path) in found["disk"]["text"]
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "compiler" not in printed
    assert printed.startswith("ok    python")


def test_a_missing_package_names_its_command(monkeypatch):
    monkeypatch.setattr(module, "EXTRAS", (("no_such_module", "nothing", "a test"), ("pytest", "other", "a test")))
    found = findings()
    text, fix = "not installed; it is for a test", "pip install 'pretrain[nothing]'"
    assert found["no_such_module"] == Finding("no_such_module", text, fix)
    assert not found["pytest"].fix


def test_what_makes_training_impossible(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert findings()["disk"].bad
    assert main(["doctor", "--quick"]) == 1
    assert "free some space" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    assert findings()["disk"].bad


def test_torch_missing_or_unable(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "NVIDIA", Path("/"))  # which exists
    gpu = findings()["gpu"]
    assert "cannot use the NVIDIA GPU" in gpu.text
    assert gpu.fix
    monkeypatch.setitem(module.sys.modules, "torch", None)  # an import of it fails
    without = findings()
    assert without["torch"].bad
    assert without["torch"].fix == "pip install torch"
    assert "disk" in without


def test_a_compiler_that_fails(monkeypatch):
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "no g++")
    found = findings(quick=False)["compiler"]
    assert not found.bad
    assert "no g++" in found.text
    assert "apt-get install g++" in found.fix


def test_one_failing_check_hides_no_other(monkeypatch):
    def broken(*_):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr("pretrain.device.matmul_flops", broken)
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "")
    found = findings(quick=False)
    assert found["precision"] == Finding("precision", "could not be examined", "broken")
    assert not found["compiler"].fix
