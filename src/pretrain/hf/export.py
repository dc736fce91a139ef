"""A run's model for others: a folder that transformers loads, or just tensors.

hf            model.safetensors, config.json, tokenizer.json and its settings, README.md; where transformers has no
              such architecture, also our model's Python files, which it then loads with trust_remote_code
safetensors   model.safetensors by our parameter names, config.json, tokenizer.json
gguf          model.gguf, for llama.cpp
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
from safetensors.torch import save_file

from pretrain.config import FREE_SECTIONS, config_to_dict
from pretrain.errors import DataError, UsageError
from pretrain.hf.convert import OWN, hf_type, obstacles, to_hf
from pretrain.hf.ggml import write_gguf
from pretrain.io import expand, read_jsonl, without_secrets
from pretrain.runs import Run
from pretrain.runs.checkpoint import AVERAGE, Checkpoint
from pretrain.runs.metrics import Smoothed
from pretrain.runs.run import stored_core
from pretrain.text import embedded_name
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import Dataset, Manifest, MixedOrder, training_order
from pretrain.tokens.shards import PLAN

CODE = (
    "hf.configuration_pretrain",
    "hf.modeling_pretrain",
    "model.transformer",
    "model.attention",
    "model.cache",
    "model.loss",
)
"""The modules that an export of our own architecture contains, in one folder."""


def export_run(
    run: Run,
    format: Literal["hf", "safetensors", "gguf"],
    out: Path,
    checkpoint: Checkpoint | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> str:
    """Write the model of ``run`` into the folder ``out``, which appears whole or not at all; says how to load it.

    ``checkpoint`` is by default the model that the run leaves: :meth:`Run.model_checkpoint`. ``dtype`` is of gguf.

    Raises:
        UsageError: ``out`` has files, or cannot be written; or the format cannot express the model.
        CheckpointError: the run has no intact checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; choose another --out")
    checkpoint = checkpoint or run.model_checkpoint()
    model, tokenizer = run.load_model(checkpoint=checkpoint), run.tokenizer()
    tree, tensors = to_hf(model, "" if format == "hf" else OWN)
    files = {"config.json": _json(tree)}
    if format == "gguf":
        how = f"llama-cli -m {out}/model.gguf"
    elif format == "safetensors":
        tensors = {name.removeprefix("gpt."): tensor for name, tensor in tensors.items()}
        how = f'from pretrain.hf.convert import load_hf; model = load_hf("{out}")'
    else:
        files = _hf_files(run, tree, tokenizer) | {"README.md": model_card(run, checkpoint, out.resolve().name)}
        trust = ", trust_remote_code=True" if tree["model_type"] == OWN else ""
        how = f'model = AutoModelForCausalLM.from_pretrained("{out}"{trust})'

    final = out.resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as temporary:
            folder = Path(temporary, "whole")
            folder.mkdir()
            if format == "gguf":
                write_gguf(folder / "model.gguf", out.resolve().name, model, tokenizer, dtype)
            else:
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
                (folder / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
                tokenizer.save(folder / "tokenizer.json")
                for name, text in files.items():
                    (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
            os.replace(folder, final)  # an empty folder gives way
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return how


def _hf_files(run: Run, tree: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """The text files that transformers looks for, by name."""
    bos, own = tokenizer.bos, tree["model_type"] == OWN
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id}
    names = {"bos_token": bos, "eos_token": bos} if bos else {}
    auto = {
        "AutoConfig": "configuration_pretrain.PretrainConfig",
        "AutoModelForCausalLM": "modeling_pretrain.PretrainForCausalLM",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.config.model.context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the name of a special token in a text is text
    }
    files = {
        "config.json": tree | ids | ({"auto_map": auto} if own else {}),
        "generation_config.json": ids | ({"use_cache": False} if own else {}),
        "tokenizer_config.json": settings | names,
    }
    return {name: _json(file) for name, file in files.items()} | (model_code() if own else {})


def model_code() -> dict[str, str]:
    """Our model's Python files by name, importing one another and nothing else of pretrain."""
    code = {}
    for module in CODE:
        folder, name = module.split(".")
        text = resources.files(f"pretrain.{folder}").joinpath(f"{name}.py").read_text(encoding="utf-8")
        # The model only reads attributes of its configuration, for which a plain namespace will do.
        text = text.replace("from pretrain.config import", "from types import SimpleNamespace as")
        code[f"{name}.py"] = text.replace("from pretrain.model.", "from .").replace("from pretrain.hf.", "from .")
    return code


def model_card(run: Run, checkpoint: Checkpoint, name: str) -> str:
    """README.md of an export: what the model is, what it learned from, how good it is, how to load it, its settings."""
    settings = {section: table for section, table in config_to_dict(run.config).items() if section not in FREE_SECTIONS}
    kind = hf_type(run.config.model)
    template = resources.files("pretrain.hf").joinpath("model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        name=name,
        facts=_facts(run, checkpoint),
        data=_data(run),
        core=stored_core(run, checkpoint),
        kind=kind,
        obstacles=", ".join(min(obstacles(run.config.model).values(), key=len)) if kind == OWN else "",
        bos=run.tokenizer().bos,
        settings=_json(without_secrets(settings)).strip(),
    )


def _facts(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Size, tokens and losses of a checkpoint, a sentence each."""
    config, summary, step = run.config, run.summary, checkpoint.step
    begin = f", beginning with the weights of {config.train.init_from}" if config.train.init_from else ""
    tokens = step * config.train.batch_tokens + checkpoint.state.get("more_tokens", 0)
    facts = [
        f"Trained on {tokens:,} tokens in {step:,} steps{begin}",
        f"Tokenizer: {Path(config.tokenizer.kind).name}, {run.tokenizer().vocab_size:,} tokens",
        f"Context: {config.model.context_length} tokens",
    ]
    left = summary and summary.get("model_step", summary["steps"]) == step
    if summary and left:
        facts.insert(0, f"Parameters: {summary['parameters']:,}")
    if run.weights(step) == AVERAGE:
        facts.append(f"Weights: their exponential moving average (optim.ema {config.optim.ema:g})")
    if (temperature := run.model_of(step)[1]) != 1:
        facts.append(f"Head: divided by the temperature {temperature:.2f} (eval.calibrate)")
    records = [record for record in read_jsonl(run.metrics) if record["step"] <= step]
    if math.isfinite(loss := Smoothed(records).loss):
        facts.append(f"Training loss: {loss:.4f} nats per token (smoothed over about ten steps)")
    validated = [(r["step"], r["val/loss"], r.get("val/bpb")) for r in records if r.get("val/loss") is not None]
    if summary and left and summary["val_loss"] is not None:  # over all held-out text
        validated.append((step, summary["val_loss"], summary["val_bpb"]))
    for measured, loss, bits in validated[-1:]:
        bpb = "" if bits is None else f", {bits:.4f} bits per byte"
        facts.append(f"Held-out loss: {loss:.4f} nats per token{bpb} (after step {measured:,})")
    if summary and left and summary.get("test_loss") is not None:
        bpb = f", {summary['test_bpb']:.4f} bits per byte" if summary.get("test_bpb") is not None else ""
        facts.append(f"Test loss: {summary['test_loss']:.4f} nats per token{bpb}, on text that nothing was chosen by")
    if caution := run.tokenizer().change_in_words:
        facts.append(f"{caution[:1].upper()}{caution[1:]}")
    for last in [record for record in records if record.get("val/core") is not None][-1:]:
        if not stored_core(run, checkpoint):
            bundle, count = without_secrets(config.eval.core_bundle) or "the bundle", config.eval.core_max_per_task
            each = f", {count:,} questions each" if count else ""
            core = f"{last['val/core']:.4f} after step {last['step']:,}"
            facts.append(f"CORE: {core}, the mean of the tasks of {bundle}{each}")
    return facts


def _data(run: Run) -> list[list[str]] | str:
    """What the model learned from: a table with a line for each dataset, as far as its files say; else a sentence."""
    data = run.config.data
    names = ", ".join(without_secrets(path) for path in data.paths) or embedded_name()
    try:
        corpus = run.corpus()
    except DataError:
        return f"{names}; its tokens were no longer there, or others, when this was written."
    rows = [["data", "training tokens", "documents", "bytes", "held-out tokens", "documents", "bytes", "share of rows"]]
    weights = data.weights or [each.tokens("train") for each in corpus.datasets]
    if data.stages and isinstance(order := training_order(corpus, run.config), MixedOrder):
        weights = order.rows_before(run.config.train.steps * run.config.batch_rows)
    for dataset, weight in zip(corpus.datasets, weights, strict=True):
        train = ["tokenized while training", "", ""] if data.stream else _sizes(dataset, "train")
        name = without_secrets(dataset.name) + _made_from(expand(dataset.name))
        name = names if run.own_tokens else name
        rows.append([name, *train, *_sizes(dataset, "val"), f"{weight / max(1, sum(weights)):.1%}"])
    return rows if len(corpus.datasets) > 1 else [row[:-1] for row in rows]


def _sizes(dataset: Dataset, split: str) -> list[str]:
    """Tokens, documents and bytes of text; the last two are empty for files that do not say."""
    tokens = f"{dataset.tokens(split):,}"
    if not dataset.tokenizer:
        return [tokens, "", ""]
    manifest = Manifest.load(expand(dataset.name))
    size = sum(shard.text_bytes for shard in manifest.shards if shard.split == split)
    return [tokens, f"{manifest.documents(split):,}", f"{size:,}"]


def _made_from(folder: Path) -> str:
    """The text of which 'pretrain data prepare' made a folder; empty if it does not say."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        files = [without_secrets(str(file)) or embedded_name() for file, *_ in plan["text"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f", made from {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}"


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
