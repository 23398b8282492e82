"""Loads architectures and weights from Hugging Face directories and GGUF files.

Every device reads only the bytes of its own shard of each tensor. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import CLASSIFIERS, FAMILIES
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.families.multimodal import find_multimodal, text_name
from kto_jax.models.families.quantization import check_quantization
from kto_jax.models.finite import find_nonfinite
from kto_jax.models.heads import SCALAR_HEAD, TOWER, init_scalar_head
from kto_jax.models.model import Model, Params
from kto_jax.models.quantised import QUANTISED, QuantisedMatrix, quantise
from kto_jax.models.weights import adapter_folder
from kto_jax.models.weights.adapter_folder import AdaptedWeights, read_adapter_folder, without_tied_head
from kto_jax.models.weights.bitsandbytes import BitsAndBytesWeights
from kto_jax.models.weights.gguf import open_gguf
from kto_jax.models.weights.grown import GrownWeights
from kto_jax.models.weights.model_files import ModelFiles
from kto_jax.models.weights.safetensors_files import (
    RenamedWeights,
    SafetensorsWeights,
    Weights,
    listed,
    read_json,
    weight_files,
)
from kto_jax.models.weights.tensors import Part, expected_shapes, find_parts
from kto_jax.storage.digests import file_digest
from kto_jax.storage.sums import check_export

# Rows of a tied head that are compared with the embedding: several, because rows that training rarely updates may be
# equal in different matrices.
_TIED_ROWS = 64


def read_config(path: str | Path) -> TransformerConfig:
    """Reads the architecture of a Hugging Face directory or a .gguf file.

    Raises:
      ConfigError: there is nothing readable, or the architecture is not supported.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path).config
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} has no config.json. A model is a Hugging Face directory or a .gguf file. Check model.path."
        )
    return read_config_json(read_json(file))


def is_reward_model(path: str | Path | ModelFiles) -> bool:
    """Whether a model's config.json or its adapters name a reward model: a decoder with a scalar output per sequence.

    Raises:
      ConfigError: the config.json is broken.
    """
    if isinstance(path, ModelFiles):
        if path.adapter is not None:
            return read_json(path.adapter / adapter_folder.CONFIG).get("task_type") == "SEQ_CLS"
        path = path.weights
    file = Path(path) / "config.json"
    named = read_json(file).get("architectures") if file.is_file() else None
    return isinstance(named, list) and named[:1] != [] and named[0] in CLASSIFIERS


def is_multimodal(path: Path) -> bool:
    """Whether a model also reads images, so that its language model is a part of it.

    Raises:
      ConfigError: the config.json is broken.
    """
    file = path / "config.json"
    return file.is_file() and find_multimodal(read_json(file)) is not None


