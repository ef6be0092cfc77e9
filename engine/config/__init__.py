"""One typed configuration: YAML presets, dotted overrides, clear errors, saved with every run.

    config = load_config("mosi", ["mode=faithful", "train.lr=5e-4"])  # a preset
    config = load_config("my.yaml")  # a file; `preset: mosi` in it starts from that preset
    config.save("run/config.yaml")

Every problem is a `ConfigError`: one line that names the key, what was found and what is allowed. `Config` lists the
settings, `sections` those of each group, `presets` loads them, `reading` reads YAML, `help` lists keys, and `problems`
writes errors.
"""

from engine.config.config import Config
from engine.config.help import Key, common_keys, key_table, keys, text_of
from engine.config.presets import (
    Preset,
    changed,
    load_config,
    presets,
    read_value,
    require_config,
    setting_type,
)
from engine.config.reading import FILE_BYTES, parse_yaml, yaml_problem
from engine.config.section import MOST_EPOCHS, Section
from engine.config.sections import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
)
from engine.vocabulary import ACTIVATIONS, BOUNDS, MODALITIES

__all__ = [
    "ACTIVATIONS",
    "BOUNDS",
    "FILE_BYTES",
    "MODALITIES",
    "MOST_EPOCHS",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "Key",
    "ModelConfig",
    "ObjectiveConfig",
    "OutputConfig",
    "Preset",
    "ScheduleConfig",
    "Section",
    "TextConfig",
    "TrainConfig",
    "changed",
    "common_keys",
    "key_table",
    "keys",
    "load_config",
    "parse_yaml",
    "presets",
    "read_value",
    "require_config",
    "setting_type",
    "text_of",
    "yaml_problem",
]
