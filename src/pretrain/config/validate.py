"""Types and ranges of the fields: msgspec checks them however a configuration is made, and we word what is wrong."""

from __future__ import annotations

import re
import typing
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
        section = type(self).__name__.removesuffix("Config").lower()
        for name, hint in _hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, msgspec.convert(value, hint))
            except msgspec.ValidationError as error:
                raise ValueError(f"{section}.{name} {_complaint(value, hint, str(error))}") from None


def _complaint(value: Any, hint: Any, error: str) -> str:
    extras = getattr(hint, "__metadata__", ())
    kind = hint.__origin__ if extras else hint
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"must be one of {', '.join(inner)}, not {value!r}{did_you_mean(str(value), inner, or_list=False)}"
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            return f"must be a list, not {value!r}"
        if place := re.search(r"\$\[(\d+)]", error):
            return _complaint(value[int(place[1])], inner[0], error)
        return f"must have {len(inner)} values, not {len(value)}"
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"must be {kind.__name__}, not {value!r}"
    (bounds,) = (extra for extra in extras if isinstance(extra, msgspec.Meta))
    if bounds.min_length:
        return "must not be empty"
    if bounds.gt is not None:
        wanted = f"above {bounds.gt}" if bounds.gt else "positive"
    elif bounds.le is not None:
        wanted = f"in [{bounds.ge}, {bounds.le}]"
    else:
        wanted = f"at least {bounds.ge}" if bounds.lt is None else f"in [{bounds.ge}, {bounds.lt})"
    return f"must be {wanted}, not {value!r}"
