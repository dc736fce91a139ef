import importlib.util
import json
import sqlite3
import sys
import threading
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Config, load_config
from pretrain.errors import UsageError
from pretrain.io import without_secrets
from pretrain.training import loggers
from pretrain.training.loggers import Logger, chosen


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def config_of(*backends: str, **fields: Any) -> Config:
    return load_config("quickstart", **{"log.backends": list(backends), **fields})


def record(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "time": 1.5 * step, "train/loss": 1.0 / step if loss is None else loss, "val/bpb": None}


class Loggers:
    """All loggers of a run, as training calls them."""

    def __init__(self, folder: Path, config: Config, done: int, say: Callable[[str], None]):
        self.all = [Logger(kind, folder, config, done, say) for kind in chosen(config.log.backends, say)]

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        for each in self.all:
            each.on_sample(step, prompt, text)

    def on_end(self, interrupted: bool) -> None:
        for each in self.all:
            each.on_end(interrupted)


def steps_of(log: Loggers, records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        for each in log.all:
            each.on_step(record)


class Said(list):
    """Hears what is said, from any thread."""

    def __call__(self, text: str) -> None:
        self.append(text)


def events(folder: Path) -> dict[int, float]:
    """The training losses that TensorBoard reads from event files; every step at most once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/loss")
    assert len({event.step for event in scalars}) == len(scalars)
    return {event.step: event.value for event in scalars}


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch: pytest.MonkeyPatch):
    """TensorBoard sorts its files by name: the second, the process, and a counter whose 10 comes before its 9."""
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.summary.writer import event_file_writer

        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@needs("tensorboard")
def test_tensorboard_reads_what_was_logged(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = Said()
    log = Loggers(tmp_path, config_of("auto"), 0, said)
    steps_of(log, [record(1), record(2)])
    log.on_sample(2, "", "a sample with ``` in it")
    log.on_end(False)
    prompts = Loggers(tmp_path, config_of("auto", **{"sample.prompts": ["a", "b"]}), 2, said)
    prompts.on_sample(3, "b", "b and more")
    prompts.on_end(False)
    assert said == []
    assert events(tmp_path) == pytest.approx({1: 1.0, 2: 0.5})
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {"train/loss", "time"}
    assert {"sample/text_summary", "sample/2/text_summary", "config/text_summary"} <= set(accumulator.Tags()["tensors"])
    assert not (tmp_path / "loggers.json").exists()


@needs("tensorboard")
def test_steps_done_again_after_a_resume_replace_the_first(tmp_path: Path):
    log = Loggers(tmp_path, config_of("tensorboard"), 0, Said())
    steps_of(log, (record(step) for step in range(1, 8)))
    log.on_end(False)
    log = Loggers(tmp_path, config_of("tensorboard"), 4, Said())  # killed after step 7, the checkpoint was of step 4
    steps_of(log, [record(5, 55.0), record(6, 66.0)])
    log.on_end(False)
    assert events(tmp_path) == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4, 5: 55, 6: 66})


@needs("tensorboard")
def test_steps_taken_back_after_a_spike_are_replaced(tmp_path: Path):
    log = Loggers(tmp_path, config_of("tensorboard"), 0, Said())
    steps_of(log, [*(record(step) for step in range(1, 6)), record(3, 33.0), record(4, 44.0)])
    log.on_end(False)
    assert events(tmp_path) == pytest.approx({1: 1, 2: 1 / 2, 3: 33, 4: 44})


class FakeWandb(types.ModuleType):
    """Records what a run is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.key = False

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt  # a question would stop the thread for ever
        assert not verify
        return self.key

    def setup(self, settings: dict[str, Any]) -> None:
        assert settings["silent"]

    def init(self, **options: Any) -> "FakeWandb":
        self.inits.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    Settings = dict
    Html = str


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loggers, "installed", lambda name: True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def test_wandb_goes_on_with_the_same_run_and_logs_no_step_twice(tmp_path: Path, wandb: FakeWandb):
    run = tmp_path / "myrun"
    run.mkdir()
    log = Loggers(run, config_of("wandb"), 0, Said())
    steps_of(log, (record(step) for step in range(1, 8)))
    log.on_sample(7, "", "<b>")
    log.on_end(False)
    log = Loggers(run, config_of("wandb", **{"sample.prompts": ["a", "b"]}), 4, Said())
    steps_of(log, (record(step) for step in range(5, 10)))
    for prompt in ("a", "b"):
        log.on_sample(9, prompt, prompt)
    log.on_end(False)
    assert [step for step, values in wandb.logged if "train/loss" in values] == list(range(1, 10))
    assert (7, {"sample": "<pre>&lt;b&gt;</pre>"}) in wandb.logged
    assert wandb.logged[-2:] == [(9, {"sample/1": "<pre>a</pre>"}), (9, {"sample/2": "<pre>b</pre>"})]
    first, second = wandb.inits
    assert first["id"] == second["id"] == json.loads((run / "loggers.json").read_text())["wandb"]["id"]
    assert (first["name"], first["project"], first["resume"]) == ("myrun", "pretrain", "allow")
    assert wandb.finished == 2


def test_what_was_measured_before_the_first_step(tmp_path: Path, wandb: FakeWandb):
    before = {"step": 0, "val/loss": 5.5}
    for done in (-1, -1, 4):  # killed before its first checkpoint, and after it
        log = Loggers(tmp_path, config_of("wandb"), done, Said())
        steps_of(log, [before, record(1)] if done < 0 else [record(5)])
        log.on_end(False)
    assert [(step, values.get("val/loss")) for step, values in wandb.logged] == [(0, 5.5), (1, None), (5, None)]


@needs("tensorboard")
def test_tensorboard_has_step_0_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (5.5, 6.5):
        log = Loggers(tmp_path, config_of("tensorboard"), -1, Said())
        steps_of(log, [{"step": 0, "val/loss": loss}, record(1)])
        log.on_end(False)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("val/loss")] == [(0, 6.5)]


