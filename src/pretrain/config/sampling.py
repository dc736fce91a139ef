"""How text is sampled: options of a command, not fields of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from msgspec import Meta

from pretrain.config.schema import Fraction, Natural, NonEmpty, NonNegative, Positive
from pretrain.config.validate import Section


@dataclass(frozen=True)
class SamplingOptions(Section):
    """How the next token is chosen, and where the text ends.

    The filters act in the order of the fields below, as in transformers: repetition penalty on the logits, then
    temperature, top_k, top_p and min_p, each on what the one before left.
    """

    max_tokens: Natural = 200
    """Maximum number of tokens to generate; the text may end earlier by itself."""
    repetition_penalty: Positive = 1.0
    """Divide the positive logits of tokens that the text holds already by this, and multiply the negative ones (CTRL,
    arXiv 1909.05858). 1: no penalty. The token that ends a document is exempt."""
    temperature: NonNegative = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: Natural = 50
    """Choose among the k likeliest tokens. 0: among all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Choose among the fewest likeliest tokens that together have this probability (arXiv 1904.09751)."""
    min_p: Fraction = 0.0
    """Choose among tokens at least this share as likely as the likeliest (arXiv 2407.01082)."""
    stop: Annotated[tuple[NonEmpty, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this; may be given several times."""
    seed: Natural = 0
    """The same seed gives the same text. Sample number i of several is drawn with seed + i."""
