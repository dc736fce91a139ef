"""What the words say is true: commands, options, fields and links of README*.md and docs/*.md, and the site.

Before every block of commands or Python a comment, which readers do not see, says how it is tested:

    <!-- test: run -->               it runs, in a folder with FILES and one for each page, so that blocks build on each
                                     other; FEW makes trainings small, which would take minutes
    <!-- test: run in a shell -->    bash runs it, for redirections and the like
    <!-- test: parse, WHY -->        its arguments are read as the command reads them, and then it ends: it needs GPUs,
                                     a network or hours
"""

import contextlib
import functools
import gzip
import io
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tyro
from tests.conftest import TINY

import pretrain
from pretrain.cli import COMMANDS, main
from pretrain.config import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"])

FEW = {
    "train.steps": 2,
    "train.epochs": 0,
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.context_length": 32,
    "train.batch_tokens": 64,
    "tokenizer.vocab_size": 300,
    "eval.tokens": 256,
    "sample.max_tokens": 4,
}
"""Fields that a training is given after its own, which are thereby tried and then made small."""
LITTLE_HELD_OUT = {"data.val_fraction": 0.002}
"""And one that trains on the embedded corpus, of which else 200 kB are measured at the end."""
TEXTS = ("mybook.txt", "other.txt", "the-verdict.txt", "notes/one.txt", "essays/2026/two.md", "books/three.txt")
OTHER_OPTIONS = {"--help", "--max-restarts", "--rdzv-endpoint", "--rdzv-conf", "--local-addr"}
"""Options of every command and of torchrun."""
SUFFIXES = {"bin", "tmp", "py", "toml", "json", "gguf"}
"""What follows the dot in names of files."""
PLACEHOLDERS: dict[str, str] = dict.fromkeys(("RECIPE", "my7b.toml", "llama7b.toml"), "quickstart")
PROGRAMS = {"pretrain", "torchrun", "srun", "make", "pip", "python"}
"""Programs whose arguments are checked."""
OTHERS = {"git", "cd", "export", "ssh", "mkdir", "sbatch", "kubectl", "ray", "hf", "pre-commit", "pytest"}
"""Programs that are not ours."""


@dataclass(frozen=True)
class Block:
    """Lines of code in a page."""

    place: str
    language: str
    lines: tuple[str, ...]
    decision: str
    """What the comment before it says."""

    @property
    def commands(self) -> list[str]:
        """The commands in it; of a transcript the lines after $."""
        if self.language not in ("", "sh"):
            return []
        typed = [line[2:] for line in self.lines if line.startswith("$ ")]
        joined = "\n".join(typed or self.lines).replace("\\\n", " ").splitlines()
        ours = [line for line in joined if line.split("#")[0].strip()]
        known = any(line.split()[0] in PROGRAMS | OTHERS for line in ours)
        return ours if typed or known or self.language == "sh" else []

    @property
    def tested(self) -> bool:
        return bool(self.commands) or self.language == "python"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced and indented blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    i, decision = 0, ""
    while i < len(lines):
        start, fence = i, re.match(r"```(\w*)$", lines[i])
        if fence:
            i = lines.index("```", start + 1)
            yield Block(f"{page.name}:{start + 1}", fence[1], tuple(lines[start + 1 : i]), decision)
        elif lines[i].startswith("    ") and not lines[i - 1].strip():
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            code = tuple(line[4:] for line in lines[start:i] if line.strip())
            yield Block(f"{page.name}:{start + 1}", "", code, decision)
            i -= 1
        if lines[start].strip():
            comment = re.fullmatch(r"<!-- test: (.+) -->", lines[start])
            decision = comment[1] if comment else ""
        i += 1


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell, without variables set for it and where its output goes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, words = True, []
    for word in [*lexer, ";"]:
        if not re.fullmatch(r"[|&;]+", word):
            words.append(word)
            continue
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words[: words.index(">")] if ">" in words else words
        words = []


class Parsed(Exception):
    """The arguments are right, and the command need not go on."""


def check_pretrain(args: list[str], patch: pytest.MonkeyPatch) -> None:
    """Read the arguments of a command of ours as it does, and no more."""
    if args == ["--help"]:
        return
    read = tyro.cli

    def stop(*parameters: Any, **options: Any) -> None:
        read(*parameters, **options)
        raise Parsed

    with patch.context() as only:
        only.setattr(tyro, "cli", stop)
        try:
            code = main([PLACEHOLDERS.get(word, word) for word in args])
        except Parsed:
            return
    pytest.fail(f"pretrain {shlex.join(args)} leaves with {code}", pytrace=False)


