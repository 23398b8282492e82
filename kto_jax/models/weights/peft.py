"""Reads and writes low-rank adapters as a directory that the peft library loads on top of their base model.

base = AutoModelForCausalLM.from_pretrained(base)
base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)     # for a reward model
policy = PeftModel.from_pretrained(base, directory)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from kto_jax.config import LORA_MATRICES, ConfigError, LoraConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.gather import gather
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.lora import GROUPS, Adapter
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.adapter_folder import PREFIX, LowRank, read_adapter_folder
from kto_jax.models.weights.export import copy_tokenizer
from kto_jax.models.weights.safetensors_files import write_safetensors
from kto_jax.models.weights.tensors import Part, expected_shapes, expected_tensors, find_parts
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_folder
from kto_jax.storage.sums import write_sums


def save_adapters(
    directory: str | Path,
    model: Model,
    adapters: Params,
    *,
    lora: LoraConfig,
    base: str | None,
    tokenizer_dir: str | Path | None,
    model_card: str,
    merged: Path | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors in float32, README.md, the tokenizer and their digests.

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
      merged: folder of adapters that the frozen weights already hold beside `base`. The written adapters then are both
        together: their ranks add up, and their alpha is their rank.
    """
    directory = Path(directory)
    pairs = _pairs(model, adapters, lora.alpha / lora.rank)
    modules = list(dict.fromkeys(name.split(".")[-2] for name in pairs))
    rank, alpha, whole = lora.rank, lora.alpha, dict[str, np.ndarray]()
    if merged is not None:
        before = read_adapter_folder(merged)
        pairs, whole = _concatenate(model, pairs, before.adapters), {**before.whole}
        modules = list(dict.fromkeys(name.split(".")[-2] for name in pairs))
        rank = alpha = len(next(iter(pairs.values())).a)
    if model.scalar_head == "reward":
        whole["score.weight"] = gather(adapters[SCALAR_HEAD]["weight"])[None]
    tensors = dict(_tensors(pairs)) | {PREFIX + name: values.astype(np.float32) for name, values in whole.items()}
    if jax.process_index() == 0:
        with new_folder(directory) as partial:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            write_safetensors(partial / "adapter_model.safetensors", shapes, "float32", tensors.values())
            values = _config(model, base, rank, alpha, modules, whole) | _patterns(pairs, rank, alpha)
            (partial / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(model_card, encoding="utf-8")
            copy_tokenizer(tokenizer_dir, partial)
            write_sums(partial)
    if jax.process_count() > 1:  # No process may read the export before it is complete.
        multihost_utils.sync_global_devices("adapters")


def read_adapters(path: Path, model: Model, lora: LoraConfig) -> Params:
    """The adapters of a folder as parameters, to be trained further.

    Args:
      path: the folder.
      model: the policy's.
      lora: how they are trained; rank, alpha and targets must be those of the folder.

    Raises:
      ConfigError: they are not; says what to set.
    """
    folder = read_adapter_folder(path)
    if any(part.rows is not None for part in find_parts(model.config).values()):
        raise ConfigError(
            f"the adapters in {path} cannot be trained further: matrices of family {model.config.family!r} are fused "
            "in files, and separate here. Adapters of other families can be. "
            'Set config.lora.start to "new", which adds them to the base and trains new ones.'
        )
    names = {_tensor_name(model, target): target for target in LORA_MATRICES}
    targets = {names.get(re.sub(r"\.\d+\.", ".{}.", name)) for name in folder.adapters}
    kinds = {(len(pair.a), pair.scale * len(pair.a)) for pair in folder.adapters.values()}
    expected = {each for name in names if names[name] in targets for each in _stacked_names(model, name)}
    if folder.whole or None in targets or len(kinds) != 1 or expected != folder.adapters.keys():
        raise ConfigError(
            f"the adapters in {path} cannot be trained further: some are on other matrices than "
            f"{', '.join(LORA_MATRICES)}, on some layers only, of several ranks, or beside modules that were trained "
            "whole. "
            'Set config.lora.start to "new", which adds them to the base and trains new ones.'
        )
    ((rank, alpha),) = kinds
    adapted = tuple(name for name in LORA_MATRICES if name in targets)
    found = {"rank": rank, "alpha": alpha, "targets": adapted}
    given = {"rank": lora.rank, "alpha": lora.alpha, "targets": tuple(n for n in LORA_MATRICES if n in lora.targets)}
    if found != given:
        as_flags = found | {"targets": ",".join(adapted)}
        flags = " ".join(f"--config.lora.{name}={as_flags[name]}" for name in found if found[name] != given[name])
        raise ConfigError(
            f"config.lora has {given}, and the adapters in {path} that are trained further have {found}. Both must be "
            f'equal. Set {flags}, or config.lora.start to "new".'
        )
    layers: Params = {}
    for name, target in names.items():
        if target in targets:
            pairs = [folder.adapters[each] for each in _stacked_names(model, name)]
            a, b = np.stack([pair.a.T for pair in pairs]), np.stack([pair.b.T for pair in pairs])
            stacked = _stacked(model, name)
            adapter = Adapter(a.reshape(*stacked, *a.shape[1:]), b.reshape(*stacked, *b.shape[1:]))
            layers.setdefault(GROUPS[target], {})[target] = {"weight": adapter}
    return {"layers": layers}


def _stacked(model: Model, name: str) -> tuple[int, ...]:
    """The axes over which a matrix with this name in the family's files is stacked: layers, or layers and experts."""
    return (model.config.num_layers, model.config.num_experts)[: name.count("{}")]


def _stacked_names(model: Model, name: str) -> list[str]:
    """The name of the matrix in each layer, or of each expert of each layer."""
    return [name.format(*index) for index in np.ndindex(_stacked(model, name))]


def _tensor_name(model: Model, target: str) -> str:
    """The name of a matrix in the family's files, "{}" for the layer and for the expert, if it has one."""
    return FAMILIES[model.config.family].tensors[f"layers.{GROUPS[target]}.{target}.weight"].name


def _pairs(model: Model, adapters: Params, scale: float) -> dict[str, LowRank]:
    """Every adapter by the name of its matrix; theirs lie as [out, in].

    Those of a fused matrix become one, whose rank is their sum: its A stacks theirs, and its B has theirs as blocks.
    """
    parts, expected = find_parts(model.config), expected_tensors(model.config)
    found: dict[str, list[tuple[Part, LowRank]]] = {}
    for matrices in adapters["layers"].values():
        for target, pair in matrices.items():
            part = parts[f"layers.{GROUPS[target]}.{target}.weight"]
            a, b, name = gather(pair["weight"].a), gather(pair["weight"].b), part.tensor.name
            for index in np.ndindex(_stacked(model, name)):
                found.setdefault(name.format(*index), []).append((part, LowRank(a[index].T, b[index].T, scale)))
    return {name: _join(held, expected[name].shape[0], scale) for name, held in found.items()}


def _join(held: Sequence[tuple[Part, LowRank]], size_out: int, scale: float) -> LowRank:
    if held[0][0].rows is None:
        return held[0][1]
    a = np.concatenate([pair.a for _, pair in held])
    b, start = np.zeros((size_out, len(a)), a.dtype), 0
    for part, pair in held:
        assert part.rows is not None, "parts of a fused tensor have rows"
        b[part.rows.places(0, part.size), start : start + len(pair.a)] = pair.b
        start += len(pair.a)
    return LowRank(a, b, scale)


def _patterns(pairs: Mapping[str, LowRank], rank: int, alpha: float) -> dict[str, object]:
    """Ranks other than `rank` by module, and alphas that keep the scale alpha / rank."""
    ranks = {name.split(".")[-2]: len(pair.a) for name, pair in pairs.items()}
    others = {module: own for module, own in ranks.items() if own != rank}
    return {"rank_pattern": others, "alpha_pattern": {name: alpha * own / rank for name, own in others.items()}}


def _concatenate(model: Model, ours: Mapping[str, LowRank], before: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The sums of adapters as adapters of scale 1 and one rank, on every layer, as peft's configuration has them.

    B A + B' A' = [B, B'] [A; A']; what is missing is 0.
    """
    modules = {name.split(".")[-2] for name in (*ours, *before)}
    shapes = {name: shape for name, shape in expected_shapes(model.config).items() if name.split(".")[-2] in modules}
    ranks = [max(len(pair.a) for pair in pairs.values()) for pairs in (before, ours)]
    added = {}
    for name, (size_out, size_in) in ((n, s) for n, s in shapes.items() if len(s) == 2):
        a, b = np.zeros((sum(ranks), size_in), np.float32), np.zeros((size_out, sum(ranks)), np.float32)
        for start, pairs in ((0, before), (ranks[0], ours)):
            if (pair := pairs.get(name)) is not None:
                a[start : start + len(pair.a)] = pair.a
                b[:, start : start + len(pair.a)] = pair.scale * pair.b
        added[name] = LowRank(a, b, 1.0)
    return added


def _tensors(pairs: Mapping[str, LowRank]) -> Iterator[tuple[str, np.ndarray]]:
    for name, pair in pairs.items():
        module = PREFIX + name.removesuffix("weight")
        yield f"{module}lora_A.weight", np.ascontiguousarray(pair.a)
        yield f"{module}lora_B.weight", np.ascontiguousarray(pair.b)


def _config(
    model: Model, base: str | None, rank: int, alpha: float, modules: Sequence[str], whole: Mapping[str, np.ndarray]
) -> dict[str, object]:
    on_hub = hub.parse(base) if base else None
    saved = sorted({name.rsplit(".", 1)[0].split(".")[-1] for name in whole})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.scalar_head == "reward" else "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repository if on_hub else base,
        "revision": on_hub.revision or None if on_hub else None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(modules),
        "modules_to_save": saved or None,
    }
