"""Checks that settings, models and feedback are compatible, in the order in which they run.

A field's range is declared with the field; this module checks several fields together, and fields against the inputs.
"""

from __future__ import annotations

import dataclasses

from kto_jax.config import Config, ConfigError
from kto_jax.data.index.index import Index
from kto_jax.data.rows.sources import sources_of
from kto_jax.models.config import TransformerConfig
from kto_jax.models.quantised import QUANTISED
from kto_jax.objectives import Objective


def check_conflicts(config: Config, objective: Objective) -> None:
    """Refuses conflicting settings; reads no file.

    Raises:
      ConfigError: naming the field.
    """
    _check_unused(config, objective)
    _check_quantised_is_frozen(config)
    _check_adapters(config)
    _check_precompute(config, objective)
    _check_best(config)
    _check_batch_has_partners(config, objective)
    _check_only_scores_have_rules(config)
    _check_scores_as_rewards(config)


def check_start(config: Config, *, has_adapters: bool) -> None:
    """Refuses a start from adapters that are not there, and one that would leave them out.

    Raises:
      ConfigError: naming the field.
    """
    if config.lora.start == "continue" and not has_adapters:
        raise ConfigError(
            f'config.lora.start="continue" trains the adapters of a folder further, and config.model.path='
            f"{config.model.path!r} holds none. It must be a folder with adapter_config.json. Set config.model.path, "
            'or config.lora.start to "new".'
        )
    if config.model.init == "random" and has_adapters:
        raise ConfigError(
            f'config.model.init="random" leaves out the weights, and config.model.path={config.model.path!r} holds '
            'adapters to add to them. Adapters need their base. Set config.model.init to "pretrained".'
        )


def check_models(config: Config, policy: TransformerConfig, reference: TransformerConfig) -> None:
    """Refuses lengths beyond the models' context, and a reference of another architecture.

    Raises:
      ConfigError: naming both sides.
    """
    context = min(policy.max_length, reference.max_length)
    if config.data.max_length > context:
        raise ConfigError(
            f"config.data.max_length={config.data.max_length} is beyond the model's context of {context} tokens. "
            f"Allowed: up to {context}. Set config.data.max_length."
        )
    # These fields change neither the weights nor the logits.
    unrelated = ("family", "bos_id", "eos_ids", "max_length", "initializer_range")
    differing = [
        f"{field.name} {getattr(reference, field.name)!r} against {getattr(policy, field.name)!r}"
        for field in dataclasses.fields(policy)
        if field.name not in unrelated and getattr(reference, field.name) != getattr(policy, field.name)
    ]
    if differing:
        raise ConfigError(
            f"config.reference.path={config.reference.path!r} has another architecture than the policy: "
            f"{', '.join(differing)}. Both must be equal. Set config.reference.path."
        )


def check_output_head(config: Config, is_reward_model: bool) -> None:
    """Refuses a reward model as the policy of an objective that needs an output head.

    Raises:
      ConfigError: naming the model.
    """
    if config.objective.name != "reward" and is_reward_model:
        raise ConfigError(
            f"config.model.path={config.model.path!r} is a reward model, which has no output head. Allowed: a language "
            "model, or config.objective.name=reward. Set config.model.path."
        )


def check_held_out(config: Config, *, is_held_out: bool) -> None:
    """Refuses early stopping and the best checkpoint without held-out feedback.

    Raises:
      ConfigError: naming the fields.
    """
    if (setting := _comparing_setting(config)) and not is_held_out:
        raise ConfigError(
            f"{setting} compares evaluations, and no feedback that counts is held out. Some is needed. Set "
            "config.data.holdout or config.data.eval, or take the setting out."
        )


def _comparing_setting(config: Config) -> str:
    """The setting that compares evaluations; "" if there is none."""
    if config.evaluation.patience:
        return f"config.evaluation.patience={config.evaluation.patience}"
    return 'config.export.step="best"' if config.export.step == "best" else ""


