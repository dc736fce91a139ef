"""The command line: one thin function for each command.

Everything heavy is imported inside the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from pretrain.config import Config, load_config, recipe_names, recipe_summary, recipe_text
from pretrain.errors import PretrainError, UsageError

T = TypeVar("T")
STARTED = time.monotonic()


@dataclass
class TrainArguments:
    """Train a model, or go on with a run that was stopped.

    Without arguments: the recipe 'quickstart' on the embedded corpus. On your own text: --data FILE_OR_FOLDER.
    'pretrain train --out RUN' alone goes on with an existing run.
    """

    recipe: tyro.conf.Positional[str] = "quickstart"
    """A recipe by name ('pretrain recipes' lists them) or a path to a TOML file."""
    out: str = ""
    """The run directory. Default: runs/RECIPE. One that exists is resumed."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train(args: list[str]) -> int:
    """Train a model, or go on with a run that was stopped."""
    given = args[0] if args and not args[0].startswith("-") else ""
    out = _value_of(args, "--out")
    if out and not given and Path(out, "config.toml").is_file():
        from pretrain.training.run import Run

        base = Run.open(out).config
    else:
        base = load_config(given or "quickstart")
    arguments = _parse(TrainArguments, args, "train", TrainArguments(config=base))
    out = arguments.out or f"runs/{Path(arguments.recipe).stem}"

    from pretrain.report import explain, plot_run
    from pretrain.training import Console, train

    console = Console(command=["pretrain", "train", "--out", out])
    run = train(arguments.config, out, console, started=STARTED)
    plot_run(run)
    console.say("\n" + explain(run))
    return 0


@dataclass
class EvalArguments:
    """Measure a run's model on all of its held-out text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    json: bool = False
    """Print one JSON object instead of words."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def evaluate(args: list[str]) -> int:
    """Validation loss, perplexity and bits per byte of a run."""
    arguments = _parse(EvalArguments, args, "eval")
    import json

    from pretrain.device import choose_device, choose_precision
    from pretrain.evaluation import evaluate_loss
    from pretrain.tokens import TokenStream, validation_batches
    from pretrain.training import Run

    run = Run.open(arguments.run)
    checkpoint = run.newest_checkpoint()
    device = choose_device(arguments.device)
    precision = choose_precision(checkpoint.state["precision"] if device.type == "cpu" else "auto", device)
    stream = TokenStream(run.data, "val")
    if not len(stream):
        raise UsageError(f"{run.folder} holds no text out (data.val_fraction is 0), so there is nothing to measure on")
    batches = validation_batches(stream, run.config.model.context_length, run.config.batch_rows)
    model = run.load_model(device, checkpoint)
    model.activation_dtype = precision.dtype
    result = evaluate_loss(model, batches, run.tokenizer().token_bytes())
    numbers = {
        "step": checkpoint.step,
        "val_loss": result.loss,
        "perplexity": result.perplexity,
        "val_bpb": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.text_bytes,
    }
    if arguments.json:
        print(json.dumps(numbers))
    else:
        print(f"{run.folder} after step {checkpoint.step:,}, on {result.tokens:,} held-out tokens")
        print(f"  loss            {result.loss:.4f} nats per token")
        print(f"  perplexity      {result.perplexity:.2f}")
        print(f"  bits per byte   {result.bits_per_byte:.4f}  ({result.text_bytes:,} bytes of text)")
    return 0


@dataclass
class SampleArguments:
    """Write text with a run's model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    prompt: str = ""
    """Text to continue. Empty: begin a new document."""
    max_tokens: int = 200
    """Tokens to write at most; the text may end earlier by itself."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int = 50
    """Choose among the k likeliest tokens. 0: among all."""
    seed: int = 0
    """The same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        for name in ("max_tokens", "temperature", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")


def sample(args: list[str]) -> int:
    """Text from a run's model, as it is made."""
    a = _parse(SampleArguments, args, "sample")

    from pretrain.device import choose_device
    from pretrain.generation import sample_text
    from pretrain.training import Run

    run = Run.open(a.run)
    model, tokenizer = run.load_model(choose_device(a.device)), run.tokenizer()
    pieces = sample_text(model, tokenizer, a.prompt, a.max_tokens, a.temperature, a.top_k, a.seed)
    first = next(pieces, "")  # a prompt that cannot be encoded is refused before anything is printed
    print(a.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


@dataclass
class RecipesArguments:
    """List the recipes, or print one."""

    name: tyro.conf.Positional[str] = ""
    """A recipe to print as TOML; none lists them all."""


def recipes(args: list[str]) -> int:
    """List the recipes, or print one as TOML."""
    name = _parse(RecipesArguments, args, "recipes").name
    names = recipe_names()
    if not name:
        width = max(map(len, names))
        for each in names:
            print(f"{each:<{width}}  {recipe_summary(each)}")
        return 0
    if name not in names:
        raise UsageError(f"no recipe named '{name}'{_did_you_mean(name, names)}")
    print(recipe_text(name), end="")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "recipes": recipes,
}

HELP = """usage: pretrain COMMAND [ARGUMENTS]

Pretrain a GPT-style language model from raw text.

  pretrain train                       the main job: a small GPT from the embedded text, in minutes
  pretrain train --data FILE_OR_DIR    the same on your own text
  pretrain train RECIPE                a published recipe; any field is overridden as --model.layers 6
  pretrain COMMAND --help              everything about one command

commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted and safely stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except PretrainError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pretrain: interrupted; the last checkpoint, if there is one, is safe", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"pretrain: {error.strerror}{where}", file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<10}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
        print(HELP + "\n".join(lines))
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"pretrain {version('pretrain')}")
        return 0
    if args[0] not in COMMANDS:
        raise UsageError(f"no command '{args[0]}'{_did_you_mean(args[0], list(COMMANDS))}")
    return COMMANDS[args[0]](args[1:])


def _parse(kind: type[T], args: list[str], command: str, default: T | None = None) -> T:
    """Parse arguments into a dataclass; what tyro would show as a box becomes a one-line UsageError."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"pretrain {command}", args=args, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    except ValueError as error:  # of the configuration as a whole, which tyro passes on as it is
        raise UsageError(str(error)) from None
    lines = [line.strip("│╭╮╰╯─- ") for line in complaint.getvalue().splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    message = re.split(r" (?:Perhaps you meant:|Argument helptext:|For full helptext)", text)[0]
    message = re.sub(r"^Error parsing [\w.]*: (?=\w+\.)", "", message)
    unknown = re.match(r"Unrecognized options: (--[\w.-]+)", message)
    if unknown:
        message = f"no option {unknown[1]}{_did_you_mean(unknown[1], _options(kind))}"
    raise UsageError(f"{message}; see pretrain {command} --help")


def _options(kind: Any, prefix: str = "--") -> list[str]:
    """The options of an arguments dataclass, as they are typed."""
    names = []
    for each in dataclasses.fields(kind):
        if each.name == "config":
            names += _options(Config)
        elif prefix == "--" and kind is Config:
            names += _options(each.default_factory, f"--{each.name}.")
        else:
            names.append(prefix + (each.name if "." in prefix else each.name.replace("_", "-")))
    return names


def _value_of(args: list[str], option: str) -> str:
    """The value given to an option, before the arguments are parsed in earnest."""
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return ""


def _did_you_mean(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there are {', '.join(names)}" if len(names) < 12 else ""