def load_params(
    model: Model,
    path: str | Path | ModelFiles,
    *,
    param_dtype: str,
    shardings: Any = None,
    key: Key[Array, ""] | None = None,
) -> Params:
    """Reads a model's parameters; each device reads only its own shards.

    A scalar head is initialised at random, unless both the model and `path` are reward models. A value head's own trunk
    starts as that of `path`.

    Args:
      model: the model; its config must be that of `path`. If its vocabulary is larger, embedding and output head get
        more rows, each the mean of those of `path`.
      path: Hugging Face directory with safetensors, or a .gguf file; or files whose adapters are added to the weights.
      param_dtype: dtype of the parameters; values are converted while reading, and quantised matrix by matrix.
      shardings: nested dictionary of shardings, as the parameters; None places all on the first local device. Whole
        parts (embed, layers, the scalar head ...) that it lacks are not read.
      key: PRNG key of a random scalar head; None is `jax.random.key(0)`.

    Raises:
      ConfigError: the weights are missing, incomplete, damaged (also by the digests of an export), pickled, not finite,
        or of another shape than the config says; or they are a reward model's, and `model` is not one.
    """
    files = path if isinstance(path, ModelFiles) else ModelFiles(Path(path))
    if files.weights.is_dir():
        check_export(files.weights, weights=True)
    weights, tensors = open_weights(files.weights), FAMILIES[model.config.family].tensors
    vocabulary = tensors["embed.table"].name, tensors["head.weight"].name
    if files.adapter is not None:
        folder = read_adapter_folder(files.adapter)
        if model.config.tied_head:
            folder = without_tied_head(folder, *vocabulary)
        weights = AdaptedWeights(weights, files.weights, folder)
    if model.config.vocab_size > read_config(files.weights).vocab_size:
        weights = GrownWeights(weights, vocabulary, model.config.vocab_size)
    check_names(weights, model, str(files))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, model.abstract_params(param_dtype))
    abstract = _abstract_in_file(model, param_dtype)
    abstract = {name: abstract[name] for name in shardings}
    drawn: Params = {}
    if SCALAR_HEAD in abstract and "score.weight" not in weights.shapes:
        del abstract[SCALAR_HEAD]
        key = jax.random.key(0) if key is None else key
        head = {name: part for name, part in shardings[SCALAR_HEAD].items() if name != TOWER}
        drawn = {SCALAR_HEAD: _draw_scalar_head(model, key, param_dtype, head)}
    parts = find_parts(model.config, reward=model.scalar_head == "reward")
    params, broken = _read_params(weights, parts, abstract, shardings)
    if broken:
        raise ConfigError(
            f"{files} holds values that are NaN or infinite in {', '.join(broken[:3])}"
            f"{f' and {len(broken) - 3} more' if len(broken) > 3 else ''}. Weights must be finite. Download the model "
            "again, or take an earlier one."
        )
    if TOWER in shardings.get(SCALAR_HEAD, {}):
        tower = shardings[SCALAR_HEAD][TOWER]
        copy = jax.jit(lambda trunk: jax.tree.map(jnp.copy, trunk), out_shardings=tower)
        drawn[SCALAR_HEAD][TOWER] = copy({name: params[name] for name in tower})
    return params | drawn


