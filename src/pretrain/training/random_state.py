"""The random states of Python and NumPy. Nothing here draws from them, but what a user adds to a run may."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def library_random_state() -> dict[str, Any]:
    """Both states, as JSON can hold them."""
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = {**state["state"], "key": state["state"]["key"].tolist()}
    return {"python": random.getstate(), "numpy": {**state, "state": inner}}


def set_library_random_state(state: dict[str, Any]) -> None:
    """Set back what :func:`library_random_state` gave, also after a journey through JSON."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
