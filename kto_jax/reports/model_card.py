"""README.md of an exported policy."""

from __future__ import annotations

from kto_jax.config import Config
from kto_jax.data.rows.sources import sources_of
from kto_jax.training.inputs import Inputs


def model_card(name: str, config: Config, inputs: Inputs, num_steps: int) -> str:
    """Returns the model card: what was trained, for how many steps, on what data, with which configuration."""
    objective = config.objective.name
    task = "text-classification" if inputs.objective.scalar_head == "reward" else "text-generation"
    return (
        f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{objective}, kto_jax]
---

# {name}

`{config.model.path}`, trained with {objective.upper()} by kto_jax: {num_steps} steps of {config.batch_size}
{inputs.objective.examples} from {_sources(config)}. An epoch has {inputs.num_desirable} desirable and
{inputs.num_undesirable} undesirable completions of {inputs.index.manifest["splits"]["train"]["prompts"]} prompts (index
{inputs.index.manifest["key"][:16]}).

"""
        + "".join(f"- {fact}\n" for fact in _facts(config, inputs))
        + """
Method of KTO: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", ICML 2024, arXiv
2402.01306. The run's config.json, manifest.json and metrics.jsonl have the details. The licence is the base model's.
"""
    )


def _sources(config: Config) -> str:
    return ", ".join(
        f"`{source.path}`" + (f" (weight {source.weight:g})" if source.weight != 1 else "")
        for source in sources_of(config.data)
        if source.split == "train"
    )


def _facts(config: Config, inputs: Inputs) -> list[str]:
    options = ", ".join(f"{name} {value}" for name, value in inputs.objective.options.items()) or "none"
    optimizer = config.optimizer
    facts = [
        f"options: {options}",
        f"{optimizer.name}, learning rate {optimizer.learning_rate}, {optimizer.schedule} schedule, "
        f"{optimizer.warmup_steps} warm-up steps, gradient clipped at norm {optimizer.clip_norm}",
    ]
    if inputs.objective.uses_reference:
        facts.append(_reference(config))
    if config.lora.rank:
        facts.append(_adapters(config))
    facts.append(f"weights in {config.export.dtype}, trained in {config.model.param_dtype}")
    facts.append(f"seed {config.seed}")
    if inputs.controls:
        facts.append(f"sample with `{config.objective.good_control}` after the chat template's generation prompt")
    return facts


def _reference(config: Config) -> str:
    text = f"reference: `{config.reference.path or config.model.path}`"
    if config.reference.sync_every:
        text += (
            f", synced every {config.reference.sync_every} steps: {config.reference.sync_mix} · policy + "
            f"{1 - config.reference.sync_mix:g} · reference"
        )
    return text


def _adapters(config: Config) -> str:
    lora, dtype = config.lora, config.reference.param_dtype
    rounded = f", rounded to {dtype} during training; policy/ has them rounded too" if dtype != "float32" else ""
    named = [name for name, used in (("DoRA", lora.dora), ("rank-stabilised", lora.rank_stabilised)) if used]
    kinds = f" ({', '.join(named)})" if named else ""
    others = [f"other {name}s: {', '.join(pattern)}" for name, pattern in
              (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)) if pattern]  # fmt: skip
    others += [f"dropout {lora.dropout:g}"] if lora.dropout else []
    others += [f"{' and '.join(lora.modules_to_save)} trained whole"] if lora.modules_to_save else []
    return (
        f"low-rank adapters{kinds} of rank {lora.rank}, alpha {lora.alpha:g}, "
        f"on {', '.join(lora.targets)}{''.join(f'; {other}' for other in others)}; the base's weights are "
        f"frozen{rounded}"
    )
