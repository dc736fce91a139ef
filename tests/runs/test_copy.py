"""Checkpoints in buckets: a real S3 server (moto's) behind a connection that fails, and a machine that has only it."""

import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tests.training.test_average import noise  # noqa: F401 (a fixture)
from tests.training.test_loop import assert_same_run, change, weights
from tests.training.test_reliability import StopAt, heard, run_command, wait_for

from pretrain.cli import main
from pretrain.config import Config
from pretrain.errors import CheckpointError, DataError, Interrupted, UsageError
from pretrain.experiments.fork import fork
from pretrain.io import read_jsonl
from pretrain.runs import Run, checkpoints
from pretrain.runs import copy as copy_module
from pretrain.runs.copy import RunCopy
from pretrain.training import Callback, copier, loop, train


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path: Path, memory: str) -> str:
    """Where a run is copied to: another folder, and a store of fsspec."""
    return str(tmp_path / "copies" / "run") if request.param == "folder" else memory


@pytest.fixture
def memory() -> str:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://bucket/run"


def steps(place: str) -> list[int]:
    return copy_module.steps_in(RunCopy(place)._list())


def summary(run: Run) -> dict[str, Any]:
    return run.summary or {}


def events(run: Path) -> list[str]:
    return [event["event"] for event in read_jsonl(run / "events.jsonl")]


# ---------------------------------------------------------------- a machine that has only the bucket


def test_a_copy_is_as_the_run_directory(tiny: Config, tmp_path: Path, place: str):
    run = train(change(tiny, checkpoint__copy_to=place), tmp_path / "run")
    assert steps(place) == [8, 12]  # keep_last 2, as here
    fs, path = fsspec.url_to_fs(place)
    there = {name.removeprefix(path).strip("/") for name in fs.find(path)}
    assert {"config.toml", "origin.json", "data/manifest.json", "summary.json", "samples.jsonl"} <= there
    assert not there & {"lock", "heartbeat.json"}
    for name in there:
        assert fs.cat_file(f"{path}/{name}") == (run.folder / name).read_bytes(), name


def test_a_new_machine_goes_on_exactly(tiny: Config, tmp_path: Path, place: str):
    """Without the text, the first run directory, or anything but the command and the copy."""
    text = tmp_path / "text.txt"
    shutil.copy(tiny.data.paths[0], text)
    config = change(tiny, data__paths=(str(text),), model__dropout=0.1, checkpoint__every=2)
    undisturbed = train(config, tmp_path / "undisturbed")
    config = change(config, checkpoint__copy_to=place)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", callbacks=[StopAt(7)])
    assert steps(place)[-1] == 6
    shutil.rmtree(tmp_path / "run")
    text.unlink()
    console, said = heard()
    run = train(config, tmp_path / "other" / "run", console)
    assert f"fetching  step 6 from {place}" in said
    assert_same_run(run, undisturbed)
    assert steps(place) == [10, 12]


def test_the_newer_of_run_and_copy_is_used_and_said(tiny: Config, tmp_path: Path, place: str):
    undisturbed = train(tiny, tmp_path / "undisturbed")
    config = change(tiny, checkpoint__copy_to=place)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "a", callbacks=[StopAt(5)])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "b", callbacks=[StopAt(9)])
    console, said = heard()
    with pytest.raises(ZeroDivisionError):  # the copy is newer than what this machine has
        train(config, tmp_path / "a", console, callbacks=[StopAt(10)])
    assert f"fetching  step 8 from {place}, newer than step 4 here" in said
    fs, path = fsspec.url_to_fs(place)
    fs.rm(f"{path}/checkpoints/step-00000008", recursive=True)
    console, said = heard()
    run = train(config, tmp_path / "a", console)
    assert f"copy      step 8 here is newer than step 4 in {place}" in said
    assert_same_run(run, undisturbed)


