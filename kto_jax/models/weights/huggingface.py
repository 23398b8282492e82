"""Weights in and out of Hugging Face directories, and in from GGUF files.

Reading goes tensor by tensor and slice by slice: every device asks for the part that its sharding gives it, and
only those bytes are read. Writing goes shard file by shard file. Nothing is ever unpickled.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Key

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families import CLASSIFIERS
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.models.heads import init_scorer
from kto_jax.models.int8 import INT8, as_matrices, quantise
from kto_jax.models.lora import as_adapted
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.classifier import choose_padding, classifier_values, write_padding
from kto_jax.models.weights.gguf import open_gguf
from kto_jax.models.weights.safetensors_files import (
    SafetensorsWeights,
    listed,
    read_json,
    weight_files,
    write_safetensors,
)
from kto_jax.models.weights.tensor_names import tensor_names
from kto_jax.storage.fetch import file_digest

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


# Rows of a tied head that are held against the embedding: those that training seldom touches may be equal by chance.
_TIED_ROWS = 64


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor."""


def read_config(path: str | Path) -> TransformerConfig:
    """Reads the architecture of a Hugging Face directory or a .gguf file.

    Raises:
      ConfigError: nothing readable is there, or the architecture is not one that is built here.
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


def is_reward_model(path: str | Path) -> bool:
    """Whether a directory's config.json names a reward model: a decoder that gives a sequence one number.

    Raises:
      ConfigError: the config.json is broken.
    """
    file = Path(path) / "config.json"
    named = read_json(file).get("architectures") if file.is_file() else None
    return isinstance(named, list) and named[:1] != [] and named[0] in CLASSIFIERS


def load_params(
    model: Model, path: str | Path, *, param_dtype: str, shardings: Any = None, key: Key[Array, ""] | None = None
) -> Params:
    """Reads a model's parameters, each device only its own part.

    A scorer is drawn, unless the model is a reward model and `path` is one too.

    Args:
      model: the model; its config must be that of `path`.
      path: Hugging Face directory with safetensors, or a .gguf file.
      param_dtype: what the parameters are kept in; values are converted as they are read, to int8 matrix by matrix.
      shardings: nested dictionary of shardings, as the parameters; None puts all on the first local device. Whole parts
        (embed, layers, scorer ...) that it does not name are not read.
      key: decides a scorer that is drawn; None is `jax.random.key(0)`.

    Raises:
      ConfigError: the weights are missing, damaged, pickled, of another shape than the config says, or not all there;
        or they are a reward model's, and `model` is none.
    """
    weights, names = open_weights(Path(path)), tensor_names(model.config)
    _check_names(weights, model, path)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, model.abstract_params(param_dtype))
    abstract = model.abstract_params("float32" if param_dtype == INT8 else param_dtype)
    abstract = {name: abstract[name] for name in shardings}

    def load(key_path, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        if isinstance(sharding, dict):  # of a matrix that becomes int8
            return quantise(key_path[-1].key, load(key_path, leaf, sharding["int8"]), sharding)
        name = ".".join(part.key for part in key_path)
        return jax.make_array_from_callback(leaf.shape, sharding, _reader(weights, *names[name], leaf))

    drawn: Params = {}
    if "scorer" in abstract and "score.weight" not in weights.shapes:
        del abstract["scorer"]
        key = jax.random.key(0) if key is None else key
        drawn = {"scorer": _draw_scorer(model, key, param_dtype, shardings["scorer"])}
    return jax.tree_util.tree_map_with_path(load, abstract, {name: shardings[name] for name in abstract}) | drawn


def _draw_scorer(model: Model, key: Array, param_dtype: str, shardings: Any) -> Params:
    def draw(key: Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), init_scorer(model.scorer, model.config, key))

    return jax.jit(draw, out_shardings=shardings)(key)


def weights_digest(path: Path) -> str:
    """Digest of the files that decide a model's parameters: a .gguf file, or config.json and the safetensors.

    Raises:
      ConfigError: there are no weights.
    """
    files = [path] if path.is_file() else [path / "config.json", *weight_files(path)]
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def open_weights(path: Path) -> Weights:
    """Opens a .gguf file or the safetensors of a directory; reads headers, no weights.

    Raises:
      ConfigError: there are none, or they are damaged or unsafe.
    """
    return open_gguf(path) if path.suffix == ".gguf" and path.is_file() else SafetensorsWeights(path)


def save_hugging_face(
    directory: str | Path,
    model: Model,
    params: Params,
    *,
    tokenizer_dir: str | Path | None,
    model_card: str,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Writes a directory that transformers loads, and whatever else reads its format.

    Every process of a run must call this; the first one writes. Arrays are gathered, and written, one tensor at a
    time. All is written beside `directory` and renamed when complete.

    A reward model becomes its family's `...ForSequenceClassification` of one label. What pads its batches there is a
    token that is no EOS (see classifier.py), written into config.json and the tokenizer's settings. A value scorer is
    left out: what is written is then a plain language model.

    Args:
      directory: where to; an earlier export there is replaced, anything else refused.
      model: the model.
      params: its parameters, sharded or not; adapters are added to their matrices, one tensor at a time.
      tokenizer_dir: Hugging Face tokenizer files to copy along; None copies none.
      model_card: text of README.md.
      stop_ids: ids that end a completion, besides those that the model's config names: generation_config.json has both.
      dtype: what the weights are written in.
      max_shard_bytes: size of the largest file, unless one tensor is larger.

    Raises:
      ConfigError: `directory` holds something that is not an exported model.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not list(directory.glob("model*.safetensors")):
        raise ConfigError(
            f"{directory} holds files that are not an exported model; an export needs a new or empty directory. "
            "Choose another or empty it."
        )
    writes = jax.process_index() == 0
    partial = directory.parent / f".{directory.name}.partial"
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    params = as_adapted(as_matrices(params))
    shapes = expected_shapes(model.config, reward=model.scorer == "reward")
    ours = {theirs: (own, transposed) for own, (theirs, transposed) in tensor_names(model.config).items()}
    files = _plan_files(shapes, jnp.dtype(dtype).itemsize, max_shard_bytes)
    for file_name, names in files.items():
        tensors = (_gathered(params, ours, name, dtype) for name in names)
        if writes:
            write_safetensors(partial / file_name, {name: shapes[name] for name in names}, dtype, tensors)
        else:
            collections.deque(tensors, maxlen=0)
    if writes:
        if len(files) > 1:
            _write_json(partial / "model.safetensors.index.json", _index(shapes, files, dtype))
        _write_small_files(partial, model, tokenizer_dir, model_card, stop_ids, dtype)
        replace_directory(partial, directory)
    if jax.process_count() > 1:  # Nobody goes on to read what is not yet there.
        multihost_utils.sync_global_devices("export")


def expected_shapes(config: TransformerConfig, *, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a Hugging Face directory of this architecture holds, in the order of the layers.

    Args:
      config: the architecture.
      reward: whether it is a reward model, which has no output head.
    """
    shapes = _stacked_shapes(config, reward)
    theirs = tensor_names(config)
    layers = [name for name in theirs if name.startswith("layers.") and name in shapes]
    names = [
        "embed.table",
        *layers * config.num_layers,
        "final_norm.scale",
        *(name for name in ("head.weight", "scorer.weight") if name in shapes),
    ]
    expected: dict[str, tuple[int, ...]] = {}
    for place, name in enumerate(names):
        template, transposed = theirs[name]
        shape = shapes[name][1:] if name in layers else shapes[name]
        shape = (1, *shape) if name == "scorer.weight" else shape
        expected[template.format((place - 1) // len(layers))] = shape[::-1] if transposed else shape
    return expected


def _stacked_shapes(config: TransformerConfig, reward: bool) -> dict[str, tuple[int, ...]]:
    abstract = Model.create(config, scorer="reward" if reward else "none").abstract_params("float32")
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {".".join(key.key for key in key_path): leaf.shape for key_path, leaf in leaves}


def _check_names(weights: Weights, model: Model, path: str | Path) -> None:
    """Refuses weights that are not exactly those of the model; a reward model may be read from a language model."""
    config, is_reward = model.config, model.scorer == "reward"
    expected, found = expected_shapes(config, reward=is_reward), dict(weights.shapes)
    if is_reward:
        found.pop("lm_head.weight", None)
        if "score.weight" not in found:
            del expected["score.weight"]
    elif "score.weight" in found:
        raise ConfigError(
            f"{path} is a reward model: it has score.weight, and no output head to write text with. A language model "
            "is needed here. Choose the model that it was trained from."
        )
    for name in list(found):
        if name.endswith(".rotary_emb.inv_freq"):  # A buffer of old exports; it follows from the config.
            del found[name]
    if config.tied_head and found.pop("lm_head.weight", None) is not None:
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
            f"{path}: its weights are not those that its config.json describes. {'; '.join(problems)}. "
            "Names and shapes must match. Download the model again, or mend its config.json."
        )


def _check_tied(weights: Weights, config: TransformerConfig, path: str | Path) -> None:
    """Refuses a copy of a tied head that is not the embedding, by rows spread over the vocabulary."""
    embedding, shape = "model.embed_tokens.weight", (config.vocab_size, config.embed_dim)
    if weights.shapes.get(embedding) != shape:
        return  # It is missing or wrong itself, which is said with all else that is.
    rows = np.linspace(0, config.vocab_size - 1, _TIED_ROWS, dtype=int)
    same = weights.shapes["lm_head.weight"] == shape and all(
        np.array_equal(weights.read("lm_head.weight", index), weights.read(embedding, index))
        for index in ((slice(row, row + 1), slice(None)) for row in rows)
    )
    if not same:
        raise ConfigError(
            f"{path}: config.json says tie_word_embeddings=true, but lm_head.weight differs from the embedding. A "
            "tied head is the embedding. Set tie_word_embeddings to false."
        )


def _reader(
    weights: Weights, template: str, transposed: bool, leaf: jax.ShapeDtypeStruct
) -> Callable[[Any], np.ndarray]:
    """What `jax.make_array_from_callback` calls with the part of an array that a device holds."""
    stacked = "{}" in template
    # Devices that hold the same part share one reading.
    cache: dict[tuple, np.ndarray] = {}

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if bounds not in cache:
            part = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            inner = tuple(slice(*bound) for bound in (bounds[1:] if stacked else bounds))
            wanted = (slice(0, 1), *inner) if template == "score.weight" else inner[::-1] if transposed else inner
            for place, layer in enumerate(range(*bounds[0]) if stacked else (0,)):
                values = weights.read(template.format(layer), wanted)
                part[place if stacked else ...] = values.T if transposed else values
            cache[bounds] = part
        return cache[bounds]

    return read_part


def _gathered(params: Params, ours: dict[str, tuple[str, bool]], name: str, dtype: str) -> np.ndarray:
    """A tensor in Hugging Face's orientation, gathered from all devices; `ours` are our names by theirs."""
    layer = next((part for part in name.split(".") if part.isdigit()), None)
    own, transposed = ours[name if layer is None else name.replace(f".{layer}.", ".{}.", 1)]
    leaf: Any = params
    for key in own.split("."):
        leaf = leaf[key]
    tensor = _cast(leaf, dtype) if layer is None else _layer(leaf, np.int32(layer), dtype)
    local = tensor.is_fully_addressable
    whole = np.asarray(tensor) if local else np.asarray(multihost_utils.process_allgather(tensor, tiled=True))
    whole = whole[None] if own == "scorer.weight" else whole
    return whole.T if transposed else whole


@jax.jit(static_argnames="dtype")
def _cast(leaf: Any, dtype: str) -> jax.Array:
    return leaf.astype(dtype)


@jax.jit(static_argnames="dtype")
def _layer(leaf: Any, layer: jax.Array, dtype: str) -> jax.Array:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf).astype(dtype)


