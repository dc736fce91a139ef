"""A sweep: runs of one configuration with several values of some fields and several seeds.

    axes (--over) × seeds → names of runs → OUT/recipes/NAME.toml → pretrain train, a process each → OUT/NAME

OUT also has ``sweep.json``, what was asked, and ``logs/NAME.txt``, what each process printed. Only the run directories
say which runs are finished, and how; so a sweep killed at any moment goes on when it is asked for again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock

from pretrain.config import Config, config_from_dict, config_to_dict, differences
from pretrain.config.load import FREE_SECTIONS, with_fields
from pretrain.errors import DataError, Interrupted, UsageError
from pretrain.io import write_atomically
from pretrain.runs import Run
from pretrain.runs.run import LOCK
from pretrain.tokens import Origin
from pretrain.tokens.on_ray import RETRIES
from pretrain.training.start import what_changed

RECORD = "sweep.json"
POLL_SECONDS = 0.1
ATTEMPTS = 200  # to draw a combination that is new and allowed
FREE = FREE_SECTIONS - {"eval", "checkpoint", "fit"}  # those decide with which loss a run ends

Axes = Mapping[str, Sequence[Any]]
"""For each field a list of values, or a tuple of two numbers, the ends of a range."""
Values = Mapping[str, Any]


def parse_axis(text: str, base: Config) -> tuple[str, Sequence[Any]]:
    """Read ``optim.lr=0.01,0.02``, a list, or ``optim.lr=0.01..0.1``, a range. Raises UsageError if it is neither."""
    name, _, listed = text.partition("=")
    if not (name and listed):
        raise UsageError(f"--over is FIELD=VALUE,VALUE,... or FIELD=LOW..HIGH, not '{text}'")
    if name in ("train.seed", "train.minutes"):
        raise UsageError(f"--over {name}: give {'--seeds N' if name == 'train.seed' else 'train.steps'} instead")
    ends = [_literal(end) for end in listed.split("..")]
    if len(ends) == 2 and {type(end) for end in ends} <= {int, float}:
        if ends[0] >= ends[1]:
            raise UsageError(f"--over {text}: a range goes from a lower to a higher number")
        section, _, field = name.partition(".")
        kind = type(sum(ends) + getattr(getattr(base, section, None), field, 0))  # int, unless one is a float
        return name, tuple(map(kind, ends))
    together = _literal(f"[{listed}]")
    return name, together if isinstance(together, list) else [_literal(value) for value in listed.split(",")]


def _literal(text: str) -> Any:
    """A number, boolean, list or quoted text as TOML writes it; other text as it is."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        return value if isinstance(value, (bool, int, float, str, list)) else text
    except tomllib.TOMLDecodeError:
        return text


def _in_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"  # 1.0 is the same as 1
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def in_words(values: Values) -> str:
    """A combination, as ``optim.lr=0.01 model.layers=4``."""
    return " ".join(f"{field}={_in_text(value)}" for field, value in values.items())


def with_values(base: Config, values: Values) -> Config:
    """The configuration with ``values`` given. Raises UsageError, which names them, if it refuses them."""
    return with_fields(config_to_dict(base), values, f"--over {in_words(values)}")