def test_a_finished_run_is_fetched_finished_and_made_longer(tiny: Config, tmp_path: Path, memory: str):
    config = change(tiny, schedule__kind="constant", checkpoint__copy_to=memory)
    train(config, tmp_path / "a")
    console, said = heard()
    assert train(config, tmp_path / "b", console).summary is not None
    assert any("is finished: 12 steps" in line for line in said)
    longer = change(config, train__steps=20)
    with pytest.raises(ZeroDivisionError):
        train(longer, tmp_path / "c", callbacks=[StopAt(17)])
    run = train(longer, tmp_path / "d")  # not taken for finished
    assert summary(run)["steps"] == 20
    a, b = (
        weights(each.newest_checkpoint())
        for each in (run, train(change(longer, checkpoint__copy_to=""), tmp_path / "e"))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_checkpoint_is_there_too(noise: Config, tmp_path: Path, memory: str):  # noqa: F811
    """What a run leaves with checkpoint.keep_best is the same on the machine that ends it."""
    undisturbed = train(noise, tmp_path / "undisturbed")
    best, config = summary(undisturbed)["model_step"], change(noise, checkpoint__copy_to=memory)
    assert best < 34
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "a", callbacks=[StopAt(38)])
    assert steps(memory) == [best, 34]
    run = train(config, tmp_path / "b")
    clock = ("seconds", "tokens_per_second")
    assert all(summary(run)[name] == value for name, value in summary(undisturbed).items() if name not in clock)


def test_the_command_and_the_bucket_are_enough(tiny: Config, tmp_path: Path, memory: str, capsys):
    with pytest.raises(ZeroDivisionError):
        train(change(tiny, checkpoint__copy_to=memory), tmp_path / "a", callbacks=[StopAt(9)])
    assert main(["train", "--out", str(tmp_path / "b"), "--checkpoint.copy_to", memory]) == 0
    assert "fetching  step 8" in capsys.readouterr().out
    assert summary(Run.open(tmp_path / "b"))["steps"] == 12


