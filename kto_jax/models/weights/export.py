"""Writes a model as a Hugging Face directory.

Weights are gathered and written one tensor at a time, file by file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from kto_jax.storage.sums import write_sums

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Effect of writing weights in a narrower dtype than they were trained in.

    Attributes:
      largest: the largest relative change of a weight; 0 if none was rounded.
      undone: norm of the rounding errors over the norm of the training update; NaN if the start is not available.
    """

    largest: float
    undone: float


def save_hugging_face(
    directory: str | Path,
    model: Model,
    params: Params,
    *,
    tokenizer_dir: str | Path | None,
    model_card: str,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
    start: Params | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> Rounding:
    """Writes a directory in transformers' format.

    Every process of a run must call this; the first one writes. Arrays are gathered and written one tensor at a time.
    The export is written beside `directory`, with the digests of its files, and renamed when complete.

    A reward model becomes its family's `...ForSequenceClassification` with one label. config.json and the tokenizer's
    settings then get a padding token that is not an EOS (see classifier.py). A value head is omitted: the export is a
    plain language model.

    Args:
      directory: the path; an earlier export there is replaced, anything else is refused.
      model: the model.
      params: its parameters, sharded or not; adapters are merged into their matrices, one tensor at a time.
      tokenizer_dir: directory whose tokenizer files are copied; None copies none.
      model_card: text of README.md.
      stop_ids: ids that end a completion, besides those in the model's config: generation_config.json gets both.
      dtype: of the written weights.
      start: the parameters before training, if available.
      max_shard_bytes: size of the largest file, unless one tensor is larger.

    Returns:
      The effect of rounding to `dtype`.

    Raises:
      ConfigError: `directory` holds something that is not an exported model, or a weight is not finite in `dtype`.
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
    stats = _write_weights(partial, model, params, start, dtype, max_shard_bytes)
    if writes:
        _write_small_files(partial, model, tokenizer_dir, model_card, stop_ids, dtype)
        write_sums(partial)
        publish_folder(partial, directory)
    if jax.process_count() > 1:  # No process may read the export before it is complete.
        multihost_utils.sync_global_devices("export")
    return _rounding(stats, has_start=start is not None)


class _Stats(NamedTuple):
    """Statistics of one tensor: number of non-finite weights, largest relative change, squared norms."""

    num_bad: Any
    largest: Any
    error: Any
    change: Any


def _write_weights(
    directory: Path, model: Model, params: Params, start: Params | None, dtype: str, max_shard_bytes: int
) -> list[_Stats]:
    """Gathers the tensors on all processes, and writes them with their index on the first; returns their statistics."""
    # Imported here because the import is slow, and only an export needs it.
    from huggingface_hub import split_state_dict_into_shards_factory

    expected = expected_tensors(model.config, reward=model.scalar_head == "reward")
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    itemsize = jnp.dtype(dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: math.prod(shape) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    writes = jax.process_index() == 0
    stats: list[_Stats] = []
    for file_name, names in plan.filename_to_tensors.items():
        tensors = (_gather_tensor(params, start, name, expected[name], dtype, stats) for name in names)
        if writes:
            write_safetensors(directory / file_name, {name: shapes[name] for name in names}, dtype, tensors)
        else:
            for _ in tensors:  # Gathering a tensor takes all processes.
                pass
    if writes and plan.is_sharded:
        _write_json(directory / WEIGHTS_INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    return stats


def _gather_tensor(
    params: Params, start: Params | None, name: str, expected: Expected, dtype: str, stats: list[_Stats]
) -> np.ndarray:
    """A tensor in the directory's layout, gathered from all devices; appends its statistics to `stats`.

    Raises:
      ConfigError: a weight is not finite in `dtype`.
    """
    index = tuple(map(np.int32, expected.place))
    parts = []
    for part in expected.parts:
        leaf, before = _leaf(params, part.parameter), _leaf(start, part.parameter)
        array, tensor_stats = _cast(leaf, before, index, dtype)
        stats.append(_Stats(*map(float, tensor_stats)))
        if stats[-1].num_bad:
            raise ConfigError(
                f"{stats[-1].num_bad:.0f} weights of {name} are not finite in {dtype}. All weights of an export must "
                'be finite. Set config.export.dtype to "float32" (--dtype of kto_jax.export), or export an earlier '
                "checkpoint."
            )
        parts.append(gather(array))
    return expected.join(parts)


def _leaf(params: Any, name: str) -> Any:
    """The parameter with this dotted name; None if there is none."""
    for key in name.split("."):
        params = None if params is None else params.get(key)
    return params


@jax.jit(static_argnames="dtype")
def _cast(leaf: Any, start: Any, index: tuple[Any, ...], dtype: str) -> tuple[jax.Array, _Stats]:
    """A parameter, or one layer or expert of it, in `dtype`, and its statistics."""
    for place in index:
        leaf, start = jax.tree.map(lambda x, i=place: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (leaf, start))
    exact, info = leaf.astype(jnp.float32), jnp.finfo(dtype)
    # XLA may drop a cast to a narrower dtype and back, but not this.
    rounded = jax.lax.reduce_precision(exact, info.nexp, info.nmant)
    error = rounded - exact
    change = 0.0 if start is None else jnp.sum((exact - start.astype(jnp.float32)) ** 2)
    largest = jnp.max(jnp.abs(error) / jnp.where(exact == 0, 1, jnp.abs(exact)))
    return leaf.astype(dtype), _Stats(jnp.sum(~jnp.isfinite(rounded)), largest, jnp.sum(error**2), change)


def _rounding(stats: Sequence[_Stats], *, has_start: bool) -> Rounding:
    error, change = (math.sqrt(sum(getattr(one, name) for one in stats)) for name in ("error", "change"))
    undone = error / change if has_start and change else math.nan
    return Rounding(max(one.largest for one in stats), undone)


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
        # The base's sampling defaults and EOS ids are kept.
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
    """Copies the tokenizer files of a directory; None has none."""
    for name in TOKENIZER_FILES if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            shutil.copyfile(file, directory / name)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
