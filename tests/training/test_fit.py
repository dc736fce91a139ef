"""Settings chosen to fit a text and a time, in place of given ones; the speed of the machine is made up."""

import math
import random
from pathlib import Path

import pytest

from pretrain import fitting
from pretrain.cli import main
from pretrain.cli.parsing import parse
from pretrain.cli.train import Train
from pretrain.config import Config, config_to_dict, load_config
from pretrain.errors import UsageError
from pretrain.fitting import SHAPES, Machine, Text, fit_model, fit_steps, fit_text, settled
from pretrain.io import read_jsonl
from pretrain.runs import Run
from pretrain.sizing import Speed
from pretrain.training import start, train

STEP = 5.0
"""Made-up seconds of a step: so that a minute holds few."""
QUICK = ("--log.backends", "none", "--train.precision", "fp32", "--train.device", "cpu", "--sample.max-tokens", "0")
SMALL = (*QUICK, "--model.layers", "1", "--model.width", "32", "--train.batch_tokens", "128")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a known speed, on which no time passes before the first step."""
    monkeypatch.setattr(start, "measure_machine", lambda *_: Machine({128: 1e10}, 2**34, 150.0))
    monkeypatch.setattr(start, "measure_training", lambda *_: (Speed(STEP, 0.0, 0.0), 1))
    monkeypatch.setattr(start, "seconds_left", lambda config, _: 60 * config.train.minutes)
    monkeypatch.setattr(fitting, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "COMPILE_SECONDS", math.inf)


def write(folder: Path, text: str | bytes) -> str:
    file = folder / "text.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def english(size: int) -> str:
    draw = random.Random(1)
    words = [
        "the",
        "a",
        "fox",
        "child",
        "river",
        "sees",
        "hears",
        "under",
        "over",
        "and",
        "then",
        "was",
        "old",
        "new",
        "green",
    ]
    return " ".join(draw.choice(words) for _ in range(size // 4))[:size]


@pytest.fixture
def book(tmp_path: Path) -> str:
    return write(tmp_path, english(20_000))


def test_minutes_become_steps_once(book: str, tmp_path: Path, capsys):
    """One minute, less what follows the last step, in steps of five seconds."""
    out, command = str(tmp_path / "run"), ["train", "--data", book, *SMALL, "--train.minutes", "1"]
    assert main([*command, "--out", out]) == 0
    said = capsys.readouterr().out
    steps = int((60 - fitting.END_SECONDS) // STEP)
    passes = steps * 128 / Run.open(out).corpus().tokens("train")
    assert f"fitted    {steps} steps of 5 s, {passes:.2g} passes, fill 1 minute" in said
    config = Run.open(out).config
    assert (config.train.steps, config.train.minutes) == (steps, 1)
    assert config.fit.fields == ()
    assert set(config.fit.chosen) == set(load_config("fit").fit.fields) - {
        "model.layers", "model.width", "train.batch_tokens",
    }  # fmt: skip
    assert (config.model.layers, config.model.width, config.train.batch_tokens) == (1, 32, 128)
    marks = steps // fitting.FEWEST_VALIDATIONS, steps // fitting.CHECKPOINTS  # with these steps validation is slow
    assert (config.eval.every, config.checkpoint.every) == marks
    assert [record["step"] for record in read_jsonl(Path(out, "metrics.jsonl"))] == list(range(1, steps + 1))

    for again in (command, command[:-2], ["train"]):  # the same, or the run alone, which chooses nothing
        assert main([*again, "--out", out]) == 0
        assert "is finished" in (said := capsys.readouterr().out)
        assert "fitted" not in said
        assert Run.open(out).config == config
    for other, what in (("--train.minutes 2", "train.minutes 1.0 → 2.0"), ("--model.dropout 0.6", "model.dropout")):
        assert main([*command[:-2], *other.split(), "--out", out]) == 2
        assert what in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert main(["train", "--out", out, "--train.steps", str(steps + 2)]) == 0
    assert Run.open(out).config.train.steps == steps + 2


def test_a_stopped_run_goes_on_with_what_was_chosen(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also by Python, where the same configuration is given again; a fit that chooses what was given is refused."""
    settings = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)
    }
    settings = {name: int(value) if value.isdecimal() else value for name, value in settings.items()}
    settings = {**settings, "log.backends": ["none"], "data.paths": [book], "train.minutes": 1}
    config = load_config("fit", **settings)
    first = train(config, tmp_path / "run").config
    monkeypatch.setattr(start, "measure_training", lambda *_: pytest.fail("a second measurement"))
    monkeypatch.setattr(start, "measure_machine", lambda *_: pytest.fail("a second measurement"))
    assert train(config, tmp_path / "run").config == first
    del settings["model.layers"]
    with pytest.raises(UsageError, match=r"model.layers 1, which was given"):
        train(load_config("fit", **settings), tmp_path / "run")