def test_going_back_goes_back_in_the_copy(tiny: Config, tmp_path: Path, memory: str):
    """Or the next start would fetch what was set aside."""
    config = change(tiny, checkpoint__keep_last=0, checkpoint__copy_to=memory)
    train(config, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", resume_from=4, callbacks=[StopAt(6)])
    assert steps(memory) == [4]
    train(config, tmp_path / "run", resume_from=4)
    assert steps(memory) == [4, 8, 12]


# ---------------------------------------------------------------- what is refused


def test_another_run_is_refused_and_nothing_is_left(tiny: Config, tmp_path: Path, place: str):
    config = change(tiny, checkpoint__copy_to=place)
    train(config, tmp_path / "a")
    other = change(config, model__layers=3)
    with pytest.raises(
        UsageError, match=r"run was made with another configuration \(model.layers 2 → 3\); choose another --c"
    ):
        train(other, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    train(change(other, checkpoint__copy_to=""), tmp_path / "b")
    with pytest.raises(UsageError, match=r"has a copy of another run \(model.layers 2 → 3\); choose another"):
        train(other, tmp_path / "b")
    text = tmp_path / "text.txt"
    text.write_text("Something else to learn from. " * 700)
    train(change(tiny, data__paths=(str(text),)), tmp_path / "c")
    with pytest.raises(UsageError, match=r"has a copy of another run \(other tokens\)"):
        train(change(config, data__paths=(str(text),)), tmp_path / "c")
    assert steps(place) == [8, 12]


def test_a_fork_is_not_copied_to_the_place_of_its_parent(tiny: Config, tmp_path: Path, memory: str):
    parent = train(change(tiny, checkpoint__copy_to=memory), tmp_path / "parent")
    made = fork(parent.folder, tmp_path / "fork", change(parent.config, train__steps=16), given={"train.steps"})
    assert not made.config.checkpoint.copy_to
    with pytest.raises(UsageError, match=r"has a copy of another run \(a fork\)"):
        train(change(made.config, checkpoint__copy_to=memory), made.folder)
    config = change(made.config, checkpoint__copy_to="memory://bucket/fork")
    with pytest.raises(ZeroDivisionError):
        train(config, made.folder, callbacks=[StopAt(14)])
    assert steps("memory://bucket/fork") == [12]
    run = train(config, tmp_path / "elsewhere")
    assert run.fork == made.fork
    assert summary(run)["steps"] == 16


def test_places_that_are_no_copies_are_refused(tiny: Config, tmp_path: Path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine has files but no run; choose another"):
        train(change(tiny, checkpoint__copy_to=str(tmp_path / "mine")), tmp_path / "run")
    train(change(tiny, checkpoint__copy_to=""), tmp_path / "run")
    with pytest.raises(UsageError, match="run is a run directory itself"):
        train(change(tiny, checkpoint__copy_to=str(tmp_path / "run")), tmp_path / "run")
    with pytest.raises(DataError, match="nosuch:// is not a known protocol"):
        train(change(tiny, checkpoint__copy_to="nosuch://x/y"), tmp_path / "run")
    assert main(["train", "--out", "s3://bucket/run"]) == 2
    assert "give a folder as --out, and --checkpoint.copy_to s3://bucket/run" in capsys.readouterr().err


def test_two_machines_that_train_the_same_run_are_not_mixed(tiny: Config, tmp_path: Path, memory: str):
    """Such as one that was believed dead."""
    config = change(tiny, checkpoint__copy_to=memory)

    class Other(Callback):
        def on_step(self, record):
            if record["step"] == 6:
                train(config, tmp_path / "b")

    with pytest.raises(CheckpointError, match=r"has a checkpoint of step 12 that another process copied"):
        train(config, tmp_path / "a", callbacks=[Other()])
    assert "copy_failed" in events(tmp_path / "a")
    assert summary(Run.open(tmp_path / "a"))["steps"] == 12


# ---------------------------------------------------------------- faults


def test_a_damaged_checkpoint_there_is_skipped(tiny: Config, tmp_path: Path, memory: str):
    config = change(tiny, checkpoint__copy_to=memory)
    undisturbed = train(tiny, tmp_path / "undisturbed")
    train(config, tmp_path / "a")
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket/run/summary.json")
    (file,) = fs.glob("/bucket/run/checkpoints/step-00000012/*.safetensors")
    data = bytearray(fs.cat_file(file))
    data[len(data) // 2] ^= 1
    fs.pipe_file(file, bytes(data))
    console, said = heard()
    assert_same_run(train(config, tmp_path / "b", console), undisturbed)
    assert any("skipping the damaged checkpoint of step 12" in line for line in said)
    assert fs.cat_file(file) != bytes(data)  # it did not pass for copied
    fs.pipe_file(file, bytes(data))
    assert_same_run(train(config, tmp_path / "d"), undisturbed)  # though there is a summary.json
    for step in steps(memory):
        fs.pipe_file(f"/bucket/run/checkpoints/step-{step:08d}/state.json", b"{}")
    with pytest.raises(CheckpointError, match="every checkpoint in memory://bucket/run is damaged"):
        train(config, tmp_path / "c")


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", ".safetensors", "COMMIT"])
def test_a_copy_cut_off_anywhere_is_not_taken_for_whole(tiny: Config, tmp_path: Path, place: str, monkeypatch, name):
    config = change(tiny, checkpoint__copy_to=place)
    undisturbed = train(tiny, tmp_path / "undisturbed")
    whole = [4] if name != "manifest.json" else []
    with pytest.raises(ZeroDivisionError):
        train(config if whole else tiny, tmp_path / "a", callbacks=[StopAt(6)])
    put = RunCopy._put

    def cut_off(copy, folder, file):
        if file.endswith(name) and "step-00000004" not in file:
            raise SystemExit  # as good as dead
        put(copy, folder, file)

    with monkeypatch.context() as patch:
        patch.setattr(RunCopy, "_put", cut_off)
        patch.setattr(threading, "excepthook", lambda _: None)
        with pytest.raises((CheckpointError, ZeroDivisionError)):
            train(config, tmp_path / "a", callbacks=[StopAt(10)])
    assert steps(place) == whole
    shutil.rmtree(tmp_path / "a")
    assert_same_run(train(config, tmp_path / "b"), undisturbed)


def test_no_step_of_a_copied_checkpoint_is_missing_from_the_metrics(
    tiny: Config, tmp_path: Path, memory: str, monkeypatch
):
    """Also if it was committed after they were copied, as while the tokens are."""
    config = change(tiny, checkpoint__copy_to=memory)
    with pytest.raises(ZeroDivisionError):
        train(change(tiny, checkpoint__copy_to=""), tmp_path / "run", callbacks=[StopAt(6)])
    run, put = Run.open(tmp_path / "run"), RunCopy._put
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "later")
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:2]))

    def cut_off(copy, folder, name):
        put(copy, folder, name)
        if name.endswith("COMMIT"):
            raise SystemExit
        if name == "data/manifest.json" and (tmp_path / "later").exists():
            run.metrics.write_text("".join(lines))
            (tmp_path / "later").rename(tmp_path / "run" / "checkpoints")

    copy = RunCopy(memory)
    copy.claim(run)
    monkeypatch.setattr(RunCopy, "_put", cut_off)
    with pytest.raises(SystemExit):
        copy.send(Run(run.folder, config))
    assert steps(memory) == [4]
    there = copy._read("metrics.jsonl").splitlines()
    assert len(there) >= 4