def check(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A command that is not run: it exists, and takes these arguments."""
    program = words[0]
    if "pretrain" in words and program in ("pretrain", "torchrun", "srun"):
        check_pretrain(words[words.index("pretrain") + 1 :], patch)
    elif program == "make":
        text = (ROOT / "Makefile").read_text()
        assert all(re.search(f"^{target}:", text, re.MULTILINE) for target in words[1:])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for name in re.findall(r"\[(.*)\]", word)]
        assert set(",".join(named).split(",")) - {""} <= set(extras)
    elif program == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    else:
        assert program in OTHERS | {"python"}, f"{program} is unknown; add it to OTHERS if it is not ours"


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for the commands that look at one."""
    out = tmp_path_factory.mktemp("docs") / "run"
    options = {**TINY, "data.paths": str(text_file)}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["train", "quickstart", "--out", str(out), *given]) == 0
    return out


@pytest.fixture
def reader(finished: Path, text_file: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder as a reader of the docs may have it."""
    for name in TEXTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(text_file, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("Ada\nNoël\n")
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write('{"text": "Ada sees Noël."}\n' * 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], finished: Path) -> None:
    """Run a command of ours, in this process."""
    args = words[1:]
    for before, word in pairwise(args):
        if word.startswith("runs/") and args[0] != "train" and before != "--out" and not Path(word).exists():
            shutil.copytree(finished, word)
    if args[0] == "fork":  # of a run of FEW steps
        at = args.index("--step")
        args[at : at + 2] = ["--train.steps", "4"]
    if args[0] == "train":
        given = {**FEW, **(LITTLE_HELD_OUT if "--data" not in args else {})}
        if "tokens" in args:  # of token shards the vocabulary is what it is
            del given["tokenizer.vocab_size"]
        args += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    if args[:2] == ["data", "prepare"]:
        args += ["--vocab-size", "300"]
    assert main(args) == 0


def run_python(code: str, finished: Path, patch: pytest.MonkeyPatch) -> None:
    """Run Python, in which trainings are given FEW."""
    if "load_config" not in code:
        shutil.copytree(finished, "runs/mine")
    load = pretrain.load_config
    with patch.context() as only:
        only.setattr(pretrain, "load_config", lambda *names, **fields: load(*names, **{**FEW, **fields}), raising=False)
        exec(compile(code, "docs", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, finished: Path, reader: Path, monkeypatch):
    for block in filter(lambda block: block.tested, blocks(page)):
        try:
            if block.language == "python" and block.decision != "run":
                compile("\n".join(block.lines), block.place, "exec")
            elif block.language == "python":
                run_python("\n".join(block.lines), finished, monkeypatch)
            elif block.decision == "run in a shell":
                home = {"HOME": str(reader), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
                subprocess.run(["bash", "-ec", "\n".join(block.lines)], env={**os.environ, **home}, check=True)
            else:
                for line in block.commands:
                    for words in simple_commands(line):
                        if block.decision == "run" and words[0] == "pretrain":
                            run(words, finished)
                        else:
                            check(words, monkeypatch)
        except BaseException as error:
            error.add_note(f"at {block.place}")
            raise


ELSEWHERE = ("data download", "--nproc", "torchrun", "cuda", "mps", "*.parquet", "core", "micro_batch 32")
"""Parts of commands that need a network, several processes, a device, files or sizes that are not here."""


def sources_commands() -> list[list[str]]:
    """The words of the commands between backticks of docs/sources.md, and of options alone as of ``pretrain train``."""
    text = (ROOT / "docs/sources.md").read_text(encoding="utf-8")
    spans = re.findall(r"`((?:pretrain|torchrun|--)[^`]*? [^`]*)`", text)
    return [shlex.split(span if not span.startswith("--") else f"pretrain train {span}") for span in spans]


def test_the_commands_of_the_sources_page_parse(reader: Path, monkeypatch):
    commands = sources_commands()
    assert len(commands) > 100
    for words in commands:
        check(words, monkeypatch)


@pytest.mark.slow
def test_the_commands_of_the_sources_page_run(finished: Path, reader: Path):
    lines = (reader / "other.txt").read_text(encoding="utf-8").splitlines()
    (reader / "other.txt").write_text("\n".join(sorted(lines)), encoding="utf-8")  # not the same as mybook.txt
    for number, words in enumerate(sources_commands()):
        line = shlex.join(words)
        if any(part in line for part in ELSEWHERE) or words == ["pretrain", "train"]:
            continue
        if words[1] == "train":  # each for itself
            words += [*(["--data", "mybook.txt"] if words[2].startswith("--") else []), "--out", f"runs/{number}"]
        try:
            run([word.replace("501", "8") if "--step" in words else word for word in words], finished)
        except BaseException as error:
            error.add_note(line)
            raise


def test_every_block_has_a_decision():
    decision = r"run|run in a shell|parse, \w.+"
    missing = [
        block.place
        for page in PAGES
        for block in blocks(page)
        if block.tested and not re.fullmatch(decision, block.decision)
    ]
    assert not missing, f"no <!-- test: run --> or <!-- test: parse, WHY --> before {', '.join(missing)}"


@functools.cache
def help_of(path: str) -> str:
    """What ``pretrain PATH --help`` prints, in lines that break no option."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        main([*path.split(), "--help"])
    return shown.getvalue()


@functools.cache
def known_options() -> dict[str, set[str]]:
    """The options of each command of ours, and under "" of the benchmarks."""
    scripts = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("benchmarks/*.py"))
    ours = {
        path: {typed(name) for name in re.findall(r"--[a-z][\w.-]*", help_of(path))}
        for path in ("data", "tokenizer", *COMMANDS)
    }
    return {**ours, "": {typed(name) for name in re.findall(r'add_argument\(\s*"(--[\w-]+)"', scripts)}}