def _abstract_in_file(model: Model, param_dtype: str) -> Params:
    """The parameters before they are quantised: matrices that will be are float32, all else is as it will be."""
    abstract = model.abstract_params(param_dtype)
    if param_dtype not in QUANTISED:
        return abstract
    is_quantised = lambda node: isinstance(node, QuantisedMatrix)  # noqa: E731
    flat, structure = jax.tree.flatten(model.abstract_params("float32"))
    kept = jax.tree.leaves(abstract, is_leaf=is_quantised)
    leaves = [whole if is_quantised(node) else node for whole, node in zip(flat, kept, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _read_params(
    weights: Weights, parts: Mapping[str, Part], abstract: Params, shardings: Params
) -> tuple[Params, list[str]]:
    """Reads the parameters of `abstract`; also returns the names of those with values that are not finite."""
    broken: list[str] = []

    def read(key_path, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        name = ".".join(part.key for part in key_path)
        if isinstance(sharding, QuantisedMatrix):
            whole = read(key_path, leaf, sharding.codes)
            broken.extend(find_nonfinite({name: whole}))
            rounding = jax.jit(quantise, static_argnums=(1, 2), out_shardings=sharding)
            return rounding(whole, sharding.kind, sharding.shared)
        return jax.make_array_from_callback(leaf.shape, sharding, _reader(weights, parts[name], leaf))

    params = jax.tree_util.tree_map_with_path(read, abstract, {name: shardings[name] for name in abstract})
    return params, broken + find_nonfinite(params)


def _draw_scalar_head(model: Model, key: Array, param_dtype: str, shardings: Any) -> Params:
    def draw(key: Array) -> Params:
        return jax.tree.map(
            lambda leaf: leaf.astype(param_dtype), init_scalar_head(model.scalar_head, model.config, key)
        )

    return jax.jit(draw, out_shardings=shardings)(key)


def weights_digest(path: Path | ModelFiles) -> str:
    """Digest of the files that decide a model's parameters: a .gguf file, or config.json and the safetensors; and the
    adapters, if any.

    Raises:
      ConfigError: there are no weights.
    """
    adapter = path.adapter if isinstance(path, ModelFiles) else None
    path = path.weights if isinstance(path, ModelFiles) else path
    files = [path] if path.is_file() else [path / "config.json", *weight_files(path)]
    files += [adapter / adapter_folder.CONFIG, adapter / adapter_folder.WEIGHTS] if adapter is not None else []
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def open_weights(path: Path) -> Weights:
    """Opens a .gguf file or a directory's safetensors, which may be in bitsandbytes' four bits; reads only headers.

    Of a model that also reads images, the tensors of its language model are opened, by the names that they have alone.

    Raises:
      ConfigError: there are none, or they are damaged or unsafe.
    """
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path)
    values = read_json(path / "config.json")
    weights: Weights = BitsAndBytesWeights(path) if check_quantization(values) else SafetensorsWeights(path)
    if find_multimodal(values) is not None:
        return RenamedWeights(weights, {name: text_name(name) for name in weights.shapes})
    renamed = FAMILIES[read_config_json(values).family].renamed
    return RenamedWeights(weights, {name: renamed.get(name, name) for name in weights.shapes}) if renamed else weights


def check_names(weights: Weights, model: Model, path: str | Path) -> None:
    """Refuses weights that do not match the model exactly; a reward model may be loaded from a language model."""
    config, is_reward = model.config, model.scalar_head == "reward"
    tensors = FAMILIES[config.family].tensors
    head, scorer = tensors["head.weight"].name, tensors["scorer.weight"].name
    expected, found = expected_shapes(config, reward=is_reward), dict(weights.shapes)
    if is_reward:
        found.pop(head, None)
        if scorer not in found:
            del expected[scorer]
    elif scorer in found:
        raise ConfigError(
            f"{path} is a reward model: it has {scorer}, and no output head to generate text with. A language "
            "model is needed here. Choose the model that it was trained from."
        )
    for name in list(found):
        if name.endswith(FAMILIES[config.family].buffers):
            del found[name]
    if config.tied_head and found.pop(head, None) is not None:
        _check_tied(weights, config, path)
    problems = [f"missing: {listed(expected.keys() - found.keys())}"] if expected.keys() - found.keys() else []
    problems += [f"unexpected: {listed(found.keys() - expected.keys())}"] if found.keys() - expected.keys() else []
    wrong = [
        f"{name} {found[name]} (expected {shape})"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    problems += [f"of another shape: {listed(wrong)}"] if wrong else []
    if problems:
        raise ConfigError(
            f"{path}: its weights are not those that its config.json describes. {'; '.join(problems)}. Names and "
            "shapes must match. Download the model again, or fix its config.json."
        )


def _check_tied(weights: Weights, config: TransformerConfig, path: str | Path) -> None:
    """Refuses a stored tied head that differs from the embedding in rows spread over the vocabulary."""
    tensors = FAMILIES[config.family].tensors
    embedding, head = tensors["embed.table"].name, tensors["head.weight"].name
    shape = (config.vocab_size, config.embed_dim)
    if weights.shapes.get(embedding) != shape:
        return  # The embedding is missing or wrong, which the caller reports.
    rows = np.linspace(0, config.vocab_size - 1, _TIED_ROWS, dtype=int)
    same = weights.shapes[head] == shape and all(
        np.array_equal(weights.read(head, index), weights.read(embedding, index))
        for index in ((slice(row, row + 1), slice(None)) for row in rows)
    )
    if not same:
        raise ConfigError(
            f"{path}: config.json says tie_word_embeddings=true, but {head} differs from the embedding. A "
            "tied head is the embedding. Set tie_word_embeddings to false."
        )


def _reader(weights: Weights, part: Part, leaf: jax.ShapeDtypeStruct) -> Callable[[Any], np.ndarray]:
    """The callback of `jax.make_array_from_callback`, which reads the shard of a parameter that a device holds."""
    # Devices that hold the same shard share one read.
    cache: dict[tuple, np.ndarray] = {}

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if bounds not in cache:
            values = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            num_stacked = part.tensor.num_stacked
            stacked, inner = bounds[:num_stacked], tuple(slice(*bound) for bound in bounds[num_stacked:])
            for place in np.ndindex(*(stop - start for start, stop in stacked)):
                stored = tuple(start + one for (start, _), one in zip(stacked, place, strict=True))
                values[place] = part.read(weights.read, stored, inner)
            cache[bounds] = values
        return cache[bounds]

    return read_part
