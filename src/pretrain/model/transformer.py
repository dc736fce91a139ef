"""The Transformer, whole, in one file.

    tokens (B, T) → embedding → [x + attention(norm(x)); x + mlp(norm(x))] × layers → norm → head → loss or logits

It knows nothing of devices, precision, processes or checkpoints: ``training/`` applies those from outside.

Shapes: B batch, T time (tokens), C channels (``model.width``), H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.loss import linear_cross_entropy, softcap


class KVCache:
    """Keys and values of the ``length`` tokens seen so far, for generation; there is room for ``limit``."""

    def __init__(self, limit: int):
        self.limit = limit
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D) of the next T tokens; return those of all tokens so far."""
        if layer not in self.layers:
            shape = (*k.shape[:2], self.limit, k.shape[3])
            self.layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def make_norm(config: ModelConfig, channels: int) -> nn.Module:
    """The configured norm over the last dimension of ``channels``."""
    if config.norm == "layernorm":
        return nn.LayerNorm(
            channels, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.norm_weight and config.bias
        )
    return nn.RMSNorm(channels, config.norm_eps, elementwise_affine=config.norm_weight)


def rotary(config: ModelConfig, positions: Tensor, head_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2) that turn each pair of channels by its frequency (RoFormer, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions.float()[:, None] * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of x (B, H, T, D) against channel i + D/2 by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_width = config.head_width or config.width // config.heads
        self.dropout = config.dropout
        self.q = nn.Linear(config.width, self.heads * self.head_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, self.kv_heads * self.head_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, self.kv_heads * self.head_width, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_width, config.width, bias=config.bias)
        self.q_norm = make_norm(config, self.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_width) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        """X (B, T, C) → (B, T, C). ``rope`` holds the cosines and sines of these T positions."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.heads, self.head_width)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(B, T, self.kv_heads, self.head_width)).transpose(1, 2)
        v = self.v(x).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            if cache.length and T > 1:  # a later chunk of several tokens sees all before it, and itself causally
                mask = torch.ones(T, cache.length + T, dtype=torch.bool, device=x.device).tril(cache.length)
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two layers with a nonlinearity, or three with a gate for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        gated = config.mlp == "swiglu"
        hidden = config.mlp_width or (64 * math.ceil(config.width * 8 / 3 / 64) if gated else 4 * config.width)
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.gate = nn.Linear(config.width, hidden, bias=config.bias) if gated else None
        self.down = nn.Linear(hidden, config.width, bias=config.bias)

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
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        """X (B, T, C) → (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only Transformer over a vocabulary of ``vocab_size`` tokens.

    Build it under ``torch.device("meta")``, give it memory with ``to_empty`` and values with :meth:`init_weights`.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, config.width)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.embedding_norm = make_norm(config, config.width) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config, config.width)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "sum",
        cache: KVCache | None = None,
    ) -> Tensor:
        """Predict the token after each of ``tokens`` (B, T).

        With ``targets`` (B, T): the cross-entropy in nats, fp32, summed over targets that are not ``IGNORE`` (a
        scalar), or one for each target with ``reduction="none"`` (B, T; 0 where ignored; no gradient). Without: the
        logits (B, T, V) in fp32. With a ``cache``, ``tokens`` continue those it holds, and are added to it.
        """
        start = cache.length if cache is not None else 0
        T = tokens.shape[1]
        assert start + T <= self.config.context_length, "more tokens than the context length"
        positions = torch.arange(start, start + T, device=tokens.device)
        x = self.embedding(tokens)
        if self.config.position == "learned":
            x = x + self.position_embedding(positions)
        x = self.dropout(self.embedding_norm(x))
        rope = None
        if self.config.position == "rope":
            head_width = self.config.head_width or self.config.width // self.config.heads
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            rope = rotary(self.config, positions, head_width, dtype)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        if targets is None:
            return softcap(self.head(x).float(), self.config.logit_softcap)
        return linear_cross_entropy(x, self.head.weight, targets, self.config.logit_softcap, reduction)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value by ``model.init``; the generator must be on the parameters' device."""
        kind, width = self.config.init, self.config.width
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
                module.weight.fill_(1.0)
                if isinstance(module, nn.LayerNorm) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)  # of a uniform distribution, PyTorch's default
                if kind == "gpt2":
                    module.weight.normal_(0, 0.02, generator=generator)
                elif kind == "torch":
                    module.weight.uniform_(-bound, bound, generator=generator)
                else:
                    bound *= math.sqrt(3)  # standard deviation in_features ** -0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    if kind == "torch":
                        module.bias.uniform_(-bound, bound, generator=generator)
                    else:
                        module.bias.zero_()
        for block in self.blocks:
            assert isinstance(block, Block)
            for projection in (block.attention.out, block.mlp.down):
                if kind == "gpt2":  # GPT-2 keeps the stream's variance by the number of additions to it
                    projection.weight.normal_(0, 0.02 / math.sqrt(2 * self.config.layers), generator=generator)
                elif kind == "zero":
                    projection.weight.zero_()
        for module in self.modules():  # last: a tied head takes the embedding's values
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02 if kind == "gpt2" else 1.0, generator=generator)
        if kind == "zero":
            if self.config.tied_head:
                self.head.weight.normal_(0, width**-0.5, generator=generator)
            else:
                self.head.weight.normal_(0, 0.001, generator=generator)
