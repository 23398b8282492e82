"""Writes low-rank adapters as a directory that the peft library loads on top of their base model.

base = AutoModelForCausalLM.from_pretrained(base)
base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)     # for a reward model
policy = PeftModel.from_pretrained(base, directory)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from kto_jax.config import LoraConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.gather import gather
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.lora import GROUPS
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.export import copy_tokenizer
from kto_jax.models.weights.safetensors_files import write_safetensors
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_folder

_PREFIX = "base_model.model."


def save_adapters(
    directory: str | Path,
    model: Model,
    adapters: Params,
    *,
    lora: LoraConfig,
    base: str | None,
    tokenizer_dir: str | Path | None,
    model_card: str,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors in float32, README.md and the tokenizer.

    Every process of a run must call this; the first one writes. The head of a reward model is included; a value head is
    omitted.

    Args:
      directory: the path; its content is replaced.
      model: the policy's.
      adapters: the trained adapters, sharded or not.
      lora: how they were trained.
      base: source of the frozen model, a directory or a Hub id with or without @REVISION; None if its weights were
        initialised at random.
      tokenizer_dir: directory whose tokenizer files are copied; None copies none.
      model_card: text of README.md.
    """
    directory = Path(directory)
    tensors = dict(_tensors(model, adapters))
    if jax.process_index() == 0:
        with new_folder(directory) as partial:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            write_safetensors(partial / "adapter_model.safetensors", shapes, "float32", tensors.values())
            values = _config(model, lora, base)
            (partial / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(model_card, encoding="utf-8")
            copy_tokenizer(tokenizer_dir, partial)
    if jax.process_count() > 1:  # No process may read the export before it is complete.
        multihost_utils.sync_global_devices("adapters")


def _tensors(model: Model, adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in peft, which stores them as [out, in]."""
    tensors = FAMILIES[model.config.family].tensors
    for group, matrices in adapters["layers"].items():
        for name, pair in matrices.items():
            theirs = _PREFIX + tensors[f"layers.{group}.{name}.weight"].name.removesuffix("weight")
            for part, factor in (("A", pair["weight"].a), ("B", pair["weight"].b)):
                for layer, values in enumerate(gather(factor)):
                    yield f"{theirs.format(layer)}lora_{part}.weight", np.ascontiguousarray(values.T)
    if model.scalar_head == "reward":
        yield f"{_PREFIX}score.weight", gather(adapters[SCALAR_HEAD]["weight"])[None]


def _config(model: Model, lora: LoraConfig, base: str | None) -> dict[str, object]:
    tensors = FAMILIES[model.config.family].tensors
    theirs = (tensors[f"layers.{GROUPS[name]}.{name}.weight"].name.split(".")[-2] for name in lora.targets)
    is_reward = model.scalar_head == "reward"
    on_hub = hub.parse(base) if base else None
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repository if on_hub else base,
        "revision": on_hub.revision or None if on_hub else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(theirs),
        "modules_to_save": ["score"] if is_reward else None,
    }
