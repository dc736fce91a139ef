"""Against transformers itself: tiny random models, the same logits both ways, exports that its Auto classes load."""

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY

from pretrain.cli import main
from pretrain.config import Config, ModelConfig, load_config
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.hf.convert import OWN, config_from_hf, hf_type, load_hf, load_weights, obstacles, read_config, to_hf
from pretrain.model import GPT
from pretrain.runs import Run
from pretrain.training import train

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, CONTEXT = 257, 32

LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    bos_token_id=256,
    eos_token_id=256,
)
WINDOWS = dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=5)
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=256, eos_token_id=256
)

THEIRS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied, exact gelu, other widths": (
        "GPT2",
        {**GPT2, "n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "llama": ("Llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama, biases, tied": (
        "Llama",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama, biases of attention only": ("Llama", {**LLAMA, "attention_bias": True}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "qwen3, windows": ("Qwen3", {**LLAMA, "head_dim": 8, "use_sliding_window": True, **WINDOWS}),
}


def tokens(rows: int = 2, length: int = CONTEXT, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def theirs(name: str) -> Any:
    """A model of transformers with every parameter random, norms and biases too."""
    kind, settings = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(config)
    return scramble(model).eval()


def scramble(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def ours(**settings: object) -> GPT:
    config = ModelConfig(**{"layers": 3, "heads": 4, "width": 32, "context_length": CONTEXT, **settings})  # type: ignore[arg-type]
    return scramble(GPT(config, VOCABULARY, bos_id=256)).eval()


def save(model: GPT, folder: Path, kind: str = "") -> Path:
    from safetensors.torch import save_file

    tree, state = to_hf(model, kind)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def furthest(mine: GPT, their: Any) -> float:
    x = tokens(vocabulary=mine.vocab_size)
    return float((mine(x) - their(x).logits).abs().max())


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_in_and_out(name: str, tmp_path: Path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "in")
    mine = load_hf(tmp_path / "in")
    assert furthest(mine, model) < 1e-5

    back = transformers.AutoModelForCausalLM.from_pretrained(save(mine, tmp_path / "out"))
    assert type(back) is type(model)
    state = back.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state.pop(key), tensor), key
    assert all(key.endswith(".bias") and not tensor.any() for key, tensor in state.items())


OURS = {
    "gpt2": dict(position="learned", norm="layernorm", norm_weight=True, bias=True, qkv_bias=True, mlp="gelu"),
    "gpt2, without weights and biases": dict(position="learned", norm="layernorm", mlp="relu2", tied_head=True),
    "llama": dict(mlp="swiglu", kv_heads=2, rope_theta=300.0, norm_eps=1e-3, vocab_multiple=64),
    "llama, biases": dict(mlp="swiglu", norm_weight=True, qkv_bias=True, bias=True, tied_head=True),
    "qwen3": dict(mlp="swiglu", qk_norm=True, head_width=16, qkv_bias=True),
    "qwen3, windows": dict(mlp="swiglu", qk_norm=True, norm_weight=True, window_pattern="SL"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_models_out_and_in(name: str, tmp_path: Path):
    mine = ours(embedding_norm=False, logit_softcap=0.0, **{"qk_norm": False, **OURS[name]})
    assert hf_type(mine.config) == name.partition(",")[0]
    their = transformers.AutoModelForCausalLM.from_pretrained(save(mine, tmp_path / "out"))
    assert their.config.vocab_size == VOCABULARY  # the padding of the vocabulary is gone
    assert furthest(mine, their) < 1e-5
    again = load_hf(tmp_path / "out")
    assert torch.equal(again(tokens()), mine(tokens()))


# What makes a model one that transformers does not have, each alone.
STRANGE = {
    "embedding_norm": True,
    "head_gates": True,
    "ngram_heads": 2,
    "value_embeddings": True,
    "residual_scalars": True,
    "smear": True,
    "bigram_rows": 64,
    "backout": True,
    "document_mask": True,
    "logit_softcap": 15.0,
    "attention_scale": 0.3,
    "rope_fraction": 0.5,
    "mlp": "relu2",
    "position": "none",
}


@pytest.mark.parametrize("field", STRANGE)
def test_no_counterpart_is_noticed(field: str):
    plain = ModelConfig(mlp="swiglu", embedding_norm=False, logit_softcap=0.0)
    assert hf_type(plain) == "qwen3"
    strange = dataclasses.replace(plain, **{field: STRANGE[field]})
    assert hf_type(strange) == OWN
    assert all(field in fields for kind, fields in obstacles(strange).items() if kind == "qwen3")


def test_a_field_that_the_export_has_never_heard_of_is_not_lost():
    fields = [("novelty", int, dataclasses.field(default=0))]
    future = dataclasses.make_dataclass("Future", fields, bases=(ModelConfig,), frozen=True)
    plain = {"mlp": "swiglu", "embedding_norm": False, "logit_softcap": 0.0}
    assert all("novelty" in names for names in obstacles(future(novelty=1, **plain)).values())
    assert hf_type(future(novelty=1, **plain)) == OWN


CHANGES = {
    "model_type": ({"model_type": "mixtral"}, "model_type 'mixtral' cannot be read"),
    "rope_scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters .*llama3"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters .*yarn"),
    "partial rotation": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters .*partial"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "experts": ({"num_experts": 8}, "num_experts 8"),
    "quantisation": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "window on the last layer": ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "a chunk": ({"layer_types": ["chunked_attention", "full_attention", "full_attention"]}, "layer_types"),
    "windows of old": ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "layer_types"),
    "no width": ({"hidden_size": None}, "does not say hidden_size"),
    "impossible heads": ({"num_key_value_heads": 3}, "kv_heads"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_represented_is_refused_by_name(name: str):
    change, message = CHANGES[name]
    tree = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
    assert config_from_hf(tree).qk_norm
    with pytest.raises(UsageError, match=message):
        config_from_hf({**tree, **change})


def test_a_model_may_be_smaller_than_its_checkpoint_not_larger(tmp_path: Path):
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    config = config_from_hf(read_config(tmp_path))
    small = GPT(dataclasses.replace(config, context_length=8, vocab_multiple=64), VOCABULARY - 7)
    load_weights(small, tmp_path)
    x = tokens(length=8, vocabulary=VOCABULARY - 7)
    assert torch.allclose(small(x), model(x).logits[..., : VOCABULARY - 7], atol=1e-5)
    assert not small.embedding.weight[VOCABULARY - 7 :].any()
    with pytest.raises(CheckpointError, match=r"wpe.weight .*\[32, 32\], .*\[64, 32\]; use --model.context_length 32"):
        load_weights(GPT(dataclasses.replace(config, context_length=64), VOCABULARY), tmp_path)
    with pytest.raises(CheckpointError, match=r"wte.weight is .*\[257, 32\], .* embedding.weight: \[300, 32\]"):
        load_weights(GPT(config, 300), tmp_path)


def test_gpt2_peculiarities_are_refused():
    for change in ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}):
        with pytest.raises(UsageError, match=next(iter(change))):
            config_from_hf({**GPT2, "model_type": "gpt2", **change})


def test_files_of_many_kinds(tmp_path: Path):
    """Shards, half precision, checkpoints without head or prefix; then what is missing, left over, damaged, pickled."""
    from safetensors.torch import load_file, save_file

    model = theirs("gpt2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    expected = load_hf(tmp_path)(tokens())
    assert furthest(load_hf(tmp_path), model) < 1e-5
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=shard.name):
        load_hf(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_hf(tmp_path)

    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pickled.*save_pretrained"):
        load_hf(tmp_path)

    model.transformer.save_pretrained(tmp_path)  # as openai-community/gpt2 is: no prefix, and masks beside the weights
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert "wte.weight" in state
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file)
    assert torch.equal(load_hf(tmp_path)(tokens()), expected)
    save_file({key: tensor.bfloat16() for key, tensor in state.items()}, file)
    assert load_hf(tmp_path).embedding.weight.dtype == torch.float32

    save_file({**state, "h.0.extra.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"no place in the model: transformer\.h\.0\.extra\.weight"):
        load_hf(tmp_path)
    save_file({key: tensor for key, tensor in state.items() if key != "h.1.mlp.c_fc.bias"}, file)
    with pytest.raises(CheckpointError, match=r"no tensor transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_hf(tmp_path)
    save_file({**state, "h.0.mlp.c_fc.bias": torch.ones(7)}, file)
    with pytest.raises(CheckpointError, match=r"c_fc\.bias is .*\[7\]"):
        load_hf(tmp_path)
    save_file({**state, "lm_head.weight": state["wte.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_hf(tmp_path / "absent")


TEXT = "Ada sees  Noël, 王さん\n\nand <|endoftext|> the fox.\n"
QUICKSTART_LIKE = {
    "model.smear": True,
    "model.residual_scalars": True,
    "model.attention_scale": 0.25,
    "model.value_embeddings": True,
    "model.backout": True,
    "model.window_pattern": "SL",
    "model.document_mask": True,
    "model.logit_softcap": 15.0,
    "model.vocab_multiple": 64,
}
PLAIN = {"model.embedding_norm": False, "model.logit_softcap": 0.0, "model.attention_scale": 0.0, "model.smear": False}
PLAIN |= {"model.residual_scalars": False, "model.document_mask": False, "model.qk_norm": False}
RUNS = {
    "own file, bpe": (OWN, {**QUICKSTART_LIKE, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}),
    "own file, tied, byte": (OWN, {**QUICKSTART_LIKE, "model.tied_head": True}),
    "llama, byte": ("llama", {**PLAIN, "model.mlp": "swiglu"}),
    "gpt2, char": (
        "gpt2",
        {**PLAIN, "model.position": "learned", "model.norm": "layernorm", "tokenizer.kind": "char"},
    ),
}


@pytest.fixture(scope="module")
def make_run(text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Run] = {}

    def make(name: str) -> Run:
        if name not in made:
            settings = {**TINY, "data.paths": [str(text_file)], "train.steps": 4, "eval.every": 2, **RUNS[name][1]}
            made[name] = train(load_config("quickstart", **settings), tmp_path_factory.mktemp("export") / "run")
        return made[name]

    return make


@pytest.mark.parametrize("name", RUNS)
def test_export_of_a_run_is_loaded_by_auto_classes(name: str, make_run, tmp_path: Path, capsys):
    run, out = make_run(name), tmp_path / "out"
    assert main(["export", str(run.folder), "--out", str(out)]) == 0
    own = RUNS[name][0] == OWN
    assert ("trust_remote_code=True" in capsys.readouterr().out) == own
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "config.json").read_text())["model_type"] == RUNS[name][0]

    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=own).eval()
    mine, tokenizer = run.load_model(), run.tokenizer()
    x = tokens(vocabulary=tokenizer.vocab_size)
    if tokenizer.bos_id is not None:
        x[0, 10] = tokenizer.bos_id
    with torch.no_grad():
        logits = model(x).logits
        assert logits.shape == (2, CONTEXT, tokenizer.vocab_size)
        assert (logits - mine(x)).abs().max() < 1e-5
    assert torch.equal(load_hf(out)(x), mine(x))

    auto = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=own)
    text = TEXT if "char" not in name else "Ada sees Noël.\nthe fox finds 王さん."
    assert auto.encode(text) == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text)) == text
    assert len(auto) == tokenizer.vocab_size
    assert (auto.bos_token_id, auto.eos_token_id) == (tokenizer.bos_id, tokenizer.bos_id)
    assert auto.model_max_length == CONTEXT

    card = (out / "README.md").read_text()
    assert "Held-out loss" in card
    assert f"{run.summary['val_loss']:.4f}" in card
    assert f'vocab_size": {run.config.tokenizer.vocab_size}' in card


CODE_FILES = {
    f"{name}.py"
    for name in ("configuration_pretrain", "modeling_pretrain", "transformer", "attention", "cache", "loss")
}


def test_own_file_generates_and_masks_padding(make_run, tmp_path: Path):
    run = make_run("own file, bpe")
    assert main(["export", str(run.folder), "--out", str(tmp_path / "out"), "--step", "4"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    scramble(model)
    x = tokens(length=5)
    texts = model.generate(x, max_new_tokens=CONTEXT, do_sample=False, eos_token_id=None)  # past the context length
    assert texts.shape == (2, 5 + CONTEXT)
    for row in texts:
        with torch.no_grad():
            assert row[5] == model(row[None, :5]).logits[0, -1].argmax()
            assert row[-1] == model(row[None, -CONTEXT - 1 : -1]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match="more than the context length"):
        model(tokens(length=CONTEXT + 1))

    with torch.no_grad():
        padded, mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), x), dim=1), torch.ones(2, 8, dtype=torch.long)
        mask[:, :3] = 0
        assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], model(x).logits, atol=1e-5)
        loss = model(x, labels=x).loss
        assert torch.isclose(loss, model.gpt(x[:, :-1], x[:, 1:]) / 8, atol=1e-5)

    model.save_pretrained(tmp_path / "again")  # with its code, as the Hub needs it
    for folder in ("out", "again"):
        files = list((tmp_path / folder).glob("*.py"))
        assert {file.name for file in files} == CODE_FILES
        assert not any("import pretrain" in file.read_text() or "from pretrain" in file.read_text() for file in files)


