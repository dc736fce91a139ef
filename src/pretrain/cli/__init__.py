"""The command line: one thin function for each command.

Everything heavy is imported inside the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro

from pretrain.cli.launch import LOCAL_RANK, count_processes, is_process, launch, machines_join, one_voice
from pretrain.cli.parsing import Command, dispatch, listing, parse, value_of
from pretrain.cli.report import report, watch
from pretrain.config import Config, load_config, recipe_names, recipe_summary, recipe_text
from pretrain.errors import Interrupted, PretrainError, UsageError, did_you_mean
from pretrain.generation.options import SamplingOptions
from pretrain.io import signals_to_handle

STARTED = time.monotonic()

PATIENCE = 10.0
"""Seconds that a process with nothing to say waits for the one that has."""


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
    resume_from: int = 0
    """Go back to the checkpoint of this step; what came after it is set aside. 0: go on from the newest."""
    nproc: str = ""
    """Start so many processes on this machine, which train together (docs/cluster.md). gpu: one for each GPU; auto: the
    same, or one where there is no GPU. Empty: this one alone."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.nproc not in ("", "gpu", "auto") and not (self.nproc.isdecimal() and int(self.nproc) >= 1):
            raise ValueError(f"--nproc must be a number of processes, gpu or auto, not '{self.nproc}'")


def train(args: list[str]) -> int:
    """Train a model, or go on with a run that was stopped."""
    with one_voice():
        arguments = _train_arguments(args)
    config, out = arguments.config, arguments.out or f"runs/{Path(arguments.recipe).stem}"
    command = ["pretrain", "train", "--out", out] + (["--nproc", arguments.nproc] if arguments.nproc else [])
    unused = 0
    if not is_process():
        count = count_processes(arguments.nproc or "auto", config.train.device)
        if arguments.nproc and (count > 1 or machines_join()):
            return launch(["train", *args], count, config.guard.grace_seconds, shlex.join(command))
        unused = count - 1 if "WORLD_SIZE" not in os.environ else 0

    from pretrain.report import explain, plot_run, write_report
    from pretrain.training import Console, train

    console = Console(command=command)
    if unused:
        console.say(f"gpus      1 of {unused + 1} will train; all of them with: --nproc gpu")
    run = train(config, out, console, STARTED, arguments.resume_from)
    if os.environ.get("RANK", "0") == "0":  # one of the processes that trained together speaks for all
        plot_run(run)
        try:
            page = write_report([run], run.folder / "report.html")
        except Exception as error:  # a trained model is not to be lost for a picture of it
            console.say(f"no report was written ({error}); try: pretrain report {out}")
            page = None
        console.say("\n" + explain(run, page))
    return 0


def _train_arguments(args: list[str]) -> TrainArguments:
    given = args[0] if args and not args[0].startswith("-") else ""
    out = value_of(args, "--out")
    if out and not given and Path(out, "config.toml").is_file():
        from pretrain.runs.run import Run

        base = Run.open(out).config
    else:
        base = load_config(given or "quickstart")
    return parse(TrainArguments, args, "train", TrainArguments(config=base))


