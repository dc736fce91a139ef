"""What a model remembers of the tokens it has seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """What a model remembers of the tokens it has seen, for generation; every row has room for ``limit`` tokens.

    The token at position p of a row lies in slot p, so rows of different lengths stand side by side without padding:
    ``lengths[b]`` says how many slots of row b count. Slots beyond are zeros or leftovers, and are masked.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.lengths: list[int] = []  # of each row; none before the first tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (B, H, limit, D)
        self.rope: tuple[Tensor, Tensor] | None = None  # cosines and sines of all positions
        self.last_embedding: Tensor | None = None  # (B, 1, C) of each row's newest token, for smear
        self.documents: Tensor | None = None  # (B, limit) the document of each token, for document masks
        self.last_document: Tensor | None = None  # (B, 1) of each row's newest token
        self.slots: slice | tuple[Tensor, slice, Tensor] = slice(0)  # where the newest tokens go

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    def advance(self, B: int, T: int, device: torch.device) -> Tensor:
        """Make room for T more tokens in each of B rows; give their positions: (T,), or (B, T) if rows differ."""
        before = self.lengths or [0] * B
        assert len(before) == B, f"{B} rows of tokens for a cache of {len(before)}"
        self.lengths = [length + T for length in before]
        assert self.length <= self.limit, f"{self.length} tokens for a cache of {self.limit}"
        if min(before) == max(before):
            self.slots = slice(before[0], before[0] + T)
            return torch.arange(before[0], before[0] + T, device=device)
        positions = torch.tensor(before, device=device)[:, None] + torch.arange(T, device=device)
        self.slots = (torch.arange(B, device=device)[:, None], slice(None), positions)
        return positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D) of the newest T tokens; return those of all tokens so far (B, H, S, D)."""
        if layer not in self.layers:
            shape = (*k.shape[:2], self.limit, k.shape[3])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))  # masked, but NaN times 0 would show
        keys, values = self.layers[layer]
        if isinstance(self.slots, slice):
            keys[:, :, self.slots] = k
            values[:, :, self.slots] = v
        else:
            keys[self.slots] = k.transpose(1, 2)
            values[self.slots] = v.transpose(1, 2)
        end = self.length
        return keys[:, :, :end], values[:, :, :end]

    def extend_documents(self, starts: Tensor) -> Tensor:
        """Number the documents of the newest tokens from ``starts`` (B, T), which are where one begins.

        Gives the document of every token so far (B, S).
        """
        new = starts.cumsum(1)
        if self.documents is None or self.last_document is None:
            self.documents = new.new_zeros(len(new), self.limit)
        else:
            new = new + self.last_document
        self.last_document = new[:, -1:]
        if isinstance(self.slots, slice):
            self.documents[:, self.slots] = new
        else:
            self.documents[self.slots[0], self.slots[2]] = new
        return self.documents[:, : self.length]

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows, in this order; a row may be taken several times, to go on in several ways."""
        chosen = KVCache(self.limit)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen.rope = self.rope
        chosen.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        for name in ROW_STATE:
            kept = getattr(self, name)
            setattr(chosen, name, None if kept is None else kept[rows])
        return chosen

    @staticmethod
    def join(parts: list[KVCache]) -> KVCache:
        """A cache of the rows of all ``parts``, one after the other; they have equal limits and are of one model."""
        whole, first = KVCache(parts[0].limit), parts[0]
        whole.lengths = [length for part in parts for length in part.lengths]
        whole.rope = first.rope
        for layer in first.layers:
            keys, values = zip(*(part.layers[layer] for part in parts), strict=True)
            whole.layers[layer] = (torch.cat(keys), torch.cat(values))
        for name in ROW_STATE:
            if getattr(first, name) is not None:
                setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        return whole


ROW_STATE = ("last_embedding", "documents", "last_document")
"""What a cache keeps for each row, or None, besides keys and values."""
