"""Models of Hugging Face's transformers in and out: GPT-2, Llama, Qwen3, and what an export of ours writes.

    config.json    →  config_from_hf  →  ModelConfig     GPT  →  to_hf  →  config.json, tensors by their names there
    *.safetensors  →  load_weights    →  GPT

The same tables are read in both directions. Whatever of a config.json or its tensors has no place in our model is an
error that names it; a model of ours is written as an architecture of theirs only if its config.json, read back, means
the same model.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, UsageError
from pretrain.model import GPT, meta_model
from pretrain.model.transformer import Norm, head_dim, layer_kinds, mlp_width, window_length

OWN = "pretrain"
"""The model_type of an export that transformers loads with a model file of ours."""

_GPT2_FIELDS = {
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "context_length": "n_positions",
    "mlp_width": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
_LLAMA_FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "width": "hidden_size",
    "context_length": "max_position_embeddings",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_FIELDS = {"gpt2": _GPT2_FIELDS, "llama": _LLAMA_FIELDS, "qwen3": _LLAMA_FIELDS}
"""Our fields and theirs, for each architecture."""

_LEFT_OUT = {"n_inner": 0, "layer_norm_epsilon": 1e-5, "num_key_value_heads": 0, "rms_norm_eps": 1e-6}
"""What fields mean that a config.json may leave out; ``head_dim`` depends on the architecture."""

_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}
_GPT2_MLPS = {theirs: ours for ours, theirs in _GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}

_GPT2_TENSORS = {
    "transformer.wte": ["embedding"],
    "transformer.wpe": ["position_embedding"],
    "transformer.h.{}.ln_1": ["blocks.{}.attention_norm"],
    "transformer.h.{}.attn.c_attn": ["blocks.{}.attention.q", "blocks.{}.attention.k", "blocks.{}.attention.v"],
    "transformer.h.{}.attn.c_proj": ["blocks.{}.attention.out"],
    "transformer.h.{}.ln_2": ["blocks.{}.mlp_norm"],
    "transformer.h.{}.mlp.c_fc": ["blocks.{}.mlp.up"],
    "transformer.h.{}.mlp.c_proj": ["blocks.{}.mlp.down"],
    "transformer.ln_f": ["norm"],
    "lm_head": ["head"],
}
_LLAMA_TENSORS = {
    "model.embed_tokens": ["embedding"],
    "model.layers.{}.input_layernorm": ["blocks.{}.attention_norm"],
    "model.layers.{}.self_attn.q_proj": ["blocks.{}.attention.q"],
    "model.layers.{}.self_attn.k_proj": ["blocks.{}.attention.k"],
    "model.layers.{}.self_attn.v_proj": ["blocks.{}.attention.v"],
    "model.layers.{}.self_attn.o_proj": ["blocks.{}.attention.out"],
    "model.layers.{}.post_attention_layernorm": ["blocks.{}.mlp_norm"],
    "model.layers.{}.mlp.gate_proj": ["blocks.{}.mlp.gate"],
    "model.layers.{}.mlp.up_proj": ["blocks.{}.mlp.up"],
    "model.layers.{}.mlp.down_proj": ["blocks.{}.mlp.down"],
    "model.norm": ["norm"],
    "lm_head": ["head"],
}
_QWEN3_TENSORS = {
    **_LLAMA_TENSORS,
    "model.layers.{}.self_attn.q_norm": ["blocks.{}.attention.q_norm"],
    "model.layers.{}.self_attn.k_norm": ["blocks.{}.attention.k_norm"],
}
_TENSORS = {"gpt2": _GPT2_TENSORS, "llama": _LLAMA_TENSORS, "qwen3": _QWEN3_TENSORS}
"""Their layers and ours whose parameters these hold, one below the other."""

# Fields of a config.json that do not change what the model computes. Dropout is among them: it is a choice of the
# training that follows (model.dropout).
# fmt: off
_HARMLESS = frozenset((
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "id2label", "label2id",
    "_num_labels", "num_labels", "pretraining_tp", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "n_ctx", "is_llama_config", "auto_map", "return_dict", "reorder_and_upcast_attn",
))
# fmt: on
# Tensors that old checkpoints carry along although they follow from the configuration.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


# ---------------------------------------------------------------------------------------------------------- in


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face checkpoint. A CheckpointError when there is none."""
    file = Path(folder) / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: config.json cannot be read ({error.strerror}); give a local"
            f" folder, as save_pretrained writes it"
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def config_from_hf(tree: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes (``model_type`` gpt2, llama, qwen3, or our own export's).

    Raises:
        UsageError: it asks for something that our Transformer does not have; the field is named.
    """
    kind = tree.get("model_type")
    if kind != OWN and kind not in _FIELDS:
        raise UsageError(f"a Hugging Face model_type {kind!r} cannot be read; those that can: {', '.join(_FIELDS)}")
    try:
        return ModelConfig(**(tree["model"] if kind == OWN else _read_fields(tree)))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the checkpoint's config.json does not describe a model we can build: {error}") from None


def _read_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig that a config.json of transformers gives."""
    kind = tree["model_type"]
    left = {name: value for name, value in tree.items() if name not in _HARMLESS and value is not None}
    left.pop("model_type")
    values: dict[str, Any] = {"norm_weight": True, "embedding_norm": False, "logit_softcap": 0.0, "init": "gpt2"}
    for ours, theirs in _FIELDS[kind].items():
        if theirs == "head_dim":
            values[ours] = left.pop(theirs, 128 if kind == "qwen3" else 0)
        elif theirs in left or theirs in _LEFT_OUT:
            values[ours] = left.pop(theirs, _LEFT_OUT.get(theirs))
        else:
            raise UsageError(f"the config.json of this {kind} checkpoint does not say {theirs}")
    values |= _read_gpt2(left) if kind == "gpt2" else _read_llama(left, kind, values["layers"])
    # What was not taken and is not switched off would change the model.
    if unknown := [f"{name} {value!r}" for name, value in left.items() if value]:
        raise UsageError(f"this {kind} checkpoint has {', '.join(unknown)}, which our Transformer cannot represent")
    return values


def _read_gpt2(left: dict[str, Any]) -> dict[str, Any]:
    if not left.pop("scale_attn_weights", True):
        left["scale_attn_weights"] = "off"
    mlp = _GPT2_MLPS.get(left.get("activation_function", "gelu_new"))
    if mlp:
        left.pop("activation_function", None)
    return {
        "mlp": mlp,
        "tied_head": left.pop("tie_word_embeddings", True),
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "bias": True,
        "qkv_bias": True,
    }


def _read_llama(left: dict[str, Any], kind: str, layers: int) -> dict[str, Any]:
    rope = {**left.pop("rope_scaling", {}), **left.pop("rope_parameters", {})}  # of transformers 4 and 5
    theta = rope.pop("rope_theta", left.pop("rope_theta", 10000.0))
    left["rope_parameters"] = {name: value for name, value in rope.items() if value and value != "default"}
    if left.get("hidden_act") == "silu":
        del left["hidden_act"]
    attention_bias, mlp_bias = left.pop("attention_bias", False), left.pop("mlp_bias", False)
    window, from_layer = left.pop("sliding_window", 0), left.pop("max_window_layers", 28)
    window = window if left.pop("use_sliding_window", False) else 0
    kinds = ["full_attention" if layer < from_layer or not window else "sliding_attention" for layer in range(layers)]
    kinds = left.pop("layer_types", kinds)
    pattern = "".join({"full_attention": "L", "sliding_attention": "S"}.get(each, "?") for each in kinds)
    if "?" in pattern or pattern[-1] == "S" or ("S" in pattern and not window):
        left["layer_types"] = kinds  # ours see a window or everything, and the last one everything
    return {
        "mlp": "swiglu",
        "tied_head": left.pop("tie_word_embeddings", False),
        "position": "rope",
        "rope_theta": theta,
        "norm": "rmsnorm",
        "qk_norm": kind == "qwen3",
        "bias": attention_bias or mlp_bias,  # those that the checkpoint does not have begin at zero
        "qkv_bias": attention_bias,
        "window_pattern": pattern if "S" in pattern else "L",
        "window": window if "S" in pattern else 0,
    }


def load_hf(folder: str | Path) -> GPT:
    """The model of a Hugging Face checkpoint or of ``pretrain export``, fp32 on the CPU, in evaluation mode.

    Raises:
        UsageError: our Transformer cannot represent it.
        CheckpointError: files are missing, damaged, or not what config.json says.
    """
    tree = read_config(folder)
    if not isinstance(vocab_size := tree.get("vocab_size"), int):
        raise CheckpointError(f"{Path(folder) / 'config.json'} does not say vocab_size")
    model = meta_model(config_from_hf(tree), vocab_size, tree.get("boundary")).to_empty(device="cpu")
    load_weights(model, folder)
    return model.eval()


@torch.no_grad()
def load_weights(model: GPT, folder: str | Path) -> None:
    """Fill ``model`` in place with the weights of a Hugging Face checkpoint, each of its tensors used exactly once.

    The model may have a shorter context or a smaller vocabulary than the checkpoint, and then gets the first rows of
    positions or tokens. Rows that pad the vocabulary, and biases that the checkpoint's architecture lacks, become 0.

    Raises:
        CheckpointError: files or tensors are missing, damaged, left over or of another shape; they are named.
    """
    tree = read_config(folder)
    state, waiting = _read_tensors(Path(folder), tree["model_type"]), dict(model.named_parameters())
    for entry in _entries(tree, model):
        if entry.theirs not in state:
            raise CheckpointError(f"{folder} has no tensor {entry.theirs}")
        tensor = state.pop(entry.theirs)
        tied = entry.ours == ["embedding.weight"] and model.config.tied_head
        if tied and not torch.equal(state.pop("lm_head.weight", tensor), tensor):
            raise CheckpointError(f"{folder}: tie_word_embeddings is on, but lm_head.weight is not {entry.theirs}")
        targets = [waiting.pop(name) for name in entry.ours]
        sizes = [entry.rows or len(target) for target in targets]
        needed, given = [sum(sizes), *targets[0].shape[1:]], list(tensor.shape)
        tensor = tensor.T if entry.transposed else tensor[: entry.rows or None]
        if list(tensor.shape) != needed or not tensor.is_floating_point():
            short = "position_embedding.weight" in entry.ours
            fix = f"; use --model.context_length {given[0]} or less" if short else ""
            ours = f"{', '.join(entry.ours)}: {needed}"
            raise CheckpointError(f"{folder}: {entry.theirs} is {tensor.dtype} {given}, which does not fit {ours}{fix}")
        for target, part in zip(targets, tensor.split(sizes), strict=True):
            target.zero_()
            target[: len(part)] = part
    if state:
        raise CheckpointError(f"{folder} has tensors that have no place in the model: {', '.join(sorted(state)[:5])}")
    if missing := [name for name in waiting if not name.endswith(".bias")]:
        raise CheckpointError(f"{folder} holds nothing for {', '.join(missing[:5])}")
    for bias in waiting.values():
        bias.zero_()


def _read_tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files by its full name; memory-mapped, so that none is read yet."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files, state = [file], {}
    pickled = [] if index.is_file() or file.is_file() else [*folder.glob("*.bin"), *folder.glob("*.pt*")]
    if pickled:
        convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safe'!r})"
        raise CheckpointError(
            f"{pickled[0]} is pickled, which could run any code; if you trust it, convert it once:"
            f' python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
        )
    try:
        if index.is_file():
            file = index
            files = {folder / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
        for file in files:
            state |= load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    prefix = {"gpt2": "transformer.", OWN: "gpt."}.get(kind, "model.")
    if not any(name.startswith(prefix) for name in state):  # saved without its head, or by us without its shell
        state = {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if not _BUFFERS.search(name)}


# --------------------------------------------------------------------------------------------------- both ways


@dataclass(frozen=True)
class _Entry:
    """One tensor of theirs and the parameters of ours that it holds, one below the other."""

    theirs: str
    ours: list[str]
    rows: int
    """Of a table of tokens or positions: how many our model uses, while the tensor may have more. 0: no table."""
    transposed: bool = False  # GPT-2's Conv1D keeps (in, out)


def _entries(tree: Mapping[str, Any], model: GPT) -> Iterator[_Entry]:
    """Every tensor that a checkpoint with this config.json has."""
    kind = tree["model_type"]
    rows: dict[str, int] = dict.fromkeys(("embedding", "head", "value_embeddings"), model.vocab_size)
    rows["position_embedding"] = model.config.context_length
    if kind == OWN:
        for name, _ in model.named_parameters():
            yield _Entry(f"gpt.{name}", [name], rows.get(name.split(".")[0], 0))
        return
    for theirs, ours in _TENSORS[kind].items():
        if theirs == "lm_head" and model.config.tied_head:
            continue
        bias = kind == "gpt2" and ours[0] not in rows
        if kind != "gpt2" and theirs.endswith("_proj"):
            bias = bool(tree.get("mlp_bias" if ".mlp." in theirs else "attention_bias"))
        for layer in range(model.config.layers if "{}" in theirs else 1):
            for leaf in ("weight", "bias") if bias else ("weight",):
                names = [f"{each.format(layer)}.{leaf}" for each in ours]
                transposed = leaf == "weight" and ".c_" in theirs
                yield _Entry(f"{theirs.format(layer)}.{leaf}", names, rows.get(ours[0], 0), transposed)


# --------------------------------------------------------------------------------------------------------- out


def obstacles(config: ModelConfig) -> dict[str, list[str]]:
    """For each architecture of transformers that we can write, the fields of ``config`` that it cannot express."""
    found, wanted = {}, _meaning(config)
    for kind in _FIELDS:
        values = {**dataclasses.asdict(ModelConfig()), **_read_fields(_tree(config, kind))}
        there = _meaning(SimpleNamespace(**values))
        found[kind] = [name for name, value in wanted.items() if name not in there or there[name] != value]
    if config.width % config.heads:
        found["llama"].append("width")  # its class insists
    if config.bias:
        found["qwen3"].append("bias")  # its MLP has none
    return found


def _meaning(config: Any) -> dict[str, Any]:
    """What a ModelConfig's fields say about the model's function, 0 replaced by what it stands for.

    Norm weights and biases are not in it: where a model has none, ones and zeros do the same.
    """
    windows = [window_length(config) if kind == "S" else 0 for kind in layer_kinds(config)]
    ignored = {"depth", "window", "vocab_multiple", "dropout", "init", "norm_weight", "bias", "qkv_bias"}
    if config.position != "rope":
        ignored |= {"rope_theta", "rope_fraction"}
    fields = {name: value for name, value in vars(config).items() if name not in ignored}
    return fields | {
        "kv_heads": config.kv_heads or config.heads,
        "head_width": head_dim(config),
        "mlp_width": mlp_width(config),
        "attention_scale": 0.0 if config.attention_scale == head_dim(config) ** -0.5 else config.attention_scale,
        "window_pattern": windows,
    }


def hf_type(config: ModelConfig) -> str:
    """The model_type as which a model is exported: gpt2, llama or qwen3 if it computes exactly that, else our own."""
    return next((kind for kind, fields in obstacles(config).items() if not fields), OWN)


@torch.no_grad()
def to_hf(model: GPT, kind: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors, by name, as which transformers loads this model.

    ``kind`` is the model_type, by default that of :func:`hf_type`. Rows that pad the vocabulary are cut off; biases and
    norm weights that we do without are written as zeros and ones.
    """
    kind = kind or hf_type(model.config)
    tree = _tree(model.config, kind) | {"vocab_size": model.vocab_size, "dtype": "float32", "torch_dtype": "float32"}
    if kind == OWN:
        tree["boundary"] = model.bos_id
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {}
    for entry in _entries(tree, model):
        tensor = torch.cat([ours[name] if name in ours else _neutral(model, name) for name in entry.ours])
        tensor = tensor[: entry.rows or None]
        state[entry.theirs] = (tensor.T if entry.transposed else tensor).contiguous()
    return tree, state


def _neutral(model: GPT, name: str) -> Tensor:
    """The values of a parameter that we do without: as if it were not there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, Norm):
        return torch.full(module.channels, 1.0 if leaf == "weight" else 0.0)
    assert isinstance(module, torch.nn.Linear), name
    return torch.zeros(module.out_features)


def _tree(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The config.json of a model as this model_type, as far as that can express it."""
    tree: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": config.tied_head}
    if kind == OWN:
        model = dataclasses.asdict(dataclasses.replace(config, vocab_multiple=1))
        return tree | {"architectures": ["PretrainForCausalLM"], "model": model}
    meaning = _meaning(config)
    tree |= {theirs: meaning[ours] for ours, theirs in _FIELDS[kind].items()}
    if kind == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        activation = _GPT2_ACTIVATIONS.get(config.mlp, "gelu_new")
        return tree | {"architectures": ["GPT2LMHeadModel"], "activation_function": activation, **dropout}
    tree |= {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,  # where transformers 4 looks; 5 looks below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.qkv_bias or config.bias,
    }
    if kind == "llama":
        return tree | {"mlp_bias": config.bias}
    kinds = layer_kinds(config)
    if "S" in kinds:
        types = ["sliding_attention" if each == "S" else "full_attention" for each in kinds]
        tree |= {"layer_types": types, "use_sliding_window": True, "sliding_window": window_length(config)}
    return tree