def test_no_secret_reaches_a_logger(tmp_path: Path, wandb: FakeWandb):
    url = "https://me:hunter2@host.example/a.txt?X-Amz-Signature=hunter3#hunter4"
    log = Loggers(tmp_path, config_of("wandb", **{"data.paths": [url, "plain.txt"]}), 0, Said())
    log.on_end(False)
    assert wandb.inits[0]["config"]["data"]["paths"] == ["https://host.example/a.txt", "plain.txt"]
    assert "hunter" not in repr(wandb.inits)
    assert without_secrets(f"failed: {url} is gone") == "failed: https://host.example/a.txt is gone"
    assert wandb.inits[0]["settings"]["x_disable_meta"]  # it would hold the command line


def test_without_a_key_wandb_is_offline(tmp_path: Path, wandb: FakeWandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    said = Said()
    Loggers(tmp_path, config_of("wandb"), 0, said).on_end(False)
    assert wandb.inits[0]["mode"] == "offline"
    assert len(said) == 1
    assert "wandb login" in said[0]
    wandb.key = True
    Loggers(tmp_path, config_of("wandb"), 0, said).on_end(False)
    assert "mode" not in wandb.inits[1]
    assert len(said) == 1


def test_a_logger_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path, wandb: FakeWandb, monkeypatch):
    def log(values: dict[str, Any], step: int) -> None:
        if step == 2:
            raise ConnectionError("no route to https://me:hunter2@host/\nand more")
        wandb.logged.append((step, values))

    monkeypatch.setattr(wandb, "log", log)
    other: list[int] = []
    fine = types.SimpleNamespace(log=lambda _, step: other.append(step), finish=lambda: other.append(-1))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **_: fine))
    said = Said()
    handle = Loggers(tmp_path, config_of("wandb", "trackio"), 0, said)
    steps_of(handle, (record(step) for step in range(1, 6)))
    handle.on_end(False)
    assert said == ["the logger wandb failed (no route to https://host/); training continues without it"]
    assert [step for step, _ in wandb.logged] == [1]
    assert other == [1, 2, 3, 4, 5, -1]


def test_a_logger_that_cannot_begin(tmp_path: Path, wandb: FakeWandb, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: sys.exit(3))
    said = Said()
    handle = Loggers(tmp_path, config_of("wandb"), 0, said)
    steps_of(handle, [record(1)])
    handle.on_end(False)
    assert said == ["the logger wandb failed (3); training continues without it"]


def test_a_logger_that_hangs_holds_nothing_up(tmp_path: Path, wandb: FakeWandb, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(wandb, "log", lambda *_, **__: free.wait(30))
    monkeypatch.setattr(loggers, "LONGEST_QUEUE", 3)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
    said = Said()
    handle = Loggers(tmp_path, config_of("wandb"), 0, said)
    for step in range(1, 11):
        steps_of(handle, [record(step)])
    handle.on_end(False)
    free.set()
    assert len(said) == 2
    assert "slower than training" in said[0]
    assert "did not finish" in said[1]


def test_missing_and_unwanted_loggers(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(loggers, "installed", lambda name: False)
    said = Said()
    assert chosen(("auto", "wandb"), said) == []
    assert said == ["log.backends names wandb, which is missing: pip install 'pretrain[wandb]'; continuing without it"]
    monkeypatch.setattr(loggers, "installed", lambda name: True)
    assert chosen(("auto", "tensorboard", "wandb"), said) == ["tensorboard", "wandb"]
    assert chosen(("none",), said) == chosen((), said) == []
    quiet = Loggers(tmp_path, config_of("none"), 0, said)
    steps_of(quiet, [record(1)])
    quiet.on_end(False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"log.backends must be one of auto, none, tensorboard.*did you mean 'wandb'"):
        config_of("wandbb")


def test_a_folder_is_no_module(tmp_path: Path, monkeypatch):
    (tmp_path / "some_logger").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not loggers.installed("some_logger")
    assert loggers.installed("json")


@needs("wandb")
def test_the_real_wandb_without_a_key(tmp_path: Path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    said = Said()
    for done, steps in ((0, range(1, 4)), (2, range(3, 6))):
        log = Loggers(tmp_path, config_of("wandb"), done, said)
        steps_of(log, (record(step) for step in steps))
        log.on_sample(steps[-1], "", "a sample")
        log.on_end(False)
    assert len(said) == 2
    assert all("wandb login" in text for text in said)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # parts of one run
    assert all(b"train/loss" in file.read_bytes() for file in files)


@needs("trackio")
def test_the_real_trackio(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    code = """
import sys
from pathlib import Path
from pretrain.config import load_config
from pretrain.training.loggers import Logger
for done, steps in ((0, range(1, 4)), (2, range(3, 6))):
    log = Logger("trackio", Path(sys.argv[1]), load_config("quickstart"), done, sys.exit)
    for step in steps:
        log.on_step({"step": step, "train/loss": 1.0 / step})
    log.on_sample(steps[-1], "", "a sample")
    log.on_end(False)
"""
    import subprocess

    run = tmp_path / "run"
    run.mkdir()
    result = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (database,) = (tmp_path / "trackio").glob("pretrain*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [step for _, step, metrics in rows if "train/loss" in str(metrics)] == [1, 2, 3, 4, 5]
