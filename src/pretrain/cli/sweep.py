"""``pretrain sweep``: train several settings with several seeds."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from filelock import FileLock, Timeout

from pretrain.cli.parsing import Command
from pretrain.config import Config, as_chosen
from pretrain.config.schema import Count, Natural
from pretrain.errors import CheckpointError, DataError, Interrupted, PretrainError, UsageError
from pretrain.io import Output, cores, duration

if TYPE_CHECKING:
    from pretrain.experiments.sweep import Sweep as Record


@dataclass
class Sweep(Command):
    """Train several settings with several seeds: all combinations of what --over lists, each an ordinary run.

    Such as: pretrain sweep quickstart --over optim.lr=0.003,0.006 --over model.layers=4,6 --seeds 3 --out runs/lr
    All else is given as to 'pretrain train'. The same command again goes on where it stopped, also after a kill; with
    more values or seeds it adds their runs.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "quickstart"
    """A recipe by name ('pretrain recipes' lists them) or a path to a TOML file."""
    over: tuple[str, ...] = ()
    """A field with its values, as optim.lr=0.01,0.02, once for each field. With --random and --search also a range, as
    optim.lr=0.01..0.1, logarithmic if its ends are floats that differ tenfold. None: only the seeds differ."""
    seeds: Count = 1
    """Runs of each combination: with train.seed, the number after it, and so on."""
    random: Natural = 0
    """Train so many combinations, drawn at random (needs the extra 'sweep'). 0: all."""
    search: Natural = 0
    """Train so many combinations, each chosen by Optuna's TPE by the held-out losses so far (needs the extra 'sweep').
    0: all."""
    jobs: Count = 1
    """How many to train at a time. They divide the cores among them, or have a GPU each."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster (the extra 'ray'), with --out on shared storage."""
    out: str = ""
    """The folder of the runs. Default: runs/RECIPE-sweep."""
    json: bool = False
    """Print one JSON object at the end, and the lines on the way to standard error."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        if self.random and self.search:
            raise ValueError("--random and --search both choose the combinations; give one of them")

    def __call__(self) -> int:
        from pretrain.experiments.sweep import RayTask, draw, grid, launch, parse_axis, run_all, with_values
        from pretrain.experiments.sweep import Sweep as Record
        from pretrain.plan import make_plan
        from pretrain.runs.run import LOCK
        from pretrain.tokens.on_ray import cluster
        from pretrain.training.start import with_absolute_paths

        self.say = functools.partial(print, file=sys.stderr if self.json else Output(), flush=True)
        command = shlex.join(["pretrain", "sweep", *self.typed])
        out, given = Path(self.out or f"runs/{Path(self.recipe).stem}-sweep"), with_absolute_paths(self.config)
        given, first = replace(given, train=replace(given.train, seed=0)), given.train.seed
        seeds, axes = range(first, first + self.seeds), dict(parse_axis(text, given) for text in self.over)
        if len(axes) < len(self.over):
            raise UsageError("--over names a field twice; list all its values in one")

        record = Record.open(out, given, list(axes))
        if not record.runs and _is_open(given):
            one = with_values(given, {name: values[0] for name, values in axes.items()})
            if _is_open(one):
                record.base = as_chosen(one, make_plan(one).config)  # else each run would choose its own
        record.commands += [command] * (command not in record.commands)
        if self.random or self.search:
            names = draw(record, axes, seeds, self.random or self.search, learn=bool(self.search))
        else:
            names = iter([record.add(values, seed) for seed in seeds for values in grid(axes)])
        left = (name for name in names if not record.summary(name))
        known = list(itertools.islice(left, 1 if self.search else None))
        total = self.search * len(seeds) or len(record.runs)
        gpus = self.say_plan(record, known, total) if known else []
        begun, failed, count = time.monotonic(), dict[str, str](), itertools.count(1)

        def start(name: str, place: int) -> Any:
            arguments, log, environment = record.prepare(name), out / "logs" / f"{name}.txt", {}
            if ray:
                return RayTask(ray, arguments, log, self.jobs, given.train.device)
            if self.jobs > 1:
                environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // self.jobs)))
                environment |= {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
            return launch(arguments, log, **environment)

        def end(name: str, code: int) -> None:
            if (summary := record.summary(name)) and not code:
                result = f"val loss {_number(summary['val_loss'])}   {_number(summary['val_bpb'])} bits per byte"
            else:
                log = (out / "logs" / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
                last = log.rstrip().rpartition("\n")[2]
                known = last.startswith("pretrain: ")
                result = failed[name] = last.removeprefix("pretrain: ") if known else f"exit code {code} after: {last}"
            self.say(f"{next(count):4d}  {name}   {result}   {duration(time.monotonic() - begun)}")

        with contextlib.ExitStack() as stack:
            out.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(out / LOCK, timeout=0))
            except Timeout:
                raise CheckpointError(f"another process is at the sweep in {out}; wait, or use another --out") from None
            except OSError:
                pass  # a file system without locks
            record.runs = Record.open(out, given, list(axes)).runs | record.runs  # another ended meanwhile
            ray = stack.enter_context(cluster(cores())) if self.engine == "ray" else None
            try:
                run_all(itertools.chain(known, left), start, self.jobs, end)
            except KeyboardInterrupt:
                done = sum(record.summary(name) is not None for name in record.runs)
                raise Interrupted(f"stopped: {done} of {total} runs are finished; resume with: {command}") from None
        self.show(record, failed)
        if failed:
            name, why = next(iter(failed.items()))
            again = shlex.join(["pretrain", *record.arguments(name)])
            raise PretrainError(f"{len(failed)} of {total} runs failed, first {name} ({why}); to see it: {again}")
        return 0

    def say_plan(self, record: Record, names: Sequence[str], total: int) -> list[str]:
        """Say how much is to do. Gives the GPUs to share; raises what would stop a run before its first step."""
        import torch

        from pretrain.device import choose_device
        from pretrain.model import meta_model
        from pretrain.optim import build_optimizers
        from pretrain.plan import make_plan
        from pretrain.plan.data import look_at_data, windows_of
        from pretrain.plan.plan import START_SECONDS, checkpoint_bytes
        from pretrain.plan.words import size
        from pretrain.sizing import count_parameters, flops_per_token, resolve
        from pretrain.training.init_from import resolve_init

        torch.set_num_threads(max(1, torch.get_num_threads() // self.jobs))
        made = make_plan(record.config(names[0]))  # its speed is measured; that of the others follows
        facts, seconds, disk = {}, 0.0, 0
        for words, members in record.settings().items():
            if not (runs := sum(name in names for name in members)):
                continue
            config = resolve_init(record.config(members[0]))
            text = config.data, config.tokenizer
            if text not in facts:
                facts[text] = data = look_at_data(config) if facts else made.data
                disk += data.train_tokens * (2 if data.vocab_size <= 2**16 else 4)
            if facts[text].problem:
                raise DataError(facts[text].problem)
            vocab_size, windows = facts[text].vocab_size, windows_of(config, facts[text].train_tokens)
            try:
                config, _ = resolve(config, vocab_size, windows)
                build_optimizers(meta_model(config.model, vocab_size), config.optim)
            except UsageError as error:
                raise UsageError(f"--over {words}: {error}") from None
            flops = flops_per_token(config.model, vocab_size) * config.train.steps * config.train.batch_tokens
            seconds += runs * (START_SECONDS + made.seconds * flops / (made.flops_per_token * made.tokens))
            counts, saving = count_parameters(config.model, vocab_size), config.checkpoint
            saved = config.train.steps // saving.every + 1 if saving.every else 1
            kept = min(saved, (saving.keep_last or saved) + saving.keep_best + len(saving.at))
            disk += runs * kept * checkpoint_bytes(config, counts)
        finished = sum(record.summary(name) is not None for name in record.runs)
        runs = total - finished if self.search else len(names)
        seconds, disk = seconds * runs / len(names), disk * runs // len(names)
        gpus = []
        if choose_device(record.base.train.device).type == "cuda":
            given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus = given if any(given) else [str(index) for index in range(torch.cuda.device_count())]
        together = min(self.jobs, runs, len(gpus) or runs)
        free = shutil.disk_usage(
            next(path for path in (record.out, *record.out.absolute().parents) if path.exists())
        ).free
        self.say(f"runs      {runs} to train, {finished} finished before → {record.out}")
        self.say(f"time      about {duration(seconds / together)}, {together} at a time; {made.speed}")
        self.say(f"disk      about {size(disk)}" + f"; only {size(free)} are free" * (disk > free))
        return gpus

    def show(self, record: Record, failed: dict[str, str]) -> None:
        """Print the results of all runs so far, as 'pretrain compare' does, the best settings first, or JSON."""
        import msgspec

        from pretrain.experiments.compare import Comparison, compare
        from pretrain.experiments.groups import groups_at

        try:
            found = compare(groups_at([str(record.out)]), measure=False)
        except PretrainError as error:  # no run is finished, or they do not compare
            found = Comparison([], [], [str(error)])
        found.groups.sort(key=lambda group: group["bits_per_byte"]["mean"])
        runs = []
        for name, (values, seed) in record.runs.items():
            result = record.summary(name) or {}
            state = "finished" if result else "failed" if name in failed else "unfinished"
            shown = {key: result[key] for key in ("val_loss", "val_bpb", "seconds") if result}
            shown |= {"error": failed[name]} if name in failed else {}
            runs.append({"run": str(record.out / name), "values": values, "seed": seed, "state": state, **shown})
        if self.json:
            print(msgspec.json.encode({"out": str(record.out), "runs": runs, **asdict(found)}).decode())
            return
        self.say(f"\n{found}" if found.groups else f"\n{found.notes[0]}")


def _is_open(config: Config) -> bool:
    """Whether each run would choose something by the speed it measures, or by its text."""
    return bool(config.fit.fields or config.train.timed)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":  # a run of a sweep, which launch() starts
    from pretrain.cli import main
    from pretrain.experiments.sweep import follow_parent

    follow_parent(Path(sys.argv[-1]))
    sys.exit(main())
