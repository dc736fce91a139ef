"""GGUF files, read as llama.cpp reads them: the graphs of its gpt2, llama and qwen3, from the file alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import made_up_text
from tests.evaluation.test_measure import train_on
from tests.hf.test_convert import PLAIN
from torch import Tensor

from pretrain.cli import main
from pretrain.config import ModelConfig
from pretrain.errors import UsageError
from pretrain.hf.ggml import write_gguf
from pretrain.model import GPT, meta_model
from pretrain.tokenizer import Tokenizer, build_tokenizer

gguf = pytest.importorskip("gguf")

PLAIN_MODEL = {name.removeprefix("model."): value for name, value in PLAIN.items()}
SHAPES = {
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "qkv_bias": True},
    "llama": {"mlp": "swiglu", "kv_heads": 2, "norm_weight": True},
    "llama, biased": {"mlp": "swiglu", "qkv_bias": True, "bias": True, "rope_theta": 500.0, "tied_head": True},
    "qwen3": {"mlp": "swiglu", "qk_norm": True, "norm_weight": True, "head_width": 16, "kv_heads": 1},
}


def make_model(tokenizer: Tokenizer, **fields: Any) -> GPT:
    """A model whose weights are all drawn, so that none is without effect."""
    config = ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "context_length": 16, **PLAIN_MODEL, **fields})
    model, draw = meta_model(config, tokenizer.vocab_size, tokenizer.bos_id).to_empty(device="cpu"), torch.Generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=draw.manual_seed(parameter.numel()))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bpe", 290, [made_up_text()])


class GGUF:
    """What is in a file, by name."""

    def __init__(self, file: Path):
        reader = gguf.GGUFReader(file)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {each.name: each.tensor_type.name for each in reader.tensors}
        self.tensors = {
            each.name: torch.from_numpy(np.array(gguf.dequantize(each.data, each.tensor_type))).float()
            for each in reader.tensors
        }

    def __getitem__(self, name: str) -> Any:
        return self.fields[f"{self.fields['general.architecture']}.{name}"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias, self["attention.layer_norm_epsilon"])
        return F.rms_norm(x, weight.shape, weight, self["attention.layer_norm_rms_epsilon"])

    def turn(self, x: Tensor) -> Tensor:
        """Rotary positions of x (T, heads, D): pairs of neighbours (ROPE_TYPE_NORM), for qwen3 of halves (NEOX)."""
        size = self["rope.dimension_count"]
        angles = torch.arange(len(x))[:, None, None] * self["rope.freq_base"] ** (-torch.arange(0, size, 2) / size)
        neox = self.fields["general.architecture"] == "qwen3"
        a, b = x.chunk(2, -1) if neox else (x[..., ::2], x[..., 1::2])
        pair = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
        return torch.cat(pair, -1) if neox else torch.stack(pair, -1).flatten(-2)

    def logits(self, ids: Tensor) -> Tensor:
        """Of tokens (T)."""
        kind, heads, T = self.fields["general.architecture"], self["attention.head_count"], len(ids)
        x = self.tensors["token_embd.weight"][ids]
        if kind == "gpt2":
            x = x + self.tensors["position_embd.weight"][:T]
        for layer in (f"blk.{i}" for i in range(self["block_count"])):
            h = self.norm(x, f"{layer}.attn_norm")
            if kind == "gpt2":
                q, k, v = (part.view(T, heads, -1) for part in self.linear(h, f"{layer}.attn_qkv").chunk(3, -1))
            else:
                groups, size = self["attention.head_count_kv"], self["attention.key_length"]
                q = self.linear(h, f"{layer}.attn_q").view(T, heads, size)
                k, v = (self.linear(h, f"{layer}.attn_{each}").view(T, groups, size) for each in "kv")
                if kind == "qwen3":
                    q, k = self.norm(q, f"{layer}.attn_q_norm"), self.norm(k, f"{layer}.attn_k_norm")
                q, k = self.turn(q), self.turn(k)
            rows = [each.transpose(0, 1)[None] for each in (q, k, v)]
            h = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
            x = x + self.linear(h, f"{layer}.attn_output")
            h = self.norm(x, f"{layer}.ffn_norm")
            up = self.linear(h, f"{layer}.ffn_up")
            gelu = kind == "gpt2"
            h = F.gelu(up, approximate="tanh") if gelu else F.silu(self.linear(h, f"{layer}.ffn_gate")) * up
            x = x + self.linear(h, f"{layer}.ffn_down")
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(self.norm(x, "output_norm"), head)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_logits_are_the_models(shape: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path):
    model = make_model(tokenizer, **SHAPES[shape])
    write_gguf(tmp_path / "model.gguf", "mine", model, tokenizer, dtype)
    file = GGUF(tmp_path / "model.gguf")
    ids = torch.randint(0, tokenizer.vocab_size, (16,), generator=torch.Generator().manual_seed(1))
    wanted, found = model(ids[None])[0], file.logits(ids)
    error = (wanted - found).norm() / wanted.norm()
    assert error < {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    stored = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    assert file.types["token_embd.weight"] == file.types["blk.1.ffn_down.weight"] == stored
    assert file.types["output_norm.weight"] == "F32"
    assert file.fields["general.name"] == "mine"
    assert file["context_length"] == 16


@pytest.mark.parametrize(("pattern", "theirs"), [("gpt2", "gpt-2"), ("gpt4", "dbrx")])
def test_the_tokenizer_is_in_the_file(pattern: str, theirs: str, tmp_path: Path):
    tokenizer = build_tokenizer("bpe", 300, [made_up_text()], pattern)
    model = make_model(tokenizer, **SHAPES["llama"])
    write_gguf(tmp_path / "a.gguf", "a", model, tokenizer)
    write_gguf(tmp_path / "b.gguf", "b", model, tokenizer.with_bos(False))
    fields, without = GGUF(tmp_path / "a.gguf").fields, GGUF(tmp_path / "b.gguf").fields
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", theirs)
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    assert [tokenizer.hf.token_to_id(token) for token in tokens] == list(range(300))
    assert len(merges) == 300 - 257
    assert all(merge.replace(" ", "") in tokens for merge in merges)
    assert [id for id, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == 3] == [tokenizer.bos_id]
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == tokenizer.bos_id
    assert (fields["tokenizer.ggml.add_bos_token"], without["tokenizer.ggml.add_bos_token"]) == (True, False)
    assert without["tokenizer.ggml.eos_token_id"] == tokenizer.bos_id


def test_what_llama_cpp_has_not_is_named(tokenizer: Tokenizer, tmp_path: Path):
    file, swiglu = tmp_path / "model.gguf", {"mlp": "swiglu"}
    for fields, named in [
        ({"smear": True, "logit_softcap": 15.0, **swiglu}, r"for (model\.\w+ (True|15\.0)(, )?){2};"),
        ({**SHAPES["gpt2"], "mlp": "gelu"}, "for model.mlp 'gelu';"),
        ({**swiglu, "qk_norm": True, "window_pattern": "SL", "window": 8}, "for model.window_pattern 'SL';"),
        ({**swiglu, "qk_norm": True, "qkv_bias": True}, "for model.qkv_bias True;"),
    ]:
        with pytest.raises(UsageError, match=named):
            write_gguf(file, "x", make_model(tokenizer, **fields), tokenizer)
    for kind, pattern, named in [("byte", "gpt2", "single bytes"), ("bpe", "nanochat", "not the pattern")]:
        other = build_tokenizer(kind, 300, [made_up_text()], pattern)
        with pytest.raises(UsageError, match=named):
            write_gguf(file, "x", make_model(other, **swiglu), other)


def test_a_run_is_exported_and_read_by_transformers(tmp_path: Path, text_file: Path, capsys):
    settings = {**PLAIN, "model.mlp": "swiglu", "tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}
    run = train_on(tmp_path / "run", str(text_file), **settings)
    command = ["export", str(run.folder), "--out", str(tmp_path / "out")]
    assert main([*command, "--dtype", "fp16"]) == 2
    assert "--dtype is for --format gguf" in capsys.readouterr().err
    assert main([*command, "--format", "gguf"]) == 0
    assert f"With llama.cpp:  llama-cli -m {tmp_path}/out/model.gguf" in capsys.readouterr().out
    ids, model = torch.arange(30)[None], run.load_model()
    with torch.no_grad():
        assert torch.allclose(GGUF(tmp_path / "out/model.gguf").logits(ids[0]), model(ids)[0], atol=1e-4)
    pytest.importorskip("accelerate", reason="transformers' reader needs it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = text_file.read_text(encoding="utf-8")[:3000]
    assert words(text, add_special_tokens=False)["input_ids"] == run.tokenizer().encode(text)
