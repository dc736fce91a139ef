import json
import os
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.conftest import TINY

from pretrain.cli import COMMANDS, main
from pretrain.config import GroupConfig, load_config
from pretrain.errors import UsageError
from pretrain.runs import Run


def options(**changes: object) -> list[str]:
    settings = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--data", str(text_file), "--out", str(out), *options()]) == 0
    return out


def test_training_ends_with_words_and_files(run: Path, text_file: Path, capsys):
    assert main(["train", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "is finished: 12 steps" in printed
    assert "bits per byte" in printed
    assert f"pretrain sample {run}" in printed
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["data"]["paths"] == [str(text_file)]
    assert config["train"]["steps"] == 12


def test_a_picture_that_fails_ends_no_training(run: Path, capsys, monkeypatch):
    def fail(run) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("pretrain.report.plot_run", fail)
    assert main(["train", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"no picture was written (no fonts); try: pretrain report {run} --png" in printed
    assert "All of it on a page:" in printed


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_training_imports_no_more_than_it_needs(kind: str, text_file: Path, tmp_path: Path):
    # Without TensorBoard, if it is installed, whose imports are its own.
    given = ["train", "--data", str(text_file), "--optim.kind", kind, "--log.backends", "none", *options()]
    given += ["--out", str(tmp_path / "run")]
    code = f"""
import sys
from pretrain.cli import main
assert main({given!r}) == 0
heavy = {{"torch._dynamo", "torch.distributed.tensor", "sympy", "fsspec", "transformers", "pandas", "PIL.ImageShow"}}
print("imported", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported []"


def test_eval_gives_the_number_of_training(run: Path, capsys):
    assert main(["eval", str(run), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert numbers["val_loss"] == summary["val_loss"]
    assert numbers["val_bpb"] == summary["val_bpb"]
    assert main(["eval", str(run)]) == 0
    assert f"{summary['val_bpb']:.4f}" in capsys.readouterr().out


def test_sample_repeats_itself_with_a_seed(run: Path, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(run), "--prompt", "Ada", "--max-tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Ada")
    assert texts[0] == texts[1] != texts[2]


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "quickstart"]) == 0
    assert "tokenizer" in tomllib.loads(capsys.readouterr().out)


@pytest.mark.parametrize("args", [[], ["shakespeare"], ["--train.steps", "3"]])
def test_where_a_run_goes_by_default(args: list[str], monkeypatch, tmp_path: Path):
    """A bare `pretrain train` is the quickstart in runs/quickstart."""
    import pretrain.report
    import pretrain.training

    seen = []

    def train(config, out, console, started, resume_from, named):
        seen.append((config, out, console.command))
        return Run(Path(out), config)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain.training, "train", train)
    monkeypatch.setattr(pretrain.report, "plot_run", lambda _run: None)
    monkeypatch.setattr(pretrain.report, "explain", lambda _run, _page: "")
    monkeypatch.setattr(pretrain.report, "write_report", lambda _runs, file: file)
    assert main(["train", *args]) == 0
    ((config, out, command),) = seen
    recipe = "shakespeare" if "shakespeare" in args else "quickstart"
    assert (out, command) == (f"runs/{recipe}", f"pretrain train --out runs/{recipe}")
    changed = {"train.steps": 3} if "--train.steps" in args else {}
    assert config == load_config(recipe, **changed)


WRONG_USE = {
    "no such command": (["trian"], "did you mean 'train'?"),
    "no such recipe": (["train", "quikstart"], "did you mean 'quickstart'?"),
    "no such field": (["train", "--model.layrs", "3"], "did you mean '--model.layers'?"),
    "recipe after its options": (
        ["train", "--train.steps", "3", "verdict"],
        "the recipe comes first: pretrain train verdict",
    ),
    "no such option": (["sample", "RUN", "--promt", "x"], "did you mean '--prompt'?"),
    "wrong type": (["train", "--model.layers", "many"], "--model.layers"),
    "wrong choice": (["train", "--model.mlp", "relu"], "relu2"),
    "no value": (["train", "--model.layers"], "--model.layers"),
    "impossible heads": (["train", "--model.heads", "7"], "model.heads 7 does not divide model.width"),
    "impossible batch": (["train", "--train.batch_tokens", "1000"], "train.batch_tokens 1000 is not a multiple"),
    "no such device": (["train", "--train.device", "mps"], "train.device is mps, but"),
    "no such tokenizer": (["train", "--tokenizer.kind", "bpee"], "bpe"),
    "missing run": (["eval"], "RUN"),
    "extra word": (["recipes", "a", "b"], "b"),
    "estimate of other text": (["eval", "RUN", "--batches", "2", "--data", "x.txt"], "leave out --data"),
    "negative": (["sample", "RUN", "--top-k", "-3"], "top_k must be at least 0"),
    "no such recipe to print": (["recipes", "quickstrat"], "did you mean 'quickstart'?"),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use_is_one_line_and_exit_code_2(name: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, expected = WRONG_USE[name]
    code = main(args)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert expected in captured.err
    assert captured.err.startswith("pretrain: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


BAD_TEXT = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n ", "white space"),
    "binary": (b"MZ\x00\x01\x02" * 50, "binary"),
    "latin1": ("Noël ".encode("latin1") * 100, "UTF-8"),
    "short": (b"too short", "one context"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_one_line_and_leaves_nothing(name: str, capsys, tmp_path: Path):
    content, expected = BAD_TEXT[name]
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert main(["train", "--data", str(file), "--out", str(tmp_path / "run"), *options()]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_vocabulary_larger_than_the_text_supports(capsys, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("the same words again and again. " * 200)
    args = options(tokenizer__kind="bpe", tokenizer__vocab_size="5000")
    assert main(["train", "--data", str(file), "--out", str(tmp_path / "run"), *args]) in (1, 2)
    error = capsys.readouterr().err
    assert "vocab_size" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_and_unwritable_places(capsys, text_file: Path, tmp_path: Path):
    assert main(["train", "--data", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "run"), *options()]) == 1
    assert "absent.txt" in capsys.readouterr().err
    blocker = tmp_path / "file"
    blocker.write_text("x")
    assert main(["train", "--data", str(text_file), "--out", str(blocker / "run"), *options()]) == 2
    assert "cannot write to" in capsys.readouterr().err
    for command in ("eval", "sample"):
        assert main([command, str(tmp_path / "nowhere")]) == 1
        assert "does not exist" in capsys.readouterr().err
        assert main([command, str(tmp_path)]) == 1
        assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(capsys, text_file: Path, tmp_path: Path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "run"), *options()]) == 2
    assert "not writable" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    commands = ("", "data", *COMMANDS)
    code = (
        "import sys\nfrom pretrain.cli import main\n"
        f"for command in {commands}:\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: pretrain") == len(commands)


def test_every_field_is_in_the_help():
    import dataclasses

    from pretrain.config import Config

    command = [sys.executable, "-m", "pretrain", "train", "nanochat", "--help"]  # which has groups
    result = subprocess.run(command, capture_output=True, text=True)
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert f"--{section.name}.{field.name.replace('_', '-')}" in result.stdout.replace("_", "-")


def test_groups_of_the_optimizer_on_the_command_line():
    """Those of the recipe, of which what is not named stays, and others."""
    from pretrain.cli.parsing import parse
    from pretrain.cli.train import Train

    typed = ["--optim.groups.head.lr", "0.5", "--optim.groups.value-embeddings.betas", "0.5", "0.6"]
    groups = parse(Train, ["nanochat", *typed], "train").config.optim.groups
    assert groups["head"] == GroupConfig(lr=0.5, betas=(0.8, 0.96), weight_decay=0.01)
    assert groups["value_embeddings"] == GroupConfig(betas=(0.5, 0.6), weight_decay=0.01)
    groups = parse(Train, typed, "train").config.optim.groups
    assert groups == {"head": GroupConfig(lr=0.5), "value_embeddings": GroupConfig(betas=(0.5, 0.6))}
    with pytest.raises(UsageError, match=r"optim\.groups\.head\.lr must be at least 0.0, not -1"):
        parse(Train, ["--optim.groups.head.lr", "-1"], "train")
    with pytest.raises(UsageError, match=r"lr 0.2 and lr_factor 0.01 of a group in optim.groups both set its rate"):
        parse(Train, ["nanochat", "--optim.groups.stream-scale.lr", "0.2"], "train")


def test_a_group_of_no_parameter_leaves_no_run(capsys, tmp_path: Path, text_file: Path):
    out = tmp_path / "run"
    command = ["train", "--data", str(text_file), "--out", str(out), *options(), "--optim.groups.hed.lr", "1"]
    assert main(command) == 2
    assert "optim.groups.hed names no parameter of this model that AdamW updates; did you mean 'head'?" in (
        capsys.readouterr().err
    )
    assert not (out / "config.toml").exists()


def test_a_list_option_given_again_adds_to_it():
    from pretrain.cli.evaluate import Evaluate
    from pretrain.cli.parsing import parse
    from pretrain.cli.train import Train

    args = ["--data", "a", "b", "--train.steps=3", "--data.paths=c", "--data.val_paths", "v", "--data.val-paths=w=1"]
    config = parse(Train, [*args, "--log.backends", "none"], "train").config
    assert config.data.paths == ("a", "b", "c")
    assert config.data.val_paths == ("v", "w=1")
    assert (config.train.steps, config.log.backends) == (3, ("none",))
    assert parse(Train, ["--sample.prompt=--Ada"], "train").config.sample.prompts == ("--Ada",)
    command = parse(Evaluate, ["RUN", "--data", "a", "--json", "--data", "b"], "eval")
    assert (command.runs, command.data, command.json) == (("RUN",), ("a", "b"), True)


def test_eval_measures_all_texts_that_are_given(run: Path, tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("The fox sees Ada. " * 40)
    (tmp_path / "b.txt").write_text("Noël sings to the fox. " * 30)

    def loss(*options: str) -> float:
        assert main(["eval", str(run), *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["data_loss"]

    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    assert loss("--data", a, "--data", b) == loss("--data", a, b) != loss("--data", b)


def test_eval_reads_other_text_as_training_read_it(text_file: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.text.pieces.RANGE_BYTES", 1000)  # a text longer than this is read in parts
    lines = text_file.read_text().splitlines()
    (tmp_path / "train.txt").write_text("<|end|>".join(lines[:600]))
    (tmp_path / "val.txt").write_text("<|end|>".join(lines[600:]) + "<|end|>" + " ".join(lines[:100]))
    out, changes = tmp_path / "run", {"data__separator": "<|end|>", "data__val_paths": tmp_path / "val.txt"}
    assert main(["train", "--data", str(tmp_path / "train.txt"), "--out", str(out), *options(**changes)]) == 0
    capsys.readouterr()

    def numbers(*args: str) -> dict:
        assert main(["eval", str(out), "--json", *args]) == 0
        return json.loads(capsys.readouterr().out)

    own, other = numbers(), numbers("--data", str(tmp_path / "val.txt"))
    assert (other["data_loss"], other["data_bpb"]) == (own["val_loss"], own["val_bpb"])
    assert other["tokens"] == own["tokens"] == len((tmp_path / "val.txt").read_bytes().replace(b"<|end|>", b"")) + 300
    unmarked = numbers("--data", str(tmp_path / "val.txt"), "--separator", "")
    assert unmarked["tokens"] == len((tmp_path / "val.txt").read_bytes())  # one document, its BOS token no target


def test_the_prompt_to_try_is_of_the_held_out_text(tmp_path: Path, capsys):
    text = tmp_path / "letters.txt"
    text.write_text("ACGT" * 2000)  # no "A" of "And" would help: the vocabulary is these four letters
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *options(tokenizer__kind="char")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    command = shlex.split(last.removeprefix("Next, let it write:  pretrain "))
    assert command[-2] == "--prompt"
    assert set(command[-1]) == set("ACGT")
    assert main(command) == 0


def test_a_warmup_as_long_as_the_run_is_told(text_file: Path, tmp_path: Path, capsys):
    long = options(schedule__warmup_steps=12)
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "run"), *long]) == 0
    assert "the warmup lasts 12 steps, so the rate only rises" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_an_import_gives_the_exit_code_too(name: str, tmp_path: Path):
    """Imports run exec, which has Python kill itself at its end if a KeyboardInterrupt is raised within it."""
    run = f"import os, signal\nos.kill(os.getpid(), signal.{name})\nfor _ in range(10**6): pass"
    lines = [
        "import pretrain.cli, signal",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # perhaps ignored, as in a background job
        f"pretrain.cli._run = lambda _: exec({run!r})",
        "raise SystemExit(pretrain.cli.main())",
    ]
    (tmp_path / "command.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("interrupted; what was saved is safe")) == (130, 1)
