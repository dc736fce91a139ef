"""benchmarks/gpu_check.py on a CPU, and what becomes of a check that breaks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_what_needs_no_card_runs_on_a_cpu(tmp_path: Path):
    """In small, with the numbers that it has on any machine; the rest says why it was skipped."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--device", "cpu", "--minutes", "20"]
    result = subprocess.run([*command, "--out", str(tmp_path / "found.json")], capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (result.returncode, found["failed"]) == (0, []), result.stdout + result.stderr
    checks = {check["name"]: check for check in found["checks"]}
    on_a_card = {"batches", "no waiting", "tests marked gpu"}
    assert {name for name, check in checks.items() if check["status"] == "skipped"} == on_a_card
    assert all("needs a CUDA device" in line for name in on_a_card for line in checks[name]["skipped"])
    facts = {name: check["facts"] for name, check in checks.items()}
    assert len(facts["attention"]) == 4 * 2 * 2 * 2
    assert all(0 < case["output"] < 1e-5 for case in facts["attention"].values())
    off = facts["loss"]["bf16, softcap 15: loss, gradients of states and of head"]
    assert all(0 < each < 0.02 for each in off)
    assert facts["compile"]["activation checkpointing on"]["graphs"] > 0
    assert facts["resume"]["SIGKILL"]["differences"] == facts["resume"]["SIGTERM"]["differences"] == 0
    assert facts["out of memory"]["in the backward pass"] == {"halved": 1, "rows": 4, "same": True}
    assert {f"{kind}, 2 processes: losses apart from one" for kind in ("ddp", "fsdp", "hsdp")} <= facts[
        "processes"
    ].keys()
    for recipe in ("gpt2-124m", "nanochat-d20", "nanochat"):
        speed = facts[f"speed of {recipe}"]
        assert speed["tokens a second"] > 0
        assert len(speed["longest kernels, share of a step"]) == 15
        assert all(0 < speed[f"share of the {part}"] < 1 for part in ("loss", "optimizer"))
    assert "aten::mm" in result.stdout


BROKEN = """
import os, sys, time
sys.path.insert(0, {folder!r})
import gpu_check
from gpu_check import Check

def breaks(report):
    report.fact("before", 1)
    raise ValueError("no such kernel\\nand more")

def goes_on(report):
    with report.part("first"):
        raise RuntimeError("out of luck")
    report.fact("second", 2)

def refuses(report):
    report.expect(False, "off by 3, more than 1")

def hangs(report):
    report.fact("before", 1)
    time.sleep(1000)

gpu_check.PATIENCE = 1
gpu_check.CHECKS = [
    Check("breaks", breaks, 60),
    Check("goes on", goes_on, 60),
    Check("refuses", refuses, 60),
    Check("hangs", hangs, 3),
    Check("dies", lambda report: os._exit(3), 60),
    Check("works", lambda report: report.fact("sum", 4), 60),
]
sys.exit(gpu_check.main(["--device", "cpu", "--out", {out!r}]))
"""


def test_a_check_that_breaks_is_a_failure_and_stops_no_other(tmp_path: Path):
    out = tmp_path / "found.json"
    script = BROKEN.format(folder=str(ROOT / "benchmarks"), out=str(out))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    found = json.loads(out.read_text())
    assert found["failed"] == ["breaks", "goes on", "refuses", "hangs", "dies"]
    checks = {check["name"]: check for check in found["checks"]}
    assert {name: check["failures"] for name, check in checks.items()} == {
        "breaks": ["ValueError: no such kernel"],
        "goes on": ["first: RuntimeError: out of luck"],
        "refuses": ["off by 3, more than 1"],
        "hangs": ["not done after 3 s"],
        "dies": ["ended with 3: "],
        "works": [],
    }
    assert checks["goes on"]["facts"] == {"second": 2}
    assert checks["hangs"]["facts"] == {"before": 1}
    assert "FAILED: ValueError: no such kernel" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 passed, 5 failed, 0 skipped in ")