@dataclass
class Sweep:
    """What a sweep was asked for so far; :meth:`save` records it."""

    out: Path
    given: Config
    """As it was given, without values and seeds."""
    base: Config
    """The same with what is chosen to fit (``fit.fields``, ``train.minutes``), once for all runs."""
    fields: list[str]
    runs: dict[str, tuple[dict[str, Any], int]]
    """Values and seed of each run, by the name of its folder."""
    commands: list[str]

    @staticmethod
    def open(out: Path, given: Config, fields: list[str]) -> Sweep:
        """The sweep in a folder, or a new one. Raises UsageError if more differs than values and seeds."""
        file = out / RECORD
        if not file.exists():
            if out.is_dir() and {path.name for path in out.iterdir()} - {LOCK}:
                raise UsageError(f"{out} has files but is not a sweep; choose another folder with --out")
            return Sweep(out, given, given, fields, {}, [])
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            before, base = (config_from_dict(record[name], str(file)) for name in ("given", "base"))
            runs = {name: (run["values"], run["seed"]) for name, run in record["runs"].items()}
            sweep = Sweep(out, before, base, record["fields"], runs, record["commands"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} is damaged ({error}); put it back, or choose another --out") from None
        different = differences(before, given, FREE)
        if set(fields) != set(sweep.fields):
            different.insert(0, f"over {', '.join(sweep.fields) or 'seeds'} → {', '.join(fields) or 'seeds'}")
        if different:
            raise UsageError(f"{out} was begun otherwise ({'; '.join(different)}); choose another --out")
        return sweep

    def save(self) -> None:
        """Write ``sweep.json`` atomically."""
        runs = {name: {"values": values, "seed": seed} for name, (values, seed) in self.runs.items()}
        configs = {"given": config_to_dict(self.given), "base": config_to_dict(self.base)}
        record = {"commands": self.commands, "fields": self.fields, **configs, "runs": runs}
        write_atomically(self.out / RECORD, json.dumps(record, indent=1) + "\n")

    def add(self, values: Values, seed: int) -> str:
        """The name of the run with these values and this seed. Raises UsageError if the configuration refuses them."""
        values = {field: values[field] for field in self.fields}
        with_values(self.base, values)
        leaves = [field.rpartition(".")[2] for field in self.fields]
        short = [leaf if leaves.count(leaf) == 1 else f for leaf, f in zip(leaves, self.fields, strict=True)]
        full = ",".join(f"{name}={_in_text(value)}" for name, value in zip(short, values.values(), strict=True))
        name = re.sub(r"[^A-Za-z0-9.,=+_-]+", "_", full)[:120]
        if name != full:  # others may look like it now
            name += "-" + hashlib.sha256(full.encode()).hexdigest()[:8]
        name = f"{name},seed={seed}".lstrip(",")
        self.runs.setdefault(name, (values, seed))
        return name

    def config(self, name: str) -> Config:
        """The configuration of a run."""
        config = with_values(self.base, self.runs[name][0])
        return replace(config, train=replace(config.train, seed=self.runs[name][1]))

    def summary(self, name: str) -> dict[str, Any] | None:
        """The results of a run; None before its end."""
        return Run(self.out / name, self.base).summary

    def settings(self) -> dict[str, list[str]]:
        """The names of the runs of each combination so far, by the combination in words."""
        found: dict[str, list[str]] = {}
        for name, (values, _) in self.runs.items():
            found.setdefault(in_words(values), []).append(name)
        return found

    def arguments(self, name: str) -> list[str]:
        """What ``pretrain`` makes or resumes a run by."""
        return ["train", str(self.out / "recipes" / f"{name}.toml"), "--out", str(self.out / name)]

    def prepare(self, name: str) -> list[str]:
        """Record the sweep and write the recipe of a run; gives its :meth:`arguments`.

        A new run is given the tokens that another one made of the same text. Raises DataError if that text changed.
        """
        config, folder, arguments = self.config(name), self.out / name, self.arguments(name)
        (self.out / "recipes").mkdir(exist_ok=True)
        write_atomically(Path(arguments[1]), tomli_w.dumps(config_to_dict(config)))
        self.save()
        for other in (self.out / each for each in self.runs if each != name and Run.exists(self.out / each)):
            run, origin = Run.open(other), Origin.load(other)
            if (run.config.data, run.config.tokenizer) != (config.data, config.tokenizer):
                continue
            problem, now = what_changed(run, origin, False, lambda _: None)
            if problem:
                raise DataError(f"{problem}; restore it, or choose another --out")
            if now == origin and run.own_tokens and not config.data.stream and not (folder / "data").exists():
                with suppress(OSError):  # a file system without links: they are made again
                    shutil.rmtree(folder / "data.tmp", ignore_errors=True)
                    shutil.copytree(run.data, folder / "data.tmp", copy_function=os.link)
                    (folder / "data.tmp").rename(folder / "data")
            break
        return arguments


def grid(axes: Axes) -> list[Values]:
    """All combinations. Raises UsageError if a field has a range."""
    for name, values in axes.items():
        if isinstance(values, tuple):
            raise UsageError(f"--over {name} is a range: draw from it with --random N or --search N")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def draw(sweep: Sweep, axes: Axes, seeds: Sequence[int], count: int, learn: bool) -> Iterator[str]:
    """Runs of ``count`` combinations: those so far that are on the axes, then others, each drawn when it is asked for.

    They are drawn at random, or with ``learn`` by Optuna's TPE from the results so far: a function of these and the
    first seed. What the configuration refuses is not drawn; fewer where there are no more. Raises UsageError if Optuna
    is missing, or all is refused.
    """
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError:
        raise UsageError("--random and --search need Optuna: pip install 'pretrain[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for name, axis in axes.items():
        if isinstance(axis, list):
            space[name] = CategoricalDistribution(range(len(axis)))
        elif isinstance(axis[0], int):
            space[name] = IntDistribution(*axis)
        else:  # logarithmic where the ends differ tenfold
            space[name] = FloatDistribution(*axis, log=axis[1] >= 9.99 * axis[0] > 0)

    def trial(names: Sequence[str]) -> Any:
        """What is known of the runs of a combination, for Optuna; None if they are not on the axes."""
        values, ends = sweep.runs[names[0]][0], [summary for name in names if (summary := sweep.summary(name))]
        if not all(values[n] in a if isinstance(a, list) else a[0] <= values[n] <= a[1] for n, a in axes.items()):
            return None
        places = {n: a.index(values[n]) if isinstance(a, list) else values[n] for n, a in axes.items()}
        losses = [end["val_bpb"] or end["val_loss"] or math.inf for end in ends]
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]  # NaN too
        known: dict[str, Any] = {"state": optuna.trial.TrialState.RUNNING}
        if losses:
            known = {"value": statistics.fmean(losses)}
        return optuna.create_trial(params=places, distributions=space, **known)

    refused = None
    for number in range(count):
        for attempt in range(ATTEMPTS):
            trials = {names[0]: found for names in sweep.settings().values() if (found := trial(names))}
            if number < len(trials):
                break
            seed = (seeds[0] + ATTEMPTS * number + attempt) % 2**32
            tpe, random = optuna.samplers.TPESampler(seed=seed, constant_liar=True), optuna.samplers.RandomSampler(seed)
            study = optuna.create_study(sampler=tpe if learn else random)
            study.add_trials(trials.values())
            values = study.ask(space).params
            for name, axis in axes.items():
                if isinstance(axis, list):
                    values[name] = axis[values[name]]
                elif isinstance(values[name], float):  # short, for the name
                    values[name] = min(max(float(f"{values[name]:.4g}"), axis[0]), axis[1])
            try:
                sweep.add(values, seeds[0])
            except UsageError as error:  # as of heads that do not divide the width
                refused = error
        else:
            if refused and not number:
                raise refused
            return
        values = sweep.runs[list(trials)[number]][0]
        yield from [sweep.add(values, seed) for seed in seeds]


def launch(arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Run ``pretrain ARGUMENTS`` in a process of its own, which stops, with all saved, when this one is gone."""
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain.cli.sweep", *arguments],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches us alone, and we ask once: a second signal would cut saving short
        )  # fmt: skip


class RayTask:
    """A run as a task of a Ray cluster, to be used as a process of :func:`launch`."""

    def __init__(self, ray: Any, arguments: Sequence[str], log: Path, jobs: int, device: str):
        sizes = [node["Resources"].get("CPU", 0) for node in ray.nodes()]
        gpus = float(device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
        share = max(1, int(min(max(sizes), sum(sizes) // jobs)))
        remote = ray.remote(num_cpus=share, num_gpus=gpus, max_retries=RETRIES)(_in_task)
        self.ray, self.log, self.task = ray, log, remote.remote(arguments, log, os.getcwd())

    def poll(self) -> int | None:
        """Its exit code; None before its end."""
        return self.wait() if self.ray.wait([self.task], timeout=0)[0] else None

    def terminate(self) -> None:
        """Ask it to stop."""
        self.ray.cancel(self.task)

    def wait(self) -> int:
        """Its exit code, at its end."""
        try:
            return self.ray.get(self.task)
        except self.ray.exceptions.TaskCancelledError:
            return Interrupted.exit_code
        except self.ray.exceptions.RayError as error:
            self.log.parent.mkdir(exist_ok=True)
            self.log.write_text(f"pretrain: {getattr(error, 'cause', error)}".split("\n")[0])
            return 1


def _in_task(arguments: Sequence[str], log: Path, folder: str) -> int:
    if Path(folder).is_dir():
        os.chdir(folder)  # paths may be relative to where the command was given
    if not Path(arguments[1]).is_file():
        host = socket.gethostname()
        raise UsageError(f"{arguments[1]} is not on {host}: with --engine ray, --out must be on shared storage")
    process = launch(arguments, log)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)  # to be cancelled does not end a system call
        return process.returncode
    finally:
        process.terminate()  # nothing, unless it is cancelled
        process.wait()


def follow_parent(folder: Path) -> None:
    """In a process of :func:`launch`: stop when the parent is gone; first wait for any other that trains ``folder``."""

    def watch() -> None:
        os.read(0, 1)  # the parent writes nothing: this ends when it does
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    if folder.is_dir():
        with suppress(OSError), FileLock(folder / LOCK):  # OSError: a file system without locks
            pass


def run_all(
    names: Iterator[str], start: Callable[[str, int], Any], jobs: int, ended: Callable[[str, int], None]
) -> None:
    """Run ``jobs`` runs at a time: ``start`` gives a process, for one of as many places; ``ended`` takes its exit code.

    When it is interrupted, all are asked to stop, and waited for.
    """
    running: dict[int, tuple[str, Any]] = {}
    try:
        while True:
            for place in range(jobs):
                if place not in running and (name := next(names, None)):
                    running[place] = name, start(name, place)
            if not running:
                return
            time.sleep(POLL_SECONDS)
            for place, (name, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[place]
                    ended(name, code)
    finally:
        left = [process for _, process in running.values()]
        for process in left:
            process.terminate()
        for process in left:  # where this is interrupted too, they leave at once, with the last checkpoint
            process.wait()