def _check_best(config: Config) -> None:
    """Refuses to compare evaluations that cannot be compared, or that there are not."""
    conflicts = [
        ("reference.sync_every", config.reference.sync_every > 0, "figures against references that differ do not say "
         "which policy is better"),
        ("evaluation.every", config.evaluation.every == 0, "there is one evaluation, at the end"),
    ]  # fmt: skip
    for field, conflict, why in conflicts:
        if (setting := _comparing_setting(config)) and conflict:
            section, name = field.split(".")
            raise ConfigError(
                f"{setting} cannot be used with config.{field}={getattr(getattr(config, section), name)}: {why}. It is "
                f"for a frozen reference and several evaluations. Set config.{field}, or take the setting out."
            )


def check_judges(config: Config, index: Index) -> None:
    """Refuses a judge without feedback to be fitted on.

    Raises:
      ConfigError: naming the share to raise.
    """
    counts = index.manifest["splits"]["judge"]
    wanted = config.samples.num_prompts and "feedback" in config.samples.judges
    if wanted and not (counts["desirable"] and counts["undesirable"]):
        raise ConfigError(
            f'config.samples.judges has "feedback", for which config.data.judge_holdout={config.data.judge_holdout} '
            f"leaves {counts['desirable']} desirable and {counts['undesirable']} undesirable completions. It needs "
            "both. Raise config.data.judge_holdout, or remove the judge."
        )


def _check_unused(config: Config, objective: Objective) -> None:
    """Refuses a field that is set but not used."""
    name = f"the objective {config.objective.name!r}"
    scored = [source.data for source in sources_of(config.data) if source.data.format == "scores"]
    by_threshold = any(data.score_rule == "threshold" for data in scored)
    rules = [
        ("reference.path", objective.uses_reference, f"{name} holds no reference"),
        ("reference.param_dtype", objective.uses_reference or config.lora.rank > 0, f"{name} holds no reference"),
        ("reference.precompute", objective.uses_reference, f"{name} holds no reference"),
        ("reference.sync_every", objective.uses_reference, f"{name} holds no reference"),
        ("reference.sync_mix", config.reference.sync_every > 0, "reference.sync_every is 0"),
        *(
            (f"lora.{field.name}", config.lora.rank > 0, "lora.rank is 0")
            for field in dataclasses.fields(config.lora)
            if field.name != "rank"
        ),
        ("lora.zero", config.lora.start == "new", 'lora.start is "continue"'),
        ("reference.base", bool(config.reference.path), "reference.path is empty"),
        ("samples.num_prompts", objective.scalar_head != "reward", f"{name} writes no text"),
        ("optimizer.value_clip_norm", objective.scalar_head == "value", f"{name} has no value head"),
        ("data.score_rule", bool(scored), "no source holds scores, as data.format says"),
        ("data.score_threshold", by_threshold, "no score is compared with it"),
    ]
    defaults = Config()
    for field, has_use, why in rules:
        section, option = field.split(".")
        value = getattr(getattr(config, section), option)
        if value != getattr(getattr(defaults, section), option) and not has_use:
            raise ConfigError(
                f"config.{field}={value!r} has no use: {why}. It must then keep its default. Remove config.{field}, or "
                "change the setting that it depends on."
            )


def _check_quantised_is_frozen(config: Config) -> None:
    kept, moves = config.reference.param_dtype, config.reference.sync_every
    if kept in QUANTISED and moves:
        raise ConfigError(
            f"config.reference.param_dtype={kept!r} cannot be used with config.reference.sync_every={moves}: each move "
            "would round the reference again. It is for a frozen reference. Set config.reference.param_dtype to "
            "bfloat16, or remove config.reference.sync_every."
        )


