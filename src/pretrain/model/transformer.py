"""The Transformer, whole, in one file.

    tokens (B, T) → embedding → [x + attention(norm(x)); x + mlp(norm(x))] × layers → norm → head → loss or logits

It knows nothing of processes or checkpoints: ``training/`` applies those from outside. Weights are fp32; activations
have ``GPT.activation_dtype``, to which every matrix product casts its weight.

Shapes: B batch, T tokens, S tokens seen (T and those in the cache), C channels (``model.width``), H heads, D head
dimension, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from pretrain.config import ModelConfig
from pretrain.model.attention import BLOCK, attend_in_blocks, block_mask
from pretrain.model.cache import KVCache
from pretrain.model.loss import ChunkLoss, chunk_rows, linear_cross_entropy, softcap


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input; ``GPT.init_weights`` gives it values."""

    def reset_parameters(self) -> None:
        """Leave the values to init_weights: PyTorch's own, on the meta device, import for seconds to do nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., in) → (..., out)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Head(Linear):
    """The linear layer of the logits, and their loss: in its own forward pass, for which FSDP gathers its weight."""

    def forward(self, input: Tensor, *loss: Any) -> Tensor:
        """Input (..., C) → logits (..., rows); or with what :func:`linear_cross_entropy` takes besides, their loss."""
        return linear_cross_entropy(input, self.weight, *loss) if loss else super().forward(input)


class Embedding(nn.Embedding):
    """A table of vectors; ``GPT.init_weights`` gives it values."""

    def reset_parameters(self) -> None:
        """Leave the values to init_weights."""


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set a share ``p`` of x to 0 in training and scale the rest by 1 / (1 - p) (Srivastava et al., JMLR 15, 2014).

    PyTorch's own takes 4 to 5 times as long on a CPU, where it draws 32 bits for each number, one by one: here 16, four
    at a time, so ``p`` is exact to 1 / 65,536.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    if not training or not p:
        return x
    limit = round(p * 2**16)
    bits = torch.empty(math.ceil(x.numel() / 4) * 4, dtype=torch.int16)
    (random_bits if torch.compiler.is_compiling() else _random_bits)(bits)
    kept = bits[: x.numel()] >= limit - 2**15
    return x * kept.view(torch.uint8).to(x.dtype).mul_(2**16 / (2**16 - limit)).view(x.shape)


def _random_bits(bits: Tensor) -> None:
    """Fill a multiple of 4 int16."""
    bits.view(torch.int64).random_(-(2**63), None)


# An operation for the compiler, which would draw each number by itself; called eagerly it would import the compiler.
random_bits = torch.library.custom_op("pretrain::random_bits", _random_bits, mutates_args=("bits",))


class Dropout(nn.Dropout):
    """:func:`dropout` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape, same shape out."""
        return dropout(input, self.p, self.training)


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dimension, statistics in fp32, weights as configured."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.channels, self.eps, self.rms = (channels,), config.norm_eps, config.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(channels)) if config.norm_weight else None
        has_bias = config.norm_weight and config.bias and not self.rms
        self.bias = nn.Parameter(torch.empty(channels)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """X (..., channels), same shape out."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, self.channels, weight, self.eps)
        return F.layer_norm(x, self.channels, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)


Rope = tuple[Tensor, Tensor]
"""Cosines and sines of some positions."""


