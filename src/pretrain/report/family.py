"""The family of runs: which began in the middle of which (``pretrain fork``), as trees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.runs import Run
from pretrain.runs.run import FORK


def family(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The trees of those ``runs`` that are forks or were forked, with their ancestors and their kin beside them.

    A node has its ``name``, the ``step`` of its parent at which it begins (0: of none) with the ``differences`` from
    it, whether it is ``there`` and ``shown`` on the page, its held-out ``loss`` when finished, and its ``children``.
    """
    shown = {run.folder.resolve() for run in runs}
    beside = {file.parent for folder in shown for file in folder.parent.glob(f"*/{FORK}")}
    begins: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for folder in shown | beside:
        with suppress(OSError, ValueError, KeyError, TypeError):
            fork = json.loads((folder / FORK).read_text(encoding="utf-8"))
            for each in (fork, *fork["ancestors"]):
                moved = (folder / each["relative"]).resolve()
                parent = moved if Run.exists(moved) else Path(each["parent"])
                begins.setdefault(folder, (parent, each))
                folder = parent

    def tree(folder: Path) -> dict[str, Any]:
        node, fork = {"name": folder.name, "loss": None}, begins[folder][1] if folder in begins else {}
        with suppress(OSError, ValueError):
            node["loss"] = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("val_loss")
        node |= {"step": fork.get("step", 0), "differences": fork.get("differences", [])}
        node |= {"there": Run.exists(folder), "shown": folder in shown}
        return node | {"children": [tree(child) for child in sorted(begins) if begins[child][0] == folder]}

    def is_kin(node: dict[str, Any]) -> bool:
        return node["shown"] or any(map(is_kin, node["children"]))

    return list(filter(is_kin, map(tree, sorted({parent for parent, _ in begins.values()} - begins.keys()))))
