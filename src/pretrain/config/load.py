"""Configurations from recipes, TOML files, dictionaries and overrides, and in which fields two of them differ."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain.config.schema import Config
from pretrain.config.validate import refuse_unknown
from pretrain.errors import UsageError, did_you_mean

# Fields that do not change what is learned: a run may be resumed with other values of these.
FREE_FIELDS = frozenset(
    {"data.allow_broken", "train.micro_batch", "train.compile", "train.device", "train.activation_checkpointing"}
    | {f"guard.{name}" for name in ("max_skips", "grace_seconds", "hang_factor", "hang_seconds")}
)
FREE_SECTIONS = frozenset({"eval", "checkpoint", "parallel", "sample", "log", "fit"})

HORIZONS = ("steps", "epochs", "target_flops", "tokens_per_parameter")
"""Fields of ``train`` that say how long to train, besides minutes."""

RECIPES = Path(__file__).parents[1] / "recipes"


def load_config(recipe: str = "quickstart", **overrides: Any) -> Config:
    """The configuration of a recipe by name or of a TOML file by path, with overrides by dotted field.

    >>> load_config("quickstart", **{"model.layers": 2}).model.layers
    2

    Raises:
        UsageError: there is no such recipe or file, a field is unknown or of the wrong type, or values contradict.
    """
    file = RECIPES / f"{recipe}.toml" if recipe in recipe_names() else Path(os.path.expanduser(recipe))
    if not file.is_file():
        hint = did_you_mean(recipe, recipe_names(), or_list=False) or "; 'pretrain recipes' lists them"
        raise UsageError(f"no recipe or TOML file named '{recipe}'{hint}")
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{recipe} is not valid TOML: {error}") from None
    return with_fields(tree, overrides, recipe)


def with_fields(tree: dict[str, Any], given: Mapping[str, Any], source: str) -> Config:
    """As :func:`config_from_dict`, after the fields ``given``, by dotted name, were put into ``tree``."""
    for name, value in given.items():
        *tables, leaf = name.split(".")
        if not tables:
            raise UsageError(f"unknown field '{name}': fields are written SECTION.NAME, such as model.layers")
        fields: Any = tree
        for table in tables:
            fields = fields.setdefault(table, {}) if isinstance(fields, dict) else None
        if isinstance(fields, dict):
            fields[leaf] = value
        elif len(tables) > 1:  # config_from_dict refuses other sections that are no tables
            raise UsageError(f"{source}: unknown field '{name}'")
    return as_given(config_from_dict(tree, source), given)


def as_given(config: Config, names: Collection[str]) -> Config:
    """The configuration after the fields ``names`` were given by hand, over a recipe or a run.

    They are not chosen any more (``fit.fields``). Of ``train.minutes`` and the other horizons what is given decides.
    Raises UsageError if both are.
    """
    train = config.train
    given = [name for name in HORIZONS if f"train.{name}" in names and getattr(train, name)]
    minutes = "train.minutes" in names and train.minutes
    if minutes and given:
        both = f"train.{given[0]} {getattr(train, given[0]):g} and train.minutes {minutes:g} both set the horizon"
        raise UsageError(f"{both}; give one of them")
    if minutes:
        train = dataclasses.replace(train, steps=0, epochs=0.0, target_flops=0.0)
    elif given:
        train = dataclasses.replace(train, minutes=0.0)
    settled = {*names, *(["train.steps"] if given else [])}
    if config.model.depth and "model.depth" in names:
        settled |= {"model.layers", "model.heads", "model.width"}
    fields = tuple(name for name in config.fit.fields if name not in settled)
    return dataclasses.replace(config, train=train, fit=dataclasses.replace(config.fit, fields=fields))


def as_chosen(config: Config, before: Config) -> Config:
    """The configuration with what was chosen ``before`` for a run, so that nothing is chosen a second time.

    Fields that the run was given and this one would choose stay in ``fit.fields``.
    """
    tree = config_to_dict(config)
    theirs = config_to_dict(before)
    for name in set(config.fit.fields) & set(before.fit.chosen):
        section, field = name.split(".")
        tree[section][field] = theirs[section][field]
    left = [name for name in config.fit.fields if name not in before.fit.chosen]
    if before.train.minutes and config.train.minutes == before.train.minutes and not config.train.steps:
        tree["train"]["steps"] = before.train.steps
    elif config.train.steps and not config.train.minutes:  # steps decide: how the run's were found is a record
        tree["train"]["minutes"] = before.train.minutes
    tree["fit"] = {"fields": left, "chosen": before.fit.chosen}
    return config_from_dict(tree, "the configuration")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def recipe_text(name: str) -> str:
    """The TOML text of a named recipe."""
    return (RECIPES / f"{name}.toml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """What a named recipe is, in one line: the first comment of its file."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")


def config_from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """Build a Config from nested mappings such as a parsed TOML file; missing fields take their defaults.

    Raises:
        UsageError: one line that names ``source``, the field and, where there is one, the nearest right name.
    """
    sections = typing.get_type_hints(Config)
    try:
        tree = _renamed(tree)
        for name, values in tree.items():
            if name not in sections:
                raise ValueError(f"unknown field '{name}'{did_you_mean(name, sections)}")
            refuse_unknown(name, values, sections[name])
        return Config(**{name: sections[name](**values) for name, values in tree.items()})
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def _renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the names of today in place of older ones."""
    sample = tree.get("sample")
    if not isinstance(sample, Mapping) or "prompt" not in sample:
        return dict(tree)
    if "prompts" in sample:
        raise ValueError("sample.prompt is the older name of sample.prompts; give only the latter")
    others = {name: value for name, value in sample.items() if name != "prompt"}
    return {**tree, "sample": {**others, "prompts": [sample["prompt"]]}}


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of every field, ready for TOML or JSON; what is None is left out."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def differences(old: Config, new: Config, free: Collection[str] = FREE_SECTIONS) -> list[str]:
    """Fields in which two configurations would learn something different, one line each: ``model.layers 4 → 6``.

    Those of the sections ``free`` may differ.
    """
    before, after = _by_dotted_name(config_to_dict(old)), _by_dotted_name(config_to_dict(new))
    return [
        f"{name} {before.get(name)!r} → {after.get(name)!r}"
        for name in after | before
        if name.partition(".")[0] not in free and name not in FREE_FIELDS
        if before.get(name) != after.get(name)
    ]


def _by_dotted_name(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    names: dict[str, Any] = {}
    for key, value in tree.items():
        names |= _by_dotted_name(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return names