def test_a_fork_whose_copy_had_only_begun_goes_on(tiny: Config, tmp_path: Path, memory: str, monkeypatch):
    parent = train(tiny, tmp_path / "parent")
    made = fork(parent.folder, tmp_path / "fork", change(parent.config, train__steps=16), given={"train.steps"})
    RunCopy(memory).claim(made)  # killed before fork.json is copied
    config = change(made.config, checkpoint__copy_to=memory)
    run = train(config, made.folder)
    shutil.copytree(run.folder, tmp_path / "fetched", ignore=lambda *_: ["fork.json", "checkpoints", "summary.json"])
    assert train(config, tmp_path / "fetched").fork == made.fork  # a fetch that was cut off before fork.json


def test_prepared_tokens_are_kept_though_there_is_no_copy_yet(tiny: Config, tmp_path: Path, memory: str):
    run = train(change(tiny, checkpoint__copy_to=""), tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copytree(run.data, tmp_path / "b" / "data")  # killed after it was prepared
    console, said = heard()
    train(change(tiny, checkpoint__copy_to=memory), tmp_path / "b", console)
    assert any("nothing left to prepare" in line for line in said)


def test_a_fetch_cut_off_after_the_newest_checkpoint_lacks_nothing(
    noise: Config,  # noqa: F811
    tmp_path: Path,
    memory: str,
    monkeypatch,
):
    run = train(change(noise, checkpoint__copy_to=memory), tmp_path / "a")
    assert summary(run)["model_step"] != run.newest_checkpoint().step
    get = RunCopy._get_checkpoint

    def cut_off(copy, step, *arguments):
        get(copy, step, *arguments)
        if step == run.newest_checkpoint().step:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunCopy, "_get_checkpoint", cut_off)
        with pytest.raises(SystemExit):
            train(run.config, tmp_path / "b")
    assert summary(train(run.config, tmp_path / "b")) == summary(run)
    assert steps(memory) == [summary(run)["model_step"], run.newest_checkpoint().step]


@pytest.mark.parametrize("name", ["metrics.jsonl", ".bin", "manifest.json", ".safetensors", "state.json"])
def test_a_fetch_cut_off_anywhere_is_done_again(tiny: Config, tmp_path: Path, memory: str, monkeypatch, name: str):
    config = change(tiny, checkpoint__copy_to=memory)
    undisturbed = train(tiny, tmp_path / "undisturbed")
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "a", callbacks=[StopAt(9)])
    get = MemoryFileSystem.get_file

    def cut_off(fs, path, to, **options):
        get(fs, path, to, **options)
        if path.endswith(name):
            with open(to, "r+b") as file:
                file.truncate(10)
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", cut_off)
        with pytest.raises(SystemExit):
            train(config, tmp_path / "b")
    assert not checkpoints(tmp_path / "b" / "checkpoints")
    assert_same_run(train(config, tmp_path / "b"), undisturbed)


