"""What there is to say of a run beside its curves: rows of text for the tables of the page.

run directory → results, loss_rows, remarks, data_rows, config_rows, environment_rows, commands
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config, config_to_dict, load_config, recipe_names
from pretrain.errors import PretrainError
from pretrain.io import duration, without_secrets
from pretrain.report.baselines import Baselines
from pretrain.report.curves import SMOOTHED, Curves
from pretrain.runs import Run
from pretrain.runs.environment import read_environment
from pretrain.sizing import count_parameters, flops_per_token, resolve
from pretrain.tokens import Manifest
from pretrain.tokens.shards import MANIFEST

OVERFIT = 0.02
"""Nats by which the held-out loss must have risen from its lowest before that is remarked on."""


@dataclass(frozen=True)
class Size:
    """What a run's model comes to."""

    parameters: int
    flops_per_token: int
    vocabulary: int


@dataclass(frozen=True)
class LossRow:
    """A line of the table of losses."""

    what: str
    loss: float | None
    bits_per_byte: float | None
    meaning: str
    ours: bool = False
    """Whether it is this model's, not a baseline."""

    @property
    def choices(self) -> str:
        """Among how many equally likely tokens one would be as unsure."""
        if self.loss is None:
            return ""
        choices = math.exp(min(self.loss, 50))
        return f"{choices:.1f}" if choices < 10 else f"{choices:,.0f}"


@dataclass(frozen=True)
class Setting:
    """A field of the configuration."""

    section: str
    name: str
    value: str
    recipe: str | None
    """The recipe's value, where it is another one."""


def size_of(run: Run) -> Size | None:
    """Counts of a run's model; None while its vocabulary is not known."""
    manifest = manifest_of(run)
    vocabulary = (run.summary or {}).get("vocab_size") or (manifest.vocab_size if manifest else 0)
    if not vocabulary:
        try:
            vocabulary = run.tokenizer().vocab_size
        except (PretrainError, OSError):
            return None
    parameters = sum(count_parameters(run.config.model, vocabulary).values())
    return Size(parameters, flops_per_token(run.config.model, vocabulary), vocabulary)


def manifest_of(run: Run) -> Manifest | None:
    """The manifest of a run's own token shards, if it has readable ones."""
    with suppress(PretrainError):
        if (run.data / MANIFEST).is_file():
            return Manifest.load(run.data)
    return None


# Results ---------------------------------------------------------------------------------------------------------


def results(run: Run, curves: Curves, size: Size | None) -> dict[str, str]:
    """What a run came to so far, by label; the same labels for every run."""
    val_loss, val_bpb, core = (curves.val.last(name) for name in ("val/loss", "val/bpb", "val/core"))
    steps, tokens, seconds = (curves.train.last(name) for name in ("step", "tokens", "time"))
    flops = size.flops_per_token * tokens if size and tokens else None
    of = "" if run.summary else f" of {run.config.train.steps:,}, not finished"
    return {
        "held-out loss": _shown(val_loss, ".4f"),
        "bits per byte": _shown(val_bpb, ".4f"),
        "CORE": _shown(core, ".4f"),
        "training loss, smoothed": _shown(curves.train.last(SMOOTHED), ".4f"),
        "steps": _shown(steps, ",.0f") + of,
        "tokens": _shown(tokens, ",.0f"),
        "time": duration(seconds) if seconds else "",
        "tokens a second": _shown(tokens / seconds if tokens and seconds else None, ",.0f"),
        "parameters": f"{size.parameters:,}" if size else "",
        "vocabulary": f"{size.vocabulary:,}" if size else "",
        "FLOPs": _shown(flops, ".3g"),
        "skipped steps": f"{sum(curves.skips.values()):,}",
    }


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# The loss in plain words -----------------------------------------------------------------------------------------


