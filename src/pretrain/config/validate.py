"""Types and bounds of fields: msgspec checks them however a configuration is made, and we word what is wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import msgspec

from pretrain.errors import did_you_mean

_hints = cache(typing.get_type_hints)


class Section:
    """Base of the sections: checks every value against the type and bounds of its field.

    Integers become floats and lists tuples where the field says so.

    Raises:
        ValueError: one line that names the field, such as ``model.heads must be at least 1, not 0``.
    """

    def __post_init__(self):
        section = re.sub("(Config|Options)$", "", type(self).__name__).lower()
        for name, hint in _hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, checked(f"{section}.{name}", getattr(self, name), hint))


def checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it. Raises ValueError: one line that begins with ``name``."""
    if typing.get_origin(hint) is dict:  # tables by name, of a dataclass
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a table of tables, not {value!r}")
        return {key: _checked_table(f"{name}.{key}", item, typing.get_args(hint)[1]) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        value = [_plain(item) for item in value]
    value = _plain(value)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).replace("`", "").replace(" | null", "").partition(" - at $")
    if place:  # one value of several
        value, hint = value[int(place.strip("[]"))], typing.get_args(hint)[0]
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        near = did_you_mean(str(value), choices, or_list=False)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}{near}")
    wanted = re.sub(r"^Expected (?:(?:int|float) (?=\W))?|, got .*", "", wrong).replace("array", "a list")
    for symbol, word in (
        (">= ", "at least "), ("<= ", "at most "), ("> ", "above "), ("< ", "below "),
        ("str matching regex", "of the form"), ("str of length at least 1", "a text that is not empty"),
    ):  # fmt: skip
        wanted = wanted.replace(symbol, word)
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _plain(value: Any) -> Any:
    """A path as text, and a float or text of a subclass such as numpy.float64, which msgspec refuses, as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return next((plain(value) for plain in (float, str) if isinstance(value, plain)), value)


def refuse_unknown(name: str, values: Any, kind: Any) -> None:
    """A ValueError unless the values of the table ``name`` are fields of the dataclass ``kind``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"[{name}] must be a table of fields, not {values!r}")
    known = [f"{name}.{field.name}" for field in dataclasses.fields(kind)]
    for unknown in sorted({f"{name}.{key}" for key in values} - set(known)):
        raise ValueError(f"unknown field '{unknown}'{did_you_mean(unknown, known)}")


def _checked_table(name: str, value: Any, kind: Any) -> Any:
    """One of the tables, as the dataclass ``kind``."""
    if isinstance(value, kind):
        value = vars(value)
    refuse_unknown(name, value, kind)
    hints = _hints(kind, include_extras=True)
    return kind(**{key: checked(f"{name}.{key}", item, hints[key]) for key, item in value.items()})
