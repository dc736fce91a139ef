"""`pretrain sample`, as typed."""

import io
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import TINY

from pretrain.cli import main


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("sample") / "run")
    settings = {**TINY, "sample.max_tokens": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["train", "quickstart", "--data", str(text_file), "--out", out, *options]) == 0
    return out


@pytest.fixture
def sample(run: str, capsys: pytest.CaptureFixture):
    """Run the command; gives its output and its words on standard error."""
    capsys.readouterr()

    def call(*args: str, code: int = 0) -> tuple[str, str]:
        assert main(["sample", run, "--max-tokens", "20", *args]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_tells_how_to_make_each_text_again(sample):
    made = objects(sample("--prompt", "Ada", "--prompt", "Noël", "--num-samples", "3", "--json", "--seed", "5")[0])
    assert [(each["prompt"], each["seed"]) for each in made] == [(p, s) for p in ("Ada", "Noël") for s in (5, 6, 7)]
    assert len({each["text"] for each in made}) == 6
    for each in made:
        alone = sample("--prompt", each["prompt"], "--seed", str(each["seed"]))[0]
        assert alone == each["prompt"] + each["text"] + "\n"
        assert set(each) == {"prompt", "text", "tokens", "seed"}
        assert 0 < each["tokens"] <= 20


def test_several_texts_are_told_apart(sample):
    made = objects(sample("--prompt", "Ada", "--num-samples", "2", "--json")[0])
    text = sample("--prompt", "Ada", "--num-samples", "2")[0]
    assert text == "".join(f"--- prompt 1, sample {i + 1}, seed {i} ---\nAda{made[i]['text']}\n" for i in range(2))


def test_prompts_from_files_and_standard_input(sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lines.txt").write_text("\ufeffAda\n\nthe fox\n")  # as editors on Windows begin a file
    (tmp_path / "objects.jsonl").write_text('{"prompt": "Ada", "id": 3}\n{"prompt": "the\\nfox", "id": "\u2028"}\n')
    expected = [objects(sample("--prompt", prompt, "--json")[0])[0] for prompt in ("Ada", "the fox", "the\nfox")]
    assert objects(sample("--prompts-file", str(tmp_path / "lines.txt"), "--json")[0]) == expected[:2]
    assert objects(sample("--prompts-file", str(tmp_path / "objects.jsonl"), "--json")[0]) == expected[::2]
    (tmp_path / "in").write_text("the\nfox\n")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "in").open())
    assert objects(sample("--prompt", "-", "--json")[0]) == expected[2:]


def test_filters_and_stops_arrive(sample):
    free = objects(sample("--prompt", "Ada", "--json")[0])[0]["text"]
    stop = free[5:7]
    assert objects(sample("--prompt", "Ada", "--json", "--stop", "never", "--stop", stop)[0])[0]["text"] == free[:5]
    greedy = sample("--prompt", "Ada", "--temperature", "0")[0]
    for one in (["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]):
        assert sample("--prompt", "Ada", *one)[0] == greedy
    assert sample("--prompt", "Ada", "--temperature", "0", "--repetition-penalty", "1e6")[0] != greedy


def test_an_earlier_checkpoint(sample):
    newest, early = (sample("--prompt", "Ada", *step)[0] for step in ([], ["--step", "8"]))
    assert newest != early
    assert sample("--prompt", "Ada", "--step", "12")[0] == newest
    assert "there are: 8, 12" in sample("--step", "9", code=1)[1]


def test_a_prompt_longer_than_the_context_says_so(sample):
    out, error = sample("--prompt", "x" * 40)
    assert error == "pretrain: the prompt has 41 tokens; the model sees the last 32\n"
    assert out.startswith("x" * 40)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--top-p", "0"], "top_p must be above 0"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--interactive", "--json"], "--interactive"),
        (["--temprature", "1"], "did you mean '--temperature'?"),
        (["--stop", ""], "stop must be a text that is not empty"),
    ],
)
def test_wrong_use(sample, args: list[str], said: str):
    out, error = sample(*args, code=2)
    assert out == ""
    assert said in error
    assert error.count("\n") == 1


def test_files_that_hold_no_prompts(sample, tmp_path: Path):
    for name, content, said in (
        ("empty.txt", "\n", "holds no prompt"), ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ("list.jsonl", "[1]", "line 1"), ("number.jsonl", '{"prompt": 3}', "line 1"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        out, error = sample("--prompts-file", str(tmp_path / name), code=1)
        assert (out, error.count("\n")) == ("", 1)
        assert said in error
    assert "cannot be read" in sample("--prompts-file", str(tmp_path / "absent"), code=1)[1]


def test_interactive_through_a_pipe(sample, monkeypatch: pytest.MonkeyPatch):
    """Each line is answered as by itself, with the next seed each; 'quit' leaves the rest unread."""
    alone = [sample("--prompt", "Ada", "--seed", seed)[0] for seed in ("0", "1")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada\nAda\nquit\nthe fox\n"))
    assert sample("--interactive") == ("".join(alone), "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada"))
    assert sample("--interactive") == (alone[0] + "\n", "")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_interactive_on_a_terminal(run: str):
    """Ctrl-C stops an endless answer, then the next prompt is answered, and Ctrl-D leaves with 0."""
    import pty

    command = [sys.executable, "-m", "pretrain", "sample", run, "--interactive", "--max-tokens", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads only wait for each other on a busy machine
    child, terminal = pty.fork()
    if child == 0:  # a session of its own, whose terminal turns Ctrl-C into a signal
        os.execve(sys.executable, command, environment)
    try:
        read_until(terminal, b"> ")
        os.write(terminal, b"Ada\n")
        read_until(terminal, b"Ada", b"Ada", 40)  # its echo, and the beginning of the answer
        os.write(terminal, b"\x03")
        read_until(terminal, b"\n> ")
        os.write(terminal, b"the fox\n")
        read_until(terminal, b"the fox", b"the fox", 40)
        os.write(terminal, b"\x03")
        read_until(terminal, b"\n> ")
        os.write(terminal, b"\x04")
        deadline = time.monotonic() + 60
        while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(status[1]) == 0
        assert status[0] == child
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)


def read_until(terminal: int, *wanted: bytes | int) -> None:
    """Read what the terminal shows until these come one after the other; a number means this many bytes more."""
    shown, at, deadline = b"", 0, time.monotonic() + 60
    for each in wanted:
        while (at + each > len(shown)) if isinstance(each, int) else (shown.find(each, at) < 0):
            assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(terminal, 4096)
        at = at + each if isinstance(each, int) else shown.find(each, at) + len(each)
