"""Text from a model: one token at a time, with the keys and values of earlier tokens kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.model import GPT, KVCache
from pretrain.tokenizer import TextStream, Tokenizer


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Continue ``prompt`` (token ids, at least one) by up to ``max_tokens`` tokens, yielding each as it comes.

    When the context is full, generation goes on from its newest half. The same seed gives the same tokens; the global
    random state is not touched.

    Args:
        model: put in evaluation mode while generating, and back as it was.
        prompt: token ids; only the last ``context_length`` of them can be seen.
        max_tokens: how many to make.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest; 0 among all.
        seed: of the draws.
        stop: a token that ends the text; it is not yielded.
    """
    device = model.embedding.weight.device
    generator = torch.Generator("cpu").manual_seed(seed)  # draws on the CPU, so that every device gives the same
    limit = model.config.context_length
    context = list(prompt)[-limit:]
    was_training = model.training
    model.eval()
    try:
        cache = KVCache(limit)
        new = context
        for _ in range(max_tokens):
            if cache.length + len(new) > limit:
                cache, new = KVCache(limit), context[-max(1, limit // 2) :]
            logits = model(torch.tensor([new], device=device), cache=cache)[0, -1]
            token = pick(logits.float().cpu(), temperature, top_k, generator)
            if token == stop:
                return
            yield token
            new = [token]
            context = [*context[-limit:], token]
    finally:
        model.train(was_training)


def pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token from logits (V)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a text, yielding pieces of whole characters as they come; ends at the document's end.

    An empty prompt begins a new document. See :func:`generate`.
    """
    boundary = tokenizer.boundary_id
    ids = ([] if boundary is None else [boundary]) + tokenizer.encode(prompt)
    # Without a boundary token there is nothing to begin a document with; a line break comes closest.
    ids = ids or tokenizer.encode("\n")
    stream = TextStream(tokenizer)
    for token in generate(model, ids, max_tokens, temperature, top_k, seed, stop=boundary):
        yield stream.push(token)
    yield stream.finish()
