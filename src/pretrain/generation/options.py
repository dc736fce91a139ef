"""How text is sampled: the options, apart from the code that follows them, so that ``--help`` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and where the text ends.

    The filters act in the order of the fields below, as in transformers: repetition penalty on the logits, then
    temperature, top_k, top_p and min_p, each on what the one before left.
    """

    max_tokens: int = 200
    """Tokens to write at most; the text may end earlier by itself."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens that the text holds already by this, and multiply the negative ones (CTRL,
    arXiv 1909.05858). 1: no penalty. The token that ends a document is exempt."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int = 50
    """Choose among the k likeliest tokens. 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that together have this probability (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Choose among tokens at least this share as likely as the likeliest (arXiv 2407.01082)."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this; may be given several times."""
    seed: int = 0
    """The same seed gives the same text. Sample number i of several is drawn with seed + i."""

    def __post_init__(self):
        for name, fits, wanted in (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if not all(self.stop):
            raise ValueError("stop must not be empty text")
