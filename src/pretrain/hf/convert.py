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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, UsageError
from pretrain.model.transformer import GPT, Norm, head_dim, layer_kinds, mlp_width, window_length

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

_TABLES = ("embedding", "position_embedding", "head", "value_embeddings")
"""Layers with a row for each token or position, of which a model may have fewer than its checkpoint."""

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
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: config.json cannot be read ({error.strerror}); give a local"
            f" folder, as save_pretrained writes it"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return tree


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
    del left["model_type"]
    values: dict[str, Any] = {"norm_weight": True, "embedding_norm": False, "logit_softcap": 0.0, "init": "gpt2"}
    missing = dict(_LEFT_OUT)
    if "hidden_size" in left and "num_attention_heads" in left:
        missing["head_dim"] = 128 if kind == "qwen3" else left["hidden_size"] // left["num_attention_heads"]
    for ours, theirs in _FIELDS[kind].items():
        if theirs not in left and theirs not in missing:
            raise UsageError(f"the config.json of this {kind} checkpoint does not say {theirs}")
        values[ours] = left.pop(theirs, missing.get(theirs))
    values |= _read_gpt2(left) if kind == "gpt2" else _read_llama(left, kind, values["layers"])
    # What was not taken and is not switched off would change the model.
    if unknown := [f"{name} {value!r}" for name, value in left.items() if value]:
        raise UsageError(f"this {kind} checkpoint has {', '.join(unknown)}, which our Transformer cannot represent")
    return values


