"""The scripts of ``pretrain completion``, in the shells that are on this machine."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain.cli import COMMANDS, main
from pretrain.cli.completion import places

LINES = {
    "a command": ("tr", "train"),
    "a command of a group": ("data pre", "prepare"),
    "a recipe": ("train quick", "quickstart"),
    "a set of text": ("data download the-v", "the-verdict"),
    "a field of the configuration": ("train --model.lay", "--model.layers"),
    "the other name of an option": ("train --dat", "--data --data.field"),
    "an option of a group": ("data prepare --split", "--split"),
    "the values of an option": ("train --schedule.kind ", "cosine linear constant"),
    "an option after words": ("sample runs/mine --num", "--num-samples"),
    "a switch": ("eval --no-j", "--no-json"),
    "a file for an option": ("train --data my", "mybook.txt"),
    "a folder for a word": ("eval ru", "runs"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder to complete in, with a file and a folder."""
    (tmp_path / "mybook.txt").touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the three scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh", "fish"):
        with (folder / shell).open("w") as file, contextlib.redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return folder


def ask(shell: str, script: str) -> list[str]:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not on this machine")
    return subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("what", LINES)
def test_bash(what: str, scripts: Path, folder: Path):
    line, expected = LINES[what]
    words = ["pretrain", *line.split(" ")]
    quoted = " ".join(f'"{word}"' for word in words)
    found = ask(
        "bash",
        f"source '{scripts}/bash'; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _pretrain;"
        f' printf "%s\\n" "${{COMPREPLY[@]}}"; complete -p pretrain',
    )
    assert "-o default -F _pretrain" in found.pop()  # with no answer of ours, bash completes files
    ours = {"a file for an option", "a folder for a word"}
    assert set(expected.split()) <= set(found) if what not in ours else found == [""]
    assert len(found) < 20


@pytest.mark.parametrize("what", LINES)
def test_fish(what: str, scripts: Path, folder: Path):
    line, expected = LINES[what]
    found = ask("fish", f"source '{scripts}/fish'; complete -C 'pretrain {line}'")
    assert set(expected.split()) <= {each.split("\t")[0].rstrip("/") for each in found}


def test_zsh_reads_its_script(scripts: Path):
    assert ask("zsh", f"zsh -n '{scripts}/zsh' && echo fine") == ["fine"]
    text = (scripts / "zsh").read_text()
    assert text.startswith("#compdef pretrain\n")
    assert '"train --schedule.kind") values=(cosine linear constant)' in text


def test_every_command_and_its_options_are_known():
    """A command whose arguments are not in a dataclass of its name would be missing."""
    found = places()
    assert set(found[""].words) == set(COMMANDS)
    assert all(place.options or place.words for place in found.values())
    assert all(place.help for path, place in found.items() if path)
    assert {"--nproc", "--resume-from", "--train.steps"} <= {n for o in found["train"].options for n in o.names}
    assert not {"--recipe", "--config"} & {n for o in found["train"].options for n in o.names}


def test_an_unknown_shell_is_one_line(capsys):
    assert main(["completion", "tcsh"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fish" in error