def typed(option: str) -> str:
    """One form of an option, which may be typed with hyphens or underscores."""
    return option.partition("=")[0].replace("_", "-")


def wrong_names(text: str) -> Iterator[str]:
    """Commands, options and fields of the configuration between backticks that do not exist."""
    options = known_options()
    sections: dict[str, Any] = {section.name: section.default_factory for section in fields(Config)}
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        words, field = span.split(), re.fullmatch(r"(\w+)\.(\w+)", span)
        given = {typed(word) for word in words if re.match(r"--[a-z]", word)}
        if words[0] == "pretrain" and re.match(r"[a-z]", " ".join(words[1:])):
            two = " ".join(words[1:3])
            path = two if two in options else words[1]
            wrong = path not in options or given - options[path] - {"--help"}
        elif span.startswith("--"):
            wrong = given - set.union(*options.values()) - OTHER_OPTIONS
        elif field and field[1] in sections and field[2] not in SUFFIXES:
            wrong = field[2] not in {each.name for each in fields(sections[field[1]])}
        else:
            wrong = False
        if wrong:
            yield span


def test_names_in_the_text():
    wrong = [f"{page.name}: {span}" for page in PAGES for span in wrong_names(page.read_text(encoding="utf-8"))]
    assert not wrong


def test_wrong_names_are_found():
    text = "`pretrain trian` `pretrain train --model.layrs 3` `data.path` `--top-q` `pretrain data prepare --workers 2`"
    assert len(list(wrong_names(text))) == 4


def test_links_lead_somewhere():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    ]
    broken = [
        f"{page.name}: {target}"
        for page, target in links
        if not re.match(r"\w+:", target) and not (page.parent / target).exists()
    ]
    assert not broken


def test_the_tests_and_files_named_exist():
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/*.py"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        missing = [name for name in re.findall(r"`(test_\w+)…?`", text) if f"def {name}" not in tests]
        for folder, cells in re.findall(r"^\| `(\w+)/` (.*)$", text, re.MULTILINE):
            names = re.findall(r"`([\w/]+\.(?:py|toml))`", cells)
            missing += [name for name in names if not (ROOT / "src/pretrain" / folder / name).exists()]
        assert not missing, page.name


def test_languages_link_to_each_other():
    readmes = [page for page in PAGES if page.name.startswith("README")]
    assert len(readmes) == 4
    for page in readmes:
        top = page.read_text(encoding="utf-8")[:400]
        assert all(f"({other.name})" in top for other in readmes if other != page)


def test_the_same_commands_in_every_language():
    """A translation shows commands of README.md, no others."""
    first, *others = sorted((page for page in PAGES if page.name.startswith("README")), key=lambda page: len(page.name))
    bare = {line.split("#")[0].strip() for block in blocks(first) for line in block.commands}
    for page in others:
        shown = {line.split("#")[0].strip() for block in blocks(page) for line in block.commands}
        assert shown <= bare, page.name


def test_the_names_of_the_api_page_exist():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 30
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs") or not find_spec("mkdocstrings"), reason="needs pretrain[docs]")
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stderr
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""<(script|img|link)[^>]+(src|href)=["']?(https?:)?//""", text), (
            "it loads from elsewhere"
        )
        assert not re.search(r":(func|class|meth|data):", text), "a role of Sphinx is not shown as one"
