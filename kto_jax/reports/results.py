"""The results of a run: the policy in Hugging Face format, completions before and after training, the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kto_jax.config import Config, to_dict
from kto_jax.config.packages import is_installed
from kto_jax.data.rows.sources import sources_of
from kto_jax.devices import processes
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.export import Rounding, save_hugging_face
from kto_jax.models.weights.load import is_multimodal
from kto_jax.models.weights.peft import save_adapters
from kto_jax.models.weights.value_head import FILE as VALUE_HEAD
from kto_jax.models.weights.value_head import save_value_head
from kto_jax.progress import console
from kto_jax.reports import samples
from kto_jax.reports.captions import captions_of
from kto_jax.reports.model_card import model_card
from kto_jax.training.inputs import Inputs
from kto_jax.training.logs import read_metrics
from kto_jax.training.reference import is_rounded
from kto_jax.training.run_folder import RunFolder, write_json
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
    # Perplexities under a moving reference cannot be compared.
    reference = {} if config.reference.sync_every else state.reference
    policy = model.merge_adapters(state.policy, state.reference)
    with console.phase(f"completing {len(prompts)} held-out prompts"):
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
            is_multimodal=is_multimodal(inputs.policy_files.weights),
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
    write_json(run.path / "verdicts.json", verdicts)
    if missing := [package for package in REPORT_PACKAGES if not is_installed(package)]:
        console.print(
            f"report.html is skipped: it needs {' and '.join(missing)}, not installed here. Run pip install "
            f"{' '.join(missing)} and the same command again to write it.",
            style="yellow",
        )
        return
    # Imported here because it imports the packages of the report.
    from kto_jax.reports.page import Report, write_report
    from kto_jax.reports.recipe import differences_from_recipe

    compared_with, differences = differences_from_recipe(command, to_dict(config))
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
        about=describe_run(inputs, config),
        held_out=_held_out_counts(inputs),
        compared_with=compared_with,
        differences=differences,
        lengths=_lengths(inputs),
        num_devices=jax.device_count(),
        spike_deviations=config.watch.spike_deviations,
    )
    write_report(run.path / "report.html", report)


def describe_run(inputs: Inputs, config: Config) -> dict[str, str]:
    """What was trained, on what, by what and when, for the top of the report."""
    base = f" on {config.model.base}" if config.model.base else ""
    adapters = f", adapters of rank {config.lora.rank}" if config.lora.rank else ""
    sources = [source.path for source in sources_of(config.data) if source.split == "train"]
    chosen = {name: value for name, value in inputs.objective.options.items() if value not in ("", None)}
    options = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
    )
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{os.cpu_count()} cores, {memory:.0f} GiB" if jax.default_backend() == "cpu" else ""
    packages = ("kto_jax", "jax", "flax", "optax")
    return {
        "model": f"{config.model.path}{base}{adapters}",
        "data": ", ".join(sources),
        "objective": f"{config.objective.name}" + (f" ({options})" if options else ""),
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "hardware": f"{count} × {kind}" + (f" ({cores})" if cores else ""),
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, packages)]),
    }


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # kto_jax runs from its sources too
        return f"{package} from its sources"


def _held_out_counts(inputs: Inputs) -> tuple[int, int]:
    """Desirable and undesirable completions of an evaluation."""
    if inputs.held_out is None:
        return (0, 0)
    count = inputs.held_out.num_examples
    if inputs.objective.reads == "pairs":
        return (count, count)
    labels = np.asarray(inputs.index.desirable)[inputs.index.sequences("eval")]
    return (round(count * labels.mean()), round(count * (1 - labels.mean())))


def _lengths(inputs: Inputs) -> dict[str, np.ndarray]:
    """Tokens of what is trained on, for the report's histograms."""
    index, rows = inputs.index, inputs.index.sequences("train")
    desirable = np.asarray(index.desirable)[rows]
    completions = np.asarray(index.completion_lengths)[rows]
    return {
        "prompts": np.asarray(index.prompt_lengths)[rows],
        "desirable": completions[desirable],
        "undesirable": completions[~desirable],
    }


def _reference_error(folder: Path) -> dict[str, Any]:
    """Returns the effect of rounding the reference on the first batch; empty if the reference was not rounded."""
    path = folder / "reference_error.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _compare(
    inputs: Inputs, run: RunFolder, config: Config
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Returns the judges' verdicts, notes on them, and completions side by side; all empty without samples."""
    paths = [run.path / f"samples_{name}.json" for name in ("before", "after")]
    if not all(path.exists() for path in paths):
        return [], [], []
    before, after = (samples.load_samples(path) for path in paths)
    verdicts, notes = samples.judge(inputs.index, run.tokenizer, config.samples.judges, before, after)
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(before.prompts, before.completions, after.completions, strict=True)
    ]
    for name, written in (("before_cut", before), ("after_cut", after)):
        for row, ended in zip(rows, written.ended, strict=False):  # none in files of earlier versions
            row[name] = not ended
    return verdicts, notes, rows
