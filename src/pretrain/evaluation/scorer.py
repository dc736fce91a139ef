"""What CORE needs of a model and its tokenizer, and how a GPT of ours gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model import GPT
from pretrain.model.cache import KVCache
from pretrain.model.packed import for_inference
from pretrain.tokenizer import Tokenizer

CHUNK_ELEMENTS = 2**22
"""Logits held at once while scoring."""


class Scorer:
    """A model and its tokenizer, as CORE sees them. Tokens are int64 on the CPU and may be padded on the right."""

    model: Any
    context_length: int | None
    """Tokens that the model can see at once; None: any number."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, after the BOS token if the vocabulary has one."""
        raise NotImplementedError

    def prefill(self, tokens: Tensor, limit: int) -> Any:
        """A KV cache of ``tokens`` (B, T) that others can follow, up to ``limit`` tokens a row in all."""
        raise NotImplementedError

    def logits(self, tokens: Tensor, positions: Tensor, cache: Any, rows: list[int]) -> Iterator[Tensor]:
        """Yield the logits (N, V) at ``positions`` (ascending indices into the flattened tokens), some at a time."""
        raise NotImplementedError

    def score(self, tokens: Tensor, wanted: Tensor, cache: Any, rows: list[int]) -> tuple[Tensor, Tensor]:
        """How well the model predicts some tokens.

        Args:
            tokens: (B, T) what the model reads.
            wanted: (K, 3) row, position and target: after reading the row up to the position, the target is next.
            cache: of :meth:`prefill`, what the model has read before ``tokens``; it is not changed. None: nothing.
            rows: (B) which row of the cache each row of ``tokens`` continues.

        Gives, on the CPU, the cross-entropy of each target in nats, fp32 (K), and whether it is the likeliest (K).
        """
        # Choices of one token each share their position, so its logits are computed once.
        positions, which = torch.unique(wanted[:, 0] * tokens.shape[1] + wanted[:, 1], return_inverse=True)
        losses, hits = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.bool)
        start = 0
        for logits in self.logits(tokens, positions, cache, rows):
            mine = ((which >= start) & (which < start + len(logits))).nonzero()[:, 0]
            row, target = (which[mine] - start).to(logits.device), wanted[mine, 2].to(logits.device)
            losses[mine] = (logits.logsumexp(1)[row] - logits[row, target]).cpu()
            hits[mine] = (logits.argmax(1)[row] == target).cpu()
            start += len(logits)
        return losses, hits


class GPTScorer(Scorer):
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
        self._ready = for_inference(model, torch.float32 if self.device.type == "cpu" else model.activation_dtype)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Scorer`."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return [bos + ids.tolist() for _, ids in self.tokenizer.encode_documents(enumerate(texts))]

    def prefill(self, tokens: Tensor, limit: int) -> KVCache:
        """See :class:`Scorer`."""
        cache = KVCache(limit)
        self._stream(tokens, cache, tokens.shape[1] - 1)
        return cache

    def logits(self, tokens: Tensor, positions: Tensor, cache: Any, rows: list[int]) -> Iterator[Tensor]:
        """See :class:`Scorer`."""
        self.on_batch()
        columns = positions % tokens.shape[1]
        first = int(columns.min())
        stream = self._stream(tokens, cache and cache.select(rows), first)
        stream = stream[(positions // tokens.shape[1]).to(self.device), (columns - first).to(self.device)]
        return map(self._ready.logits, stream.split(max(1, CHUNK_ELEMENTS // self.model.vocab_size)))

    def _stream(self, tokens: Tensor, cache: KVCache | None, first: int) -> Tensor:
        return self._ready.stream(tokens.to(self.device), cache, first)


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
