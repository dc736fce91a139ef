"""``pretrain data``: text and tokens before training."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pretrain.cli.parsing import Command
from pretrain.config import DataConfig, TokenizerConfig
from pretrain.config.schema import Count, Natural
from pretrain.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from pretrain.tokens import Manifest

SHOWN = 60  # tokens and characters of a row at its beginning


@dataclass(kw_only=True)
class Prepare(Command):
    """Tokenize text into shards: of any size, in bounded memory and on all cores.

    Stopped or killed at any moment, the same command resumes and writes the same bytes. See docs/data.md.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC ...]")] = ()
    """Text: files, folders, patterns, URLs. None: the embedded corpus."""
    out: str
    """The folder of the shards."""
    tokenizer: str = "bpe"
    """bpe (trained on this text), gpt2, byte, char, or the path of a tokenizer.json."""
    vocab_size: int = 4096
    """Number of tokens for bpe."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How bpe cuts words before it merges their bytes: as GPT-2, as GPT-4 and Llama 3, or as nanochat does."""
    bos_token: str = ""
    """Token of a tokenizer.json that begins a document. Empty: found by the tokenizer's own files."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    separator: str = ""
    """What separates the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    bos: bool = True
    """Begin each document with the BOS token, if the vocabulary has one. Off: documents follow one another unmarked."""
    split: Literal["tail", "hash", "last_file"] = "tail"
    """What is held out. tail: the last part of all text, which is read twice for it; hash: documents chosen by a hash
    of their text; last_file: the last file."""
    val_fraction: float = 0.05
    """Share of the text held out by tail and hash. 0: nothing."""
    test_fraction: float = 0.0
    """Share of the text held out besides, for runs to measure once at their end; with last_file any above 0 makes the
    last file that text, and the one before it what validation has."""
    val: tuple[str, ...] = ()
    """Files to validate on, instead of splitting the text."""
    allow_broken: bool = False
    """Use what is left where more than half of the records have no text that can be used, rather than refusing it."""
    workers: Natural = 0
    """Processes. 0: as many as there are cores."""
    shard_tokens: Count = 100_000_000
    """Tokens at which a shard is closed."""
    engine: Literal["local", "ray"] = "local"
    """ray: the work is done on a Ray cluster, --out being on storage that all its machines share."""

    def __post_init__(self):
        self.text = DataConfig(
            paths=self.sources,
            field=self.field,
            separator=self.separator,
            bos=self.bos,
            split=self.split,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            val_paths=self.val,
            allow_broken=self.allow_broken,
        )
        self.vocabulary = TokenizerConfig(self.tokenizer, self.vocab_size, self.pattern, self.bos_token)

    def __call__(self) -> int:
        from rich.console import Console

        from pretrain.tokens.prepare import prepare_text
        from pretrain.tokens.progress import Progress

        console = Console(highlight=False, soft_wrap=True)

        def say(line: str) -> None:  # some lines name the option of training
            console.print(line.replace("--tokenizer.bos", "--bos-token"), markup=False)

        progress = Progress(say, console)
        try:
            manifest = prepare_text(
                self.text,
                self.vocabulary,
                Path(self.out),
                workers=self.workers,
                shard_tokens=self.shard_tokens,
                engine=self.engine,
                progress=progress,
            ).manifest
        except Interrupted:
            again = shlex.join(["pretrain", "data", "prepare", *self.typed])
            raise Interrupted(f"stopped; what is done so far stays in {self.out}. Resume with: {again}") from None
        for line in _contents(manifest):
            progress.say(line)
        if progress.bytes:
            rate = progress.bytes / 1e6 / max(progress.seconds, 1e-9)
            progress.say(f"speed     {progress.bytes / 1e6:,.1f} MB in {progress.seconds:,.1f} s, {rate:,.0f} MB/s")
        progress.say(f"next      pretrain train --data {shlex.quote(self.out)}{'' if self.bos else ' --data.no-bos'}")
        return 0


def _contents(manifest: Manifest) -> Iterator[str]:
    for split, name in (("train", "training"), ("val", "held out"), ("test", "test")):
        shards = [shard for shard in manifest.shards if shard.split == split]
        if shards:
            size = sum(shard.text_bytes for shard in shards) / 1e6
            counts = f"{manifest.documents(split):,} documents, {manifest.tokens(split):,} tokens"
            yield f"{name:<9} {counts}, {size:,.1f} MB of text, {len(shards):,} shards"
    yield f"tokenizer {manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes of text per token"
    yield from manifest.problem_lines()


