"""Reads and writes low-rank adapters as a directory that the peft library loads on top of their base model.

base = AutoModelForCausalLM.from_pretrained(base)
base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)     # for a reward model
policy = PeftModel.from_pretrained(base, directory)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.models.families import FAMILIES
from kto_jax.models.gather import gather
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.lora import GROUPS, Adapter, DoraAdapter, rank_of, scale_of
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.adapter_folder import PREFIX, AdapterFolder, LowRank, read_adapter_folder
from kto_jax.models.weights.adapter_names import resolve_lora
from kto_jax.models.weights.export import copy_tokenizer
from kto_jax.models.weights.safetensors_files import write_safetensors
from kto_jax.models.weights.tensors import Part, expected_shapes, expected_tensors, find_parts
from kto_jax.storage import hub
from kto_jax.storage.atomic import new_folder
from kto_jax.storage.sums import write_sums

_WHOLE_PARAMETERS = {"embedding": "embed.table", "head": "head.weight"}
"""Of lora.modules_to_save."""


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
    is_multimodal: bool = False,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors in float32, README.md, the tokenizer and their digests.

    Every process of a run must call this; the first one writes. Parts that were trained whole and the head of a reward
    model are included; a value head is omitted. A tied embedding is written as the head, too, because peft copies both.

    Args:
      directory: the path; its content is replaced.
      model: the policy's.
      adapters: the trained adapters, sharded or not.
      lora: how they were trained, as configured or resolved.
      base: source of the frozen model, a directory or a Hub id with or without @REVISION; None if its weights were
        initialised at random.
      tokenizer_dir: directory whose tokenizer files are copied; None copies none.
      model_card: text of README.md.
      merged: folder of adapters that the frozen weights already hold beside `base`. The written adapters then are both
        together: their ranks add up, and their alpha is their rank.
      is_multimodal: whether the base also reads images, so that its language model is a part of it.

    Raises:
      ConfigError: DoRA and other adapters cannot be written together.
    """
    directory, lora = Path(directory), resolve_lora(lora, model.config)
    pairs, whole = _pairs(model, adapters, lora), _whole(model, adapters)
    if merged is not None:
        before = read_adapter_folder(merged)
        _check_sum(before, lora, merged)
        pairs, whole = _concatenate(model, pairs, before.adapters), {**before.whole, **whole}
        rank = len(next(iter(pairs.values())).a)
        lora = dataclasses.replace(lora, rank=rank, alpha=float(rank), rank_stabilised=False)
    tensors = dict(_tensors(pairs)) | {PREFIX + name: values.astype(np.float32) for name, values in whole.items()}
    if is_multimodal:
        tensors = {_inside(name): values for name, values in tensors.items()}
    if jax.process_index() == 0:
        with new_folder(directory) as partial:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            write_safetensors(partial / "adapter_model.safetensors", shapes, "float32", tensors.values())
            values = _config(model, base, lora, pairs, whole)
            if is_multimodal:
                # The vision model's matrices have the same names.
                values["target_modules"] = rf".*language_model\..*\.({'|'.join(_modules(pairs))})"
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
      lora: how they are trained; matrices, ranks, scales, DoRA and what is trained whole must be those of the folder.

    Raises:
      ConfigError: they are not; says what to set.
    """
    folder, parts = read_adapter_folder(path), find_parts(model.config)
    if any(part.rows is not None for part in parts.values()):
        raise ConfigError(
            f"the adapters in {path} cannot be trained further: matrices of family {model.config.family!r} are fused "
            "in files, and separate here. Adapters of other families can be. "
            'Set config.lora.start to "new", which adds them to the base and trains new ones.'
        )
    names = {name: parts[f"layers.{group}.{name}.weight"].tensor.name for name, group in GROUPS.items()
             if f"layers.{group}.{name}.weight" in parts}  # fmt: skip
    pairs, left = {}, set(folder.adapters)
    for matrix, name in names.items():
        stored = [name.format(*index) for index in np.ndindex(_stacked(model, name))]
        if all(one in folder.adapters for one in stored):
            pairs[matrix] = [folder.adapters[one] for one in stored]
            left -= set(stored)
    kinds = {matrix: {(len(pair.a), pair.scale, pair.magnitude is None) for pair in held}
             for matrix, held in pairs.items()}  # fmt: skip
    if left or not pairs or any(len(kind) > 1 for kind in kinds.values()):
        raise ConfigError(
            f"the adapters in {path} cannot be trained further: some are on other matrices than {', '.join(names)}, on "
            "some layers only, or of ranks that differ by layer or expert. "
            'Set config.lora.start to "new", which adds them to the base and trains new ones.'
        )
    _check_same(folder, model, lora, {matrix: held[0] for matrix, held in pairs.items()})
    layers: Params = {}
    for matrix, held in pairs.items():
        stacks = [[pair.a.T for pair in held], [pair.b.T for pair in held]]
        stacks += [[pair.magnitude for pair in held if pair.magnitude is not None]] if lora.dora else []
        leaves = [np.stack(each).reshape(*_stacked(model, names[matrix]), *each[0].shape) for each in stacks]
        adapter = DoraAdapter(*leaves) if lora.dora else Adapter(*leaves)
        layers.setdefault(GROUPS[matrix], {})[matrix] = {"weight": adapter}
    return {"layers": layers}


def _stacked(model: Model, name: str) -> tuple[int, ...]:
    """The axes over which a matrix with this name in the family's files is stacked: layers, or layers and experts."""
    return (model.config.num_layers, model.config.num_experts)[: name.count("{}")]


