"""The decoding loop: token ids of many rows, one step of the model for all of them at a time.

    prompts → prefill (each different prompt once) → [choose a token of each row → one step of the model] until all end

Rows may have any lengths. Each gets the tokens that it gets alone, whatever its neighbours are: they share matrix
products, in which a row's numbers may differ in the last bits, but no position, no mask and no draw.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pretrain.config.sampling import SamplingOptions
from pretrain.generation.sampling import choose, penalize_repetition
from pretrain.model import GPT
from pretrain.model.cache import KVCache
from pretrain.model.packed import for_inference


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    end: int | None = None,
    seeds: Sequence[int] | None = None,
    ended: set[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue each of ``prompts`` (token ids, at least one each), yielding (row, token) as tokens come.

    At every step each row that has not ended gives one token, in the order of rows. A row ends after
    ``options.max_tokens``, at the token ``end``, or when the caller says so. Equal prompts are computed once.

    **Past the context length**: of a longer prompt the last ``context_length`` tokens are seen. When a row fills the
    context it goes on from its newest half, computed anew as if that were all there is. So positions never pass the
    context length, windows and documents mean what they meant in training, and a token always sees at least half a
    context; the recomputing costs about one token's worth a step.

    Args:
        model: left as it is; it computes in its ``activation_dtype``, without dropout.
        prompts: one for each row.
        options: all but ``stop``, which is text: see :func:`pretrain.generation.sample_text`.
        end: a token that ends a row, such as BOS; it is not yielded.
        seeds: of each row's draws; ``options.seed`` + row if not given. The global random state is not touched.
        ended: rows that the caller adds to this set give no more tokens.
    """
    assert all(prompts), "a prompt needs at least one token"
    texts = [list(prompt) for prompt in prompts]
    rows = list(range(len(texts)))
    if not rows or not options.max_tokens:
        return
    draws = [random.Random(options.seed + row if seeds is None else seeds[row]) for row in rows]
    ended = set() if ended is None else ended
    model = for_inference(model)
    was_training = model.training  # only where for_inference cannot copy it
    model.eval()
    try:
        context = model.config.context_length
        starts = [text[-context:] for text in texts]
        cache, logits = prefill(model, starts, min(context, max(map(len, starts)) + options.max_tokens))
        seen = _seen(texts, logits, end) if options.repetition_penalty != 1 else None
        for left in range(options.max_tokens - 1, -1, -1):
            if seen is not None:
                logits = penalize_repetition(logits, seen, options.repetition_penalty)
            uniform = torch.tensor([[draws[row].getrandbits(24) / 2**24] for row in rows])  # exact in fp32, below 1
            tokens = choose(logits, options, uniform.to(logits.device))
            for row, token in zip(rows, tokens.flatten().tolist(), strict=True):
                if token == end:
                    ended.add(row)
                elif row not in ended:
                    texts[row].append(token)
                    yield row, token
            kept = [index for index, row in enumerate(rows) if row not in ended]
            if not kept or not left:
                return
            if len(kept) < len(rows):
                rows, cache, tokens = [rows[index] for index in kept], cache.select(kept), tokens[kept]
                seen = None if seen is None else seen[kept]
            if seen is not None:
                seen.scatter_(1, tokens, True)
            cache, logits = _step(model, cache, tokens, [texts[row] for row in rows])
    finally:
        model.train(was_training)


def _step(model: GPT, cache: KVCache, tokens: Tensor, texts: list[list[int]]) -> tuple[KVCache, Tensor]:
    """Take in each row's newest token, ``tokens`` (B, 1) and the last of its text; give the logits (B, V) after it."""
    context = model.config.context_length
    full = [index for index, length in enumerate(cache.lengths) if length == context]
    if not full:
        return cache, model(tokens, cache=cache, last_only=True)[:, -1]
    anew, logits = prefill(model, [texts[index][-max(1, context // 2) :] for index in full], context)
    others = [index for index in range(len(texts)) if index not in full]
    if not others:
        return anew, logits
    rest = cache.select(others)
    rest_logits = model(tokens[others], cache=rest, last_only=True)[:, -1]
    order = [(others + full).index(index) for index in range(len(texts))]
    return KVCache.join([rest, anew]).select(order), torch.cat((rest_logits, logits))[order]


def prefill(model: GPT, prompts: Sequence[Sequence[int]], limit: int) -> tuple[KVCache, Tensor]:
    """Compute prompts: a cache of them all with ``limit`` slots a row, and the logits (B, V) after each.

    Each different prompt is computed once, together with those of equal length, so that nothing is padded.
    """
    device = model.embedding.weight.device
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for prompt in dict.fromkeys(map(tuple, prompts)):
        by_length.setdefault(len(prompt), []).append(prompt)
    parts, logits = [], []
    for group in by_length.values():
        parts.append(KVCache(limit))
        logits.append(model(torch.tensor(group, device=device), cache=parts[-1], last_only=True)[:, -1])
    computed = [prompt for group in by_length.values() for prompt in group]
    row_of = {prompt: row for row, prompt in enumerate(computed)}
    order = [row_of[tuple(prompt)] for prompt in prompts]
    if order == [0]:  # nothing to copy
        return parts[0], logits[0]
    return KVCache.join(parts).select(order), torch.cat(logits)[order]


def _seen(texts: list[list[int]], logits: Tensor, end: int | None) -> Tensor:
    """Which tokens each text holds: (B, V), bool; never ``end``, with which a prompt may begin."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(text, device=logits.device)] = True
    if end is not None:
        seen[:, end] = False
    return seen