def failing(monkeypatch, fails) -> list[str]:
    """Let memory:// fail to take a file where ``fails`` of its name and how many came before it; gives their names."""
    put, names = MemoryFileSystem.put_file, []

    def put_file(fs, file, path, **options):
        names.append(path)
        if fails(path, len(names)):
            raise ConnectionError("the network is gone")
        put(fs, file, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return names


def test_a_bucket_that_is_down_for_a_while_stops_nothing(tiny: Config, tmp_path: Path, memory: str, monkeypatch):
    undisturbed = train(tiny, tmp_path / "undisturbed")
    down = threading.Event()

    class Network(Callback):
        def on_step(self, record):
            (down.set if record["step"] == 2 else down.clear if record["step"] == 9 else int)()

        def on_event(self, event):
            said.append(event["text"])

        def on_checkpoint(self, path):
            time.sleep(0.5)  # so that there is a try for each

    said: list[str] = []
    failing(monkeypatch, lambda path, _: down.is_set())
    run = train(change(tiny, checkpoint__copy_to=memory), tmp_path / "run", callbacks=[Network()])
    assert_same_run(run, undisturbed)
    assert events(run.folder) == ["copy_failed", "copied"]
    assert said == [
        f"copying failed: {memory}: cannot be reached (ConnectionError: the network is gone); check the address and the"
        " network, or try again later; training goes on, and so do the tries",
        f"copying to {memory} works again",
    ]
    assert steps(memory)[-1] == 12


def test_what_is_not_copied_at_the_end_is_said_and_copied_by_the_same_command(
    tiny: Config, tmp_path: Path, memory: str, monkeypatch
):
    config = change(tiny, checkpoint__copy_to=memory)
    with monkeypatch.context() as patch:
        patch.setattr(copier, "LONGEST_GRACE", 1.0)
        patch.setattr(copier, "SLOWEST", 1e12)
        failing(patch, lambda path, _: "step-00000012" in path)
        message = (
            r"the run is finished, but not all is copied \(.* network is gone.*\); the newest checkpoint there is of"
        )
        with pytest.raises(CheckpointError, match=message):
            train(config, tmp_path / "run")
    assert summary(Run.open(tmp_path / "run"))["steps"] == 12
    assert 12 not in steps(memory)
    assert not RunCopy(memory).fs.exists("/bucket/run/summary.json")
    train(config, tmp_path / "run")
    assert steps(memory)[-1] == 12
    assert RunCopy(memory).fs.exists("/bucket/run/summary.json")


def test_a_slow_copy_skips_checkpoints_and_keeps_only_the_one_it_copies(
    tiny: Config, tmp_path: Path, memory: str, monkeypatch
):
    """Steps do not wait for it, and pruning leaves it the files."""
    config = change(tiny, checkpoint__copy_to=memory, checkpoint__every=1, checkpoint__keep_last=1, train__steps=20)
    put, at = MemoryFileSystem.put_file, []

    def slowly(fs, file, path, **options):
        if path.endswith(".safetensors"):
            at.append((path[path.index("step-") :].partition("/")[0], run.step))
            while run.step < min(20, at[-1][1] + 7):  # for seven steps, each of which saves a checkpoint
                time.sleep(0.01)
            there.append([checkpoint.step for checkpoint in checkpoints(tmp_path / "run" / "checkpoints")])
        put(fs, file, path, **options)

    class Watch(Callback):
        step = 0

        def on_checkpoint(self, path):
            self.step = int(path.name.removeprefix("step-"))

    run, there = Watch(), []
    monkeypatch.setattr(MemoryFileSystem, "put_file", slowly)
    train(config, tmp_path / "run", callbacks=[run])
    assert len(at) <= 5
    assert at[-1][0] == "step-00000020"
    assert steps(memory) == [20]
    assert all(len(each) <= 3 for each in there)  # the one that is copied, the last, one that is about to be pruned
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run" / "checkpoints")] == [20]


@pytest.mark.parametrize("works", [True, False])
def test_a_signal_saves_first_and_copies_as_far_as_the_grace_allows(
    tiny: Config, tmp_path: Path, memory: str, monkeypatch, works: bool
):
    monkeypatch.setattr(loop, "LEAVING", 0.5)
    config = change(tiny, checkpoint__copy_to=memory, guard__grace_seconds=2.0, train__steps=4000, checkpoint__every=0)
    saved: list[bool] = []

    def fails(path: str, count: int) -> bool:
        if "step-" in path:
            saved.append(bool(checkpoints(tmp_path / "run" / "checkpoints")))
        return "step-" in path and not works

    class Signal(Callback):
        def on_step(self, record):
            if record["step"] == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    failing(monkeypatch, fails)
    said = (
        "all saved; resume"
        if works
        else "all saved here, but not all is copied .*; there is no checkpoint there; resume"
    )
    with pytest.raises(Interrupted, match=said):
        train(config, tmp_path / "run", callbacks=[Signal()])
    assert saved
    assert all(saved)
    assert len(steps(memory)) == works


def test_a_run_that_fails_copies_what_it_saved(tiny: Config, tmp_path: Path, memory: str):
    class Fails(Callback):
        def on_start(self, trainer):
            raise RuntimeError("its own")

    config = change(tiny, checkpoint__copy_to=memory)
    with pytest.raises(RuntimeError, match="its own"):  # not one of a copy that has not begun
        train(config, tmp_path / "run", callbacks=[Fails()])
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", callbacks=[StopAt(5)])
    assert steps(memory) == [4]


# ---------------------------------------------------------------- an S3 server


class Wire(threading.Thread):
    """A connection to a server; its ``state`` is fine, slow, cut (after some bytes) or dead."""

    def __init__(self, server: tuple[str, int]):
        super().__init__(daemon=True)
        self.server, self.state, self.sent = server, "fine", 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def run(self) -> None:
        while True:
            client, _ = self.socket.accept()
            if self.state == "dead":
                client.close()
                continue
            server = socket.create_connection(self.server)
            for source, to in ((client, server), (server, client)):
                threading.Thread(target=self.carry, args=(source, to, source is client), daemon=True).start()

    def carry(self, source: socket.socket, to: socket.socket, up: bool) -> None:
        try:
            carried = 0
            while data := source.recv(4096):
                carried += len(data)
                if self.state == "dead" or (self.state == "cut" and carried > 20_000):
                    break
                if self.state == "slow" and up:
                    time.sleep(0.02)
                to.sendall(data)
                self.sent += len(data) * up
        except OSError:
            pass
        for each in (source, to):
            each.close()


@pytest.fixture
def wire(monkeypatch) -> Iterator[Wire]:
    """To an S3 server of moto with the bucket 'bucket'."""
    pytest.importorskip("s3fs")
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port())
    wire.start()
    for name, value in {
        "AWS_ENDPOINT_URL": wire.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    s3fs.S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(f"{wire.url}/moto-api/reset", data=b"").close()
    fsspec.filesystem("s3").mkdir("bucket")
    yield wire
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


S3 = "s3://bucket/runs/mine"


def test_s3_a_cut_connection_and_a_new_machine(tiny: Config, tmp_path: Path, wire: Wire):
    undisturbed = train(tiny, tmp_path / "undisturbed")
    config = change(tiny, checkpoint__copy_to=S3)

    class Faults(Callback):
        def on_step(self, record):
            wire.state = {3: "cut", 6: "dead", 9: "slow"}.get(record["step"], wire.state)
            if record["step"] == 8:
                assert failed.wait(120)

        def on_event(self, event):
            failed.set()

    failed = threading.Event()
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "a", callbacks=[Faults(), StopAt(11)])
    assert "copy_failed" in events(tmp_path / "a")
    wire.state = "fine"
    assert steps(S3) == [8]
    shutil.rmtree(tmp_path / "a")
    assert_same_run(train(config, tmp_path / "b"), undisturbed)
    assert steps(S3) == [8, 12]


