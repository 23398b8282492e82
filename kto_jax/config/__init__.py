"""Configuration: frozen dataclasses, made and checked before any device is touched.

A config file defines `get_config()`, which starts from `default_config()` and sets fields. Any field can be set on the
command line: `--config.objective.beta=0.2`. `resolve` turns the result into a `Config`.
"""

from kto_jax.config.data_fields import SOURCE_FIELDS, DataConfig
from kto_jax.config.errors import ConfigError, OutOfMemory, TransientError
from kto_jax.config.fields import (
    LORA_MATRICES,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    ExportConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProcessesConfig,
    ProfileConfig,
    ReferenceConfig,
    RouterConfig,
    SamplesConfig,
    WatchConfig,
)
from kto_jax.config.names import nearest
from kto_jax.config.resolve import check_overrides, default_config, one_host_config, online_config, resolve, to_dict

__all__ = [
    "LORA_MATRICES",
    "SOURCE_FIELDS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OutOfMemory",
    "ProcessesConfig",
    "ProfileConfig",
    "ReferenceConfig",
    "RouterConfig",
    "SamplesConfig",
    "TransientError",
    "WatchConfig",
    "check_overrides",
    "default_config",
    "nearest",
    "one_host_config",
    "online_config",
    "resolve",
    "to_dict",
]
