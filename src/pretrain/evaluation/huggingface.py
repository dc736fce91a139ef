"""Hugging Face models from a local directory, measured like runs: ``hf:DIR``.

hf:DIR → read_as_ours → GPT, Tokenizer    gpt2, llama, qwen3 and exports of ours
hf:DIR → HFScorer                         everything else, by transformers; never by code from the directory
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import CheckpointError, DataError, PretrainError, UsageError
from pretrain.evaluation.scorer import CHUNK_ELEMENTS, losses_and_hits
from pretrain.hf.convert import OWN, load_hf, read_config
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.tokenizer import Tokenizer

PREFIX = "hf:"
"""What marks the directory of a transformers model where a run directory may stand."""


def check_folder(place: str) -> Path:
    """The directory of ``hf:DIR``. A CheckpointError when there is no model in it."""
    folder = Path(place.removeprefix(PREFIX)).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{place}: no model there (no config.json); give hf: and a directory that has one")
    return folder


def read_as_ours(place: str) -> tuple[GPT, Tokenizer] | None:
    """The model of ``hf:DIR`` as a GPT, fp32 on the CPU, and its tokenizer; None where only transformers can run it.

    Raises:
        CheckpointError: there is no model.
        PretrainError: an export of ours is damaged, which transformers could not read either.
    """
    folder = check_folder(place)
    try:
        model, tokenizer = load_hf(folder), Tokenizer.load(folder / "tokenizer.json")
        if tokenizer.vocab_size > model.vocab_size:
            raise DataError(f"{place}: tokenizer.json has more tokens than the model ({model.vocab_size:,}); fix one")
    except PretrainError:
        if read_config(folder).get("model_type") == OWN:
            raise
        return None
    return model, tokenizer


class HFScorer(nn.Module):
    """A causal language model of transformers with its tokenizer: a Scorer, and a model for ``evaluate_loss``.

    Args:
        place: ``hf:DIR`` or the directory, with config.json, weights and tokenizer.
        device: where to compute.
        dtype: its precision, of weights and activations.

    Raises:
        UsageError: transformers is not installed.
        DataError: the directory cannot be loaded without running code from it.
    """

    def __init__(self, place: str, device: torch.device, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.folder = Path(place.removeprefix(PREFIX)).expanduser()
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UsageError(f"{place} needs transformers, which is not installed; pip install transformers") from None
        try:
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self.hf_tokenizer: Any = AutoTokenizer.from_pretrained(str(self.folder), **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(self.folder), **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise DataError(f"{place} cannot be loaded by transformers: {' '.join(str(error).split())[:300]}") from None
        self.hf: Any = loaded.to(device, dtype).eval()
        self.model: nn.Module = self.hf
        self.device = device
        text_config = self.hf.config.get_text_config()
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.vocab_size: int = self.hf.get_output_embeddings().weight.shape[0]

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer as ours, which knows the bytes of every token. A DataError where they cannot be known."""
        return Tokenizer.load(self.folder / "tokenizer.json")

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        """Cross-entropy of each target (B, T) in nats, 0 where it is ``IGNORE``; a row at a time, for memory."""
        assert reduction == "none", "this model is only measured"
        losses = torch.zeros(tokens.shape, device=tokens.device)
        for loss, row, target in zip(losses, tokens, targets, strict=True):
            logits = self.hf(row[None], use_cache=False).logits[0].float()
            loss[:] = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        return losses

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`pretrain.evaluation.Scorer`."""
        bos = [] if self.hf_tokenizer.bos_token_id is None else [self.hf_tokenizer.bos_token_id]
        return [bos + ids for ids in self.hf_tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def prefill(self, tokens: Tensor, limit: int) -> Any:
        """See :class:`pretrain.evaluation.Scorer`."""
        return self.hf(tokens.to(self.device), use_cache=True, logits_to_keep=1).past_key_values

    def score(
        self, tokens: Tensor, wanted: Tensor, cache: Any = None, rows: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`pretrain.evaluation.Scorer`."""
        if len(tokens) > 1 and len(wanted) * self.vocab_size > 16 * CHUNK_ELEMENTS:
            half = len(tokens) // 2
            first = wanted[:, 0] < half
            parts = [
                self.score(tokens[:half], wanted[first], cache, rows and rows[:half]),
                self.score(tokens[half:], wanted[~first] - torch.tensor([half, 0, 0]), cache, rows and rows[half:]),
            ]
            losses, hits = (torch.cat(values) for values in zip(*parts, strict=True))
            return losses, hits
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_select_indices(torch.tensor(rows, device=self.device))
        positions, which = torch.unique(wanted[:, 0] * tokens.shape[1] + wanted[:, 1], return_inverse=True)
        positions = positions.to(self.device)

        # Whatever a model does around its head, the head itself need only see the positions that count.
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].flatten(0, 1)[positions][None], *inputs[1:])

        hook = self.hf.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            output = self.hf(tokens.to(self.device), past_key_values=cache, use_cache=cache is not None)
        finally:
            hook.remove()
        return losses_and_hits(output.logits[0].float(), which, wanted[:, 2])
