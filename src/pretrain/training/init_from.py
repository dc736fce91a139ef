"""Begin with the weights of another model: ``train.init_from``.

resolve_init, before the run is made  →  config.toml says what is really built  →  load_initial fills the model
"""

from __future__ import annotations

import dataclasses

import torch

from pretrain.config import Config, ModelConfig
from pretrain.errors import UsageError
from pretrain.hf.convert import config_from_hf, load_weights, read_config
from pretrain.io import expand
from pretrain.model import GPT
from pretrain.model.transformer import layer_kinds, window_length
from pretrain.runs.run import Run
from pretrain.sizing import resolve
from pretrain.tokenizer import Tokenizer

HF = "hf:"
FREE = ("context_length", "document_mask", "dropout", "init")
"""Fields of the model that are choices of the training to come; all others are those of the weights."""


def resolve_init(config: Config) -> Config:
    """The configuration with model and tokenizer as ``train.init_from`` decides them; resolved once, it stays.

    A Hugging Face checkpoint brings its architecture; a run must have the one that is asked for.

    Raises:
        UsageError: its architecture differs, cannot be represented, or has fewer learned positions than asked for.
        CheckpointError: there is no such checkpoint or run.
    """
    source = config.train.init_from
    if not source:
        return config
    if source.startswith(HF):
        folder = expand(source.removeprefix(HF))
        theirs = config_from_hf(read_config(folder))
        ours = dataclasses.replace(
            _fixed_windows(theirs),
            depth=config.model.depth,
            vocab_multiple=config.model.vocab_multiple,
            **{name: getattr(config.model, name) for name in FREE},
        )
    else:
        run = Run.open(source)
        folder, theirs = run.folder, run.config.model
        wanted, _ = resolve(config, run.tokenizer().vocab_size)  # the dial may still have to set its size
        has, wants = (dataclasses.asdict(_fixed_windows(model)) for model in (theirs, wanted.model))
        meaning = [name for name in has if name not in (*FREE, "depth")]
        if different := [f"model.{n} {has[n]!r} → {wants[n]!r}" for n in meaning if has[n] != wants[n]]:
            raise UsageError(
                f"{source} is another model than this run asks for: {'; '.join(different)}; give these fields, or train"
                f" with {run.folder / 'config.toml'} as the recipe"
            )
        ours = config.model
    if ours.position == "learned" and ours.context_length > theirs.context_length:
        raise UsageError(
            f"{source} has learned {theirs.context_length} positions, fewer than model.context_length"
            f" {ours.context_length}; use --model.context_length {theirs.context_length} or less"
        )
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    tokenizer = dataclasses.replace(config.tokenizer, kind=str(vocabulary))
    return dataclasses.replace(config, model=ours, tokenizer=tokenizer)


def load_initial(model: GPT, config: Config, tokenizer: Tokenizer) -> None:
    """Fill ``model`` in place with the weights that ``train.init_from`` names; a run's are those of its model.

    Raises:
        UsageError: the run has another tokenizer.
        CheckpointError: weights are missing, damaged or of another shape.
    """
    source = config.train.init_from
    if source.startswith(HF):
        load_weights(model, expand(source.removeprefix(HF)))
        return
    run = Run.open(source)
    if run.tokenizer().hf.get_vocab() != tokenizer.hf.get_vocab():  # another BOS token is no hindrance
        raise UsageError(
            f"{source} was trained with another tokenizer; use --tokenizer.kind {run.folder / 'tokenizer.json'}"
        )
    weights = dict(run.load_model().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])  # a shorter context has fewer learned positions


def _fixed_windows(model: ModelConfig) -> ModelConfig:
    """The same model with its windows as a number, which no longer changes with the context length."""
    return dataclasses.replace(model, window=window_length(model) if "S" in layer_kinds(model) else 0)
