"""Configuration of a model exported by pretrain, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class PretrainConfig(PretrainedConfig):
    """``model`` holds every field of pretrain's model configuration; ``boundary`` is the id that begins a document."""

    model_type = "pretrain"

    def __init__(
        self, model: dict[str, Any] | None = None, vocab_size: int = 0, boundary: int | None = None, **kwargs: Any
    ):
        self.model = model or {}
        self.vocab_size = vocab_size
        self.boundary = boundary
        # The names under which tools look for these numbers.
        self.hidden_size = self.model.get("width")
        self.num_hidden_layers = self.model.get("layers")
        self.num_attention_heads = self.model.get("heads")
        self.max_position_embeddings = self.model.get("context_length")
        kwargs["use_cache"] = False
        super().__init__(**kwargs)
