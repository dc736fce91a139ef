"""Public sets of text by name: ``CATALOGUE``, from catalogue.toml."""

from __future__ import annotations

import os
import tomllib
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import UsageError

HUGE = 20_000_000_000  # bytes from which on the user must say how many files to download


@dataclass(frozen=True)
class TextSet:
    """A public set of text. Numbers are of the whole set; 0: no source gives them."""

    name: str
    about: str
    licence: str
    page: str  # where to read about it
    train: list[str] = field(default_factory=list)  # training files, in the order in which they are downloaded
    validation: str = ""  # the file to validate on; it sorts after all others, where data.split = last_file finds it
    dataset: str = ""  # OWNER/NAME of a Hugging Face dataset, and
    folder: str = ""  # the folder in it with the files
    base: str = ""  # or the URL of the folder with the files
    saved_as: dict[str, str] = field(default_factory=dict)  # names for files whose own would say nothing
    bytes: int = 0
    characters: int = 0
    tokens: int = 0  # of GPT-2, about
    sizes: dict[str, int] = field(default_factory=dict)  # exact bytes of files
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def huge(self) -> bool:
        """Whether the user must say how much of it to download."""
        return self.bytes >= HUGE

    def files(self, train: int = 0) -> list[str]:
        """The first ``train`` training files (0: all of them) and, always, the validation file.

        Raises UsageError if there are fewer, or if the set is huge and ``train`` is 0.
        """
        if train == 0 and self.huge:
            raise UsageError(
                f"{self.name} is about {self.bytes / 1e9:,.0f} GB in all; say how many of its {len(self.train):,}"
                f" training files to download, about {self.size_about(self.train[0]) / 1e6:.0f} MB each: -n 8"
            )
        if not 0 <= train <= len(self.train):
            raise UsageError(f"-n {train}: {self.name} has {len(self.train):,} training files; give 1 to that many")
        return [*self.train[: train or None], *filter(None, [self.validation])]

    def size_about(self, file: str) -> int:
        """Bytes of a file: exactly if known, else the average."""
        return self.sizes.get(file) or self.bytes // (len(self.train) + bool(self.validation))

    def url(self, file: str, base: str = "") -> str:
        """Where a file is: in the folder ``base``, if given (a mirror), else where it was published."""
        if self.dataset and not base:
            base = f"{hugging_face()}/datasets/{self.dataset}/resolve/main/{self.folder}"
        return f"{(base or self.base).rstrip('/')}/{urllib.parse.quote(file)}"


def hugging_face() -> str:
    """URL of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _text_set(name: str, facts: dict[str, Any]) -> TextSet:
    if shards := facts.pop("shards", 0):  # too many to list
        facts["train"] = [f"shard_{number:05d}.parquet" for number in range(shards)]
    return TextSet(name, **facts)


_TABLES = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
CATALOGUE = {name: _text_set(name, facts) for name, facts in _TABLES.items()}
