import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY
from tests.report.conftest import Browser, records
from tests.report.test_page import Elements

from pretrain.config import load_config
from pretrain.errors import CheckpointError, UsageError
from pretrain.io import append_jsonl, keep_steps
from pretrain.report import watch
from pretrain.report.watch import Watcher
from pretrain.runs import Run
from pretrain.runs.run import HEARTBEAT

PROMPT = {"prompt": "Ada", "max_tokens": 12, "temperature": 0, "top_k": 0, "seed": 0}


@contextmanager
def watching(folder: Path) -> Iterator[Watcher]:
    """The server, at work."""
    with Watcher(folder) as watcher:
        thread = threading.Thread(target=watcher.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield watcher
        finally:
            watcher.shutdown()
            thread.join()


def ask(watcher: Watcher, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """A request as a program makes it; with a body, a POST as the page makes it but for the headers given."""
    port = watcher.server_port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    own = {"Host": f"127.0.0.1:{port}"}
    if body is not None:
        own["Origin"] = f"http://127.0.0.1:{port}"
    headers = {**own, **{name.replace("_", "-"): value for name, value in headers.items()}}
    text = body if body is None or isinstance(body, str) else json.dumps(body)
    try:
        connection.request("GET" if body is None else "POST", path, text, {k: v for k, v in headers.items() if v})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def state(watcher: Watcher) -> dict:
    code, text = ask(watcher, "/state")
    assert code == 200
    return json.loads(text)


def page(watcher: Watcher) -> Elements:
    code, text = ask(watcher, "/")
    assert code == 200
    return Elements(text)


def beat(run: Run, age: float = 0.0, phase: str = "training", silent: float = 0.0) -> None:
    told = {"step": 40, "phase": phase, "time": time.time() - age, "silent_seconds": silent, "pid": 1, "host": "x"}
    (run.folder / HEARTBEAT).write_text(json.dumps(told))


# What is served --------------------------------------------------------------------------------------------------


def test_the_page_and_its_fingerprint_change_with_the_run(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        first = page(watcher)
        assert len(first.data["runs"][0]["train"]["step"]) == 40
        assert state(watcher)["fingerprint"] == state(watcher)["fingerprint"] == first.data["live"]["fingerprint"]
        beat(run)  # is no news for the page
        assert state(watcher)["fingerprint"] == first.data["live"]["fingerprint"]
        append_jsonl(run.metrics, *records(41, 50))
        append_jsonl(run.samples, {"step": 50, "prompt": "", "text": "new"})
        assert state(watcher)["fingerprint"] != first.data["live"]["fingerprint"]
        now = page(watcher)
        shown = now.data["runs"][0]
        assert shown["train"]["step"] == list(range(1, 51))
        assert shown["val"]["step"] == [10, 20, 30, 40, 50]
        assert shown["samples"][-1]["text"] == "new"
        assert "this model after step 50" in now.text
        assert state(watcher)["fingerprint"] == now.data["live"]["fingerprint"]


def test_half_a_line_waits_for_its_end(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        with run.metrics.open("a") as out:
            out.write('{"step": 41, "train/loss"')
        assert page(watcher).data["runs"][0]["train"]["step"][-1] == 40
        with run.metrics.open("a") as out:
            out.write(": 2.0}\n")
        assert page(watcher).data["runs"][0]["train"]["step"][-1] == 41


def test_a_resume_that_rewrites_the_file_begins_anew(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        before = state(watcher)["fingerprint"]
        keep_steps(run.metrics, 20)
        append_jsonl(run.metrics, *records(21, 60, **{"train/loss": 1.0}))
        assert state(watcher)["fingerprint"] != before
        train = page(watcher).data["runs"][0]["train"]
        assert len(train["step"]) == 60
        assert train["train/loss"][30] == 1.0


def test_how_the_run_is(make_run):
    run = make_run()

    def said() -> tuple[str, bool]:
        now = state(watcher)
        return now["status"], now["stuck"]

    with watching(run.folder) as watcher:
        begun = ("It has begun, and has not reported yet what it is doing.", False)
        assert said() == begun
        beat(run)
        assert said() == ("Training, 40 of 40 steps done.", False)
        beat(run, phase="measuring CORE", silent=300)
        assert said() == ("Measuring CORE, 40 of 40 steps done; no progress for 5.0 min.", False)
        beat(run, silent=3000)
        assert said() == ("Training, 40 of 40 steps done; no progress for 50.0 min.", True)
        beat(run, age=9000)
        assert said()[0].endswith("no heartbeat for 2.5 h: it was stopped, or hangs.")
        assert said()[1]
        (run.folder / HEARTBEAT).write_text("{")
        assert said() == begun
        (run.folder / "summary.json").write_text(json.dumps({"steps": 40, "vocab_size": 257}))
        assert said() == ("Finished after 40 steps.", False)


def test_what_is_no_run(tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").touch()
    with pytest.raises(CheckpointError, match="is not a run directory"):
        Watcher(tmp_path / "letters")
    with Watcher(tmp_path / "later") as first, pytest.raises(UsageError, match="--port 0 takes one that is free"):
        Watcher(tmp_path / "later", first.server_port)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "data.tmp").mkdir()
    with watching(tmp_path / "later") as watcher:
        assert "has not begun yet" in page(watcher).text


# Who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "[::", "0.0.0.0"])
def test_names_of_others_are_not_answered(make_run, host: str):
    run = make_run()
    with watching(run.folder) as watcher:
        for path, body in (("/", None), ("/state", None), ("/prompt", PROMPT)):
            code, text = ask(watcher, path, body, Host=host, **({"Origin": f"http://{host}"} if body else {}))
            assert code == 403
            assert "Ada" not in text
        assert ask(watcher, "/state", Host="LOCALHOST:9999")[0] == 200  # through a tunnel; names have no case


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_other_pages_cannot_prompt(make_run, headers: dict[str, str]):
    run = make_run()
    with watching(run.folder) as watcher:
        assert ask(watcher, "/prompt", PROMPT, **headers)[0] == 403
        assert watcher.process is None


def test_requests_that_are_none(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        assert ask(watcher, "/../config.toml")[0] == ask(watcher, "/", {})[0] == 404
        for body in ("[]", "{", "x" * 300_000):
            assert ask(watcher, "/prompt", body)[0] == 400
        for wrong in ({"prompt": 1}, {"top_k": None}, {"top_k": True}, {"max_tokens": 10**9}, {"seed": 0.5}):
            code, text = ask(watcher, "/prompt", PROMPT | wrong)
            assert code == 400
            assert f"$.{next(iter(wrong))}" in text
        assert watcher.process is None


def test_it_listens_here_only(tmp_path: Path):
    with Watcher(tmp_path / "later") as watcher:
        assert watcher.socket.getsockname()[0] == "127.0.0.1"


# Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_is_what_sample_gives(trained: Run):
    from pretrain.generation import sample_text

    options = {name: value for name, value in PROMPT.items() if name != "prompt"}
    expected = {"text": "".join(sample_text(trained.load_model(), trained.tokenizer(), "Ada", **options)), "step": 12}
    with watching(trained.folder) as watcher:
        assert json.loads(ask(watcher, "/prompt", PROMPT)[1]) == expected
        process = watcher.process
        assert process is not None
        if hasattr(os, "getpriority"):
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
            assert os.getpgid(process.pid) != os.getpgid(0)  # Ctrl-C in the terminal is not for it
        assert watcher.answer(PROMPT) == expected
        assert watcher.process is process
        process.kill()
        process.wait()
        assert watcher.answer(PROMPT) == expected
        # One that ends while it writes, as for want of memory, is told, and the next prompt starts another.
        process = watcher.process
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        assert "is there memory for a second model?" in watcher.answer(PROMPT | {"max_tokens": 10**6})["error"]
        assert watcher.answer(PROMPT) == expected
    assert watcher.process.poll() is not None


def test_a_prompt_does_not_wait_for_ever(make_run, monkeypatch):
    monkeypatch.setattr(watch, "BUSY_SECONDS", 0.01)
    with Watcher(make_run().folder) as watcher:
        with watcher.answering:  # as while another prompt is being answered
            assert "still being answered" in watcher.answer(PROMPT)["error"]
        assert watcher.process is None


def test_nothing_to_answer_with(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        error = json.loads(ask(watcher, "/prompt", PROMPT)[1])["error"]
        assert "has no intact checkpoint yet" in error


@pytest.mark.slow
def test_a_newer_checkpoint_is_loaded(trained: Run, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", "tokenizer.json", "data"):
        (tmp_path / name).symlink_to(trained.folder / name)
    with Watcher(tmp_path) as watcher:
        for step in (8, 12):
            (tmp_path / f"checkpoints/step-{step:08d}").symlink_to(trained.checkpoints / f"step-{step:08d}")
            assert watcher.answer(PROMPT)["step"] == watcher.answer(PROMPT)["step"] == step


# In the browser --------------------------------------------------------------------------------------------------

LAST = "return document.querySelector('figure[data-plot=loss] .u-legend td')?.textContent === arguments[0]"


@pytest.mark.slow
def test_steps_appear_as_they_come(make_run, browser: Browser, tmp_path: Path):
    run = make_run()
    beat(run)
    with watching(run.folder) as watcher:
        browser.open(watcher.address)
        browser.until(LAST, "40")
        browser.until("return document.getElementById('status').textContent.startsWith('Training, 40')")
        browser.find("#prompt").send_keys("half a prompt")
        browser.run("window.scrollTo(0, 200)")
        append_jsonl(run.metrics, *records(41, 60))
        append_jsonl(run.samples, {"step": 60, "prompt": "", "text": "fresh <i>"})
        append_jsonl(run.events, {"step": 60, "event": "hang", "text": "quiet"})
        browser.until(LAST, "60")
        browser.until("return document.querySelector('#sample-texts').textContent === 'fresh <i>'")
        browser.until("return document.querySelector('#events').textContent.includes('quiet')")
        browser.until("return document.querySelector('#facts').textContent.includes('this model after step 60')")
        browser.find("#config-1 summary").click()
        keep_steps(run.metrics, 20)
        browser.until(LAST, "20")
        browser.until("return document.querySelector('#facts').textContent.includes('this model after step 20')")
        assert browser.run("return document.getElementById('config-1').open")
        assert browser.run("return document.getElementById('prompt').value") == "half a prompt"
        assert browser.run("return window.scrollY") > 0
        assert browser.drawn("loss") > 1000
        assert browser.complaints() == []
        assert all(address.startswith(watcher.address) for address in browser.requests())
        browser.shoot(tmp_path / "watch.png")


@pytest.mark.slow
def test_a_run_that_begins_while_it_is_watched(make_run, browser: Browser, tmp_path: Path):
    with watching(tmp_path / "one") as watcher:
        browser.open(watcher.address)
        browser.until("return document.getElementById('status').textContent.includes('has not begun yet')")
        make_run("one")
        browser.until(LAST, "40")
        browser.until("return document.querySelector('#facts').textContent.includes('guess any token')")
        assert browser.complaints() == []


@pytest.mark.slow
def test_the_box_shows_an_answer(trained: Run, browser: Browser, tmp_path: Path):
    with watching(trained.folder) as watcher:
        browser.open(watcher.address)
        browser.find("#prompt").send_keys("Ada <b>")
        browser.find("#send").click()
        browser.until("return document.getElementById('answer-note').textContent.startsWith('Written by the model')")
        assert browser.find("#answer").text.startswith("Ada <b>")
        assert len(browser.find("#answer").text) > len("Ada <b>")
        assert browser.find("#answer-note").text == "Written by the model after step 12."
        browser.shoot(tmp_path / "answer.png")
        browser.run("document.getElementById('max_tokens').value = ''")
        browser.find("#send").click()
        assert browser.run("return document.querySelector('#max_tokens:invalid') !== null")
        assert browser.find("#answer-note").text == "Written by the model after step 12."  # it was not sent
        assert browser.complaints() == []


@pytest.mark.slow
def test_a_server_that_is_gone(make_run, browser: Browser):
    run = make_run()
    with watching(run.folder) as watcher:
        browser.open(watcher.address)
        browser.until(LAST, "40")
    browser.until("return document.getElementById('status').textContent.includes('does not answer')")
    browser.driver.get("about:blank")


# The command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_command_ends_cleanly(make_run, name: str):
    run = make_run()
    words = [sys.executable, "-m", "pretrain", "watch", str(run.folder), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = int(re.findall(r"on http://127\.0\.0\.1:(\d+)/", line)[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert b"<title>one</title>" in connection.getresponse().read()
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip(), err) == (0, "", "")
    finally:
        process.kill()
        process.wait()


def test_a_config_that_is_damaged_while_it_is_watched(make_run):
    run = make_run()
    with watching(run.folder) as watcher:
        (run.folder / "config.toml").write_text("[train\n")
        code, text = ask(watcher, "/state")
        assert code == 500
        assert "config.toml is damaged" in text
        Run.create(run.folder, load_config("quickstart", **TINY))
        assert ask(watcher, "/state")[0] == 200