def test_s3_what_is_wrong_with_it_is_said_before_the_first_step(tiny: Config, tmp_path: Path, wire: Wire, monkeypatch):
    with pytest.raises(DataError, match="s3://elsewhere/run: no such file or folder; check the address"):
        train(change(tiny, checkpoint__copy_to="s3://elsewhere/run"), tmp_path / "run")
    wire.state = "dead"
    monkeypatch.setattr(copy_module.RETRYING, "wait", lambda _: 0)
    with pytest.raises(DataError, match="s3://bucket/runs/mine: cannot be reached"):
        train(change(tiny, checkpoint__copy_to=S3), tmp_path / "run")
    assert not Run.exists(tmp_path / "run")


@pytest.mark.slow
def test_s3_killed_in_the_middle_of_uploads(tiny: Config, tmp_path: Path, wire: Wire):
    """Real processes, killed with -9 while a slow connection takes a checkpoint; then always a new machine."""
    config = change(tiny, train__steps=300, checkpoint__every=3, model__dropout=0.1)
    undisturbed = train(config, tmp_path / "undisturbed")
    config, cut_off = change(config, checkpoint__copy_to=S3), 0
    for number in range(4):
        process = run_command(config, tmp_path / f"machine{number}")
        wait_for(
            tmp_path / f"machine{number}" / "checkpoints" / "step-00000003" / "COMMIT", process
        ) if not number else 0
        wire.state, before = "slow", wire.sent
        while wire.sent < before + 60_000 * (number + 1) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        wire.state = "fine"
        there = RunCopy(S3)._list()
        cut_off += bool({*copy_module.steps_in(there, ".*")} - {*copy_module.steps_in(there)})
        shutil.rmtree(tmp_path / f"machine{number}")
    assert cut_off  # or nothing was shown
    assert_same_run(train(config, tmp_path / "run"), undisturbed)
