"""The main jobs where the system lacks what Linux usually has."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import TINY

WINDOWS = """
import builtins, importlib, multiprocessing, os, signal
# Other packages know the system they were built for: they are imported before it is taken away.
for name in "filelock fsspec matplotlib.pyplot psutil pyarrow.parquet rich.console torch.distributed".split():
    importlib.import_module(name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"):
    delattr(signal, name)
for name in ("fork", "sched_getaffinity", "O_DIRECTORY", "getpgid", "killpg", "setsid"):
    delattr(os, name)
real = builtins.__import__
def without(name, space=None, *more, **others):
    ours = str((space or {}).get("__name__")).startswith("pretrain")
    if ours and name in ("resource", "fcntl", "termios", "pwd", "grp"):
        raise ModuleNotFoundError(name)
    return real(name, space, *more, **others)
builtins.__import__ = without
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
"""

NOBODY = """
import os, pwd
for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
def unknown(who):
    raise KeyError(f"getpwuid(): uid not found: {who}")
pwd.getpwuid = unknown
"""

JOBS = """
if __name__ == "__main__":
    import sys
    from pretrain.cli import main
    options = sys.argv[1:]
    for job in (
        ["train", "--data", "text.jsonl", "--out", "run", *options],
        ["plan", "--data", "text.jsonl", *options],
        ["train", "--data", "text.jsonl", "--out", "live", "--data.stream", "--data.split", "hash", *options],
        ["data", "prepare", "text.jsonl", "--out", "shards", "--tokenizer", "byte", "--workers", "2"],
        ["eval", "run"],
        ["sample", "run", "--prompt", "Ada", "--max-tokens", "5"],
        ["report", "run"],
    ):
        assert main(job) == 0, job
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", [WINDOWS, NOBODY], ids=["windows", "nobody"])
def test_the_main_jobs_run_on_less(system: str, text_file: Path, tmp_path: Path):
    lines = text_file.read_text().splitlines()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "jobs.py").write_text(system + JOBS)
    options = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "jobs.py", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "output", ["| head -1", "> /dev/full", ">&-", "> out.txt"], ids=["head", "full", "closed", "encoding"]
)
def test_no_output_ends_a_run(output: str, text_file: Path, tmp_path: Path):
    options = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    train = shlex.join([sys.executable, "-m", "pretrain", "train", "--data", str(text_file), "--out", "run", *options])
    encoding = {**os.environ, "PYTHONIOENCODING": "cp932"}  # has neither é nor the replacement character
    done = subprocess.run(["bash", "-c", f"{train} {output}"], cwd=tmp_path, env=encoding, capture_output=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == TINY["train.steps"]
    if output == "> out.txt":
        assert re.search(r"\\(xe[9b]|ufffd)", (tmp_path / "out.txt").read_text("cp932"))
