"""``pretrain data``: text and tokens before training."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.cli.download import download
from pretrain.cli.parsing import Command, parse
from pretrain.errors import Interrupted, UsageError


@dataclass
class PrepareArguments:
    """Make token shards of text, of any size, in bounded memory and on all cores.

    Stopped or killed at any moment, the same command resumes and writes the same bytes. See docs/data.md.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC ...]")] = ()
    """Text: files, folders, patterns, URLs. None: the embedded corpus."""
    out: str = ""
    """The folder of the shards."""
    tokenizer: str = "bpe"
    """bpe (trained on this text), gpt2, byte, char, or the path of a tokenizer.json."""
    vocab_size: int = 4096
    """Number of tokens for bpe."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How bpe cuts words."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    separator: str = ""
    """What separates the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    split: Literal["tail", "hash", "last_file"] = "tail"
    """What is held out. tail: the last part of all text, which is read twice for it; hash: documents chosen by a hash
    of their text; last_file: the last file."""
    val_fraction: float = 0.05
    """Share of the text held out by tail and hash. 0: nothing."""
    val: tuple[str, ...] = ()
    """Text to hold out, instead of a split of the other."""
    workers: int = 0
    """Processes. 0: as many as there are cores."""
    shard_tokens: int = 100_000_000
    """Tokens at which a shard is closed."""
    engine: Literal["local", "ray"] = "local"
    """ray: the work is done on a Ray cluster, --out being on storage that all its machines share."""

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out is missing: the folder to write the token shards into")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens must be 1 or more, not {self.shard_tokens}")


def prepare(args: list[str]) -> int:
    """Make token shards of text."""
    a = parse(PrepareArguments, args, "data prepare")

    from rich.console import Console

    from pretrain.config import DataConfig, TokenizerConfig
    from pretrain.text import PROBLEMS
    from pretrain.tokens.prepare import prepare_text
    from pretrain.tokens.progress import Progress

    try:
        data = DataConfig(
            paths=a.sources,
            field=a.field,
            separator=a.separator,
            split=a.split,
            val_fraction=a.val_fraction,
            val_paths=a.val,
        )
        tokenizer = TokenizerConfig(a.tokenizer, a.vocab_size, a.pattern)
    except ValueError as error:
        raise UsageError(str(error)) from None
    console = Console(highlight=False, soft_wrap=True)
    progress = Progress(lambda line: console.print(line, markup=False), console)
    out = Path(a.out)
    try:
        manifest = prepare_text(
            data, tokenizer, out, workers=a.workers, shard_tokens=a.shard_tokens, engine=a.engine, progress=progress
        ).manifest
    except Interrupted:
        again = shlex.join(["pretrain", "data", "prepare", *args])
        raise Interrupted(f"stopped; what is done so far stays in {a.out}. To go on: {again}") from None
    for split, name in (("train", "training"), ("val", "held out")):
        if manifest.documents(split):
            progress.say(f"{name:<9} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents")
    progress.say(f"tokenizer {manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes of text per token")
    for problem, count in manifest.problems.items():
        progress.say(f"problem   {count:,} {PROBLEMS.get(problem, problem)}")
    if progress.bytes:
        rate = progress.bytes / 1e6 / max(progress.seconds, 1e-9)
        progress.say(f"speed     {progress.bytes / 1e6:,.1f} MB in {progress.seconds:,.1f} s, {rate:,.0f} MB/s")
    progress.say(f"next      pretrain train --data {shlex.quote(a.out)}")
    return 0


@dataclass
class VerifyArguments:
    """Read every byte of token shards again and find what is not as it was written."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder that 'pretrain data prepare' made, or RUN/data."""
    tokenizer: str = ""
    """Also check that the shards were made with this: gpt2, byte, or the path of a tokenizer.json."""


def verify(args: list[str]) -> int:
    """Find damaged, missing or mismatched token shards."""
    a = parse(VerifyArguments, args, "data verify")

    from rich.console import Console

    from pretrain.tokenizer import build_tokenizer
    from pretrain.tokens.progress import Progress
    from pretrain.tokens.shards import Manifest
    from pretrain.tokens.verify import verify

    if a.tokenizer in ("bpe", "char"):
        raise UsageError(f"--tokenizer {a.tokenizer} is made of a text; give the path of its tokenizer.json")
    tokenizer = build_tokenizer(a.tokenizer, 0, []) if a.tokenizer else None
    faults = verify(Path(a.folder), tokenizer, Progress(console=Console()))
    for fault in faults:
        print(f"pretrain: {fault}", file=sys.stderr)
    if faults:
        return 1
    manifest = Manifest.load(Path(a.folder))
    tokens = sum(shard.tokens for shard in manifest.shards)
    print(f"{a.folder}: {len(manifest.shards):,} shards with {tokens:,} tokens are as they were written")
    return 0


@dataclass
class InspectArguments:
    """Look into token shards: counts, document lengths, frequent tokens, and some documents."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder that 'pretrain data prepare' made, or token shards of another program."""
    tokenizer: str = ""
    """The tokenizer of shards of another program: gpt2, or the path of a tokenizer.json."""
    samples: int = 3
    """Documents of each split to decode: the first one and random others."""
    seed: int = 0
    """Fixes which these are."""

    def __post_init__(self):
        if self.samples < 0:
            raise ValueError(f"--samples must be 0 or more, not {self.samples}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {self.seed}")


def inspect(args: list[str]) -> int:
    """Show what token shards hold."""
    a = parse(InspectArguments, args, "data inspect")

    from pretrain.text import PROBLEMS
    from pretrain.tokens import Manifest, open_corpus
    from pretrain.tokens.inspection import inspect_split
    from pretrain.tokens.shards import MANIFEST

    folder = Path(a.folder).expanduser()
    if not a.tokenizer and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder} has no {MANIFEST}; for token shards of another program add --tokenizer gpt2, or the path of "
            f"their tokenizer.json"
        )
    corpus = open_corpus([a.folder], a.tokenizer)
    print(f"{a.folder}: vocabulary of {corpus.tokenizer.vocab_size:,}", end="")
    print(f", {corpus.bytes_per_token:.2f} bytes of text per token" if corpus.bytes_per_token else "")
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        for split, name in (("train", "training"), ("val", "validation")):
            shards = [shard for shard in manifest.shards if shard.split == split]
            size = sum(shard.text_bytes for shard in shards)
            print(
                f"  {name:<11} {manifest.documents(split):,} documents, {manifest.tokens(split):,} tokens, "
                f"{size / 1e6:,.1f} MB of text, {len(shards):,} shards"
            )
        for problem, count in manifest.problems.items():
            print(f"  problem     {count:,} {PROBLEMS.get(problem, problem)}")
    for split in ("train", "val"):
        for line in inspect_split(corpus, split, a.samples, a.seed):
            print(line)
    return 0


COMMANDS: dict[str, Command] = {"download": download, "prepare": prepare, "verify": verify, "inspect": inspect}
