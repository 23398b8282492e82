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
_WHOLE = re.compile(r"(?!.*lora_)(.+\.(?:weight|bias))")
# What peft may add to an adapter, and the values under which it is the plain sum W + scale · B A.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    # Others change the base's own weights when they begin.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one matrix, [out, in]: scale · B A.

    Attributes:
      a: A, [r, in], float32.
      b: B, [out, r], float32.
      scale: α/r, or α/√r of a rank-stabilised adapter.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds.

    Attributes:
      path: the folder.
      adapters: by the name of the matrix, such as "model.layers.0.self_attn.q_proj.weight".
      whole: tensors that were trained whole, by name.
    """

    path: Path
    adapters: Mapping[str, LowRank]
    whole: Mapping[str, np.ndarray]


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
        _check_base(base, base_path, folder)
        self._base, self._folder = base, folder
        self.shapes = {**base.shapes, **{name: values.shape for name, values in folder.whole.items()}}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor; in float32 if an adapter is added to it."""
        whole, pair = self._folder.whole.get(name), self._folder.adapters.get(name)
        values = self._base.read(name, index) if whole is None else whole[index]
        if pair is None:
            return values
        rows, columns = index
        return values.astype(np.float32) + pair.scale * (pair.b[rows] @ pair.a[:, columns])


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
    whole, unknown = {}, []
    for name, shape in weights.shapes.items():
        plain = name.removeprefix(PREFIX)
        plain = text_name(plain) or plain  # of a model that also reads images, only the language model is read
        values = weights.read(name, (slice(None),) * len(shape))
        if (match := _FACTOR.fullmatch(plain)) and len(shape) == 2:
            factors.setdefault(match[1], {})[match[2]] = values.astype(np.float32)
        elif match := _WHOLE.fullmatch(plain):
            whole[plain] = values
        else:
            unknown.append(plain)
    unknown += [module for module, pair in factors.items() if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]]
    if unknown:
        raise ConfigError(
            f"{path}/{WEIGHTS} holds tensors that are not read: {listed(unknown)}. Adapters are read that add "
            "scale · B A to a matrix: lora_A [r, in] and lora_B [out, r]. Merge these into their base with peft "
            "(merge_and_unload), and set model.path to the merged model."
        )
    adapters = {
        f"{module}.weight": LowRank(pair["A"], pair["B"], _scale(settings, module, len(pair["A"]), path))
        for module, pair in factors.items()
    }
    return AdapterFolder(path, adapters, whole)


def _scale(settings: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    """What peft multiplies the adapter of a module by."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float):
        raise ConfigError(f"{path}/{CONFIG} has lora_alpha={alpha!r}. It must be a number. Restore the file.")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check_base(base: Weights, base_path: Path, folder: AdapterFolder) -> None:
    found = {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in folder.adapters.items()}
    found |= {name: values.shape for name, values in folder.whole.items() if name != "score.weight"}
    problems = [
        f"{name} {shape} here, {base.shapes.get(name, 'missing')} in the base"
        for name, shape in found.items()
        if base.shapes.get(name) != shape
    ]
    if problems:
        raise ConfigError(
            f"the adapters in {folder.path} are not for the base {base_path}: {len(problems)} of {len(found)} matrices "
            f"differ ({listed(problems)}). Names and shapes must be those of the base. Set config.model.base "
            "(config.reference.base) to the model that they were trained on."
        )
