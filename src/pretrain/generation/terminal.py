"""Prompts from the terminal, line by line, and from files."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import DataError, PretrainError


def converse(answer: Callable[[str, int], Iterator[str]]) -> None:
    """Read a prompt a line and print its continuation as it comes, until the input ends or a line is 'quit'.

    Ctrl-C ends the answer that is being written; where none is, it leaves. An empty line begins a new document.

    Args:
        answer: given a prompt and how many came before it, yields the pieces of its continuation.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and a history
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print("Type a beginning and press Enter. Ctrl-C stops an answer; Ctrl-D or 'quit' leaves.", file=sys.stderr)
    for number in itertools.count():
        try:
            prompt = input("> " if on_terminal else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt.strip() == "quit":
            return
        try:
            print_as_it_comes(prompt, answer(prompt, number))
        except KeyboardInterrupt:
            print()
        except PretrainError as error:  # such as a character that the tokenizer does not know
            print(f"pretrain: {error}", file=sys.stderr)


def print_as_it_comes(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and its continuation, each piece at once, and end the line."""
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def read_prompts(file: str) -> list[str]:
    """Prompts of a file: one a line, or in a ``.jsonl`` the field 'prompt' of each object; blank lines are passed over.

    Raises DataError if it cannot be read, holds no prompt, or a line is not an object with a 'prompt'.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028, form feeds
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{file}: cannot be read ({why}); give a text file with one prompt a line") from None
    prompts = []
    for number, prompt in enumerate(lines, start=1):
        if not prompt.strip():
            continue
        if file.endswith(".jsonl"):
            try:
                prompt = json.loads(prompt)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                wanted = 'a JSON object with a "prompt" of text'
                raise DataError(f"{file}: line {number} is not {wanted}; fix or remove it")
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{file}: holds no prompt; write one a line")
    return prompts