@dataclass
class Verify(Command):
    """Read every byte of token shards again and find what is not as it was written."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder that 'pretrain data prepare' made, or RUN/data."""
    tokenizer: str = ""
    """Also check that the shards were made with this: gpt2, byte, or the path of a tokenizer.json."""

    def __call__(self) -> int:
        from rich.console import Console

        from pretrain.cli.tokenizer import open_tokenizer
        from pretrain.tokens.progress import Progress
        from pretrain.tokens.shards import Manifest
        from pretrain.tokens.verify import verify

        folder, tokenizer = Path(self.folder), open_tokenizer(self.tokenizer) if self.tokenizer else None
        if faults := verify(folder, tokenizer, Progress(console=Console())):
            for fault in faults:
                print(f"pretrain: {fault}", file=sys.stderr)
            return 1
        shards = Manifest.load(folder).shards
        tokens = sum(shard.tokens for shard in shards)
        print(f"{self.folder}: {len(shards):,} shards with {tokens:,} tokens are as they were written")
        return 0


@dataclass
class Inspect(Command):
    """Look into token shards: counts, document lengths, frequent tokens, and some documents."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder that 'pretrain data prepare' made, or token shards made by another tool."""
    tokenizer: str = ""
    """The tokenizer of shards made by another tool: gpt2, or the path of a tokenizer.json."""
    dtype: Literal["auto", "uint16", "uint32", "int32", "int64"] = "auto"
    """Integers in them, if they do not say it themselves. auto: as their values look."""
    samples: Natural = 3
    """Documents of each split to decode: the first one and random others."""
    seed: Natural = 0
    """Seed for choosing them."""

    def __call__(self) -> int:
        from pretrain.io import expand
        from pretrain.text.split import SIDES
        from pretrain.tokens import Manifest, open_corpus
        from pretrain.tokens.inspection import inspect_split
        from pretrain.tokens.shards import MANIFEST

        folder = expand(self.folder)
        ours = (folder / MANIFEST).is_file()
        if not ours and not self.tokenizer:
            raise UsageError(
                f"{folder} has no {MANIFEST}; for token shards made by another tool add --tokenizer gpt2 or FILE"
            )
        corpus = open_corpus([self.folder], self.tokenizer, dtype=self.dtype)
        for line in _contents(Manifest.load(folder)) if ours else ():
            print(line)
        for split in SIDES:
            for line in inspect_split(corpus, split, self.samples, self.seed):
                print(line)
        return 0


@dataclass
class At(Command):
    """Show the exact text that a step of a run trained on, and where each row of it came from.

    Without --row a line for each row. It is found again from the data, which must be as it was; of a
    stream it is read again from the nearest checkpoint. See docs/data.md.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    step: Natural = 0
    """The step, as in metrics.jsonl: that whose update made the weights of this step."""
    batch: int = -1
    """A batch by its number instead, the first being 0: also one that was skipped, as events.jsonl names it."""
    row: int = -1
    """Show all of this row of the batch, the first being 0, and find its documents in their files."""
    rank: int = -1
    """Only the rows of this process."""
    world: Natural = 0
    """How many processes there were. 0: as the run noted."""
    json: bool = False
    """Print one JSON object, with the ids of the tokens."""

    def __post_init__(self):
        if bool(self.step) == (self.batch >= 0):
            raise ValueError("give one of --step N and --batch N")

    def __call__(self) -> int:
        from pretrain.runs import Run
        from pretrain.runs.batch import batch_of, last_batch, read_batch, world_of

        run = Run.open(self.run)
        batch = batch_of(run, self.step) if self.step else self.batch
        if batch > (last := last_batch(run)):
            raise UsageError(f"{self.run} has read batches 0 to {last} so far; give --batch one of them")
        world, size = self.world or world_of(run, self.step), run.config.batch_rows
        if self.rank >= 0 and world is None:
            raise UsageError(f"{self.run} does not say how many processes computed this batch; add --world N")
        rows = [row for row in range(size) if self.row in (-1, row) and self.rank in (-1, row % (world or 1))]
        if not rows:
            ranks = f", and process R of {world} has rows R, R + {world}, ..." if world else ""
            raise UsageError(f"there is no such row: a batch has rows 0 to {size - 1}{ranks}")
        found, tokenizer = read_batch(run, batch, rows, world, closely=self.row >= 0), run.tokenizer()
        if self.json:
            texts = [{"text": tokenizer.decode(row.tokens, show_special=True), **asdict(row)} for row in found]
            print(json.dumps({"step": self.step or None, "batch": batch, "world": world, "rows": texts}))
            return 0
        for row in found:
            name = f"batch {batch}, row {row.row}" + (f", rank {row.rank}" if world else "")
            for part in row.parts if self.row >= 0 else row.parts[:1]:
                at = f", token {part.pop('begin')}"
                place = [f"{key} {each:,}" if isinstance(each, int) else each for key, each in part.items() if each]
                print(f"{name}{at if self.row >= 0 else ''}: {', '.join(place)}")
            text = tokenizer.decode(row.tokens, show_special=True)
            print(f"\n{text}" if self.row >= 0 else f"    {' '.join(text.split())[:SHOWN]}")
        return 0
