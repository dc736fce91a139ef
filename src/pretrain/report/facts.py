"""The tables of the page: facts of a run beside its curves.

run directory → facts: results, losses, remarks, data, configuration, environment, commands
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
    """Counts of a run's model."""

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


def facts(run: Run, curves: Curves, size: Size | None, baselines: Baselines | None) -> dict[str, Any]:
    """What the template facts.html shows of a run."""
    manifest = manifest_of(run)
    losses = loss_rows(run, curves, baselines, manifest)
    recipe, config, known = recipe_of(run, size.vocabulary if size else 0)
    rows = config_rows(run, config)
    return {
        "results": results(run, curves, size),
        "remarks": remarks(run, curves, baselines, manifest, losses),
        "losses": losses,
        "data": data_rows(run, manifest),
        "recipe": recipe,
        "recipe_known": known,
        "config": rows,
        "changed": [row for row in rows if row.recipe is not None],
        "environment": environment_rows(run),
        "commands": commands(run),
    }


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


def results(run: Run, curves: Curves, size: Size | None) -> dict[str, str]:
    """The newest numbers, by label; the same labels for every run."""
    train, val = curves.train, curves.val
    tokens, seconds = train.last("tokens"), train.last("time")
    of = "" if run.summary else f" of {run.config.train.steps:,}, not finished"

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return {
        "held-out loss": shown(val.last("val/loss"), ".4f"),
        "bits per byte": shown(val.last("val/bpb"), ".4f"),
        "CORE": shown(val.last("val/core"), ".4f"),
        "training loss, smoothed": shown(train.last(SMOOTHED), ".4f"),
        "steps": shown(train.last("step"), ",.0f") + of,
        "tokens": shown(tokens, ",.0f"),
        "time": duration(seconds) if seconds else "",
        "tokens per second": shown(tokens / seconds if tokens and seconds else None, ",.0f"),
        "parameters": f"{size.parameters:,}" if size else "",
        "vocabulary": f"{size.vocabulary:,}" if size else "",
        "FLOPs": shown(size.flops_per_token * tokens if size and tokens else None, ".3g"),
        "skipped steps": f"{sum(curves.skips.values()):,}",
    }


# The loss in plain words -----------------------------------------------------------------------------------------


def loss_rows(run: Run, curves: Curves, baselines: Baselines | None, manifest: Manifest | None) -> list[LossRow]:
    """What losses mean: guessing without a model, and this model in the course of its training."""
    rows = []
    if baselines:
        of, bpb = f"{baselines.tokens:,} training tokens", baselines.bits_per_byte
        uniform, unigram, bigram = baselines.uniform, baselines.unigram, baselines.bigram
        rows = [
            LossRow("guess any token", uniform, bpb(uniform), "knows nothing: every token is equally likely"),
            LossRow("count tokens", unigram, bpb(unigram), f"knows how frequent each token is, counted over {of}"),
            LossRow("count pairs", bigram, bpb(bigram), f"also looks at the one token before, by the pairs of {of}"),
            LossRow("a zip file", None, baselines.zipped, "what deflate makes of the held-out text"),
        ]
    columns = [curves.val.column(name).tolist() for name in ("step", "val/loss", "val/bpb")]
    measured = [row for row in zip(*columns, strict=True) if math.isfinite(row[1])]
    if measured:
        lowest = min(measured, key=lambda row: row[1])
        # The keys make a row of each: a measurement that is the last and the lowest is called the last.
        chosen = {measured[0]: "first measured", lowest: "lowest", measured[-1]: "last measured"}
        for (step, loss, bits), which in sorted(chosen.items()):
            shown, meaning = bits if math.isfinite(bits) else None, f"this model after step {step:,.0f}"
            rows.append(LossRow(f"held-out text, {which}", loss, shown, meaning, ours=True))
    loss = curves.train.last(SMOOTHED)
    if loss is not None:
        bytes_per_token = manifest.bytes_per_token if manifest else (run.summary or {}).get("bytes_per_token")
        bits = loss / (math.log(2) * bytes_per_token) if bytes_per_token else None
        meaning = f"this model up to step {curves.train.last('step') or 0:,.0f}, smoothed"
        rows.append(LossRow("training text", loss, bits, meaning, ours=True))
    return rows


def remarks(
    run: Run, curves: Curves, baselines: Baselines | None, manifest: Manifest | None, losses: Sequence[LossRow]
) -> list[str]:
    """What the numbers say, in sentences."""
    said = []
    rows = {row.what: row for row in losses}
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
    tokens = curves.train.last("tokens")
    if manifest and tokens and manifest.tokens("train"):
        said.append(f"It has seen its training text {tokens / manifest.tokens('train'):.2f} times.")
    limit = run.config.train.grad_clip
    clipped, clippable = curves.clipped(limit, run.config.train.grad_clip_from)
    if clippable:
        said.append(
            f"Gradients were clipped to norm {limit:g} at {clipped:,} of {clippable:,} steps"
            f" ({clipped / clippable:.1%})."
        )
    if curves.skips:
        kinds = {1: "not finite", 2: "a spike"}
        parts = ", ".join(f"{count:,} {kinds.get(kind, 'other')}" for kind, count in sorted(curves.skips.items()))
        said.append(f"Skipped steps, which changed nothing: {parts}.")
    return said


# Data and configuration ------------------------------------------------------------------------------------------


