"""Which runs a place on the command line means, and which of them are the same settings with other seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config, config_to_dict
from pretrain.config.load import FREE_FIELDS, FREE_SECTIONS
from pretrain.errors import UsageError
from pretrain.io import without_secrets
from pretrain.runs import Run
from pretrain.tokens import Origin

MEASURING = {"eval.every", "eval.tokens", "eval.stride", "eval.calibrate", "checkpoint.keep_best"}
"""What changes which model a run leaves, or how it is measured, though it may be resumed with others."""

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, each with another seed."""

    name: str
    runs: tuple[Run, ...]
    folder: str = ""  # of runs that was named; empty: they were named one by one


def runs_at(place: str | Path) -> list[Run]:
    """The run in ``place``, or those in the folders directly below it, by name. Raises UsageError if there is none."""
    folder = Path(place)
    if Run.exists(folder) or not folder.is_dir():
        return [Run.open(folder)]
    below = sorted(child for child in folder.iterdir() if Run.exists(child))
    if not below:
        raise UsageError(f"{place} is neither a run directory nor a folder of run directories")
    return [Run.open(child) for child in below]


def groups_at(places: Iterable[str]) -> list[Group]:
    """The runs at ``places`` in groups: those of each folder by themselves, and all that were named one by one.

    Runs with the same seed besides the same settings are of several groups: they differ in something else. Raises
    UsageError for a run that is at two places, by itself and in its folder.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    places = list(dict.fromkeys(str(Path(place)) for place in places))
    home: dict[Path, str] = {}
    for place in places:
        for run in runs_at(place):
            if (other := home.setdefault(run.folder.resolve(), place)) != place:
                raise UsageError(f"{run.folder} is at {other} and at {place}; name it once")
            key = ("" if Run.exists(Path(place)) else place, tuple(settings(run).items()))
            found.setdefault((*key, seen[key, run.config.train.seed]), []).append(run)
            seen[key, run.config.train.seed] += 1
    names = []
    for (folder, same, _), runs in found.items():
        beside = [dict(others) for of, others, _ in found if of == folder]
        values, members = dict(flat(runs[0].config)), [run.folder.resolve().name for run in runs]
        differ = [name for name, _ in same if len({others[name] for others in beside}) > 1]
        paths = {str(of[0].config.data.paths) for (named, *_), of in found.items() if named == folder}
        apart = {tuple(item for item in others.items() if item[0] != "data.paths") for others in beside}
        if len(paths) == 1 and len(apart) == len(beside):  # the same text, in the tokens of another tokenizer
            differ = [name for name in differ if name != "data.paths"]
        differing = [f"{name} {values[name]}" for name in differ]
        alone = [Path(folder).resolve().name] if len(beside) == 1 else []
        members = members if len(members) < 4 else [members[0], "...", members[-1]]
        names.append(", ".join((folder and (differing or alone)) or members))
    named = zip(names, found.items(), strict=True)
    return [
        Group(name if names.count(name) == 1 else f"{folder or runs[0].folder.parent}: {name}", tuple(runs), folder)
        for name, ((folder, *_), runs) in named
    ]


def settings(run: Run) -> dict[str, str]:
    """What a run was made with, by field, but for its seed and for what changes neither the model nor its measurement.

    Of the text counts what it was, not where; of ``train.minutes`` not how many steps they were on this machine.
    """
    fields, origin = dict(flat(run.config)), Origin.load(run.folder)
    if known := origin.stream or origin.tokens:
        fields |= {"data.paths": known, "data.val_paths": ""}
    if run.config.train.minutes:
        fields["train.steps"] = ""
    free = {name for name in fields if name.partition(".")[0] in FREE_SECTIONS} - MEASURING
    return {name: value for name, value in fields.items() if name not in free | FREE_FIELDS | {"train.seed"}}


def differences(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """Fields in which configurations differ, with the value of each."""
    rows = zip(*map(flat, configs), strict=True)
    every = [(row[0][0], [value for _, value in row]) for row in rows]
    return [(field, values) for field, values in every if len(set(values)) > 1]


def flat(config: Config) -> Pairs:
    """The fields as ``section.name``, with their values as text."""
    tree = without_secrets(config_to_dict(config))
    return [(f"{section}.{name}", text(value)) for section, fields in tree.items() for name, value in fields.items()]


def text(value: Any) -> str:
    """A value of the configuration for people: floats short where that loses nothing."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else str(value) or "''"