def loss_rows(run: Run, curves: Curves, baselines: Baselines | None) -> list[LossRow]:
    """What losses mean: guessing without a model, and this model in the course of its training."""
    rows = []
    if baselines:
        of, held_out = f"{baselines.tokens:,} training tokens", baselines.bits_per_byte
        counted = [
            ("guess any token", baselines.uniform, "knows nothing: every token of the vocabulary is equally likely"),
            ("count tokens", baselines.unigram, f"knows how frequent each token is, counted over {of}"),
            ("count pairs", baselines.bigram, f"also looks at the one token before, by the pairs of {of}"),
        ]
        rows += [LossRow(what, loss, held_out(loss), meaning) for what, loss, meaning in counted]
        rows.append(LossRow("a zip file", None, baselines.zipped, "what deflate makes of the held-out text"))
    measured = [
        (int(step), loss, bpb)
        for step, loss, bpb in zip(*(_column(curves, name) for name in ("step", "val/loss", "val/bpb")), strict=True)
        if math.isfinite(loss)
    ]
    chosen = {}
    if measured:
        chosen[measured[0][0]] = ("held-out text, first measured", measured[0])
        lowest = min(measured, key=lambda row: row[1])
        chosen[lowest[0]] = ("held-out text, lowest", lowest)
        chosen[measured[-1][0]] = ("held-out text, last measured", measured[-1])
    for step in sorted(chosen):
        what, (_, loss, bpb) = chosen[step]
        finite = bpb if math.isfinite(bpb) else None
        rows.append(LossRow(what, loss, finite, f"this model after step {step:,}", ours=True))
    train = curves.train.last(SMOOTHED)
    if train is not None:
        manifest = manifest_of(run)
        bytes_per_token = manifest.bytes_per_token if manifest else (run.summary or {}).get("bytes_per_token")
        bpb = train / (math.log(2) * bytes_per_token) if bytes_per_token else None
        step = int(curves.train.last("step") or 0)
        rows.append(LossRow("training text", train, bpb, f"this model up to step {step:,}, smoothed", ours=True))
    return rows


def _column(curves: Curves, name: str) -> list[float]:
    there = name in curves.val.columns
    return curves.val.column(name).tolist() if there else [math.nan] * len(curves.val)


def remarks(run: Run, curves: Curves, baselines: Baselines | None) -> list[str]:
    """What the numbers say, in sentences."""
    said = []
    rows = {row.what: row for row in loss_rows(run, curves, baselines)}
    last, lowest = rows.get("held-out text, last measured"), rows.get("held-out text, lowest")
    if last and last.loss is not None:
        said.append(
            f"Before each next token of text that it has not seen, the model is as unsure as if it had to guess among"
            f" {last.choices} equally likely ones."
        )
        if last.bits_per_byte is not None:
            said.append(
                f"With its predictions, held-out text could be packed into {last.bits_per_byte / 8:.0%} of its size"
                f" ({last.bits_per_byte:.3f} bits for each byte of 8)."
            )
        if baselines and last.loss > baselines.unigram:
            said.append("That is no better yet than knowing how frequent each token is.")
        elif baselines and last.loss > baselines.bigram:
            said.append("That is better than knowing how frequent each token is, but not yet than counting pairs.")
        if lowest and lowest.loss is not None and last.loss > lowest.loss + OVERFIT:
            said.append(
                f"The held-out loss was lowest, {lowest.loss:.3f}, {lowest.meaning.removeprefix('this model ')}, and"
                f" has risen to {last.loss:.3f} since: the model memorises its training text. Fewer steps, more text or"
                f" dropout help; --checkpoint.keep_best keeps the weights of the lowest."
            )
    manifest, tokens = manifest_of(run), curves.train.last("tokens")
    if manifest and tokens and manifest.tokens("train"):
        said.append(f"It has seen its training text {tokens / manifest.tokens('train'):.2f} times.")
    if curves.clippable:
        share = curves.clipped / curves.clippable
        said.append(
            f"Gradients were clipped to norm {run.config.train.grad_clip:g} at {curves.clipped:,} of"
            f" {curves.clippable:,} steps ({share:.1%})."
        )
    if curves.skips:
        kinds = {1: "not finite", 2: "a spike"}
        parts = ", ".join(f"{count:,} {kinds.get(kind, 'other')}" for kind, count in sorted(curves.skips.items()))
        said.append(f"Skipped steps, which changed nothing: {parts}.")
    return said


# The data --------------------------------------------------------------------------------------------------------


def data_rows(run: Run) -> list[tuple[str, str]]:
    """What the run was trained on."""
    paths = ", ".join(run.config.data.paths) or "the embedded corpus (the King James Bible)"
    rows = [("text", without_secrets(paths))]
    manifest = manifest_of(run)
    if manifest is None:
        return rows
    for split, name in (("train", "training"), ("val", "held out")):
        shards = [shard for shard in manifest.shards if shard.split == split]
        size = sum(shard.text_bytes for shard in shards)
        rows.append((
            name,
            f"{_many(manifest.documents(split), 'document')}, {_many(manifest.tokens(split), 'token')},"
            f" {_many(size, 'byte')} of text in {_many(len(shards), 'shard')}",
        ))  # fmt: skip
    rows += [
        ("vocabulary", f"{manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes of text each on average"),
        ("fingerprint", manifest.fingerprint),
    ]
    problems = getattr(manifest, "problems", {})
    rows += [(f"problem: {what}", f"{count:,} times") for what, count in sorted(problems.items())]
    return rows


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


# The configuration -----------------------------------------------------------------------------------------------


