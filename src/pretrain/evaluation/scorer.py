"""What an evaluation needs of a model and its tokenizer, and how a GPT of ours gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.model import GPT
from pretrain.model.cache import KVCache
from pretrain.model.packed import for_inference
from pretrain.tokenizer import Tokenizer

CHUNK_ELEMENTS = 2**22
"""Logits held at once while scoring."""


class Scorer(Protocol):
    """A model and its tokenizer, as CORE sees them. Tokens are int64 on the CPU and may be padded on the right."""

    @property
    def model(self) -> nn.Module:
        """Put in evaluation mode while it is measured."""
        ...

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see at once; None: any number."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, after the BOS token if the vocabulary has one."""
        ...

    def prefill(self, tokens: Tensor, limit: int) -> Any:
        """A KV cache of ``tokens`` (B, T) that others can follow, up to ``limit`` tokens a row in all."""
        ...

    def score(
        self, tokens: Tensor, wanted: Tensor, cache: Any = None, rows: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """How well the model predicts some tokens.

        Args:
            tokens: (B, T) what the model reads.
            wanted: (K, 3) row, position and target: after reading the row up to the position, the target is next. In
                the order of rows, of which each has at least one.
            cache: of :meth:`prefill`, what the model has read before ``tokens``; it is not changed.
            rows: (B) which row of the cache each row of ``tokens`` continues.

        Gives, on the CPU, the cross-entropy of each target in nats, fp32 (K), and whether it is the likeliest (K).
        """
        ...


class GPTScorer:
    """Scores with a GPT of ours: on a CPU in fp32, in which a loss is the same in any batch; else in its precision.

    Args:
        model: on any device; its weights as they are now count, and what it learns later does not.
        tokenizer: its own.
        on_batch: called before each batch; what it raises cuts the scoring short.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, on_batch: Callable[[], None] = lambda: None):
        self.model, self.tokenizer, self.on_batch = model, tokenizer, on_batch
        self.context_length = model.config.context_length
        self.device = model.embedding.weight.device
        with _fp32_on_cpu(model):
            self._ready = for_inference(model)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Scorer`."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return [bos + ids.tolist() for _, ids in self.tokenizer.encode_documents(enumerate(texts))]

    def prefill(self, tokens: Tensor, limit: int) -> KVCache:
        """See :class:`Scorer`."""
        cache = KVCache(limit)
        self._stream(tokens, cache)
        return cache

    def score(
        self, tokens: Tensor, wanted: Tensor, cache: Any = None, rows: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Scorer`."""
        self.on_batch()
        stream = self._stream(tokens, cache and cache.select(rows))
        # Choices of one token each share their position, so its logits are computed once.
        positions, which = torch.unique(wanted[:, 0] * tokens.shape[1] + wanted[:, 1], return_inverse=True)
        needed = stream.flatten(0, 1)[positions.to(self.device)]
        losses, hits = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.bool)
        size = max(1, CHUNK_ELEMENTS // self.model.vocab_size)
        for start in range(0, len(positions), size):
            mine = ((which >= start) & (which < start + size)).nonzero()[:, 0]
            logits = self._ready.logits(needed[start : start + size])
            losses[mine], hits[mine] = losses_and_hits(logits, which[mine] - start, wanted[mine, 2])
        return losses, hits

    def _stream(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        with _fp32_on_cpu(self._ready):  # which is the model itself where it is spread over processes
            return self._ready.stream(tokens.to(self.device), cache)


@contextmanager
def _fp32_on_cpu(model: GPT) -> Iterator[None]:
    """While entered, a model on a CPU computes in fp32."""
    dtype = model.activation_dtype
    if model.embedding.weight.device.type == "cpu":
        model.activation_dtype = torch.float32
    try:
        yield
    finally:
        model.activation_dtype = dtype


def losses_and_hits(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether it is the likeliest, for each of ``targets`` (K) by the row of ``logits`` (N, V)."""
    rows, targets = rows.to(logits.device), targets.to(logits.device)
    losses = logits.logsumexp(1)[rows] - logits[rows, targets]
    return losses.cpu(), (logits.argmax(1)[rows] == targets).cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout while entered; afterwards the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
