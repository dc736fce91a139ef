"""A model exported by pretrain, for transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Logits equal those of pretrain. ``generate`` works on the whole text for every token (there is no cache), and past the
context length sees the newest tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pretrain.config import ModelConfig
from pretrain.hf.configuration_pretrain import PretrainConfig
from pretrain.model.transformer import GPT


class PretrainForCausalLM(PreTrainedModel, GenerationMixin):
    """The Transformer of pretrain, :class:`GPT`, behind the interface of transformers."""

    config_class = PretrainConfig
    base_model_prefix = "gpt"
    _tied_weights_keys = {"gpt.head.weight": "gpt.embedding.weight"}  # noqa: RUF012 - transformers reads it so

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        self.gpt = GPT(ModelConfig(**config.model), config.vocab_size, config.boundary)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        return self.gpt.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.gpt.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits (B, T, V) of the token after each of ``input_ids`` (B, T), and the mean loss against ``labels``.

        ``attention_mask`` may hide padding at either end of a row. ``labels`` are the inputs themselves, -100 where
        they do not count.
        """
        limit = self.gpt.config.context_length
        if input_ids.shape[1] > limit:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than the context length of {limit}")
        self.gpt.activation_dtype = self.gpt.embedding.weight.dtype
        back = None
        if attention_mask is not None and bool((attention_mask[:, 0] == 0).any()):
            # Turn each row until its padding is at the end, where causal attention never sees it; then back.
            B, T = input_ids.shape
            places, first = torch.arange(T, device=input_ids.device), attention_mask.int().argmax(1)[:, None]
            input_ids = input_ids.gather(1, (places + first) % T)
            back = ((places - first) % T)[..., None].expand(B, T, self.gpt.vocab_size)
        logits = self.gpt(input_ids)
        logits = logits if back is None else logits.gather(1, back)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The newest tokens that fit the context."""
        limit = self.gpt.config.context_length
        mask = None if attention_mask is None else attention_mask[:, -limit:]
        return {"input_ids": input_ids[:, -limit:], "attention_mask": mask}