def rotary(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Cosines and sines (T, R/2) that turn R channels of a head, in pairs, by position (arXiv 2104.09864)."""
    rotated = int(head_dim(config) * config.rope_fraction)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=positions.device) / rotated
    angles = positions.float()[:, None] * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of x (B, H, T, D) against channel i + R/2; channels from R on stay."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


PLAIN_LIMIT = 1024
"""Longest context on a CPU for which plain matrix products in bf16 take the place of PyTorch's blockwise kernel: they
keep a weight for each pair of tokens, in longer ones more than all other activations together."""

PLAIN_ROWS = 256
"""Queries that they compute at once, needing no key after the last of them; and their longest context in fp32."""


Mask = Tensor | BlockMask | None
"""Who may look at whom: True where allowed (broadcast to (B, H, T, S)), or in blocks, or None for plain causal."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, p: float, device_type: str) -> Tensor:
    """Attention of queries (B, H, T, D) over keys and values (B, G, S, D), G dividing H → (B, H, T, D).

    Without a mask it is causal, or everything is seen if T is 1. ``p`` is the dropout of the weights.
    """
    if isinstance(mask, BlockMask):
        return attend_in_blocks(q, k, v, mask, scale)
    T, S = q.shape[2], k.shape[2]
    # The CPU kernel in bf16 takes 1.8 times as long as plain products for 1,024 tokens, 3 times for 128; and it has no
    # dropout. On a GPU they would write all scores to memory, which its kernel never does.
    longest = PLAIN_LIMIT if q.dtype == torch.bfloat16 else PLAIN_ROWS
    if device_type == "cpu" and T > 1 and (longest >= S or p):
        return attend_plainly(q, k, v, mask, scale, p)
    if device_type == "cuda" and T > 1 and mask is not None and k.shape[1] != q.shape[1]:
        # With a mask the kernels that hold no scores take no groups: torch would fall back to one that does.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    causal, gqa = mask is None and T > 1, k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=scale, enable_gqa=gqa)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, p: float) -> Tensor:
    """:func:`attend` by matrix products, for T queries that are the last of the S tokens."""
    (B, H, T, _), S = q.shape, k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.where(mask, 0.0, -torch.inf).to(q.dtype)
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1).flatten(0, 1) for x in (k, v))
    parts = []
    for rows in q.flatten(0, 1).split(PLAIN_ROWS, dim=1):
        start = sum(part.shape[1] for part in parts)
        end = start + rows.shape[1]
        seen = S - T + end
        hidden = bias[..., start:end, :seen]
        if hidden.dim() == 4:
            hidden = hidden.expand(B, H, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(hidden, rows, k[:, :seen].mT, alpha=scale).softmax(dim=-1)
        parts.append(dropout(weights, p, training=True) @ v[:, :seen])
    return torch.cat(parts, dim=1).unflatten(0, (B, H))


class Attention(nn.Module):
    """Causal self-attention; heads share keys and values in groups (GQA, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.dropout, self.device_type = layer, config.dropout, ""
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = D = head_dim(config)
        self.scale = config.attention_scale or D**-0.5
        self.q = Linear(config.width, self.heads * D, bias=config.qkv_bias)
        self.k = Linear(config.width, self.kv_heads * D, bias=config.qkv_bias)
        self.v = Linear(config.width, self.kv_heads * D, bias=config.qkv_bias)
        self.out = Linear(self.heads * D, config.width, bias=config.bias)
        self.q_norm = Norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, D) if config.qk_norm else nn.Identity()
        self.head_gate = self.value_gate = None
        if config.head_gates:
            self.head_gate = Linear(min(HEAD_GATE_CHANNELS, config.width), self.heads, bias=False)
        self.ngram_out = None
        if config.ngram_heads and layer == 0:
            self.ngram_out = Linear(config.ngram_heads * config.width, config.width, bias=False)
        if has_value_embedding(config, layer):
            self.value_gate = Linear(min(VALUE_GATE_CHANNELS, config.width), self.kv_heads, bias=False)

    def forward(
        self, x: Tensor, rope: Rope | None, mask: Mask, value_embedding: Tensor | None, cache: KVCache | None,
        first: int = 0, matches: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """X (B, T, C) → (B, T - first, C): what the tokens from ``first`` on, whom ``mask`` is for, see of all T."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x[:, first:]).view(B, T - first, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(B, T, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).view(B, T, self.kv_heads, self.head_dim)
        if self.value_gate is not None and value_embedding is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, H), as nanochat
            v = v + gate[..., None] * value_embedding.view_as(v)
        v = v.transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *(table[..., first:, :] for table in rope)), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(f"k{self.layer}", k), cache.extend(f"v{self.layer}", v)
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, self.scale, p, self.device_type or x.device.type)
        y = y.transpose(1, 2)
        if self.head_gate is not None:
            gate = 2 * torch.sigmoid(self.head_gate(x[:, first:, : self.head_gate.in_features]))  # (B, T - first, H)
            y = y * gate[..., None]
        y = self.out(y.reshape(B, T - first, -1))
        if self.ngram_out is not None and matches is not None:
            seen = x if cache is None else cache.extend(f"x{self.layer}", x[:, None])[:, 0]
            followed = matches[:, :, first:].flatten(1, 2) @ seen
            y = y + self.ngram_out(followed.view(B, -1, T - first, x.shape[-1]).transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """Two layers with a nonlinearity, or three with a gate for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        hidden = mlp_width(config)
        self.up = Linear(config.width, hidden, bias=config.bias)
        self.gate = Linear(config.width, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.down = Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, C) → (B, T, C)."""
        h = self.up(x)
        if self.gate is not None:
            h = F.silu(self.gate(x)) * h
        elif self.kind == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(h)


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = Norm(config, config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: Rope | None, mask: Mask, value_embedding: Tensor | None, cache: KVCache | None,
        embedded: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None, first: int = 0,
        matches: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """X (B, T, C) → (B, T - first, C), the stream of the tokens from ``first`` on; ``mask`` is for these.

        With ``scales`` it is that of x times the first of them and ``embedded`` (B, T, C) times the second, which are
        multiplied here so that they are compiled with the block, where each block is compiled by itself.
        """
        if embedded is not None and scales is not None:
            x = scales[0] * x + scales[1] * embedded
        seen = self.attention(self.attention_norm(x), rope, mask, value_embedding, cache, first, matches)
        x = x[:, first:] + self.dropout(seen)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only Transformer over a vocabulary of ``vocab_size`` tokens.

    Build it with :func:`meta_model`, give it memory with :meth:`to_empty` and values with :meth:`init_weights`.
    ``bos_id`` is the token that begins a document, for ``model.document_mask``.
    """

    activation_dtype: torch.dtype = torch.float32
    """The dtype of activations and matrix products, set from outside."""
    device_type: str = ""
    """See :meth:`compute_as_on`."""

    def __init__(self, config: ModelConfig, vocab_size: int, bos_id: int | None = None):
        super().__init__()
        self.config, self.vocab_size, self.bos_id = config, vocab_size, bos_id
        self.in_blocks = False
        """Whether windows and documents are attended to in blocks (attention.py), set from outside."""
        rows = math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
        self.embedding = Embedding(rows, config.width)
        if config.position == "learned":
            self.position_embedding = Embedding(config.context_length, config.width)
        self.bigram_embedding = Embedding(config.bigram_rows, config.width) if config.bigram_rows else None
        self.embedding_norm = Norm(config, config.width) if config.embedding_norm else nn.Identity()
        self.smear = nn.Parameter(torch.empty(1)) if config.smear else None
        self.smear_gate = Linear(min(SMEAR_GATE_CHANNELS, config.width), 1, bias=False) if config.smear else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.stream_scale = nn.Parameter(torch.empty(config.layers)) if config.residual_scalars else None
        self.embedding_scale = nn.Parameter(torch.empty(config.layers)) if config.residual_scalars else None
        self.backout = nn.Parameter(torch.empty(1)) if config.backout else None
        self.value_embeddings = nn.ModuleDict(
            {
                str(layer): Embedding(rows, (config.kv_heads or config.heads) * head_dim(config))
                for layer in range(config.layers)
                if has_value_embedding(config, layer)
            }
        )
        self.norm = Norm(config, config.width)
        self.head = Head(config.width, rows, bias=False)
        self.chunk_loss = ChunkLoss()
        self._tie_head()

    def _tie_head(self) -> None:
        if self.config.tied_head:
            self.head.weight = self.embedding.weight

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> GPT:
        """The model with memory on a device but no values; a tied head stays tied."""
        # torch's own asks empty_like, which for meta tensors imports sympy, in 0.4 s.
        self._apply(lambda tensor: tensor.new_empty(tensor.shape, device=device), recurse=recurse)
        self._tie_head()
        return self

    def compute_as_on(self, device_type: str) -> None:
        """Take the paths of another type of device than the tensors', for a dry run that counts its memory."""
        self.device_type = device_type
        for module in self.modules():
            if isinstance(module, Attention):
                module.device_type = device_type

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, reduction: str = "sum", cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:  # fmt: skip
        """Predict the token after each of ``tokens`` (B, T).

        With ``targets`` (B, T): the cross-entropy in nats, fp32, summed over targets that are not ``IGNORE`` (a
        scalar), or one for each target with ``reduction="none"`` (B, T; 0 where ignored; no gradient). Without: the
        logits (B, T, V) in fp32, or with ``last_only`` those after the last token (B, 1, V). With a ``cache``,
        ``tokens`` continue those it holds, and are added to it.
        """
        x = self.stream(tokens, cache)
        if targets is None:
            return self.logits(x[:, -1:] if last_only else x)
        chunk = chunk_rows(self.device_type or tokens.device.type, self.embedding.num_embeddings)
        x, cap = self.norm(x), self.config.logit_softcap
        return self.head(x, targets, cap, reduction, self.vocab_size, chunk, self.chunk_loss)

    def stream(self, tokens: Tensor, cache: KVCache | None = None, first: int = 0) -> Tensor:
        """The residual stream (B, T - first, C) of the ``tokens`` (B, T) from ``first`` on after the last layer.

        Of the tokens before, that layer has only the keys and values computed. ``cache`` as in :meth:`forward`.
        """
        config, (B, T) = self.config, tokens.shape
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.advance(B, T, tokens.device)
        seen = T if cache is None else cache.length
        assert seen <= config.context_length, "more tokens than the context length"
        x = self.embedding(tokens)
        if config.position == "learned":
            x = x + self.position_embedding(positions)
        x = self.embedding_norm(x.to(self.activation_dtype))
        if self.smear is not None and self.smear_gate is not None:
            before = torch.zeros_like(x[:, :1])
            if cache is not None:
                before = cache.tensors.get("last_embedding", before)
                cache.tensors["last_embedding"] = x[:, -1:]
            gate = self.smear.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
            x = x + gate * torch.cat((before, x[:, :-1]), dim=1)
        if self.bigram_embedding is not None:
            previous = torch.full_like(tokens[:, :1], self.vocab_size)  # no token
            if cache is not None:
                previous = cache.tensors.get("last_token", previous)
                cache.tensors["last_token"] = tokens[:, -1:]
            previous = torch.cat((previous, tokens[:, :-1]), dim=1)
            x = x + self.bigram_embedding(bigram_index(previous, tokens, self.config.bigram_rows)).to(x.dtype)
        x = half_way = self.dropout(x)
        embedded = x.view_as(x)  # torch.compile would compile the first block by itself if both were one object
        rope = self._rope(positions, x.dtype, cache) if config.position == "rope" else None
        documents = None
        if config.document_mask and self.bos_id is not None:
            starts = tokens == self.bos_id
            documents = starts.cumsum(1) if cache is None else cache.extend_documents(starts)
        matches = self._matches(tokens, positions, documents, cache, x.dtype) if config.ngram_heads else None
        kinds = layer_kinds(config)
        in_blocks = self.in_blocks and cache is None and T % BLOCK == 0
        masks = {kind: self._mask(positions, seen, kind, documents, in_blocks) for kind in set(kinds)}
        scales: list[tuple[Tensor, Tensor] | None] = [None] * config.layers
        if self.stream_scale is not None and self.embedding_scale is not None:  # not by layer: few operations
            stream_scales, embedding_scales = (s.to(x.dtype) for s in (self.stream_scale, self.embedding_scale))
            scales = list(zip(stream_scales.unbind(), embedding_scales.unbind(), strict=True))
        for layer, (block, kind) in enumerate(zip(self.blocks, kinds, strict=True)):
            value_embedding = None
            if str(layer) in self.value_embeddings:
                value_embedding = self.value_embeddings[str(layer)](tokens).to(x.dtype)
            last = layer == config.layers - 1
            if last and first:
                masks[kind] = self._mask(positions[..., first:], seen, kind, documents, in_blocks=False)
            x = block(
                x, rope, masks[kind], value_embedding, cache, embedded, scales[layer], first if last else 0,
                matches if layer == 0 else None,
            )  # fmt: skip
            if layer == config.layers // 2:
                half_way = x
        if self.backout is not None:
            x = x - self.backout.to(x.dtype) * half_way[:, -x.shape[1] :]
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token (..., V), fp32, from what :meth:`stream` gives (..., C), or some of it."""
        return softcap(self.head(self.norm(x))[..., : self.vocab_size].float(), self.config.logit_softcap)

    def _rope(self, positions: Tensor, dtype: torch.dtype, cache: KVCache | None) -> Rope:
        """Cosines and sines of these positions, (T, R/2) or (B, 1, T, R/2); a cache keeps those of all positions."""
        if cache is None:
            return rotary(self.config, positions, dtype)
        if cache.rope is None:
            cache.rope = rotary(self.config, torch.arange(cache.limit, device=positions.device), dtype)
        cos, sin = cache.rope[0][positions], cache.rope[1][positions]
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

    def _mask(self, positions: Tensor, S: int, kind: str, documents: Tensor | None, in_blocks: bool) -> Mask:
        """Where the tokens at ``positions``, (T,) or (B, T), may look among the S so far: (T, S), or (B, 1, T, S).

        With ``in_blocks`` they are all S, and the mask is made of blocks. None stands for plain causal attention, which
        needs no mask. ``documents`` (B, S) numbers each token's document.
        """
        T, same = positions.shape[-1], positions.dim() == 1
        if kind == "L" and documents is None and same and T in (1, S):
            return None
        if in_blocks:
            return block_mask(T, window_length(self.config) if kind == "S" else None, documents, positions.device)
        keys = torch.arange(S, device=positions.device)
        mask = keys <= positions[..., None]
        if kind == "S":
            mask &= keys > positions[..., None] - window_length(self.config)
        if documents is not None:
            own = documents[:, S - T :] if same else documents.gather(1, positions)
            mask = mask & (own[..., None] == documents[:, None])
        return mask if mask.dim() == 2 else mask[:, None]

    def _matches(
        self, tokens: Tensor, positions: Tensor, documents: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> Tensor:
        """Weights (B, N, T, S) with which the n-gram heads see the S tokens so far, for n = 1 ... N.

        Equal ones for all tokens that follow the same n tokens as the next one will; all 0 where there is none.
        """
        known = tokens if cache is None else cache.extend("tokens", tokens[:, None, :, None])[:, 0, :, 0]
        if documents is not None:
            known = known + self.vocab_size * documents  # the same token of another document is another
        S, same = known.shape[1], positions.dim() == 1
        seen = torch.arange(S, device=known.device) <= positions[..., None]
        weights = []
        for n in range(1, self.config.ngram_heads + 1):
            before = F.pad(known, (n, 0), value=-1)  # the token n places before each, and -1 before the first
            newest = before[:, 1 : S + 1]
            newest = newest[:, positions] if same else newest.gather(1, positions)
            seen = seen & (newest[..., None] == before[:, None, :S])
            weights.append((seen / seen.sum(-1, keepdim=True).clamp(min=1)).to(dtype))
        return torch.stack(weights, dim=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value by ``model.init``; the generator must be on the parameters' device."""
        kind, width = self.config.init, self.config.width
        nothing_at_first = kind in ("zero", "nanochat_2025", "nanochat_2026")  # blocks add 0 to the stream
        for module in self.modules():
            if isinstance(module, Norm):
                if module.weight is not None:
                    module.weight.fill_(1.0)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)  # of a uniform distribution, PyTorch's default
                if kind in ("zero", "nanochat_2026"):
                    bound *= math.sqrt(3)  # standard deviation in_features ** -0.5
                if kind == "gpt2":
                    module.weight.normal_(0, 0.02, generator=generator)
                elif kind == "nanochat_2025":  # arXiv 2310.17813
                    std = min(1, math.sqrt(module.out_features / module.in_features)) / math.sqrt(module.in_features)
                    module.weight.normal_(0, std, generator=generator)
                else:
                    module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_() if kind != "torch" else module.bias.uniform_(-bound, bound, generator=generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            for projection in (block.attention.out, block.mlp.down):
                if kind == "gpt2":  # GPT-2 keeps the stream's variance by the number of additions to it
                    projection.weight.normal_(0, 0.02 / math.sqrt(2 * self.config.layers), generator=generator)
                elif nothing_at_first:
                    projection.weight.zero_()
            if kind in ("zero", "nanochat_2026"):
                block.mlp.up.weight.mul_(0.4)
            if block.attention.ngram_out is not None:
                block.attention.ngram_out.weight.zero_()
            if block.attention.head_gate is not None:
                block.attention.head_gate.weight.zero_()
            if block.attention.value_gate is not None:
                block.attention.value_gate.weight.uniform_(0, 0.02, generator=generator)
        if self.smear is not None and self.smear_gate is not None:
            self.smear.zero_()
            self.smear_gate.weight.uniform_(0, 0.02, generator=generator)
        if self.backout is not None:
            self.backout.fill_(0.2)
        if self.stream_scale is not None and self.embedding_scale is not None:
            height = torch.linspace(0, 1, self.config.layers, device=self.stream_scale.device)
            self.stream_scale.copy_(1.15 - 0.10 * height)  # early layers write more, and see more of the embedding
            self.embedding_scale.copy_(0.20 - 0.15 * height)
        if nothing_at_first and not self.config.tied_head:
            std = 0.0 if kind == "nanochat_2025" else 0.001
            self.head.weight.normal_(0, std, generator=generator)
        for module in self.modules():  # last: a tied head takes the embedding's values
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, {"gpt2": 0.02, "nanochat_2026": 0.8}.get(kind, 1.0), generator=generator)
        if nothing_at_first and self.config.tied_head:
            self.embedding.weight.mul_(width**-0.5)
        if self.bigram_embedding is not None:
            self.bigram_embedding.weight.zero_()
        for table in self.value_embeddings.values():
            assert isinstance(table, Embedding)
            if kind == "zero":
                table.weight.mul_(width**-0.5)
            elif kind == "nanochat_2026":  # as the values
                table.weight.uniform_(-math.sqrt(3 / width), math.sqrt(3 / width), generator=generator)


def meta_model(config: ModelConfig, vocab_size: int, bos_id: int | None = None) -> GPT:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return GPT(config, vocab_size, bos_id)


HEAD_GATE_CHANNELS, VALUE_GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 12, 24
"""Channels of the stream from which the gates of heads, value embeddings and the smear are computed; the last two as in
nanochat."""


def head_dim(config: ModelConfig) -> int:
    """D, the channels of one head."""
    return config.head_width or config.width // config.heads


def mlp_width(config: ModelConfig) -> int:
    """Hidden channels of the MLP."""
    default = 64 * math.ceil(config.width * 8 / 3 / 64) if config.mlp == "swiglu" else 4 * config.width
    return config.mlp_width or default


def bigram_index(previous: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The row of a table that each pair of tokens has, by a hash; some pairs share one."""
    mixed = previous * 2_654_435_761 + tokens * 1_640_531_527  # odd, near 2^32 / φ and 2^32 / φ²
    return (mixed ^ (mixed >> 15)) % rows


def has_value_embedding(config: ModelConfig, layer: int) -> bool:
    """Every other layer, the last one included."""
    return config.value_embeddings and (config.layers - 1 - layer) % 2 == 0


def layer_kinds(config: ModelConfig) -> list[str]:
    """L or S for each layer: the pattern repeated, but L for the last."""
    kinds = [config.window_pattern[layer % len(config.window_pattern)] for layer in range(config.layers)]
    return [*kinds[:-1], "L"]


def window_length(config: ModelConfig) -> int:
    """Tokens an S layer sees, itself included."""
    return config.window or max(1, config.context_length // 4)
