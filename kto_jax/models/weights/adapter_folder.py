"""Low-rank adapters in a directory that peft wrote, or kto_jax: what is in it, and its sum with the base's weights.

adapter_config.json          base_model_name_or_path, r, lora_alpha, ...
adapter_model.safetensors    base_model.model.NAME.lora_A.weight [r, in], ....lora_B.weight [out, r];
                             base_model.model.NAME.weight of a module that was trained whole
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.models.families.multimodal import text_name
from kto_jax.models.weights.safetensors_files import SafetensorsWeights, Weights, listed, read_json
from kto_jax.storage.sums import check_export

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
_WHOLE = re.compile(r"(?!.*lora_)(.+\.(?:weight|bias))")
# What peft may add to an adapter, and the values under which it is W + scale · B A, or DoRA of that.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (True, False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    # Others change the base's own weights when they begin.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one matrix, [out, in]: scale · B A; with DoRA, rows of the sum then have the norm m.

    Attributes:
      a: A, [r, in], float32.
      b: B, [out, r], float32.
      scale: α/r, or α/√r of a rank-stabilised adapter.
      magnitude: DoRA's m, [out]; None without.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds.

    Attributes:
      path: the folder.
      adapters: by the name of the matrix, such as "model.layers.0.self_attn.q_proj.weight".
      whole: tensors that were trained whole, by name.
      rank_stabilised: whether scales are α/√r.
    """

    path: Path
    adapters: Mapping[str, LowRank]
    whole: Mapping[str, np.ndarray]
    rank_stabilised: bool = False


class AdaptedWeights:
    """The weights of a base with adapters added to them.

    Attributes:
      shapes: shape of every tensor by name.
    """

    def __init__(self, base: Weights, base_path: Path, folder: AdapterFolder) -> None:
        """Compares adapters and base.

        Raises:
          ConfigError: the adapters are those of another base; lists what differs.
        """
        check_base(base.shapes, base_path, folder)
        self._base, self._folder = base, folder
        self.shapes = {**base.shapes, **{name: values.shape for name, values in folder.whole.items()}}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor; in float32 if an adapter is added to it."""
        whole, pair = self._folder.whole.get(name), self._folder.adapters.get(name)
        values = self._base.read(name, index) if whole is None else whole[index]
        if pair is None:
            return values
        rows, columns = index
        if pair.magnitude is None:
            return values.astype(np.float32) + pair.scale * (pair.b[rows] @ pair.a[:, columns])
        # The norm is that of whole rows.
        values = self._base.read(name, (rows, slice(0, pair.a.shape[1])))
        total = values.astype(np.float32) + pair.scale * (pair.b[rows] @ pair.a)
        return (total * (pair.magnitude[rows] / np.linalg.norm(total, axis=1))[:, None])[:, columns]


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds adapters rather than a whole model.

    Raises:
      ConfigError: it holds both.
    """
    if not (path / CONFIG).is_file():
        return False
    if any(path.glob("model*.safetensors")):
        raise ConfigError(
            f"{path} holds adapters ({CONFIG}) and a whole model (model.safetensors). A model is one of the two. "
            "Move the one that is not meant to a folder of its own."
        )
    return True


def named_base(path: Path) -> str:
    """The base that an adapter folder names, at the revision that it names; "" if it names none.

    Raises:
      ConfigError: adapter_config.json is broken.
    """
    settings = read_json(path / CONFIG)
    name, revision = settings.get("base_model_name_or_path") or "", settings.get("revision")
    return f"{name}@{revision}" if name and revision and not Path(name).exists() and "@" not in name else str(name)