@pytest.mark.slow
def test_an_export_needs_no_pretrain(make_run, tmp_path: Path):
    run = make_run("own file, bpe")
    assert main(["export", str(run.folder), "--out", str(tmp_path / "out")]) == 0
    program = (
        "import sys; sys.modules['pretrain'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "if len(sys.argv) > 2: model.save_pretrained(sys.argv[2])\n"
        "import torch; print(float(model(torch.arange(20)[None]).logits.double().square().sum()))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    with torch.no_grad():
        expected = float(run.load_model()(torch.arange(20)[None]).double().square().sum())
    for folders in (("out", "again"), ("again",)):
        command = [sys.executable, "-c", program, *folders]
        out = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert float(out.stdout or "nan") == pytest.approx(expected, rel=1e-4), out.stderr


@pytest.mark.slow
def test_gpt2_vocabulary_in_auto_tokenizer(shared_data: Path, tmp_path: Path, text_file: Path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_GPT2_DIR", str(shared_data / "gpt2"))
    settings = {"data.paths": [str(text_file)], "tokenizer.kind": "gpt2", "train.steps": 1, **PLAIN}
    settings |= {"model.position": "learned", "model.norm": "layernorm", "model.width": 8, "sample.max_tokens": 0}
    run = train(load_config("quickstart", **{**TINY, **settings}), tmp_path / "run")
    assert main(["export", str(run.folder), "--out", str(tmp_path / "out")]) == 0
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.encode(TEXT) == run.tokenizer().encode(TEXT)
    assert auto.eos_token_id == 50256


def test_safetensors_export(make_run, tmp_path: Path, capsys):
    from safetensors.torch import load_file

    run = make_run("own file, bpe")
    assert main(["export", str(run.folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert "load_hf" in capsys.readouterr().out
    mine = run.load_model()
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == dict(mine.named_parameters()).keys()
    assert torch.equal(load_hf(tmp_path / "out")(tokens()), mine(tokens()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_export_refuses(make_run, tmp_path: Path, capsys):
    run = make_run("llama, byte")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert main(["export", str(run.folder), "--out", str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["export", str(run.folder), "--out", str(tmp_path / "out"), "--step", "3"]) == 1
    assert "no checkpoint of step 3" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export", str(run.folder), "--out", str(tmp_path / "empty")]) == 0


def initial_loss(run: Run) -> float:
    """The loss of the first step: that of the initial weights."""
    return json.loads(run.metrics.read_text().splitlines()[0])["train/loss"]


def test_training_goes_on_from_a_checkpoint_of_transformers(make_run, tmp_path: Path, text_file: Path, capsys):
    source, out = tmp_path / "source", tmp_path / "run"
    theirs("llama").save_pretrained(source)
    options = {
        **TINY,
        "data.paths": str(text_file),
        "train.steps": 2,
        "model.context_length": 16,
        "sample.max_tokens": 0,
    }
    args = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    args += [
        "--init-from",
        f"hf:{source}",
        "--model.vocab_multiple",
        "64",
        "--optim.kind",
        "adamw",
        "--optim.lr",
        "1e-9",
    ]
    assert main(["train", "--out", str(out), *args]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not out.exists()

    make_run("llama, byte").tokenizer().save(source / "tokenizer.json")
    assert main(["train", "--out", str(out), *args]) == 0
    run, model = Run.open(out), load_hf(source)
    assert (run.config.model.mlp, run.config.model.layers, run.config.model.context_length) == ("swiglu", 3, 16)
    assert run.config.tokenizer.kind == str(source / "tokenizer.json")
    assert tomllib.loads((out / "config.toml").read_text())["train"]["init_from"] == f"hf:{source}"
    trained = run.load_model()
    x = tokens(length=16)
    assert torch.allclose(trained(x), model(x), atol=1e-4)  # the learning rate was next to nothing
    first = initial_loss(run)

    # The same command, and the short one without the checkpoint at hand, go on; another source is refused.
    assert main(["train", "--out", str(out), *args]) == 0
    assert main(["train", "--out", str(out), "--init-from", str(tmp_path)]) != 0
    source.rename(tmp_path / "moved")
    assert main(["train", "--out", str(out)]) == 0
    assert initial_loss(run) == first


def test_training_goes_on_from_a_run(make_run, tmp_path: Path, tiny: Config):
    source = make_run("gpt2, char")
    model = dataclasses.replace(source.config.model, context_length=16)
    config = dataclasses.replace(
        source.config,
        model=model,
        train=dataclasses.replace(source.config.train, init_from=str(source.folder), steps=1),
    )
    run = train(config, tmp_path / "run")
    assert run.tokenizer().fingerprint == source.tokenizer().fingerprint
    assert initial_loss(run) < 0.99 * initial_loss(source)

    longer = dataclasses.replace(config, model=dataclasses.replace(model, context_length=64))
    with pytest.raises(UsageError, match="learned 32 positions"):
        train(longer, tmp_path / "longer")
    wider = dataclasses.replace(config, model=dataclasses.replace(model, width=64))
    with pytest.raises(UsageError, match=r"model\.width 32 → 64"):
        train(wider, tmp_path / "wider")
    nowhere = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, init_from=str(tmp_path / "nowhere")))
    with pytest.raises(PretrainError, match="nowhere"):
        train(nowhere, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


TASK = """task: verbs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("name", ["own file, tied, byte", "llama, byte"])
def test_lm_eval_runs_on_an_export(name: str, make_run, tmp_path: Path, monkeypatch):
    """EleutherAI's harness, with its own loader, on a task made here, gives the likelihoods of our model."""
    pytest.importorskip("accelerate")
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    docs = [{"context": who, "choices": ["sees", "zqxj"]} for who in ("Ada", "Noël", "the fox")]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "verbs.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    run = make_run(name)
    assert main(["export", str(run.folder), "--out", str(tmp_path / "out")]) == 0
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "trust_remote_code": True, "dtype": "float32"},
        tasks=["verbs"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    mine, tokenizer = run.load_model(), run.tokenizer()
    assert len(result["samples"]["verbs"]) == len(docs)
    for sample in result["samples"]["verbs"]:
        context = tokenizer.encode(sample["doc"]["context"])
        for choice, ((likelihood, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            targets = tokenizer.encode(f" {choice}")
            losses = mine(torch.tensor([context + targets]))[0, len(context) - 1 : -1].log_softmax(-1)
            expected = losses.gather(1, torch.tensor(targets)[:, None]).sum().detach()
            assert abs(float(likelihood) - float(expected)) < 1e-4