@dataclass
class EvalArguments:
    """Measure models: loss, perplexity and bits per byte on all held-out text; CORE; several side by side.

    What the numbers mean: docs/evaluation.md.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or hf:DIR for a Hugging Face model (with --data or --core)."""
    data: tuple[str, ...] = ()
    """Measure on this text instead: files, folders or patterns."""
    split: Literal["val", "train"] = "val"
    """Which of the run's own text: the held-out part, or what it was trained on."""
    batches: int = 0
    """Only estimate: the mean over this many random batches of both splits. 0: measure on all."""
    core: Annotated[str, tyro.conf.arg(metavar="[BUNDLE]")] = ""
    """Also measure CORE, accuracy on up to 22 tasks, from a folder, .zip file or URL; without one, nanochat's."""
    max_per_task: int = 0
    """Ask only this many questions of each task of CORE. 0: all."""
    json: bool = False
    """Print one JSON object a model, a line each."""
    csv: str = ""
    """Write the numbers to this file too."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        for name in ("batches", "max_per_task"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if self.batches and (self.data or self.split != "val"):
            raise ValueError("--batches estimates on both of the run's own splits; leave out --data and --split")
        if self.data and self.split != "val":
            raise ValueError("--split is of the run's own text; leave it out with --data")
        if not self.runs:
            raise ValueError("RUN is missing: give a run directory, or hf:DIR; see pretrain eval --help")


DEFAULT = "default"
"""The value of --core given without one."""


def evaluate(args: list[str]) -> int:
    """Loss, perplexity, bits per byte and CORE of runs, side by side."""
    for i, argument in enumerate(args):
        if argument == "--core" and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args = [*args[: i + 1], DEFAULT, *args[i + 1 :]]
    a = parse(EvalArguments, args, "eval")

    from pretrain.evaluation import open_bundle, read_tasks
    from pretrain.evaluation.compare import What, check_places, json_line, measure, tables, write_csv

    tasks = read_tasks(open_bundle("" if a.core == DEFAULT else a.core)) if a.core else []
    what = What(a.split, a.data, a.batches, tasks, a.max_per_task)
    check_places(a.runs, what)  # before the first of them takes its time
    measured = []
    for run in a.runs:
        measured.append(measure(run, what, a.device, lambda line: print(line, file=sys.stderr, flush=True)))
        if a.json:
            print(json_line(measured[-1]), flush=True)
    if not a.json:
        print(tables(measured))
    if a.csv:
        write_csv(Path(a.csv), measured)
    return 0


@dataclass
class SampleArguments:
    """Write text with a run's model.

    One text is printed as it is made; of several (--num-samples, --prompt given again, --prompts-file) each follows a
    line that tells its prompt, sample and seed. Every text is the one that its prompt and seed give alone.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. -: what standard input holds. None: begin a new document."""
    prompts_file: str = ""
    """A file of prompts, one a line; or .jsonl, the field 'prompt' of each object."""
    num_samples: int = 1
    """Texts for each prompt."""
    interactive: bool = False
    """Read prompts from the terminal, a line each, until Ctrl-D or 'quit'. Ctrl-C stops an answer."""
    json: bool = False
    """Print one JSON object a text: prompt, text, tokens (how many), seed."""
    options: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    step: int = 0
    """Use the checkpoint of this step. 0: the newest."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, not {self.num_samples}")
        if self.interactive and (self.prompt or self.prompts_file or self.json or self.num_samples > 1):
            raise ValueError("--interactive reads its prompts and prints one text for each; give it no other")


def sample(args: list[str]) -> int:
    """Text from a run's model, as it is made."""
    a = parse(SampleArguments, args, "sample")

    import json

    from pretrain.device import choose_device, choose_precision
    from pretrain.generation import encode_prompt, sample_text, sample_texts
    from pretrain.generation.terminal import converse, print_as_it_comes, read_prompts
    from pretrain.runs import Run

    run = Run.open(a.run)
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in a.prompt]
    prompts += read_prompts(a.prompts_file) if a.prompts_file else []
    device = choose_device(a.device)
    model, tokenizer = run.load_model(device, run.checkpoint(a.step) if a.step else None), run.tokenizer()
    # On a CPU fp32, in which a text is the same in any batch; elsewhere bf16 for its speed.
    model.activation_dtype = choose_precision("fp32" if device.type == "cpu" else "auto", device).dtype
    options = vars(a.options)

    def say_if_long(prompt: str) -> None:
        tokens, context = len(encode_prompt(tokenizer, prompt)), model.config.context_length
        if tokens > context:
            print(f"pretrain: the prompt has {tokens:,} tokens; the model sees the last {context:,}", file=sys.stderr)

    def answer(prompt: str, number: int) -> Iterator[str]:
        say_if_long(prompt)
        return sample_text(model, tokenizer, prompt, **{**options, "seed": a.options.seed + number})

    if a.interactive:
        converse(answer)
        return 0
    prompts = prompts or [""]
    if len(prompts) * a.num_samples == 1 and not a.json:
        pieces = answer(prompts[0], 0)  # a prompt that cannot be encoded is refused before anything is printed
        print_as_it_comes(prompts[0], pieces)
        return 0
    for prompt in prompts:
        say_if_long(prompt)
    for number, text in enumerate(sample_texts(model, tokenizer, prompts, a.num_samples, **options)):
        if a.json:
            print(json.dumps(dataclasses.asdict(text), ensure_ascii=False), flush=True)
        else:
            of = f"prompt {number // a.num_samples + 1}, sample {number % a.num_samples + 1}, seed {text.seed}"
            print(f"--- {of} ---\n{text.prompt}{text.text}", flush=True)
    return 0