def read_adapter_folder(path: Path) -> AdapterFolder:
    """Reads the adapters of a folder.

    Raises:
      ConfigError: they are of a kind that is not a sum of low rank, pickled, damaged or incomplete.
    """
    settings = read_json(path / CONFIG)
    for name, allowed in _SUPPORTED.items():
        if name in settings and settings[name] not in allowed:
            raise ConfigError(
                f"{path}/{CONFIG} has {name}={settings[name]!r}. Adapters are read that add scale · B A to a matrix: "
                f"{name} {' or '.join(repr(value) for value in allowed if value is not None)}. Merge these into their "
                "base with peft (merge_and_unload), and set model.path to the merged model."
            )
    if not (path / WEIGHTS).is_file():
        raise ConfigError(
            f"{path} holds no {WEIGHTS}. Adapters are read from safetensors, never from pickled files, which can run "
            "code. Save them with peft's save_pretrained(..., safe_serialization=True)."
        )
    check_export(path, weights=True)
    weights = SafetensorsWeights(path, WEIGHTS)
    factors: dict[str, dict[str, np.ndarray]] = {}
    magnitudes: dict[str, np.ndarray] = {}
    whole, unknown = {}, []
    for name, shape in weights.shapes.items():
        plain = name.removeprefix(PREFIX)
        plain = text_name(plain) or plain  # of a model that also reads images, only the language model is read
        values = weights.read(name, (slice(None),) * len(shape))
        if (match := _FACTOR.fullmatch(plain)) and len(shape) == 2:
            factors.setdefault(match[1], {})[match[2]] = values.astype(np.float32)
        elif (match := _MAGNITUDE.fullmatch(plain)) and len(shape) == 1:
            magnitudes[match[1]] = values.astype(np.float32)
        elif match := _WHOLE.fullmatch(plain):
            whole[plain] = values
        else:
            unknown.append(plain)
    without = factors.keys() - magnitudes.keys() if settings.get("use_dora") else set()
    unknown += [f"{name}.lora_magnitude_vector" for name in magnitudes.keys() - factors.keys()]
    unknown += [f"{name} without lora_magnitude_vector" for name in without]
    unknown += [module for module, pair in factors.items() if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]]
    if unknown:
        raise ConfigError(
            f"{path}/{WEIGHTS} holds tensors that are not read: {listed(unknown)}. Adapters are read that add "
            "scale · B A to a matrix: lora_A [r, in] and lora_B [out, r], and DoRA's magnitude [out]. Merge these into "
            "their base with peft (merge_and_unload), and set model.path to the merged model."
        )
    adapters = {
        f"{module}.weight": LowRank(
            pair["A"], pair["B"], _scale(settings, module, len(pair["A"]), path), magnitudes.get(module)
        )
        for module, pair in factors.items()
    }
    return AdapterFolder(path, adapters, whole, bool(settings.get("use_rslora")))


def without_tied_head(folder: AdapterFolder, embedding: str, head: str) -> AdapterFolder:
    """The folder for a base whose head is its embedding, without the copy of the head that peft keeps beside it.

    Raises:
      ConfigError: head and embedding differ in the folder, which no tied model can express.
    """
    saved = [name for name in (embedding, head) if name in folder.whole]
    if not saved:
        return folder
    if len(saved) == 1 or not np.array_equal(folder.whole[embedding], folder.whole[head]):
        what = f"only {saved[0]}" if len(saved) == 1 else "an embedding and a head that differ"
        raise ConfigError(
            f"{folder.path} holds {what}, and the head of the base is its embedding. Both must be there and equal. "
            "Merge these adapters into their base with peft (merge_and_unload), save it with "
            "tie_word_embeddings=false, and set model.path to it."
        )
    return dataclasses.replace(folder, whole={name: value for name, value in folder.whole.items() if name != head})


def _scale(settings: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    """What peft multiplies the adapter of a module by."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float):
        raise ConfigError(f"{path}/{CONFIG} has lora_alpha={alpha!r}. It must be a number. Restore the file.")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def check_base(shapes: Mapping[str, tuple[int, ...]], base: Path | str, folder: AdapterFolder) -> None:
    """Refuses adapters of another base.

    Args:
      shapes: shape of every tensor of the base by name.
      base: what the base is called in the message.
      folder: the adapters.

    Raises:
      ConfigError: lists what differs.
    """
    found = {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in folder.adapters.items()}
    found |= {name: values.shape for name, values in folder.whole.items() if name != "score.weight"}
    problems = [
        f"{name} {shape} here, {shapes.get(name, 'missing')} in the base"
        for name, shape in found.items()
        if shapes.get(name) != shape
    ]
    if problems:
        raise ConfigError(
            f"the adapters in {folder.path} are not for the base {base}: {len(problems)} of {len(found)} matrices "
            f"differ ({listed(problems)}). Names and shapes must be those of the base. Set config.model.base "
            "(config.reference.base) to the model that they were trained on."
        )