def _read_gpt2(left: dict[str, Any]) -> dict[str, Any]:
    only = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in only.items():
        if left.pop(name, value) != value:
            raise UsageError(f"this checkpoint has another {name} than {value!r}, which our Transformer does not have")
    known = {theirs: ours for ours, theirs in _GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    return {
        "mlp": _activation(left.pop("activation_function", "gelu_new"), known),
        "tied_head": left.pop("tie_word_embeddings", True),
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "bias": True,
        "qkv_bias": True,
    }


def _read_llama(left: dict[str, Any], kind: str, layers: int) -> dict[str, Any]:
    theta = left.pop("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        rope = dict(left.pop(name, {}))
        theta = rope.pop("rope_theta", theta)
        if {rope.pop("rope_type", "default"), rope.pop("type", "default")} != {"default"} or any(rope.values()):
            raise UsageError(f"this {kind} checkpoint has {name} other than the default, which our rope does not have")
    attention_bias, mlp_bias = left.pop("attention_bias", False), left.pop("mlp_bias", False)
    window, from_layer = left.pop("sliding_window", 0), left.pop("max_window_layers", 28)
    window = window if left.pop("use_sliding_window", False) else 0
    first_sliding = from_layer if window else layers
    types = ["full_attention" if layer < first_sliding else "sliding_attention" for layer in range(layers)]
    types = left.pop("layer_types", types)
    names = {"full_attention": "L", "sliding_attention": "S"}
    sliding = "sliding_attention" in types
    if set(types) - set(names) or types[-1] != "full_attention" or (sliding and not window):
        raise UsageError(
            f"this {kind} checkpoint has layer_types {types}; ours are full_attention or sliding_attention with a"
            f" sliding_window, and the last layer sees the whole context"
        )
    return {
        "mlp": _activation(left.pop("hidden_act", "silu"), {"silu": "swiglu"}),
        "tied_head": left.pop("tie_word_embeddings", False),
        "position": "rope",
        "rope_theta": theta,
        "norm": "rmsnorm",
        "qk_norm": kind == "qwen3",
        "bias": attention_bias or mlp_bias,  # those that the checkpoint does not have begin at zero
        "qkv_bias": attention_bias,
        "window_pattern": "".join(names[name] for name in types) if sliding else "L",
        "window": window if sliding else 0,
    }


def _activation(name: str, known: Mapping[str, str]) -> str:
    if name not in known:
        raise UsageError(f"this checkpoint has the activation {name!r}; known here: {', '.join(known)}")
    return known[name]


def load_hf(folder: str | Path) -> GPT:
    """The model of a Hugging Face checkpoint or of ``pretrain export``, fp32 on the CPU, in evaluation mode.

    Raises:
        UsageError: our Transformer cannot represent it.
        CheckpointError: files are missing, damaged, or not what config.json says.
    """
    tree = read_config(folder)
    vocab_size = tree.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(f"{Path(folder) / 'config.json'} does not say vocab_size")
    with torch.device("meta"):
        model = GPT(config_from_hf(tree), vocab_size, tree.get("boundary"))
    model = model.to_empty(device="cpu")
    model.tie_head()
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
    ours = dict(model.named_parameters())
    waiting = set(ours)
    with ExitStack() as stack:
        tensors = _open_tensors(Path(folder), stack)
        prefix = {"gpt2": "transformer.", OWN: "gpt."}.get(tree["model_type"], "model.")
        if not any(name.startswith(prefix) for name in tensors):  # saved without its head, or by us without its shell
            tensors = {name if name == "lm_head.weight" else prefix + name: file for name, file in tensors.items()}
        left = {name for name in tensors if not _BUFFERS.search(name)}

        def take(name: str) -> Tensor:
            if name not in left:
                raise CheckpointError(f"{folder} has no tensor {name}")
            left.remove(name)
            file, stored_name = tensors[name]
            tensor = file.get_tensor(stored_name)
            if not tensor.is_floating_point():
                raise CheckpointError(f"{folder}: {name} is {tensor.dtype}; quantised weights cannot be read")
            return tensor

        for entry in _entries(tree, model):
            tensor = take(entry.theirs)
            tensor = tensor.T if entry.transposed else tensor
            targets = [ours[name] for name in entry.ours]
            waiting -= set(entry.ours)
            sizes, fix = [len(target) for target in targets], ""
            shape, whole = list(tensor.shape), tensor
            if entry.rows:  # the first rows are enough
                positions = entry.ours == ["position_embedding.weight"]
                sizes = [model.config.context_length if positions else model.vocab_size]
                fix = f"; use --model.context_length {len(tensor)} or less" if positions else ""
                tensor = tensor[: sizes[0]]
            needed = [sum(sizes), *targets[0].shape[1:]]
            if list(tensor.shape) != needed:
                raise CheckpointError(
                    f"{folder}: {entry.theirs} is {_product(shape)}, which does not fit {', '.join(entry.ours)}:"
                    f" {_product(needed)}{fix}"
                )
            for target, part in zip(targets, tensor.split(sizes), strict=True):
                target.zero_()
                target[: len(part)] = part
            twice = entry.ours == ["embedding.weight"] and model.config.tied_head and "lm_head.weight" in left
            if twice and not torch.equal(take("lm_head.weight"), whole):
                raise CheckpointError(f"{folder}: tie_word_embeddings is on, but lm_head.weight is not {entry.theirs}")
    if left:
        raise CheckpointError(f"{folder} has tensors that have no place in the model: {_some(left)}")
    if missing := {name for name in waiting if not name.endswith(".bias")}:
        raise CheckpointError(f"{folder} holds nothing for {_some(missing)}")
    for name in waiting:
        ours[name].zero_()


def _product(shape: list[int]) -> str:
    return "×".join(map(str, shape))


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Every tensor of the folder's safetensors files by name: (open file, its name there). None is read yet."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from None
        files = [folder / Path(name).name for name in names]
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
            convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safe'!r})"
            raise CheckpointError(
                f"{folder} has its weights pickled, which could run any code; if you trust them, convert them once:"
                f' python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
            )
        raise CheckpointError(f"{folder} has no *.safetensors file")
    found: dict[str, tuple[Any, str]] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(str(path), framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name in found:
                raise CheckpointError(f"{folder} has the tensor {name} in more than one file")
            found[name] = (file, name)
    return found


# --------------------------------------------------------------------------------------------------- both ways


@dataclass(frozen=True)
class _Entry:
    """One tensor of theirs and the parameters of ours that it holds, one below the other."""

    theirs: str
    ours: list[str]
    rows: bool
    transposed: bool = False  # GPT-2's Conv1D keeps (in, out)


def _entries(tree: Mapping[str, Any], model: GPT) -> Iterator[_Entry]:
    """Every tensor that a checkpoint with this config.json has."""
    kind = tree["model_type"]
    if kind == OWN:
        for name, _ in model.named_parameters():
            yield _Entry(f"gpt.{name}", [name], name.split(".")[0] in _TABLES)
        return
    for theirs, ours in _TENSORS[kind].items():
        rows = ours[0] in _TABLES
        if theirs == "lm_head" and model.config.tied_head:
            continue
        bias = kind == "gpt2"
        if kind != "gpt2" and theirs.endswith("_proj"):
            bias = bool(tree.get("mlp_bias" if ".mlp." in theirs else "attention_bias"))
        for layer in range(model.config.layers if "{}" in theirs else 1):
            for leaf in ("weight", "bias") if bias and not rows else ("weight",):
                names = [f"{each.format(layer)}.{leaf}" for each in ours]
                yield _Entry(f"{theirs.format(layer)}.{leaf}", names, rows, leaf == "weight" and ".c_" in theirs)


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
        parts = [ours[name] if name in ours else _neutral(model, name) for name in entry.ours]
        tensor = torch.cat(parts)
        if entry.rows and entry.ours != ["position_embedding.weight"]:
            tensor = tensor[: model.vocab_size]
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
