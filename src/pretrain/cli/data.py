"""``pretrain data``: text and tokens before training."""

from __future__ import annotations

from pretrain.cli.parsing import Command

COMMANDS: dict[str, Command] = {}
