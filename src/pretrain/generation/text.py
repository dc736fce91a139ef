"""From tokens to text as it is made: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pretrain.tokenizer import Tokenizer


class TextWriter:
    """One row's text: takes tokens, gives text that is certain.

    Text is held back while it may be part of a character or of a stop string, however these are cut into tokens.

    Attributes:
        tokens: how many tokens it has taken.
        stopped: whether a stop string has come; the text before it is all there is.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokens, self.stopped = 0, False
        self._tokenizer, self._stop, self._held = tokenizer, stop, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take the next token; give the text that is now certain, perhaps none."""
        self.tokens += 1
        return self._certain(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Give what is still held back when no token follows; U+FFFD for a character that stayed incomplete."""
        if self.stopped:
            return ""
        return self._certain(self._decoder.decode(b"", final=True)) + self._held

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:  # the one that was complete first, so that it does not matter how the text came in pieces
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        open_ends = (
            size for stop in self._stop for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )  # fmt: skip
        certain = len(text) - max(open_ends, default=0)
        self._held = text[certain:]
        return text[:certain]
