"""``pretrain compare``: what several runs let one conclude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pretrain.cli.parsing import Command


@dataclass
class Compare(Command):
    """Say which settings are better, as far as runs with several seeds show it: docs/experiments.md.

    Runs whose settings differ only in train.seed are a group; each folder of runs, such as a sweep makes, has groups of
    its own. Each group is compared with the first, or those of a single folder with its best: better, worse, or cannot
    tell, with the number of seeds that could. Groups of one seed each are compared token by token on their held-out
    text, which shows which model is better, not which settings.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or folders of run directories."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("RUN is missing: give run directories, or a folder of them")

    def __call__(self) -> int:
        import msgspec

        from pretrain.experiments.compare import compare
        from pretrain.experiments.groups import groups_at

        found = compare(groups_at(self.runs))
        print(msgspec.json.encode(found).decode() if self.json else found)
        return 0