def _check_same(folder: AdapterFolder, model: Model, lora: LoraConfig, pairs: Mapping[str, LowRank]) -> None:
    """Refuses to train adapters further in another way than they were.

    Args:
      folder: the adapters.
      model: the policy's.
      lora: how they are to be trained.
      pairs: a layer's adapter of every matrix that has one.
    """
    tensors = FAMILIES[model.config.family].tensors
    saved = {name: tensors[parameter].name for name, parameter in _WHOLE_PARAMETERS.items()}
    first = next(iter(pairs.values()))
    rank = len(first.a)

    def alpha(pair: LowRank) -> float:
        exact = pair.scale * (math.sqrt(len(pair.a)) if folder.rank_stabilised else len(pair.a))
        return round(exact, 6)

    found: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha(first),
        "rank_stabilised": folder.rank_stabilised,
        "dora": first.magnitude is not None,
        "targets": tuple(pairs),
        "rank_pattern": tuple(f"{name}={len(pair.a)}" for name, pair in pairs.items() if len(pair.a) != rank),
        "alpha_pattern": tuple(
            f"{name}={alpha(pair):g}" for name, pair in pairs.items() if alpha(pair) != alpha(first)
        ),
        "modules_to_save": tuple(
            name for name, tensor in saved.items()
            if tensor in folder.whole and not (name == "head" and model.config.tied_head)
        ),
    }  # fmt: skip
    others = folder.whole.keys() - set(saved.values()) - {"score.weight"}
    if others:
        raise ConfigError(
            f"the adapters in {folder.path} cannot be trained further: {', '.join(sorted(others))} were trained whole "
            "beside them. Allowed: embedding and head. "
            'Set config.lora.start to "new", which adds them to the base and trains new ones.'
        )
    same_matrices = set(lora.targets) == set(pairs) and all(
        (rank_of(lora, name), round(scale_of(lora, name), 6)) == (len(pair.a), round(pair.scale, 6))
        for name, pair in pairs.items()
    )
    same = same_matrices and lora.dora == found["dora"] and set(lora.modules_to_save) == set(found["modules_to_save"])
    if not same:
        given = {name: getattr(lora, name) for name in found}
        flags = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in found.items()}
        wanted = " ".join(f"--config.lora.{name}={flags[name]}" for name in found if found[name] != given[name])
        raise ConfigError(
            f"config.lora has {given}, and the adapters in {folder.path} that are trained further have {found}. Both "
            f'must be equal. Set {wanted}, or config.lora.start to "new".'
        )


def _check_sum(before: AdapterFolder, lora: LoraConfig, path: Path) -> None:
    if lora.dora or any(pair.magnitude is not None for pair in before.adapters.values()):
        raise ConfigError(
            f"the adapters in {path} and new ones cannot be written as one: DoRA is no sum. Plain adapters can be "
            'added to plain ones. Set config.lora.start to "continue", or merge the first into their base '
            "(python -m kto_jax.export --merge, or peft's merge_and_unload)."
        )


