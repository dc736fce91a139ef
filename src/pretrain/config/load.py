"""Configurations from recipes, TOML files, dictionaries and overrides, and what two of them differ in."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pretrain.config.schema import Config
from pretrain.errors import UsageError

# Fields that do not change what is learned: a run may be resumed with other values of these.
FREE_FIELDS = frozenset(
    {"train.micro_batch", "train.compile", "train.device", "train.activation_checkpointing"}
    | {f"guard.{name}" for name in ("max_skips", "grace_seconds", "hang_factor", "hang_seconds")}
)
FREE_SECTIONS = frozenset({"eval", "checkpoint", "parallel", "sample", "log"})


def load_config(recipe: str = "quickstart", **overrides: Any) -> Config:
    """The configuration of a recipe by name or of a TOML file by path, with overrides by dotted field.

    >>> load_config("quickstart", **{"model.layers": 2}).model.layers
    2

    Raises:
        UsageError: there is no such recipe or file, a field is unknown or of the wrong type, or values contradict.
    """
    tree = tomllib.loads(recipe_text(recipe)) if recipe in recipe_names() else _read_toml(recipe)
    for name, value in overrides.items():
        section, _, leaf = name.partition(".")
        if not leaf:
            raise UsageError(f"unknown field '{name}': fields are written SECTION.NAME, such as model.layers")
        tree.setdefault(section, {})[leaf] = value
    return config_from_dict(tree, source=recipe)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    files = resources.files("pretrain.recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML text of a named recipe."""
    return resources.files("pretrain.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """What a named recipe is, in one line: the first comment of its file."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")


def _read_toml(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        near = difflib.get_close_matches(path, recipe_names(), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "'pretrain recipes' lists them"
        raise UsageError(f"no recipe or TOML file named '{path}'; {hint}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def config_from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """Build a Config from nested mappings such as a parsed TOML file; missing fields take their defaults.

    Raises:
        UsageError: one line that names ``source``, the field and, where there is one, the nearest right name.
    """
    try:
        return _build(Config, tree, "", source)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of every field, ready for TOML or JSON."""
    return {
        section.name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(getattr(config, section.name)).items()
        }
        for section in dataclasses.fields(config)
    }


def differences(old: Config, new: Config) -> list[str]:
    """Where two configurations would learn something different: ``model.layers 4 → 6``, one line a field."""
    before, after = config_to_dict(old), config_to_dict(new)
    return [
        f"{section}.{key} {before[section][key]!r} → {value!r}"
        for section, values in after.items()
        if section not in FREE_SECTIONS
        for key, value in values.items()
        if value != before[section][key] and f"{section}.{key}" not in FREE_FIELDS
    ]


def _build(cls: type, tree: Mapping[str, Any], prefix: str, source: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in hints:
            raise UsageError(f"{source}: unknown field '{prefix}{name}'{_did_you_mean(name, prefix)}")
    values = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UsageError(f"{source}: [{prefix}{name}] must be a table of fields, not {value!r}")
            values[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.", source)
        else:
            values[name] = _coerce(value, hints[name], f"{prefix}{name}")
    return cls(**values)


def _did_you_mean(name: str, prefix: str) -> str:
    section = prefix.rstrip(".")
    if section:
        names = [f"{prefix}{field}" for field in typing.get_type_hints(typing.get_type_hints(Config)[section])]
    else:
        names = [s.name for s in dataclasses.fields(Config)]
    near = difflib.get_close_matches(f"{prefix}{name}", names, n=1, cutoff=0.4)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(names)}"


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """Check a plain value against a field's type; ints pass as floats and lists as tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            hint_text = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, not {value!r}{hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, not {value!r}")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise ValueError(f"{name} must have {len(inner)} values, not {len(value)}")
        return tuple(_coerce(item, kind, name) for item, kind in zip(value, inner, strict=True))
    assert not isinstance(hint, types.UnionType), f"{name}: unions are not used in the configuration"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {hint.__name__}, not {value!r}")
    return value
