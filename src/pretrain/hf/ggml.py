"""A model for llama.cpp, and for what is built on it: one GGUF file with weights, settings and tokenizer (``gguf``).

Written as GPT-2, Llama or Qwen3 where the model computes exactly that, from the tensors of an export for transformers;
llama.cpp's own converter renames, turns and casts them in the same way. Anything that the file cannot say is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import UsageError
from pretrain.hf.convert import OWN, hf_type, obstacles, to_hf
from pretrain.model import GPT
from pretrain.model.transformer import layer_kinds
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.patterns import GPT2, PATTERNS, pattern_of

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Names of ``--dtype`` and of GGUF."""

# llama.cpp's name of each of our regexes; what it does not know is refused.
_PATTERNS = {
    GPT2: "gpt-2",
    PATTERNS["gpt4"]: "dbrx",
    PATTERNS["gpt4"].replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


def write_gguf(file: Path, name: str, model: GPT, tokenizer: Tokenizer, dtype: str = "fp32") -> None:
    """Write a model into ``file``: its matrices as ``dtype``, one of ``DTYPES``; norms, biases, positions as fp32.

    Raises:
        UsageError: gguf is not installed, or llama.cpp has not what the model or the tokenizer needs, which is named.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"--format gguf needs the package gguf ({error}); pip install 'pretrain[gguf]'") from None
    kind = hf_type(model.config)
    if lacking := _lacking(model.config, kind):
        fields = ", ".join(f"model.{name} {getattr(model.config, name)!r}" for name in lacking)
        raise UsageError(f"llama.cpp cannot compute this model, for {fields}; use --format hf")
    tree, tensors = to_hf(model, kind)
    writer = gguf.GGUFWriter(None, kind)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "fp32" else f"MOSTLY_{DTYPES[dtype]}"])
    _add_settings(writer, tree)
    _add_tokenizer(writer, gguf.TokenType, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], model.config.layers)
    for theirs, tensor in tensors.items():
        array = _as_read(theirs, tensor, tree).contiguous().numpy()
        small = array.ndim < 2 or "wpe" in theirs
        stored = gguf.GGMLQuantizationType["F32" if small else DTYPES[dtype]]
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert ours, theirs
        writer.add_tensor(ours, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _lacking(config: ModelConfig, kind: str) -> list[str]:
    """The fields of ``config`` that llama.cpp cannot express."""
    if kind == OWN:
        return min(obstacles(config).values(), key=len)
    lacking = {
        "gpt2": {"mlp": config.mlp != "gelu_tanh"},
        "llama": {},
        "qwen3": {"window_pattern": "S" in layer_kinds(config), "qkv_bias": config.qkv_bias or config.bias},
    }
    return [name for name, wrong in lacking[kind].items() if wrong]


def _add_settings(writer: Any, tree: Mapping[str, Any]) -> None:
    """What llama.cpp asks of a model, from its config.json."""
    if tree["model_type"] == "gpt2":
        writer.add_context_length(tree["n_positions"])
        writer.add_embedding_length(tree["n_embd"])
        writer.add_block_count(tree["n_layer"])
        writer.add_feed_forward_length(tree["n_inner"])
        writer.add_head_count(tree["n_head"])
        writer.add_layer_norm_eps(tree["layer_norm_epsilon"])
        return
    writer.add_context_length(tree["max_position_embeddings"])
    writer.add_embedding_length(tree["hidden_size"])
    writer.add_block_count(tree["num_hidden_layers"])
    writer.add_feed_forward_length(tree["intermediate_size"])
    writer.add_head_count(tree["num_attention_heads"])
    writer.add_head_count_kv(tree["num_key_value_heads"])
    writer.add_key_length(tree["head_dim"])
    writer.add_value_length(tree["head_dim"])
    writer.add_rope_dimension_count(tree["head_dim"])
    writer.add_rope_freq_base(tree["rope_theta"])
    writer.add_layer_norm_rms_eps(tree["rms_norm_eps"])
    writer.add_vocab_size(tree["vocab_size"])


def _as_read(name: str, tensor: Tensor, tree: Mapping[str, Any]) -> Tensor:
    """A tensor as llama.cpp reads it: (out, in); for Llama the halves that rotary positions turn are interleaved."""
    if tree["model_type"] == "gpt2":  # whose Conv1D keeps (in, out)
        return tensor.T if ".c_" in name and tensor.ndim == 2 else tensor
    if tree["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = tree["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor


def _add_tokenizer(writer: Any, types: Any, tokenizer: Tokenizer) -> None:
    """The tokens, merges and special tokens of a byte-level BPE. A UsageError for any other tokenizer."""
    spec = json.loads(tokenizer.to_json())
    merges = spec["model"].get("merges")
    if not merges:
        raise UsageError("llama.cpp has no tokenizer of single bytes or characters; train with --tokenizer.kind bpe")
    pattern = _PATTERNS.get(pattern_of(spec.get("pre_tokenizer")) or "")
    if pattern is None or spec.get("normalizer"):
        what = "normalizer" if pattern else "pattern"
        raise UsageError(f"llama.cpp has not the {what} of this tokenizer; train with --tokenizer.pattern gpt2 or gpt4")
    if not tokenizer.special_ids:
        raise UsageError("llama.cpp needs a token that ends a text; name one of the vocabulary with --tokenizer.bos")
    added = tokenizer.hf.get_added_tokens_decoder()
    tokens = {id: token for token, id in tokenizer.hf.get_vocab().items()}
    kinds = {id: types.CONTROL if token.special else types.USER_DEFINED for id, token in added.items()}
    end = min(tokenizer.special_ids) if tokenizer.bos_id is None else tokenizer.bos_id
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if pattern == "dbrx" and spec["model"].get("ignore_merges") else pattern)
    writer.add_token_list([tokens[id] for id in range(len(tokens))])
    writer.add_token_types([kinds.get(id, types.NORMAL) for id in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(tokenizer.bos_id is not None)  # as 'pretrain sample' begins a prompt
    writer.add_add_space_prefix(False)
