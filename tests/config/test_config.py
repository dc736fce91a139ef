import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from pretrain.cli.parsing import parse
from pretrain.cli.train import Train
from pretrain.config import (
    Config,
    GroupConfig,
    ModelConfig,
    config_from_dict,
    config_to_dict,
    differences,
    load_config,
    recipe_names,
    recipe_summary,
)
from pretrain.errors import UsageError


def test_every_recipe_loads_and_says_what_it_is():
    assert "quickstart" in recipe_names()
    for name in recipe_names():
        assert isinstance(load_config(name), Config)
        assert len(recipe_summary(name)) > 20


def test_a_config_survives_toml():
    groups = {"optim.groups.head.betas": [0.8, 0.96], "optim.groups.embedding.weight_decay": 0}
    config = load_config(
        "quickstart", **{"model.layers": 3, "data.paths": ["a", "b"], "checkpoint.at": [5, 50], **groups}
    )
    assert config.optim.groups == {"head": GroupConfig(betas=(0.8, 0.96)), "embedding": GroupConfig(weight_decay=0.0)}
    tree = tomllib.loads(tomli_w.dumps(config_to_dict(config)))
    assert config_from_dict(tree, "test") == config


def test_a_single_prompt_by_its_older_name(tmp_path):
    """As every config.toml has it that was written while there was one prompt."""
    (tmp_path / "old.toml").write_text('[sample]\nprompt = "Ada"\nmax_tokens = 3\n')
    config = load_config(str(tmp_path / "old.toml"))
    assert (config.sample.prompts, config.sample.max_tokens) == (("Ada",), 3)
    assert load_config("quickstart", **{"sample.prompt": ""}).sample.prompts == ("",)
    recipe = parse(Train, ["verdict"], "train")
    assert recipe.config.sample.prompts == ("Every effort moves you",)
    given = parse(Train, ["verdict", "--sample.prompt", "Ada", "--sample.prompts", "", "the fox"], "train")
    assert given.config.sample.prompts == ("Ada", "", "the fox")
    with pytest.raises(UsageError, match=r"sample.prompt is the older name of sample.prompts"):
        load_config(str(tmp_path / "old.toml"), **{"sample.prompts": ["the fox"]})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model.layrs", 4, "did you mean 'model.layers'?"),
        ("modl.layers", 4, "did you mean 'model'?"),
        ("layers", 4, "SECTION.NAME"),
        ("model.layers", "four", "model.layers must be int, not 'four'"),
        ("model.layers", True, "model.layers must be int"),
        ("model.layers", 0, "model.layers must be at least 1, not 0"),
        ("model.mlp", "relu", "model.mlp must be one of gelu"),
        ("data.paths", "book.txt", "data.paths must be a list"),
        ("optim.betas", [0.9], "optim.betas must be a list of length 2, not [0.9]"),
        ("model.heads", 5, "model.heads 5 does not divide model.width"),
        ("model.kv_heads", 3, "model.kv_heads 3 does not divide model.heads"),
        ("train.batch_tokens", 1000, "try --train.batch_tokens"),
        ("train.micro_batch", 7, "train.micro_batch 7 does not divide the"),
        ("tokenizer.vocab_size", 100, "at least 257"),
        ("data.val_fraction", 1.5, "data.val_fraction must be below 1.0, not 1.5"),
        ("schedule.final", 2, "schedule.final must be at most 1.0, not 2"),
        ("checkpoint.at", [5, 0], "checkpoint.at must be at least 1, not 0"),
        ("data.weights", ["a"], "data.weights must be float, not 'a'"),
        ("log.backends", ["wandbb"], "trackio, not 'wandbb'; did you mean 'wandb'?"),
        ("optim.lr", 0, "optim.lr must be above 0.0, not 0"),
        ("optim.lr", float("nan"), "optim.lr must be above 0.0, not nan"),
        ("guard.hang_factor", 0.5, "guard.hang_factor must be at least 1.0, not 0.5"),
        ("model.rope_fraction", 0.0, "model.rope_fraction 0.0 of the head dimension 64 is not an even number"),
        ("model.window_pattern", "LXS", "model.window_pattern must be of the form '^[LS]+$', not 'LXS'"),
        ("data.field", "", "data.field must be a text that is not empty, not ''"),
        ("optim.groups", 3, "optim.groups must be a table of tables, not 3"),
        ("optim.groups.head", 3, "[optim.groups.head] must be a table of fields, not 3"),
        ("optim.groups.head.beta", [0.8, 0.9], "'optim.groups.head.beta'; did you mean 'optim.groups.head.betas'?"),
        ("optim.groups.head.lr", -1, "optim.groups.head.lr must be at least 0.0, not -1"),
        ("optim.groups.head.betas", [0.8], "optim.groups.head.betas must be a list of length 2, not [0.8]"),
        ("optim.groups.head.betas", [0.8, 1], "optim.groups.head.betas must be below 1.0, not 1"),
        ("optim.groups.head.weight_decay", "x", "optim.groups.head.weight_decay must be float, not 'x'"),
        ("train.seed", 2**63, "train.seed must be at most 9223372036854775807"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(field: str, value: object, expected: str):
    with pytest.raises(UsageError) as error:
        load_config("quickstart", **{field: value})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"layers": "4"}, "model.layers must be int, not '4'"),
        ({"mlp": "relu"}, "model.mlp must be one of gelu, gelu_tanh, relu2, swiglu, not 'relu'; did you mean 'relu2'?"),
        ({"dropout": 1}, "model.dropout must be below 1.0, not 1"),
    ],
)
def test_python_gets_the_same_checks(values: dict[str, Any], expected: str):
    for make in (ModelConfig, lambda **values: dataclasses.replace(ModelConfig(), **values)):
        with pytest.raises(ValueError, match=re.escape(expected)):
            make(**values)


