"""What a model remembers of the tokens it has seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys, values and other per-token state of a model's rows, each row with space for ``limit`` tokens.

    The token at position p of a row is in slot p, so rows of different lengths need no padding:
    ``lengths[b]`` says how many slots of row b count. Slots beyond are zeros or leftovers, and are masked.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.lengths: list[int] = []  # of each row; none before the first tokens
        self.tensors: dict[str, Tensor] = {}  # each (B, ...), by name
        self.rope: tuple[Tensor, Tensor] | None = None  # cosines and sines of all positions
        self.slots: slice | tuple[Tensor, slice, Tensor] = slice(0)  # where the newest tokens go

    @property
    def length(self) -> int:
        """S, the tokens in the longest row."""
        return max(self.lengths, default=0)

    def advance(self, B: int, T: int, device: torch.device) -> Tensor:
        """Reserve slots for T more tokens in each of B rows. Returns their positions, (T,) or (B, T) if rows differ."""
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

    def extend(self, name: str, x: Tensor) -> Tensor:
        """Store ``x`` (B, H, T, D) of the newest T tokens; return that of all tokens so far (B, H, S, D)."""
        if name not in self.tensors:
            shape = (*x.shape[:2], self.limit, x.shape[3])
            self.tensors[name] = x.new_zeros(shape)  # unused slots are masked, but NaN times 0 would show
        stored = self.tensors[name]
        if isinstance(self.slots, slice):
            stored[:, :, self.slots] = x
        else:
            stored[self.slots] = x.transpose(1, 2)
        return stored[:, :, : self.length]

    def extend_documents(self, starts: Tensor) -> Tensor:
        """The number of the document of every token so far (B, S); the newest begin one at ``starts`` (B, T)."""
        new = starts.cumsum(1)
        if "last_document" in self.tensors:
            new = new + self.tensors["last_document"]
        self.tensors["last_document"] = new[:, -1:]
        return self.extend("documents", new[:, None, :, None])[:, 0, :, 0]

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows, in this order; a row may be taken several times, to go on in several ways."""
        chosen = KVCache(self.limit)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen.tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        chosen.rope = self.rope
        return chosen

    @staticmethod
    def join(parts: list[KVCache]) -> KVCache:
        """A cache of the rows of all ``parts``, one after the other; they have equal limits and are of one model."""
        whole = KVCache(parts[0].limit)
        whole.lengths = [length for part in parts for length in part.lengths]
        whole.tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        whole.rope = parts[0].rope
        return whole