@dataclass
class ExportArguments:
    """Write a run's model into a folder for others.

    As hf, transformers loads it with AutoModelForCausalLM and AutoTokenizer: as GPT-2, Llama or Qwen3 if the model
    computes exactly that, else with a model file of ours that is written along. As safetensors: tensors by our names,
    and config.json.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    out: str
    """The folder to write; it must not exist, or be empty."""
    format: Literal["hf", "safetensors"] = "hf"
    """What to write."""
    step: int = 0
    """Use the checkpoint of this step. 0: the newest."""


def export(args: list[str]) -> int:
    """A run's model as a folder that Hugging Face transformers loads."""
    a = parse(ExportArguments, args, "export")

    from pretrain.hf.export import export_run
    from pretrain.runs import Run

    run = Run.open(a.run)
    how = export_run(run, a.format, Path(a.out), run.checkpoint(a.step) if a.step else None)
    print(f"Wrote {a.out}. In Python:  {how}")
    return 0


@dataclass
class RecipesArguments:
    """List the recipes, or print one."""

    name: tyro.conf.Positional[str] = ""
    """A recipe to print as TOML; none lists them all."""


def recipes(args: list[str]) -> int:
    """List the recipes, or print one as TOML."""
    name = parse(RecipesArguments, args, "recipes").name
    names = recipe_names()
    if not name:
        width = max(map(len, names))
        for each in names:
            print(f"{each:<{width}}  {recipe_summary(each)}")
        return 0
    if name not in names:
        raise UsageError(f"no recipe named '{name}'{did_you_mean(name, names)}")
    print(recipe_text(name), end="")
    return 0


def _data(args: list[str]) -> int:
    """Download, prepare, verify or inspect data: 'pretrain data' lists the commands."""
    from pretrain.cli.data import COMMANDS as commands

    return dispatch(args, commands, "pretrain data")


def _tokenizer(args: list[str]) -> int:
    """Train a tokenizer, or show one at work: 'pretrain tokenizer' lists the commands."""
    from pretrain.cli.tokenizer import COMMANDS as commands

    return dispatch(args, commands, "pretrain tokenizer")


def _plan(args: list[str]) -> int:
    """What a training comes to: parameters, memory, time, and what is unusual about it."""
    from pretrain.cli.plan import plan

    return plan(args)


def _doctor(args: list[str]) -> int:
    """What this machine can do, what is missing, and the command that mends it."""
    from pretrain.cli.doctor import doctor

    return doctor(args)


COMMANDS: dict[str, Command] = {
    "plan": _plan,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "export": export,
    "report": report,
    "watch": watch,
    "data": _data,
    "tokenizer": _tokenizer,
    "recipes": recipes,
    "doctor": _doctor,
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
        with _signals_interrupt():
            return _run(args)
    except PretrainError as error:
        if str(error):
            print(f"pretrain: {error}", file=sys.stderr)
        elif is_process() and error.exit_code != Interrupted.exit_code:
            # Another process says it. torchrun ends all when the first has gone, so let that be the other one.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(PATIENCE)
        return error.exit_code
    except KeyboardInterrupt:
        if LOCAL_RANK == 0:
            text = "interrupted; what was saved is safe, and the same command goes on from it"
            print(f"pretrain: {text}", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"pretrain: {error.strerror}{where}", file=sys.stderr)
        return 1


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGUSR1 stop a command as Ctrl-C does; training has its own handlers."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = signals_to_handle("SIGTERM", "SIGHUP", "SIGUSR1")
    if threading.current_thread() is not threading.main_thread():  # where Python cannot install handlers
        numbers = []
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP + listing(COMMANDS))
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"pretrain {version('pretrain')}")
        return 0
    return dispatch(args, COMMANDS, "pretrain")
