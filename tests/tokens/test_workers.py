"""Worker processes: what they give, what they are told, and how they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from pretrain.errors import DataError, PretrainError
from pretrain.tokens.workers import run_in_processes

pytestmark = pytest.mark.slow


def facts(name: str, report) -> tuple[str | None, bool, bool]:
    report(1, 2)
    report(3, 4)
    print("what a library may print")
    return os.environ.get(name), "torch" in sys.modules, os.getpid() != multiprocessing.parent_process().pid  # type: ignore[union-attr]


def test_tasks_are_done_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "random.py").write_text("raise RuntimeError('not the random of the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "77")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    before, main, told = dict(os.environ), sys.modules["__main__"], []
    names = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "RAYON_NUM_THREADS"]
    results = run_in_processes(facts, [(name,) for name in names], lambda *more: told.append(more), 2)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert results == [("77", False, True), (str(2**26), False, True), (threads, False, True)]
    assert [sum(each) for each in zip(*told, strict=True)] == [12, 18]
    assert dict(os.environ) == before
    assert sys.modules["__main__"] is main
    assert not multiprocessing.active_children()


def die_once(file: str, report) -> str:
    """A task whose first process is killed by the system."""
    report(1, 2)
    if file and not Path(file).exists():
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def die(how: str, report) -> None:
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_replaced_once(tmp_path: Path):
    told = []
    files = [(str(tmp_path / "a"),), ("",), ("",)]
    assert run_in_processes(die_once, files, lambda *more: told.append(more), 2) == ["alive"] * 3
    assert sum(size for size, _ in told) >= 4  # with what was done before it died
    # Two deaths with a task done in between: one at a time, each dies once.
    assert run_in_processes(die_once, [(str(tmp_path / name),) for name in "bc"], lambda *_: None, 1) == ["alive"] * 2
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_twice_is_an_error_of_one_line():
    with pytest.raises(PretrainError, match=r"^a worker process died, twice \(SIGKILL.*memory.*fewer --workers.*$"):
        run_in_processes(die, [("kill",), ("kill",), ("kill",)], lambda *_: None, 2)
    with pytest.raises(PretrainError, match=r"twice \(exit code 3;"):
        run_in_processes(die, [("exit",)], lambda *_: None, 1)
    assert not multiprocessing.active_children()


def fail(kind: str, report) -> None:
    if kind == "ours":
        raise DataError("a.txt: this is wrong; fix it")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/x")
    raise ZeroDivisionError("a defect")


def test_what_goes_wrong_in_a_worker_is_raised_here():
    for kind, expected in (("ours", DataError), ("disk", OSError), ("defect", ZeroDivisionError)):
        with pytest.raises(expected) as caught:
            run_in_processes(fail, [(kind,)], lambda *_: None, 1)
        if kind == "ours":
            assert str(caught.value) == "a.txt: this is wrong; fix it"
        elif kind == "disk":
            assert caught.value.args[0] == 28
        else:
            assert "in fail" in str(caught.value.__cause__)  # the traceback of the worker
    assert not multiprocessing.active_children()


SCRIPT = """
import sys
print("script", flush=True)
from pathlib import Path
from pretrain.config import DataConfig, TokenizerConfig
from pretrain.tokens.prepare import prepare_text
data = DataConfig(paths=(sys.argv[1],), split="hash", val_fraction=0.2)
prepare_text(data, TokenizerConfig("byte"), Path(sys.argv[2]), shard_tokens=1000, workers=2)
print("done", flush=True)
"""


@pytest.mark.parametrize("way", ["script", "-c", "stdin"])
def test_a_program_without_a_main_guard(way: str, tmp_path: Path):
    """A worker does not run the program again that started it."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number} " * 200)
    (tmp_path / "script.py").write_text(SCRIPT)
    start = {"script": ["script.py"], "-c": ["-c", SCRIPT], "stdin": ["-"]}[way]
    command = [sys.executable, *start, "text", "out"]
    result = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "script\ndone\n", "")
    assert len(list((tmp_path / "out").glob("*.bin"))) > 10


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_reaches_the_workers_at_any_moment_and_the_parent_decides():
    """A terminal sends SIGINT to all processes: also to workers that have not begun."""
    code = (
        "import sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_workers import sleep\n"
        "from pretrain.tokens.workers import run_in_processes\n"
        "print('up', flush=True)\n"
        "try: run_in_processes(sleep, [(60,)] * 2, print, 2)\n"
        "except KeyboardInterrupt: print('stopped')\n"
    )
    for delay in (0.02, 0.1, 0.3, 1.5):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        printed, error = process.communicate(timeout=50)  # which ends when no worker holds the pipes any more
        assert (process.returncode, printed, error) == (0, "stopped\n", "")


def test_ctrl_c_while_a_worker_starts_leaves_none(monkeypatch: pytest.MonkeyPatch):
    """Also when a thread of a library takes the signal, as those of OpenBLAS may."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    start = SpawnProcess._Popen
    begun = []

    def interrupted(*arguments):
        begun.append(start(*arguments))
        signal.pthread_kill(thread.ident or 0, signal.SIGINT)
        time.sleep(0.1)  # where Python interrupts
        return begun[-1]

    monkeypatch.setattr(SpawnProcess, "_Popen", staticmethod(interrupted))
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_processes(sleep, [(60,)] * 2, lambda *_: None, 2)
        assert [process.poll() for process in begun] == [-signal.SIGKILL] * 2
    finally:
        end.set()
        for process in begun:
            process.kill()


def sleep(seconds: float, report) -> None:
    time.sleep(seconds)
