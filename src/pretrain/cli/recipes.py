"""``pretrain recipes``: the recipes that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pretrain.cli.parsing import Command
from pretrain.config import recipe_names, recipe_summary, recipe_text
from pretrain.errors import UsageError, did_you_mean


@dataclass
class Recipes(Command):
    """List the recipes, or print one."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = ""
    """A recipe to print as TOML. None: list them all."""

    def __call__(self) -> int:
        names = recipe_names()
        if not self.name:
            for name in names:
                print(f"{name:<{max(map(len, names))}}  {recipe_summary(name)}")
            return 0
        if self.name not in names:
            raise UsageError(f"no recipe named '{self.name}'{did_you_mean(self.name, names)}")
        print(recipe_text(self.name), end="")
        return 0