def _check_adapters(config: Config) -> None:
    """Refuses settings that conflict with low-rank adapters."""
    has_tower = config.objective.value_tower
    conflicts = {
        "objective.value_tower": (has_tower, "False", "a tower trains all weights of a second model"),
        "reference.path": (config.reference.path, '""', "the reference is the policy without its adapters"),
        "reference.sync_every": (config.reference.sync_every, "0", "the frozen weights cannot move"),
        "model.param_dtype": (
            config.model.param_dtype if config.model.param_dtype != "float32" else "",
            '"float32"',
            "adapters are small and stored in float32; config.reference.param_dtype is the dtype of the frozen weights",
        ),
    }
    if config.lora.rank and config.model.added_tokens and "embedding" not in config.lora.modules_to_save:
        raise ConfigError(
            f"config.model.added_tokens={config.model.added_tokens!r} cannot be used with config.lora.rank="
            f"{config.lora.rank} alone: the embedding of new tokens would stay what it is at the start. It must be "
            "trained. Set config.lora.modules_to_save=embedding (embedding,head if the head is not tied)."
        )
    for field, (value, allowed, why) in conflicts.items():
        if config.lora.rank and value:
            raise ConfigError(
                f"config.{field}={value!r} cannot be used with config.lora.rank={config.lora.rank}: {why}. "
                f"Allowed: {allowed}. Set config.{field} to it, or config.lora.rank to 0."
            )


def _check_precompute(config: Config, objective: Objective) -> None:
    """Refuses to precompute log-probabilities of a reference that moves, or that are needed per token."""
    by_token = "log-probabilities are stored per completion, and {} needs them per token"
    conflicts = [
        (
            config.reference.sync_every > 0,
            f"config.reference.sync_every={config.reference.sync_every} moves the reference",
        ),
        (objective.humanline is not None, by_token.format("config.objective.humanline=True")),
        (
            objective.scalar_head == "value" or objective.reads_tokens,
            by_token.format(f"the objective {config.objective.name!r}"),
        ),
    ]
    for conflict, why in conflicts:
        if config.reference.precompute and conflict:
            raise ConfigError(
                f"config.reference.precompute=True cannot be used: {why}. It is for a frozen reference and whole "
                "completions. Remove config.reference.precompute, or change the setting that conflicts."
            )


def _check_batch_has_partners(config: Config, objective: Objective) -> None:
    if config.batch_size < 2 and objective.first_pass == "unmatched":
        raise ConfigError(
            f"config.batch_size={config.batch_size} leaves no other example, whose completion z0 needs. The objective "
            f"{config.objective.name!r} needs 2 or more. Set config.batch_size."
        )


def _check_only_scores_have_rules(config: Config) -> None:
    for source in sources_of(config.data):
        if source.scale is not None and source.data.format != "scores":
            raise ConfigError(
                f"the source {source.path!r} of config.data has its own score_rule or score_threshold, and its format "
                f"is {source.data.format!r}. Rules apply only to scores. Remove it, or set its format."
            )


def _check_scores_as_rewards(config: Config) -> None:
    unscored = [source for source in sources_of(config.data) if source.data.format != "scores"]
    if config.objective.rewards == "scores" and unscored:
        raise ConfigError(
            f'config.objective.rewards="scores" needs scores, and the format of {unscored[0].path!r} is '
            f'{unscored[0].data.format!r}. Set config.data.format to "scores", or objective.rewards to "labels".'
        )


def check_sampled(config: Config, objective: Objective) -> None:
    """Refuses an objective that reads figures of sampled tokens, for feedback without them.

    Raises:
      ConfigError: naming the setting.
    """
    if objective.reads_sampled and not config.data.sampled_tokens:
        raise ConfigError(
            f"config.objective.name={config.objective.name!r} reads the log-probabilities and advantages that online "
            "training writes beside each sampled token, and config.data.sampled_tokens is False. Train with python -m "
            "kto_jax.online, or set config.data.sampled_tokens for the feedback of one of its rounds."
        )