def _whole(model: Model, adapters: Params) -> dict[str, np.ndarray]:
    """What was trained whole, by the names of its tensors."""
    tensors = FAMILIES[model.config.family].tensors
    found = {}
    for parameter in _WHOLE_PARAMETERS.values():
        part, name = parameter.split(".")
        if part in adapters:
            found[tensors[parameter].name] = tensors[parameter].to_file(gather(adapters[part][name]))
    if model.config.tied_head and found:
        found[tensors["head.weight"].name] = found[tensors["embed.table"].name]
    if model.scalar_head == "reward":
        found[tensors["scorer.weight"].name] = gather(adapters[SCALAR_HEAD]["weight"])[None]
    return found


def _pairs(model: Model, adapters: Params, lora: LoraConfig) -> dict[str, LowRank]:
    """Every adapter by the name of its matrix; theirs lie as [out, in].

    Those of a fused matrix become one, whose rank is their sum: its A stacks theirs, and its B has theirs as blocks.
    """
    parts, expected = find_parts(model.config), expected_tensors(model.config)
    found: dict[str, list[tuple[Part, LowRank]]] = {}
    for matrices in adapters["layers"].values():
        for target, held in matrices.items():
            part, pair = parts[f"layers.{GROUPS[target]}.{target}.weight"], held["weight"]
            leaves = [gather(leaf) for leaf in jax.tree.leaves(pair)]  # a, b and perhaps the magnitude
            for index in np.ndindex(_stacked(model, part.tensor.name)):
                a, b, *magnitude = (leaf[index] for leaf in leaves)
                one = LowRank(a.T, b.T, scale_of(lora, target), *magnitude)
                found.setdefault(part.tensor.name.format(*index), []).append((part, one))
    return {name: _join(held, expected[name].shape[0]) for name, held in found.items()}


def _join(held: Sequence[tuple[Part, LowRank]], size_out: int) -> LowRank:
    """The adapter of a matrix, from those of the parameters that it holds."""
    scale, first = held[0][1].scale, held[0][1]
    if held[0][0].rows is None:
        return first
    a = np.concatenate([pair.a for _, pair in held])
    b, start = np.zeros((size_out, len(a)), a.dtype), 0
    magnitude = None if first.magnitude is None else np.zeros(size_out, a.dtype)
    for part, pair in held:
        assert part.rows is not None, "parts of a fused tensor have rows"
        rows = part.rows.places(0, part.size)
        b[rows, start : start + len(pair.a)] = pair.b * (pair.scale / scale)
        start += len(pair.a)
        if magnitude is not None:
            magnitude[rows] = pair.magnitude
    if magnitude is not None and not magnitude.all():
        raise ConfigError(
            "DoRA was trained on a part of a fused matrix, and peft's has a magnitude for all of it. All of its parts "
            "must have adapters. Export the merged model instead (python -m kto_jax.export --merge)."
        )
    return LowRank(a, b, scale, magnitude)


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
        if pair.magnitude is not None:
            yield f"{module}lora_magnitude_vector", np.ascontiguousarray(pair.magnitude)


def _inside(name: str) -> str:
    """A tensor's name in peft's folder for a model whose language model is a part."""
    plain = name.removeprefix(PREFIX)
    return PREFIX + (plain.replace("model.", "model.language_model.", 1) if plain.startswith("model.") else plain)


def _modules(pairs: Mapping[str, LowRank]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[-2] for name in pairs))


def _config(
    model: Model,
    base: str | None,
    lora: LoraConfig,
    pairs: Mapping[str, LowRank],
    whole: Mapping[str, np.ndarray],
) -> dict[str, object]:
    on_hub = hub.parse(base) if base else None
    saved = sorted({name.rsplit(".", 1)[0].split(".")[-1] for name in whole})
    ranks, alphas = {}, {}
    for name, pair in pairs.items():
        rank, module = len(pair.a), name.split(".")[-2]
        ranks[module] = rank
        alphas[module] = round(pair.scale * (math.sqrt(rank) if lora.rank_stabilised else rank), 6)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.scalar_head == "reward" else "CAUSAL_LM",
        "base_model_name_or_path": on_hub.repository if on_hub else base,
        "revision": on_hub.revision or None if on_hub else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "use_dora": lora.dora,
        "lora_dropout": lora.dropout,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != lora.rank},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != lora.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _modules(pairs),
        "modules_to_save": saved or None,
    }