def test_the_configuration_of_a_run_makes_it_again(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--data", book, *SMALL, "--train.minutes", "0.5", "--out", str(first)]) == 0
    monkeypatch.setattr(start, "measure_training", lambda *_: pytest.fail("a measurement"))
    assert main(["train", str(first / "config.toml"), "--out", str(second)]) == 0
    assert Run.open(first).config == Run.open(second).config
    losses = [[record["train/loss"] for record in read_jsonl(out / "metrics.jsonl")] for out in (first, second)]
    assert losses[0] == losses[1]


def test_what_is_typed_is_not_chosen():
    every = load_config("fit").fit.fields
    config = parse(Train, ["--data", "x", "--model.context-length", "128", "--tokenizer.kind=bpe"], "train").config
    assert set(every) - set(config.fit.fields) == {"model.context_length", "tokenizer.kind"}
    config = parse(Train, ["fit", "--train.steps", "9"], "train").config
    assert (config.train.steps, config.train.minutes) == (9, 0)
    assert "train.steps" not in config.fit.fields
    config = parse(Train, ["fit", "--model.depth", "2"], "train").config
    assert not {"model.layers", "model.heads", "model.width"} & set(config.fit.fields)
    assert load_config("fit", **{"optim.lr": 0.00625}).fit.fields == tuple(name for name in every if name != "optim.lr")


def test_the_recipe():
    """A text without a recipe is fitted; a recipe that is named, and no text, are not."""
    for args, recipe in (
        (["--data", "x"], "fit"), (["--data.paths=x"], "fit"), ([], "quickstart"),
        (["laptop", "--data", "x"], "laptop"),
        (["--data", "x", "--init-from", "hf:y"], "quickstart"),
    ):  # fmt: skip
        command = parse(Train, args, "train")
        assert command.recipe == recipe
        assert bool(command.config.fit.fields) == (recipe == "fit")


def test_minutes_of_any_recipe():
    """They take the place of its horizon, but not of another that is given."""
    for recipe in ("quickstart", "verdict", "nanochat"):
        config = parse(Train, [recipe, "--train.minutes", "2"], "train").config
        assert (config.train.steps, config.train.epochs, config.train.minutes) == (0, 0, 2)
        assert load_config(recipe, **{"train.minutes": 2}) == config
    with pytest.raises(UsageError, match=r"^train.epochs 3 and train.minutes 2 both set the horizon; give one"):
        parse(Train, ["quickstart", "--train.minutes", "2", "--train.steps", "0", "--train.epochs", "3"], "train")


def test_a_recipe_in_a_given_time(book: str, tmp_path: Path, capsys):
    out = tmp_path / "run"
    command = ["train", "quickstart", "--data", book, *SMALL, "--tokenizer.kind", "byte", "--model.heads", "1"]
    assert main([*command, "--train.minutes", "0.5", "--eval.every", "0", "--out", str(out)]) == 0
    config = Run.open(out).config
    assert (config.train.steps, config.train.minutes) == (int((30 - fitting.END_SECONDS) // STEP), 0.5)
    assert config.fit.chosen == ()
    assert main([*command, "--train.minutes", "0.03", "--out", str(tmp_path / "other")]) == 2
    assert "train.minutes 0.03 leave 0 s for training" in capsys.readouterr().err


CHINESE = "".join(chr(0x4E00 + random.Random(number).randrange(3000)) for number in range(3400))
HEXADECIMAL = random.Random(0).randbytes(6000).hex()


@pytest.mark.parametrize("text", [english(3000), english(20_000), CHINESE, HEXADECIMAL, "ab" * 5000])
def test_no_text_is_refused_for_its_vocabulary(text: str, tmp_path: Path, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", write(tmp_path, text), *QUICK, "--model.layers", "1", "--model.width", "32"]
    assert main([*command, "--train.steps", "2", "--out", str(out)]) == 0
    run = Run.open(out)
    config, vocab_size = run.config, run.tokenizer().vocab_size
    assert vocab_size == config.tokenizer.vocab_size or config.tokenizer.kind == "char"
    assert run.corpus().tokens("val") > config.model.context_length
    assert config.batch_rows * config.model.context_length == config.train.batch_tokens
    if text is CHINESE:
        assert config.tokenizer.kind == "bpe"

    assert main([*command, "--train.steps", "2", "--out", str(tmp_path / "o"), "--tokenizer.vocab_size", "60000"]) == 1
    assert "too small for tokenizer.vocab_size 60000" in capsys.readouterr().err


def test_too_little_text(tmp_path: Path, capsys):
    assert main(["train", "--data", write(tmp_path, english(1900)), "--out", str(tmp_path / "run")]) == 1
    assert "the text has 1,900 bytes, too few to learn from; give 2,000 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def config_with(**given: object) -> Config:
    return load_config("fit", **{name.replace("__", "."): value for name, value in given.items()})


@pytest.mark.parametrize(
    "given",
    [
        {"model__width": 100}, {"model__heads": 6}, {"model__context_length": 300}, {"train__batch_tokens": 3000},
        {"train__micro_batch": 6}, {"model__kv_heads": 2}, {"model__heads": 6, "model__width": 96},
        {"model__layers": 7, "model__context_length": 100, "train__batch_tokens": 700}, {"model__depth": 4},
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [5_000, 500_000, 50_000_000])
def test_what_is_chosen_goes_with_what_is_given(given: dict[str, int], size: int):
    text = Text(size, vocab_size=300, train_tokens=size // 2, val_tokens=max(200, size // 20))
    config, _ = fit_text(config_with(**given), text)
    config, said = fit_model(config, text, Machine({128: 1e10, 512: 4e10}, 2**34, 150.0))
    made = settled(config, text)
    assert not made.fit.fields
    tree = config_to_dict(made)
    for name, value in given.items():
        section, field = name.split("__")
        assert tree[section][field] == value
    assert len(said) == 2


def test_more_time_makes_no_smaller_model():
    """Of a large text; a small one has its own size, whatever the time."""
    widths = []
    for seconds in (10.0, 100.0, 1000.0, 10_000.0):
        text = Text(50_000_000, vocab_size=4096, train_tokens=12_000_000, val_tokens=600_000)
        config, _ = fit_model(config_with(), text, Machine({128: 1e11, 512: 3e11}, 2**35, seconds))
        widths.append(config.model.width)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] <= SHAPES[-1][1]


def test_a_large_text_that_is_read_often_is_regularised():
    text = Text(5_000_000, vocab_size=4096, train_tokens=1_200_000, val_tokens=60_000)
    for seconds, dropout in ((150.0, 0.0), (3600.0, 0.1)):
        config, _ = fit_model(config_with(), text, Machine({128: 3e11}, 2**35, seconds))
        assert (config.model.dropout, config.eval.calibrate) == (dropout, dropout > 0)


def test_long_training_on_a_cpu_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """Not what a little text makes short, nor where no time is given."""
    monkeypatch.setattr(fitting, "COMPILE_SECONDS", 90.0)
    little, much = (Text(size, vocab_size=300, train_tokens=size // 3, val_tokens=999) for size in (50_000, 5_000_000))
    for text, seconds, compile in (
        (little, 1000.0, "auto"),
        (much, 1000.0, "on"),
        (much, 80.0, "auto"),
        (much, 0.0, "auto"),
    ):
        config, _ = fit_model(config_with(), text, Machine({128: 3e11}, 2**35, seconds))
        assert config.train.compile == compile


def test_memory():
    """Half of what is free, and 2 GB for a small text on a CPU, by a smaller model and by fewer rows at once."""
    text = Text(9_000_000, vocab_size=4096, train_tokens=2_000_000, val_tokens=100_000)
    for free in (2**31, 2**32, 2**38):
        machine = Machine({128: 1e15}, free, 1e5)
        limit = min(2e9, free / 2)
        config, _ = fit_model(config_with(train__batch_tokens=65536), text, machine)
        rows = config.train.micro_batch or config.batch_rows
        assert config.batch_rows % rows == 0
        assert fitting.memory_needed(config, 4096, rows, machine) <= limit


def test_a_little_text_is_not_read_more_often_than_pays():
    """Its steps are bounded, by passes too, if they are chosen; those of a large text, or of a recipe, are not."""
    speed = Speed(0.1, 0.0, 0.0, 0.0)
    for size, tokens, most in ((5e4, 40_000, 500), (3e5, 100_000, 400), (2e6, 700_000, 684), (9e6, 3_000_000, 0)):
        text = Text(round(size), vocab_size=300, train_tokens=tokens, val_tokens=2000)
        machine = Machine({128: 1e12}, 2**34, 600.0)
        config, _ = fit_model(config_with(train__minutes=10), text, machine)
        steps, said = fit_steps(config, text, speed, 1, 600.0)
        assert steps == most or (not most and steps > 5000)
        assert ("more would learn less from so little text" in said[0]) == bool(most)
        recipe = load_config("quickstart", **{"train.minutes": 10})
        assert fit_steps(recipe, text, speed, 1, 600.0)[0] > 5000


def test_steps_leave_time_for_validation():
    text = Text(1_000_000, vocab_size=1024, train_tokens=300_000, val_tokens=20_000)
    config = load_config(
        "quickstart", **{"train.minutes": 1, "eval.every": 10, "eval.tokens": 1000, "sample.max_tokens": 50}
    )
    speed = Speed(0.04, 0.01, 0.0001, 0.002)
    steps, _ = fit_steps(config, text, speed, 2, 60.0)
    validations = steps // 10  # of a part, the last one besides of all; a sample with each
    takes = steps * 0.09 + 0.1 * validations + 2.0 + 0.1 * (validations + 1)
    assert takes == pytest.approx(60 - fitting.END_SECONDS, abs=0.5)
