"""The configuration of a run: its fields (``schema``), and how they are read and compared (``load``)."""

from pretrain.config.load import (
    FREE_SECTIONS,
    HORIZONS,
    as_chosen,
    as_given,
    config_from_dict,
    config_to_dict,
    differences,
    load_config,
    recipe_names,
    recipe_summary,
    recipe_text,
)
from pretrain.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    FitConfig,
    GroupConfig,
    GuardConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SampleConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
