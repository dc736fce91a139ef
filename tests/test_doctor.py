import json
import os
import shutil
from pathlib import Path

import pytest

from pretrain.cli import doctor as room
from pretrain.cli import main
from pretrain.cli.doctor import BAD, OK, WARN, Line, examine


def lines(quick: bool = True) -> dict[str, Line]:
    return {line.name: line for line in examine(quick)}


def test_every_finding_on_this_machine(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "")
    assert main(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"python", "torch", "cpu", "memory", "precision", "compiler", "distributed", "disk", "disk speed"} <= set(
        findings
    )
    assert {finding["status"] for finding in findings.values()} <= {OK, WARN}
    assert "GFLOP/s" in findings["precision"]["text"]
    assert str(tmp_path) in findings["disk"]["text"]
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "compiler" not in printed
    assert printed.startswith("ok    python")


def test_a_missing_package_names_its_command(monkeypatch):
    monkeypatch.setattr(room, "EXTRAS", (("no_such_module", "nothing", "a test"), ("json", "other", "a test")))
    assert lines()["no_such_module"] == Line(
        "no_such_module", WARN, "not installed; it is for a test", "pip install 'pretrain[nothing]'"
    )


def test_what_makes_training_impossible(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert lines()["disk"].status == BAD
    assert main(["doctor", "--quick"]) == 1
    assert "make room" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(room, "LEAST_PYTHON", (4, 0))
    assert lines()["python"].status == BAD


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    assert lines()["disk"].status == BAD


def test_torch_missing_or_unable(monkeypatch):
    monkeypatch.setattr(room, "has_nvidia_gpu", lambda: True)
    torch_line = lines()["torch"]
    assert torch_line.status == WARN
    assert torch_line.mend
    monkeypatch.setitem(room.sys.modules, "torch", None)  # an import of it fails
    without = lines()
    assert without["torch"].status == BAD
    assert without["torch"].mend == "pip install torch"
    assert "disk" in without


def test_a_compiler_that_fails(monkeypatch):
    monkeypatch.setattr("pretrain.training.parallel.compiler_problem", lambda device: "no g++")
    (line,) = room.check_compiler()
    assert line.status == WARN
    assert "no g++" in line.text
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    assert "apt-get install g++" in room.compiler_mend()


def test_one_failing_check_hides_no_other(monkeypatch):
    def check_memory():
        raise RuntimeError("broken\nin two lines")
        yield

    monkeypatch.setattr(room, "check_memory", check_memory)
    found = lines()
    assert found["memory"] == Line("memory", WARN, "could not be examined (broken)")
    assert "disk" in found