def recipe_of(run: Run, vocabulary: int) -> tuple[str, Config, bool]:
    """The recipe that a run was made from, and whether that is known: its command may have told.

    Otherwise it is the recipe that differs in the fewest fields.
    """
    starts = read_environment(run.folder)
    words = [str(word) for word in starts[0].get("command") or []] if starts else []
    name = ""
    if words[:2] == ["pretrain", "train"]:
        given = words[2] if len(words) > 2 and not words[2].startswith("-") else "quickstart"
        name = given if given in recipe_names() or Path(given).is_file() else ""
    if name:
        with suppress(PretrainError):
            return name, _resolved(load_config(name), vocabulary), True
    own = _flat(run.config)

    def distance(recipe: str) -> int:
        other = _flat(load_config(recipe))
        return sum(value != other[field] for field, value in own.items())

    nearest = min(recipe_names(), key=distance)
    return nearest, _resolved(load_config(nearest), vocabulary), False


def _resolved(config: Config, vocabulary: int) -> Config:
    with suppress(PretrainError):
        return resolve(config, vocabulary)[0]
    return config


def config_rows(run: Run, recipe: Config) -> list[Setting]:
    """Every field, and where the recipe has another value."""
    theirs = _flat(recipe)
    rows = []
    for name, value in _flat(run.config).items():
        section, _, field = name.partition(".")
        other = theirs[name]
        rows.append(Setting(section, field, _value(value), None if value == other else _value(other)))
    return rows


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Fields in which runs differ, with the value of each run."""
    flat = [_flat(run.config) for run in runs]
    return [
        (name, [_value(each[name]) for each in flat])
        for name in flat[0]
        if any(each[name] != flat[0][name] for each in flat)
    ]


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, part in config_to_dict(config).items() for name, value in part.items()
    }


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return without_secrets(value) if isinstance(value, str) and value else repr(value)


# The machine -----------------------------------------------------------------------------------------------------


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """On what the run was made; of several starts, the first one and where later ones differ."""
    starts = read_environment(run.folder)
    if not starts:
        return []
    first = starts[0]
    rows = _start_rows(first)
    for start in starts[1:]:
        before = dict(rows)
        changed = [f"{name} {value}" for name, value in _start_rows(start) if before.get(name) != value]
        rows.append((f"went on after step {start.get('step', '?')}", "; ".join(changed) or "the same"))
    return rows


def _start_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    memory = {name: f"{start[name] / 2**30:.1f} GiB" for name in ("memory_bytes", "gpu_memory_bytes") if name in start}
    packages = start.get("packages") or {}
    cores = f"{start.get('cpu', '')}, {start.get('cores', '?')} cores, {start.get('threads', '?')} threads"
    rows = {
        "begun": start.get("time", ""),
        "command": shlex.join(without_secrets([str(word) for word in start.get("command", [])])),
        "device": start.get("device", ""),
        "GPU": ", ".join(filter(None, (start.get("gpu", ""), memory.get("gpu_memory_bytes", "")))),
        "CPU": cores,
        "memory": memory.get("memory_bytes", ""),
        "system": start.get("system", ""),
        "Python": start.get("python", ""),
        **packages,
        "CUDA": start.get("cuda") or "",
        "source": start.get("commit", ""),
    }
    shown = {
        "time",
        "command",
        "device",
        "gpu",
        "gpu_memory_bytes",
        "cpu",
        "cores",
        "threads",
        "memory_bytes",
        "system",
    }
    shown |= {"python", "packages", "cuda", "commit"}
    rows |= {name: value for name, value in start.items() if name not in shown}
    return [(name, str(value)) for name, value in rows.items() if value not in ("", None)]


# What to type ----------------------------------------------------------------------------------------------------


def commands(run: Run) -> list[tuple[str, str]]:
    """What can be done with a run, each with its command."""
    folder, config = str(run.folder), run.config
    again = f"{folder.rstrip('/')}-again"
    prompt = config.sample.prompt.strip() or "And"
    rows = [
        ("make the same again", ["pretrain", "train", f"{folder}/config.toml", "--out", again]),
        ("let it write", ["pretrain", "sample", folder, "--prompt", prompt]),
        ("measure it", ["pretrain", "eval", folder]),
        ("give it to others", ["pretrain", "export", folder, "--out", f"{folder.rstrip('/')}-hf"]),
        ("this page again", ["pretrain", "report", folder]),
    ]
    if run.summary:
        longer = str(2 * config.train.steps)
        rows.insert(1, ("train it longer", ["pretrain", "train", "--out", folder, "--train.steps", longer]))
    else:
        rows.insert(1, ("go on with it", ["pretrain", "train", "--out", folder]))
        rows.append(("watch it", ["pretrain", "watch", folder]))
    return [(what, shlex.join(words)) for what, words in rows]
