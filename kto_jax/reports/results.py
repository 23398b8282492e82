"""The results of a run: the policy in Hugging Face format, completions before and after training, the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import Config, to_dict
from kto_jax.config.packages import is_installed
from kto_jax.devices import processes
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.export import Rounding, save_hugging_face
from kto_jax.models.weights.peft import save_adapters
from kto_jax.models.weights.value_head import FILE as VALUE_HEAD
from kto_jax.models.weights.value_head import save_value_head
from kto_jax.reports import samples
from kto_jax.reports.captions import captions_of
from kto_jax.reports.model_card import model_card
from kto_jax.training.inputs import Inputs
from kto_jax.training.logs import console, read_metrics
from kto_jax.training.reference import is_rounded
from kto_jax.training.run_folder import RunFolder
from kto_jax.training.state import TrainState

REPORT_PACKAGES = ("matplotlib", "jinja2")
"""Packages that a report needs."""


def write_samples(name: str, model: Model, state: TrainState, inputs: Inputs, run: RunFolder, config: Config) -> None:
    """Completes the held-out prompts with the policy and writes samples_NAME.json.

    An existing file is kept, so that a resumed run still compares with the policy before the first step.
    """
    path = run.path / f"samples_{name}.json"
    prompts = samples.held_out_prompts(inputs.index, config.samples.num_prompts)
    if not prompts or processes.broadcast_bool(path.exists()):
        return
    if inputs.controls is not None:
        prompts = [np.concatenate([prompt, inputs.controls[1]]) for prompt in prompts]
    console.print(f"completing {len(prompts)} held-out prompts")
    # Perplexities under a moving reference cannot be compared.
    reference = {} if config.reference.sync_every else state.reference
    policy = model.merge_adapters(state.policy, state.reference)
    written = samples.write_samples(model, policy, reference, run.tokenizer, prompts, config.samples, config.seed)
    if processes.is_first():
        samples.save_samples(path, written)


def write_results(
    model: Model,
    state: TrainState,
    inputs: Inputs,
    run: RunFolder,
    config: Config,
    command: str,
    notes: Sequence[str] = (),
) -> None:
    """Writes policy/, adapter/ (for LoRA), a value head, and report.html (if its packages are there).

    Prints the judges' verdicts.
    """
    folder = run.path
    card = model_card(folder.name, config, inputs, int(state.step))
    rounding = save_hugging_face(
        folder / "policy",
        model,
        model.merge_adapters(state.policy, state.reference),
        tokenizer_dir=run.tokenizer.directory,
        stop_ids=run.tokenizer.stop_ids,
        model_card=card,
        dtype=config.export.dtype,
        start=_start(state, config),
    )
    note = describe_rounding(config, rounding)
    console.print(note)
    if model.scalar_head == "value":
        head = processes.gather(state.policy[SCALAR_HEAD])
        if processes.is_first():
            save_value_head(folder / VALUE_HEAD, head)
    if config.lora.rank:
        save_adapters(
            folder / "adapter",
            model,
            state.policy,
            lora=config.lora,
            base=None if config.model.init == "random" else _base(config.model.base or config.model.path),
            merged=inputs.policy_files.adapter if config.lora.start == "new" else None,
            tokenizer_dir=run.tokenizer.directory,
            model_card=card.replace("library_name: transformers", "library_name: peft"),
        )
    write_samples("after", model, state, inputs, run, config)
    if processes.is_first():
        _write_report(inputs, run, config, command, [*notes, *([note] if rounding.largest else [])])
    # No process exits before the first one has written the report, however long the judges take.
    processes.exchange_text("written")


def _base(path: str) -> str:
    """Returns where to find the frozen weights: the absolute path of a folder, or the Hub id."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _start(state: TrainState, config: Config) -> Params | None:
    """The policy's parameters before training, if the reference is exactly these."""
    moved = config.reference.path or config.reference.sync_every or is_rounded(config)
    return None if moved or not state.reference else state.reference


def describe_rounding(config: Config, rounding: Rounding) -> str:
    """One sentence on the dtype of policy/ and the effect of rounding to it."""
    text = f"policy/ is written in {config.export.dtype}"
    if not rounding.largest:
        return text + ", which rounds no weight"
    undone = "" if math.isnan(rounding.undone) else f", and {rounding.undone:.2g} times what training changed (norm)"
    return (
        f"{text}: rounding changes a weight by up to {rounding.largest:.2g} of its value{undone}. "
        'config.export.dtype="float32" writes the weights as they were trained'
    )


def _write_report(inputs: Inputs, run: RunFolder, config: Config, command: str, notes: Sequence[str]) -> None:
    """Prints the judges' verdicts and writes report.html, or says why there is none."""
    verdicts, judges_notes, rows = _compare(inputs, run, config)
    for verdict in verdicts:
        console.print("{judge}, {figure}: {before:.3f} before, {after:.3f} after".format(**verdict), highlight=False)
    if missing := [package for package in REPORT_PACKAGES if not is_installed(package)]:
        console.print(
            f"report.html is skipped: it needs {' and '.join(missing)}, not installed here. Run pip install "
            f"{' '.join(missing)} and the same command again to write it.",
            style="yellow",
        )
        return
    # Imported here because it imports the packages of the report.
    from kto_jax.reports.page import Report, write_report

    report = Report(
        title=run.path.name,
        command=command,
        config=to_dict(config),
        manifest=inputs.index.manifest,
        metrics=read_metrics(run.path / "metrics.jsonl"),
        captions=captions_of(config.objective.name, inputs.objective),
        samples=rows,
        verdicts=verdicts,
        reference_error=_reference_error(run.path),
        notes=[*notes, *judges_notes],
    )
    write_report(run.path / "report.html", report)


def _reference_error(folder: Path) -> dict[str, Any]:
    """Returns the effect of rounding the reference on the first batch; empty if the reference was not rounded."""
    path = folder / "reference_error.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _compare(
    inputs: Inputs, run: RunFolder, config: Config
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, str]]]:
    """Returns the judges' verdicts, notes on them, and completions side by side; all empty without samples."""
    paths = [run.path / f"samples_{name}.json" for name in ("before", "after")]
    if not all(path.exists() for path in paths):
        return [], [], []
    before, after = (samples.load_samples(path) for path in paths)
    verdicts, notes = samples.judge(inputs.index, run.tokenizer, config.samples.judges, before, after)
    triples = zip(before.prompts, before.completions, after.completions, strict=True)
    return verdicts, notes, [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in triples]