def _plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = int(np.prod(shape)) * itemsize
        if files[-1] and size + tensor_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{place:05}-of-{len(files):05}.safetensors": names for place, names in enumerate(files, 1)}


def _index(shapes: dict[str, tuple[int, ...]], files: dict[str, list[str]], dtype: str) -> dict[str, Any]:
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * jnp.dtype(dtype).itemsize
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file_name for file_name, names in files.items() for name in names},
    }


def _write_small_files(
    directory: Path,
    model: Model,
    tokenizer_dir: str | Path | None,
    model_card: str,
    stop_ids: Sequence[int],
    dtype: str,
) -> None:
    (directory / "README.md").write_text(model_card, encoding="utf-8")
    copy_tokenizer(tokenizer_dir, directory)
    if model.scorer == "reward":
        pad_id, pad_token = choose_padding(model.config, tokenizer_dir, stop_ids)
        write_padding(directory, pad_token)
        values = classifier_values(model.config, pad_id)
    else:
        values = write_config_json(model.config)
        ends = list(dict.fromkeys((*model.config.eos_ids, *stop_ids)))
        generation: dict[str, Any] = {} if model.config.bos_id is None else {"bos_token_id": model.config.bos_id}
        generation |= {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
        _write_json(directory / "generation_config.json", generation)
    _write_json(directory / "config.json", values | {"torch_dtype": dtype})


def copy_tokenizer(source: str | Path | None, directory: Path) -> None:
    """Copies the tokenizer files that a directory has; None has none."""
    for name in TOKENIZER_FILES if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            shutil.copyfile(file, directory / name)


def replace_directory(partial: Path, directory: Path) -> None:
    """Renames a complete directory into place; an earlier export leaves only once the new one is whole."""
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(partial, directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
