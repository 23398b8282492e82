"""Writes a model as a Hugging Face directory.

Weights are gathered and written one tensor at a time, file by file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kto_jax.config import ConfigError
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.gather import gather
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.classifier import choose_padding, classifier_values, write_padding
from kto_jax.models.weights.safetensors_files import read_json, write_safetensors
from kto_jax.models.weights.tensors import Expected, expected_tensors
from kto_jax.storage.atomic import publish_folder
from kto_jax.storage.hub import WEIGHTS_INDEX

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


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
    token that is no EOS (see classifier.py), written into config.json and the tokenizer's settings. A value head is
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
    # Imported here because it takes a while to import, and only an export needs it.
    from huggingface_hub import split_state_dict_into_shards_factory

    writes = jax.process_index() == 0
    partial = directory.parent / f".{directory.name}.partial"
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    expected = expected_tensors(model.config, reward=model.scalar_head == "reward")
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    itemsize = jnp.dtype(dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: math.prod(shape) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file_name, names in plan.filename_to_tensors.items():
        tensors = (_gathered(params, expected[name], dtype) for name in names)
        if writes:
            write_safetensors(partial / file_name, {name: shapes[name] for name in names}, dtype, tensors)
        else:
            for _ in tensors:  # Gathering a tensor takes all processes.
                pass
    if writes:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(partial / WEIGHTS_INDEX, index)
        _write_small_files(partial, model, tokenizer_dir, model_card, stop_ids, dtype)
        publish_folder(partial, directory)
    if jax.process_count() > 1:  # Nobody goes on to read what is not yet there.
        multihost_utils.sync_global_devices("export")


def _gathered(params: Params, expected: Expected, dtype: str) -> np.ndarray:
    """A tensor as the directory holds it, gathered from all devices."""
    leaf: Any = params
    for key in expected.parameter.split("."):
        leaf = leaf[key]
    array = _cast(leaf, dtype) if expected.layer is None else _layer(leaf, np.int32(expected.layer), dtype)
    return expected.tensor.to_file(gather(array))


@jax.jit(static_argnames="dtype")
def _cast(leaf: Any, dtype: str) -> jax.Array:
    return leaf.astype(dtype)


@jax.jit(static_argnames="dtype")
def _layer(leaf: Any, layer: jax.Array, dtype: str) -> jax.Array:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf).astype(dtype)


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
    if model.scalar_head == "reward":
        pad_id, pad_token = choose_padding(model.config, tokenizer_dir, stop_ids)
        write_padding(directory, pad_token)
        values = classifier_values(model.config, pad_id)
    else:
        values = write_config_json(model.config)
        ends: list[int] = list(dict.fromkeys((*model.config.eos_ids, *stop_ids)))
        # The base's own sampling defaults stay, and so do its ends.
        base = Path(tokenizer_dir or "") / "generation_config.json"
        generation = read_json(base) if tokenizer_dir is not None and base.is_file() else {}
        if model.config.bos_id is not None:
            generation.setdefault("bos_token_id", model.config.bos_id)
        own = generation.get("eos_token_id", [])
        ends = list(dict.fromkeys((*ends, *(own if isinstance(own, list) else [own]))))
        generation |= {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
        _write_json(directory / "generation_config.json", generation)
    _write_json(directory / "config.json", values | {"torch_dtype": dtype})


def copy_tokenizer(source: str | Path | None, directory: Path) -> None:
    """Copies the tokenizer files that a directory has; None has none."""
    for name in TOKENIZER_FILES if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            shutil.copyfile(file, directory / name)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
