"""``pretrain recipes``: the recipes that come with the package."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from pretrain.cli.parsing import parse
from pretrain.config import recipe_names, recipe_summary, recipe_text
from pretrain.errors import UsageError, did_you_mean


@dataclass
class RecipesArguments:
    """List the recipes, or print one."""

    name: tyro.conf.Positional[str] = ""
    """A recipe to print as TOML. None: list them all."""


def recipes(args: list[str]) -> int:
    """List the recipes, or print one as TOML."""
    name, names = parse(RecipesArguments, args, "recipes").name, recipe_names()
    if not name:
        width = max(map(len, names))
        for each in names:
            print(f"{each:<{width}}  {recipe_summary(each)}")
        return 0
    if name not in names:
        raise UsageError(f"no recipe named '{name}'{did_you_mean(name, names)}")
    print(recipe_text(name), end="")
    return 0
