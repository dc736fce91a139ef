"""Models of Hugging Face's transformers in and out: GPT-2, Llama, Qwen3, and what an export of ours writes.

    config.json  →  config_from_hf  →  ModelConfig          GPT  →  to_hf  →  config.json, tensors by their names there
    *.safetensors  →  load_weights  →  GPT

One table (``_correspondence``) says which of their tensors holds which of ours; it is read in both directions. Whatever
of a config.json or its tensors has no place in our model is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, UsageError
from pretrain.model.transformer import GPT, Norm, layer_kinds, window_length

OWN = "pretrain"
"""The model_type of an export that transformers loads with a model file of ours (``hub/``)."""

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}

# Fields of a config.json that do not change what the model computes. Dropout is among them: it is a choice of the
# training that follows (model.dropout).
# fmt: off
_HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
        "initializer_range", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params",
        "id2label", "label2id", "_num_labels", "num_labels", "pretraining_tp", "attention_dropout", "attn_pdrop",
        "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj", "n_ctx", "is_llama_config", "auto_map", "return_dict",
    }
)
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
    if kind == OWN:
        return _model_config(tree.get("model"))
    readers = {"gpt2": _from_gpt2, "llama": _from_llama, "qwen3": _from_llama}
    if kind not in readers:
        raise UsageError(f"a Hugging Face model_type {kind!r} cannot be read; those that can: {', '.join(readers)}")
    left = {name: value for name, value in tree.items() if name not in _HARMLESS and value is not None}
    del left["model_type"]
    values = readers[kind](left, kind)
    # What the reader did not take and is not switched off would change the model.
    if unknown := [f"{name} {value!r}" for name, value in left.items() if value]:
        raise UsageError(f"this {kind} checkpoint has {', '.join(unknown)}, which our Transformer cannot represent")
    plain = {"norm_weight": True, "embedding_norm": False, "logit_softcap": 0.0, "init": "gpt2"}
    return _model_config({**plain, **values})


def _model_config(values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the checkpoint's config.json does not describe a model we can build: {error}") from None


def _take(left: dict[str, Any], name: str, kind: str) -> Any:
    if name not in left:
        raise UsageError(f"the config.json of this {kind} checkpoint does not say {name}")
    return left.pop(name)


def _insist(left: dict[str, Any], **wanted: Any) -> None:
    """Take fields that we have one value for only."""
    for name, value in wanted.items():
        if left.pop(name, value) != value:
            raise UsageError(f"this checkpoint has another {name} than {value!r}, which our Transformer does not have")


def _activation(name: str, known: Mapping[str, str]) -> str:
    if name not in known:
        raise UsageError(f"this checkpoint has the activation {name!r}; known here: {', '.join(known)}")
    return known[name]


def _from_gpt2(left: dict[str, Any], kind: str) -> dict[str, Any]:
    _insist(left, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    left.pop("reorder_and_upcast_attn", None)  # precision only
    return {
        "layers": _take(left, "n_layer", kind),
        "heads": _take(left, "n_head", kind),
        "width": _take(left, "n_embd", kind),
        "context_length": _take(left, "n_positions", kind),
        "mlp": _activation(left.pop("activation_function", "gelu_new"), _ACTIVATIONS),
        "mlp_width": left.pop("n_inner", 0),
        "norm_eps": left.pop("layer_norm_epsilon", 1e-5),
        "tied_head": left.pop("tie_word_embeddings", True),
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "bias": True,
        "qkv_bias": True,
    }


def _from_llama(left: dict[str, Any], kind: str) -> dict[str, Any]:
    theta = left.pop("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        rope = dict(left.pop(name, {}))
        theta = rope.pop("rope_theta", theta)
        if {rope.pop("rope_type", "default"), rope.pop("type", "default")} != {"default"} or any(rope.values()):
            raise UsageError(f"this {kind} checkpoint has {name} other than the default, which our rope does not have")
    attention_bias, mlp_bias = left.pop("attention_bias", False), left.pop("mlp_bias", False)
    heads, width = _take(left, "num_attention_heads", kind), _take(left, "hidden_size", kind)
    _activation(left.pop("hidden_act", "silu"), {"silu": "swiglu"})
    layers = _take(left, "num_hidden_layers", kind)
    window, from_layer = left.pop("sliding_window", 0), left.pop("max_window_layers", 28)
    window = window if left.pop("use_sliding_window", False) else 0
    first_sliding = from_layer if window else layers
    types = ["full_attention" if layer < first_sliding else "sliding_attention" for layer in range(layers)]
    types = left.pop("layer_types", types)
    names = {"full_attention": "L", "sliding_attention": "S"}
    if set(types) - set(names) or types[-1] != "full_attention" or ("sliding_attention" in types and not window):
        raise UsageError(
            f"this {kind} checkpoint has layer_types {types}; ours are full_attention or sliding_attention with a"
            f" sliding_window, and the last layer sees the whole context"
        )
    sliding = "sliding_attention" in types
    return {
        "layers": layers,
        "heads": heads,
        "kv_heads": left.pop("num_key_value_heads", 0),
        "width": width,
        "head_width": left.pop("head_dim", 128 if kind == "qwen3" else width // heads),  # the classes' own defaults
        "context_length": _take(left, "max_position_embeddings", kind),
        "mlp": "swiglu",
        "mlp_width": _take(left, "intermediate_size", kind),
        "norm_eps": left.pop("rms_norm_eps", 1e-6),
        "tied_head": left.pop("tie_word_embeddings", False),
        "position": "rope",
        "rope_theta": theta,
        "norm": "rmsnorm",
        "qk_norm": kind == "qwen3",
        "bias": attention_bias or mlp_bias,  # the ones that the checkpoint does not have begin at zero
        "qkv_bias": attention_bias,
        "window_pattern": "".join(names[name] for name in types) if sliding else "L",
        "window": window if sliding else 0,
    }


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

        def read(name: str) -> Tensor:
            file, stored_name = tensors[name]
            tensor = file.get_tensor(stored_name)
            if not tensor.is_floating_point():
                raise CheckpointError(f"{folder}: {name} is {tensor.dtype}; quantised weights cannot be read")
            return tensor

        for entry in _correspondence(tree, model):
            if entry.theirs not in left:
                raise CheckpointError(f"{folder} has no tensor {entry.theirs}")
            left.remove(entry.theirs)
            tensor = read(entry.theirs)
            tensor = tensor.T if entry.transposed else tensor
            targets = [ours[name] for name in entry.ours]
            waiting -= set(entry.ours)
            if entry.rows:
                _copy_rows(tensor, targets[0], entry, model, folder)
                continue
            sizes = [len(target) for target in targets]
            if tensor.shape != (sum(sizes), *targets[0].shape[1:]):
                shape = "×".join(map(str, tensor.shape))
                raise CheckpointError(
                    f"{folder}: {entry.theirs} is {shape}, which does not fit {', '.join(entry.ours)}"
                )
            for target, part in zip(targets, tensor.split(sizes), strict=True):
                target.copy_(part)
        if model.config.tied_head and "lm_head.weight" in left:  # some save the shared tensor twice
            left.remove("lm_head.weight")
            embedding = next(e.theirs for e in _correspondence(tree, model) if e.ours == ("embedding.weight",))
            if not torch.equal(read("lm_head.weight"), read(embedding)):
                raise CheckpointError(f"{folder}: tie_word_embeddings is on, but lm_head.weight is not {embedding}")
    if left:
        raise CheckpointError(f"{folder} has tensors that have no place in the model: {_some(left)}")
    if missing := {name for name in waiting if not name.endswith(".bias")}:
        raise CheckpointError(f"{folder} holds nothing for {_some(missing)}")
    for name in waiting:
        ours[name].zero_()


def _copy_rows(tensor: Tensor, target: Tensor, entry: _Entry, model: GPT, folder: str | Path) -> None:
    positions = entry.ours == ("position_embedding.weight",)
    needed = model.config.context_length if positions else model.vocab_size
    if len(tensor) < needed or tensor.shape[1:] != target.shape[1:]:
        mend = f"; use --model.context_length {len(tensor)} or less" if positions else ""
        raise CheckpointError(
            f"{folder}: {entry.theirs} has {len(tensor)} rows of {tensor.shape[1]}, and the model needs {needed} of"
            f" {target.shape[1]}{mend}"
        )
    target.zero_()
    target[:needed] = tensor[:needed]


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
        if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
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
    ours: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps (in, out)
    rows: bool = False  # a row for each token or position, of which a model may have fewer


_GPT2_LAYER = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention.q", "attention.k", "attention.v"),
    "attn.c_proj": ("attention.out",),
    "ln_2": ("mlp_norm",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}
_LLAMA_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_QK_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}


def _correspondence(tree: Mapping[str, Any], model: GPT) -> Iterator[_Entry]:
    """Every tensor that a checkpoint with this config.json has."""
    kind, layers = tree["model_type"], range(model.config.layers)
    if kind == OWN:
        for name, parameter in model.named_parameters():
            yield _Entry(f"gpt.{name}", (name,), rows=parameter.dim() == 2 and _is_table(name))
        return
    embedding, norm = {"gpt2": ("transformer.wte", "transformer.ln_f")}.get(kind, ("model.embed_tokens", "model.norm"))
    yield _Entry(f"{embedding}.weight", ("embedding.weight",), rows=True)
    if not model.config.tied_head:
        yield _Entry("lm_head.weight", ("head.weight",), rows=True)
    yield _Entry(f"{norm}.weight", ("norm.weight",))
    if kind == "gpt2":
        yield _Entry("transformer.wpe.weight", ("position_embedding.weight",), rows=True)
        yield _Entry(f"{norm}.bias", ("norm.bias",))
        for layer in layers:
            for theirs, parts in _GPT2_LAYER.items():
                for leaf in ("weight", "bias"):
                    ours = tuple(f"blocks.{layer}.{part}.{leaf}" for part in parts)
                    transposed = leaf == "weight" and ".c_" in theirs
                    yield _Entry(f"transformer.h.{layer}.{theirs}.{leaf}", ours, transposed)
        return
    for layer in layers:
        for theirs, ours in {**_LLAMA_LAYER, **(_QK_NORMS if kind == "qwen3" else {})}.items():
            room = theirs.partition(".")[0]
            has_bias = theirs.endswith("_proj") and tree.get("mlp_bias" if room == "mlp" else "attention_bias")
            for leaf in ("weight", "bias") if has_bias else ("weight",):
                yield _Entry(f"model.layers.{layer}.{theirs}.{leaf}", (f"blocks.{layer}.{ours}.{leaf}",))


def _is_table(name: str) -> bool:
    return name in ("embedding.weight", "head.weight", "position_embedding.weight") or name.startswith(
        "value_embeddings."
    )


# --------------------------------------------------------------------------------------------------------- out


def obstacles(config: ModelConfig) -> dict[str, list[str]]:
    """For each architecture of transformers that we can write, the fields of ``config`` that it cannot express."""
    default, head_width = ModelConfig(), config.head_width or config.width // config.heads
    windows = "S" in layer_kinds(config)
    everywhere = [
        name
        for name, plain in {
            "embedding_norm": False,
            "value_embeddings": False,
            "residual_scalars": False,
            "smear": False,
            "backout": False,
            "document_mask": False,
            "logit_softcap": 0.0,
        }.items()
        if getattr(config, name) != plain
    ]
    if config.attention_scale not in (0.0, head_width**-0.5):
        everywhere.append("attention_scale")
    # A field that this file has never heard of must not be lost.
    everywhere += [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _KNOWN_FIELDS and getattr(config, field.name) != getattr(default, field.name)
    ]
    only = {
        "gpt2": {
            "position": config.position == "learned",
            "norm": config.norm == "layernorm",
            "mlp": config.mlp in _GPT2_ACTIVATIONS,
            "qk_norm": not config.qk_norm,
            "kv_heads": config.kv_heads in (0, config.heads),
            "head_width": head_width * config.heads == config.width,
            "window_pattern": not windows,
        },
        "llama": {
            "position": config.position == "rope",
            "rope_fraction": config.rope_fraction == 1,
            "norm": config.norm == "rmsnorm",
            "mlp": config.mlp == "swiglu",
            "qk_norm": not config.qk_norm,
            "width": config.width % config.heads == 0,
            "window_pattern": not windows,
        },
        "qwen3": {
            "position": config.position == "rope",
            "rope_fraction": config.rope_fraction == 1,
            "norm": config.norm == "rmsnorm",
            "mlp": config.mlp == "swiglu",
            "qk_norm": config.qk_norm,
            "bias": not config.bias,
        },
    }
    return {
        kind: everywhere + [name for name, possible in fields.items() if not possible] for kind, fields in only.items()
    }


# fmt: off
_KNOWN_FIELDS = frozenset(
    {
        "depth", "layers", "heads", "kv_heads", "width", "head_width", "context_length", "mlp", "mlp_width", "position",
        "rope_theta", "rope_fraction", "norm", "norm_weight", "norm_eps", "embedding_norm", "qk_norm",
        "attention_scale", "window_pattern", "window", "document_mask", "bias", "qkv_bias", "value_embeddings",
        "residual_scalars", "smear", "backout", "tied_head", "logit_softcap", "vocab_multiple", "dropout", "init",
    }
)
# fmt: on


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
    tree = {"model_type": kind, "vocab_size": model.vocab_size, **_TREES[kind](model)}
    tree |= {"tie_word_embeddings": model.config.tied_head, "dtype": "float32", "torch_dtype": "float32"}
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {}
    for entry in _correspondence(tree, model):
        parts = [ours[name] if name in ours else _neutral(model, name) for name in entry.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.rows and entry.ours != ("position_embedding.weight",):
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
    assert leaf == "bias", name
    return torch.zeros(module.out_features)


def _gpt2_tree(model: GPT) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_positions": config.context_length,
        "n_inner": _mlp_width(model),
        "activation_function": _GPT2_ACTIVATIONS[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _llama_tree(model: GPT) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_width or config.width // config.heads,
        "hidden_size": config.width,
        "intermediate_size": _mlp_width(model),
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks; 5 looks below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.qkv_bias or config.bias,
        "mlp_bias": config.bias,
    }


def _qwen3_tree(model: GPT) -> dict[str, Any]:
    tree = _llama_tree(model) | {"architectures": ["Qwen3ForCausalLM"]}
    del tree["mlp_bias"]
    kinds = layer_kinds(model.config)
    if "S" not in kinds:
        return tree
    types = ["sliding_attention" if kind == "S" else "full_attention" for kind in kinds]
    window = window_length(model.config)
    return tree | {"layer_types": types, "use_sliding_window": True, "sliding_window": window}


def _own_tree(model: GPT) -> dict[str, Any]:
    return {
        "architectures": ["PretrainForCausalLM"],
        "model": dataclasses.asdict(dataclasses.replace(model.config, vocab_multiple=1)),
        "boundary": model.bos_id,
    }


_TREES = {"gpt2": _gpt2_tree, "llama": _llama_tree, "qwen3": _qwen3_tree, OWN: _own_tree}


def _mlp_width(model: GPT) -> int:
    return model.blocks[0].mlp.up.out_features  # type: ignore[union-attr, return-value]