def data_rows(run: Run, manifest: Manifest | None) -> list[tuple[str, str]]:
    """What the run was trained on."""
    paths = ", ".join(run.config.data.paths) or "the embedded corpus (the King James Bible)"
    rows = [("text", without_secrets(paths))]
    if manifest is None:
        return rows

    def many(count: int, what: str) -> str:
        return f"{count:,} {what}{'s' * (count != 1)}"

    for split, name in (("train", "training"), ("val", "held out")):
        shards = [shard for shard in manifest.shards if shard.split == split]
        rows.append((
            name,
            f"{many(manifest.documents(split), 'document')}, {many(manifest.tokens(split), 'token')},"
            f" {many(sum(shard.text_bytes for shard in shards), 'byte')} of text in {many(len(shards), 'shard')}",
        ))  # fmt: skip
    return [
        *rows,
        ("vocabulary", f"{manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes of text each on average"),
        ("fingerprint", manifest.fingerprint),
        *((f"problem: {what}", f"{count:,} times") for what, count in sorted(manifest.problems.items())),
    ]


def recipe_of(run: Run, vocabulary: int) -> tuple[str, Config, bool]:
    """The recipe that a run was made from, and whether its recorded command says so.

    If not, it is the recipe that differs in the fewest fields.
    """
    starts = read_environment(run.folder)
    words = [str(word) for word in starts[0].get("command") or []] if starts else []
    name, config = "", None
    if words[:2] == ["pretrain", "train"]:
        name = words[2] if len(words) > 2 and not words[2].startswith("-") else "quickstart"
        if name in recipe_names() or Path(name).is_file():
            with suppress(PretrainError):
                config = load_config(name)
    known = config is not None
    if config is None:
        own = _flat(run.config)
        recipes = {recipe: load_config(recipe) for recipe in recipe_names()}
        name = min(recipes, key=lambda recipe: sum(own[field] != v for field, v in _flat(recipes[recipe]).items()))
        config = recipes[name]
    with suppress(PretrainError):
        config = resolve(config, vocabulary)[0]
    return name, config, known


def config_rows(run: Run, recipe: Config) -> list[Setting]:
    """Every field, and where the recipe has another value."""
    theirs = _flat(recipe)
    return [
        Setting(section, name, _value(value), None if value == theirs[section, name] else _value(theirs[section, name]))
        for (section, name), value in _flat(run.config).items()
    ]


def config_differences(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """Fields in which configurations differ, with the value of each."""
    first, *others = flat = [_flat(config) for config in configs]
    return [
        (".".join(field), [_value(each[field]) for each in flat])
        for field, value in first.items()
        if any(each[field] != value for each in others)
    ]


def _flat(config: Config) -> dict[tuple[str, str], Any]:
    return {(section, name): value for section, part in config_to_dict(config).items() for name, value in part.items()}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return without_secrets(value) if isinstance(value, str) and value else repr(value)


# The machine, and what to type -----------------------------------------------------------------------------------


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """What the run was made on; of several starts, the first one and where later ones differ."""
    starts = read_environment(run.folder)
    if not starts:
        return []
    rows = _start_rows(starts[0])
    for start in starts[1:]:
        before = dict(rows)
        changed = [f"{name} {value}" for name, value in _start_rows(start) if before.get(name) != value]
        rows.append((f"resumed after step {start.get('step', '?')}", "; ".join(changed) or "the same"))
    return rows


def _start_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    left = dict(start)  # of which what has no row of its own is shown as it is

    def take(name: str, default: Any = "") -> Any:
        return left.pop(name, None) or default

    def gib(name: str) -> str:
        size = take(name)
        return f"{size / 2**30:.1f} GiB" if size else ""

    rows = {
        "begun": take("time"),
        "command": shlex.join(without_secrets([str(word) for word in take("command", [])])),
        "device": take("device"),
        "GPU": ", ".join(filter(None, (take("gpu"), gib("gpu_memory_bytes")))),
        "CPU": f"{take('cpu')}, {take('cores', '?')} cores, {take('threads', '?')} threads",
        "memory": gib("memory_bytes"),
        "system": take("system"),
        "Python": take("python"),
        **take("packages", {}),
        "CUDA": take("cuda"),
        "source": take("commit"),
    }
    return [(name, str(value)) for name, value in (rows | left).items() if value not in ("", None)]


def commands(run: Run) -> list[tuple[str, str]]:
    """What can be done with a run, each with its command."""
    folder, config = str(run.folder), run.config
    bare, prompt = folder.rstrip("/"), config.sample.prompt.strip() or "And"
    rows = [
        ("make the same again", ["pretrain", "train", f"{folder}/config.toml", "--out", f"{bare}-again"]),
        ("let it write", ["pretrain", "sample", folder, "--prompt", prompt]),
        ("measure it", ["pretrain", "eval", folder]),
        ("give it to others", ["pretrain", "export", folder, "--out", f"{bare}-hf"]),
        ("this page again", ["pretrain", "report", folder]),
    ]
    if run.summary:
        longer = str(2 * config.train.steps)
        rows.insert(1, ("train it longer", ["pretrain", "train", "--out", folder, "--train.steps", longer]))
    else:
        rows.insert(1, ("go on with it", ["pretrain", "train", "--out", folder]))
        rows.append(("watch it", ["pretrain", "watch", folder]))
    return [(what, shlex.join(words)) for what, words in rows]
