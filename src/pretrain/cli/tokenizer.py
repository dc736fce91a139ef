"""``pretrain tokenizer``: make vocabularies and look at them."""

from __future__ import annotations

from pretrain.cli.parsing import Command

COMMANDS: dict[str, Command] = {}
