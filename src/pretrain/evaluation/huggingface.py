"""Hugging Face models from a local directory, measured like runs: ``hf:DIR``.

hf:DIR → read_as_ours → GPT, Tokenizer    gpt2, llama, qwen3 and exports of ours
hf:DIR → HFScorer                         everything else, by transformers; never by code from the directory
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import CheckpointError, DataError, PretrainError, UsageError
from pretrain.evaluation.scorer import CHUNK_ELEMENTS, Scorer
from pretrain.hf.convert import OWN, load_hf, read_config
from pretrain.io import expand
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.tokenizer import Tokenizer

PREFIX = "hf:"
"""What marks the directory of a transformers model where a run directory may stand."""


def check_folder(place: str) -> Path:
    """The directory of ``hf:DIR``. A CheckpointError when there is no model in it."""
    folder = expand(place.removeprefix(PREFIX))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{place}: no model there (no config.json); give hf: and a directory that has one")
    return folder


def read_as_ours(folder: Path) -> tuple[GPT, Tokenizer] | None:
    """The model in a directory as a GPT, fp32 on the CPU, and its tokenizer; None where only transformers can run it.

    Raises:
        PretrainError: an export of ours is damaged, which transformers could not read either.
    """
    try:
        model, tokenizer = load_hf(folder), Tokenizer.adopt(folder / "tokenizer.json")
        if tokenizer.vocab_size > model.vocab_size:
            raise DataError(f"{folder}: tokenizer.json has more tokens than the model ({model.vocab_size:,}); fix one")
    except PretrainError:
        if read_config(folder).get("model_type") == OWN:
            raise
        return None
    # An export of a run with data.bos off says that it has no BOS token.
    return model, tokenizer.with_bos(read_config(folder).get("bos_token_id", 0) is not None)


class HFScorer(nn.Module, Scorer):
    """A causal language model of transformers with its tokenizer: a Scorer, and a model for ``evaluate_loss``.

    Raises:
        UsageError: transformers is not installed.
        DataError: ``folder`` cannot be loaded without running code from it.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32):
        super().__init__()
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UsageError(f"{folder} needs transformers, which is not installed; pip install transformers") from None
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise DataError(f"{folder} cannot be loaded by transformers: {why}") from None
        self.model: Any = loaded.to(device, dtype).eval()
        self.device = device
        self.context_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        """Cross-entropy of each target (B, T) in nats, 0 where it is ``IGNORE``; a row at a time, for memory."""
        assert reduction == "none", "this model is only measured"
        rows = []
        for row, target in zip(tokens, targets, strict=True):
            logits = self.model(row[None], use_cache=False).logits[0].float()
            rows.append(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none"))
        return torch.stack(rows)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`pretrain.evaluation.Scorer`."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [bos + ids for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def prefill(self, tokens: Tensor, limit: int) -> Any:
        """See :class:`pretrain.evaluation.Scorer`."""
        return self.model(tokens.to(self.device), use_cache=True, logits_to_keep=1).past_key_values

    def logits(self, tokens: Tensor, positions: Tensor, cache: Any, rows: list[int]) -> Iterator[Tensor]:
        """See :class:`pretrain.evaluation.Scorer`."""
        (B, T), head = tokens.shape, self.model.get_output_embeddings()
        together = max(1, 16 * CHUNK_ELEMENTS * B // (len(positions) * len(head.weight)))
        for start in range(0, B, together):
            part = slice(start, start + together)
            kept = positions[(positions // T >= part.start) & (positions // T < part.stop)] - start * T
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_select_indices(torch.tensor(rows[part], device=self.device))

            # Whatever a model does around its head, the head itself need only see the positions that count.
            def keep(_: nn.Module, inputs: tuple[Tensor, ...], kept: Tensor = kept) -> tuple[Tensor, ...]:
                return (inputs[0].flatten(0, 1)[kept.to(self.device)][None], *inputs[1:])

            hook = head.register_forward_pre_hook(keep)
            try:
                output = self.model(tokens[part].to(self.device), past_key_values=past, use_cache=past is not None)
            finally:
                hook.remove()
            yield output.logits[0].float()
