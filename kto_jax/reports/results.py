"""What a finished run leaves: the policy in Hugging Face format, completions before and after, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import Config, to_dict
from kto_jax.data.rows.sources import sources_of
from kto_jax.devices import processes
from kto_jax.models.model import Model
from kto_jax.models.weights.huggingface import save_hugging_face
from kto_jax.models.weights.peft import save_adapters
from kto_jax.reports import samples
from kto_jax.reports.page import write_report
from kto_jax.training.inputs import Inputs
from kto_jax.training.logs import console, read_metrics
from kto_jax.training.run_folder import RunFolder
from kto_jax.training.state import TrainState


def write_samples(name: str, model: Model, state: TrainState, inputs: Inputs, run: RunFolder, config: Config) -> None:
    """Completes the held-out prompts with the policy, and keeps them as samples_NAME.json.

    What the run has written already stays, so that a run that is continued compares with its true beginning.
    """
    path = run.path / f"samples_{name}.json"
    prompts = samples.held_out_prompts(inputs.index, config.samples.num_prompts)
    if not prompts or processes.as_first_says(path.exists()):
        return
    if inputs.controls is not None:
        prompts = [np.concatenate([prompt, inputs.controls[1]]) for prompt in prompts]
    console.print(f"completing {len(prompts)} held-out prompts")
    # A reference that moves is no measure of what changed.
    reference = {} if config.reference.sync_every else state.reference
    policy = model.policy(state.policy, state.reference)
    written = samples.write_samples(model, policy, reference, run.tokenizer, prompts, config.samples, config.seed)
    if processes.is_first():
        samples.save_samples(path, written)


def write_results(
    model: Model, state: TrainState, inputs: Inputs, run: RunFolder, config: Config, command: str
) -> None:
    """Writes policy/, of low-rank adapters also adapter/, and report.html, and says what the judges found."""
    folder = run.path
    card = model_card(folder.name, config, inputs)
    save_hugging_face(
        folder / "policy",
        model,
        model.policy(state.policy, state.reference),
        tokenizer_dir=run.tokenizer.directory,
        stop_ids=run.tokenizer.stop_ids,
        model_card=card,
        dtype=config.model.param_dtype,
    )
    if config.lora.rank:
        save_adapters(
            folder / "adapter",
            model,
            state.policy,
            lora=config.lora,
            base=None if config.model.init == "random" else _base(config.model.path),
            tokenizer_dir=run.tokenizer.directory,
            model_card=card.replace("library_name: transformers", "library_name: peft"),
        )
    write_samples("after", model, state, inputs, run, config)
    if processes.is_first():
        _write_report(inputs, run, config, command)
    # However long the judges take, nobody leaves before the report is written.
    processes.tell("written")


def _base(path: str) -> str:
    """Where others find the frozen weights: a folder by its whole path."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _write_report(inputs: Inputs, run: RunFolder, config: Config, command: str) -> None:
    folder = run.path
    verdicts, notes, rows = _compare(inputs, run, config)
    write_report(
        folder / "report.html",
        title=folder.name,
        command=command,
        config=to_dict(config),
        manifest=inputs.index.manifest,
        metrics=read_metrics(folder / "metrics.jsonl"),
        samples=rows,
        verdicts=verdicts,
        notes=notes,
    )
    for verdict in verdicts:
        console.print("{judge}, {figure}: {before:.3f} before, {after:.3f} after".format(**verdict), highlight=False)


def _compare(
    inputs: Inputs, run: RunFolder, config: Config
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, str]]]:
    """Verdicts of the judges, notes on them, and completions side by side; nothing where no samples were asked for."""
    paths = [run.path / f"samples_{name}.json" for name in ("before", "after")]
    if not all(path.exists() for path in paths):
        return [], [], []
    before, after = (samples.load_samples(path) for path in paths)
    verdicts, notes = samples.judge(inputs.index, run.tokenizer, config.samples.judges, before, after)
    triples = zip(before.prompts, before.completions, after.completions, strict=True)
    return verdicts, notes, [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in triples]


def _of_adapters(config: Config) -> list[str]:
    """What the model card says of low-rank adapters."""
    lora, kept = config.lora, config.reference.param_dtype
    rounded = f", rounded to {kept} while they were trained: policy/ is the sum with those" if kept != "float32" else ""
    return [
        f"low-rank adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}, beside frozen "
        f"weights{rounded}"
    ]


def model_card(name: str, config: Config, inputs: Inputs) -> str:
    """README.md of the policy: what was trained, on what, by which configuration."""
    objective = config.objective.name
    task = "text-classification" if inputs.objective.scorer == "reward" else "text-generation"
    options = ", ".join(f"{name} {value}" for name, value in inputs.objective.options.items()) or "none"
    reference = f"reference: `{config.reference.path or config.model.path}`" if inputs.objective.uses_reference else ""
    if config.reference.sync_every:
        reference += f", moved by {config.reference.sync_mix} to the policy every {config.reference.sync_every} steps"
    sources = ", ".join(
        f"`{source.path}`" + (f" (weight {source.weight:g})" if source.weight != 1 else "")
        for source in sources_of(config.data)
        if source.split == "train"
    )
    facts = [
        f"options: {options}",
        f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate}, {config.optimizer.schedule} "
        f"schedule, {config.optimizer.warmup_steps} warm-up steps, clipped at {config.optimizer.clip_norm}",
        *([reference] if reference else []),
        *(_of_adapters(config) if config.lora.rank else []),
        f"seed {config.seed}",
        *([f"sample behind `{config.objective.good_control}`, after the template"] if inputs.controls else []),
    ]
    return (
        f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{objective}, kto_jax]
---

# {name}

`{config.model.path}`, trained with {objective.upper()} by kto_jax: {inputs.num_steps} steps of {config.batch_size}
{inputs.objective.examples} from {sources}, an epoch of which has {inputs.num_desirable} desirable and
{inputs.num_undesirable} undesirable completions of {inputs.index.manifest["splits"]["train"]["prompts"]} prompts (index
{inputs.index.manifest["key"][:16]}).

"""
        + "".join(f"- {fact}\n" for fact in facts)
        + """
Method of KTO: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", ICML 2024, arXiv
2402.01306. config.json, manifest.json and metrics.jsonl of the run hold the rest. The licence is the base model's.
"""
    )