def test_integers_become_floats_and_lists_tuples():
    assert type(load_config(**{"optim.lr": np.float64(0.5)}).optim.lr) is float  # as numpy.logspace gives them
    assert load_config(**{"optim.betas": [np.float64(0.5), 0.9]}).optim.betas == (0.5, 0.9)
    assert load_config(**{"data.paths": [Path("a"), "b"], "tokenizer.kind": Path("c")}).data.paths == ("a", "b")
    config = load_config("quickstart", **{"optim.weight_decay": 1, "optim.betas": [0, 0.5], "checkpoint.at": [3]})
    assert repr(config.optim.weight_decay) == "1.0"
    assert repr(config.optim.betas) == "(0.0, 0.5)"
    assert config.checkpoint.at == (3,)


def test_the_dial_sets_what_is_0():
    """Which the model alone may leave open, but no configuration without a dial."""
    assert Config(model=ModelConfig(depth=4, layers=0, width=0, heads=0)).model.layers == 0
    with pytest.raises(ValueError, match=r"model\.width must be at least 1, not 0"):
        Config(model=ModelConfig(width=0))


def test_toml_files_are_checked_like_everything_else(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nlayers = 2\nwdith = 64\n")
    with pytest.raises(UsageError, match=r"mine.toml: unknown field 'model.wdith'; did you mean 'model.width'\?"):
        load_config(str(file))
    file.write_text("model = 3\n")
    with pytest.raises(UsageError, match=r"\[model\] must be a table of fields, not 3"):
        load_config(str(file))
    with pytest.raises(UsageError, match=r"\[model\] must be a table of fields, not 3"):
        load_config(str(file), **{"model.layers": 2})
    file.write_text("[model\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(str(file))
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        load_config("quikstart")


def test_only_differences_that_change_what_is_learned_count():
    config = load_config("quickstart")
    assert differences(config, load_config("quickstart", **{"eval.every": 7, "train.micro_batch": 1})) == []
    changed = differences(config, load_config("quickstart", **{"model.layers": 9, "train.seed": 2}))
    assert [line.split()[0] for line in changed] == ["model.layers", "train.seed"]
    groups = load_config("quickstart", **{"optim.groups.head.lr": 0.5})
    assert differences(config, groups)[0] == "optim.groups.head.lr None → 0.5"
    assert differences(groups, config)[0] == "optim.groups.head.lr 0.5 → None"


def test_every_field_has_help():
    """The docstring below a field is its help text; tyro reads it from the source."""
    import inspect

    for section in dataclasses.fields(Config):
        source = inspect.getsource(type(getattr(Config(), section.name)))
        for field in dataclasses.fields(getattr(Config(), section.name)):
            after = source.split(f"\n    {field.name}: ", 1)[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), f"{section.name}.{field.name} has no docstring"


@pytest.mark.parametrize(
    ("weights", "stages", "expected"),
    [
        ([], ["0.8: 1 2"], "data.stages changes data.weights, and there are none; give those of the first stage"),
        ([1, 2], ["0.8 1 2"], "must be of the form 'SHARE: WEIGHTS', such as '0.8: 0.2 0.8', with a weight for each"),
        ([1, 2], ["1.2: 1 2"], "'SHARE: WEIGHTS'"),
        ([1, 2], ["0.8: 1 -2"], "'SHARE: WEIGHTS'"),
        ([1, 2], ["0.8: 1 nan"], "'SHARE: WEIGHTS'"),
        ([1, 2], ["0.8: 1"], "0.8: 1 has 1 values; give one for each of data.paths"),
        ([1, 2], ["0.8: 1 1", "0.5: 1 1"], "data.stages begin at 0.8, 0.5; each must be later than the one before"),
        ([1, 2], ["0.0: 1 1"], "each must be later than the one before"),
        ([1, 2], ["0.8: 0 0"], "0.8: 0 0 are all 0; give one above"),
        ([0, 0], ["0.8: 1 1"], "data.weights are all 0; give one above"),
        ([1, 0], ["0.8: 1 0"], "data.weights gives b nothing in any stage; leave it out of data.paths"),
        ([1, 0], [], "data.weights gives b nothing"),
    ],
)
def test_stages_of_a_mixture_that_cannot_be(weights: list[float], stages: list[str], expected: str):
    fields = {"data.paths": ["a", "b"], "data.weights": weights, "data.stages": stages, "train.steps": 10}
    with pytest.raises(UsageError) as error:
        load_config("quickstart", **fields)
    assert expected in str(error.value)


def test_stages_of_a_mixture_begin_at_the_nearest_batch():
    fields = {"data.paths": ["a", "b"], "data.weights": [1, 0], "train.steps": 10}
    config = load_config("quickstart", **fields, **{"data.stages": [".26: 1 1", "0.85:0.5 2"]})
    assert config.mixtures == [(0, (1, 0)), (3, (1, 1)), (8, (0.5, 2))]
