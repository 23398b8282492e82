"""Scoring completions with a reward model: the library behind `kto_jax.score`.

from kto_jax.rewards.reward_model import open_reward_model, reward

with open_reward_model("runs/reward") as model:
    print(reward(model, ["Name a film."], ["Jaws."]))
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows import records
from kto_jax.data.rows.rejection import Rejection
from kto_jax.data.rows.sources import sources_of
from kto_jax.data.tokens.encoded_rows import EncodedRows, Limits, encode_feedback, start_encoder
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.tokenizer import TokenizerInfo, token_of
from kto_jax.data.truncation import cut_prompt, fit_lengths
from kto_jax.data.workers import Workers
from kto_jax.devices.inference import Devices, Placed, place_model, whole_parts
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.models.weights.model_files import ModelFiles, find_model
from kto_jax.shapes import power_of_two
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.run_place import fetched
from kto_jax.training.resume import rendering_of_run

_SHORTEST = 64
"""Sequences are padded to this length or to a power of two above it, so that few shapes are compiled."""
_BATCHES_READ_AHEAD = 32
"""Batches of rows that are read and sorted by length before any is scored."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model with its tokenizer, from `open_reward_model`.

    Attributes:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer, while the scratch folder of `open_reward_model` exists.
      max_length: most tokens of prompt and completion.
      max_prompt_length: most tokens of a prompt; a longer one is cut as in training.
      placed: the devices that hold it; None if only one can.
    """

    model: Model
    params: Params
    tokenizer: TokenizerInfo
    max_length: int = DataConfig.max_length
    max_prompt_length: int = DataConfig.max_prompt_length
    placed: Placed | None = None


@contextlib.contextmanager
def open_reward_model(
    path: str,
    *,
    dtype: str = "float32",
    chat_template: str = "auto",
    eos_token: str = "",
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    devices: Devices = "one",
) -> Iterator[RewardModel]:
    """Opens a reward model.

    Args:
      path: the folder of a run that trained a reward model, or a sequence classification model of one label, such as a
        LlamaForSequenceClassification.
      dtype: what to compute in.
      chat_template: "auto" for the tokenizer's own, "none" for plain text, or the path of a Jinja file.
      eos_token: what completions end in, as data.eos_token; empty for what the run trained with.
      max_length: most tokens of prompt and completion; None for what the run trained with.
      max_prompt_length: most tokens of a prompt; None likewise.
      devices: which devices of this process hold it, as `place_model` takes it.

    Yields:
      The model.

    Raises:
      ConfigError: there is no reward model that can be loaded, or its context is shorter than `max_length`.
      TransientError: the Hub cannot be reached.
    """
    path = fetched(path)
    files = _find_reward_model(path)
    trained_with = settings_of_run(path)
    max_length = max_length or trained_with["max_length"]
    config = read_config(files.weights)
    if max_length > config.max_length:
        raise ConfigError(
            f"--max_length={max_length} is beyond the model's context of {config.max_length} tokens. Allowed: up to "
            f"{config.max_length}. Set --max_length."
        )
    placed = place_model(config, dtype=dtype, devices=devices, scalar_head="reward")
    with scratch_folder() as scratch:
        tokenizer = prepare_tokenizer(
            files.tokenizer,
            scratch / "tokenizer",
            chat_template=chat_template,
            eos_token=eos_token or trained_with["eos_token"],
            rendering=rendering_of_run(Path(path)),
        )
        params = load_params(placed.model, files, param_dtype=dtype, shardings=placed.shardings)
        max_prompt_length = max_prompt_length or trained_with["max_prompt_length"]
        yield RewardModel(placed.model, params, tokenizer, max_length, max_prompt_length, placed)


def _find_reward_model(path: str) -> ModelFiles:
    files = find_model(path)
    source = files.weights
    if (source / "policy" / "config.json").is_file():
        files = find_model(str(source / "policy"))
    elif (source / "checkpoints").is_dir():
        raise ConfigError(
            f"{source} is a run without a policy/ yet. Only a finished run can score. Wait for it to finish, or set a "
            "sequence classification model, such as a LlamaForSequenceClassification."
        )
    if not is_reward_model(files):
        raise ConfigError(
            f"{files} is no reward model. Allowed: a run of the reward objective, or a directory whose config.json "
            "names a sequence classification model, such as LlamaForSequenceClassification. Choose another --model."
        )
    return files


def settings_of_run(path: str) -> dict[str, Any]:
    """`max_length`, `max_prompt_length` and `eos_token` of a run, from its folder or its policy/; else the defaults."""
    folder = Path(path).parent if Path(path).name == "policy" else Path(path)
    names = ("max_length", "max_prompt_length", "eos_token")
    config, manifest = folder / "config.json", folder / "manifest.json"
    if not ((folder / "policy").is_dir() and config.is_file() and manifest.is_file()):
        return {name: getattr(DataConfig, name) for name in names}
    data, eos_id = json.loads(config.read_text())["data"], json.loads(manifest.read_text())["tokenizer"]["eos_id"]
    # The token itself: earlier versions chose another one for the same setting.
    return {name: data[name] for name in names[:2]} | {"eos_token": token_of(folder / "policy", eos_id)}


def reward(
    model: RewardModel,
    prompts: Sequence[str | list[dict[str, str]]],
    completions: Sequence[str],
    *,
    batch_size: int = 16,
) -> Float[np.ndarray, " N"]:
    """The reward of each completion of a prompt.

    Args:
      model: from `open_reward_model`.
      prompts: text or chat messages; one for each completion.
      completions: text.
      batch_size: completions scored at once.

    Returns:
      Rewards, float64.

    Raises:
      ConfigError: a completion cannot be scored: it is empty or too long, or its reward is not finite.
    """
    pairs = zip(prompts, completions, strict=True)
    rows = [(f"completion {n}", {"prompt": p, "completion": c}) for n, (p, c) in enumerate(pairs, start=1)]
    data = DataConfig(max_length=model.max_length, max_prompt_length=model.max_prompt_length)
    found = []
    for row in score_rows(model, rows, data, batch_size=batch_size):
        if isinstance(row, Rejection):
            reason = row.reason.partition(";")[0]  # what follows are settings of feedback, which this call has none of
            raise ConfigError(
                f"{row.place} cannot be scored: {reason}. A completion needs text that fits max_length="
                f"{model.max_length}, and a finite reward. Leave it out or change it."
            )
        found.append(row["score"])
    return np.asarray(found, np.float64)


def score_sequences(
    model: RewardModel,
    sequences: Sequence[np.ndarray],
    *,
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " N"]:
    """The reward of each sequence at its last token.

    Args:
      model: from `open_reward_model`.
      sequences: token ids of prompt and completion, at least one token each.
      batch_size: sequences scored at once. Over several devices it is raised to the next multiple of the parts into
        which they divide rows.
      on_batch: called after each batch with the number of its sequences.

    Returns:
      Rewards in the sequences' order, float32 or wider.
    """
    found = np.zeros(len(sequences), jnp.promote_types(model.model.dtype, jnp.float32))
    batch_size = whole_parts(batch_size, model.params)
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(sequences):
        groups.setdefault(max(_SHORTEST, power_of_two(len(ids))), []).append(row)
    for length, group in sorted(groups.items()):
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            tokens_BL = np.zeros((batch_size, length), np.int32)
            lengths_B = np.ones(batch_size, np.int32)  # Also of the last batch's empty rows, whose scores are dropped.
            for place, row in enumerate(rows):
                lengths_B[place] = len(sequences[row])
                tokens_BL[place, : lengths_B[place]] = sequences[row]
            scores_B = _score_batch(model.model, model.params, tokens_BL, lengths_B)
            found[rows] = np.asarray(scores_B)[: len(rows)]
            if on_batch:
                on_batch(len(rows))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
    model: Model, params: Params, tokens_BL: Int[Array, "B L"], lengths_B: Int[Array, " B"]
) -> Float[Array, " B"]:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
    segment_ids_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    hidden_BLD = model.hidden_states(params, tokens_BL, segment_ids_BL, positions_BL)
    return model.apply_scalar_head(params, hidden_BLD[jnp.arange(len(lengths_B)), lengths_B - 1])


def score_rows(
    model: RewardModel,
    rows: Iterable[tuple[str, Any]],
    data: DataConfig,
    *,
    batch_size: int,
    score_field: str = "score",
    on_batch: Callable[[int], object] | None = None,
) -> Iterator[dict[str, Any] | Rejection]:
    """Adds to each row the score of its prompt and completion.

    Args:
      model: from `open_reward_model`.
      rows: place and fields, as `files.read_rows` gives them.
      data: names of the fields, and limits; fields other than prompt and completion are only copied.
      batch_size: rows scored at once.
      score_field: the field that is added.
      on_batch: called after each batch with the number of its rows.

    Yields:
      Every row in order, with its score, or a `Rejection`.

    Raises:
      ConfigError: the first row lacks a prompt or a completion, or a row has a field `score_field` already.
    """
    pairs = _records(rows, data, score_field)
    yield from score_records(model, pairs, data, batch_size=batch_size, score_field=score_field, on_batch=on_batch)


def score_records(
    model: RewardModel,
    pairs: Iterator[tuple[Any, records.Feedback | Rejection]],
    data: DataConfig,
    *,
    batch_size: int,
    score_field: str,
    on_batch: Callable[[int], object] | None = None,
) -> Iterator[dict[str, Any] | Rejection]:
    """Adds to each row the score of its prompt, completion and EOS, encoded as in training.

    Args:
      model: from `open_reward_model`.
      pairs: each row's fields, and the completion that was read from them.
      data: the limits.
      batch_size: rows scored at once.
      score_field: the field that is added.
      on_batch: called after each batch with the number of its rows.

    Yields:
      Every row in order, with its score, or a `Rejection`.
    """
    limits = Limits(data.max_length, data.max_prompt_length, "reject", model.model.config.vocab_size)
    with Workers(1, start_encoder, model.tokenizer) as workers:
        while chunk := list(itertools.islice(pairs, batch_size * _BATCHES_READ_AHEAD)):
            readable = [record for _, record in chunk if isinstance(record, records.Feedback)]
            encoded = workers.submit(encode_feedback, readable, limits).result()
            sequences = _truncate(encoded, data, model.tokenizer.bos_id)
            found = score_sequences(model, sequences, batch_size=batch_size, on_batch=on_batch)
            scores = iter(found.tolist())
            reasons = iter(encoded.reasons)
            for fields, record in chunk:
                if isinstance(record, Rejection):
                    yield record
                elif (reason := next(reasons)) is not None:
                    yield Rejection(reason, record.place)
                elif math.isfinite(score := next(scores)):
                    yield {**fields, score_field: score}
                else:
                    yield Rejection(f"its score is {score}", record.place)


def _records(
    rows: Iterable[tuple[str, Any]], data: DataConfig, score_field: str
) -> Iterator[tuple[Any, records.Feedback | Rejection]]:
    """Every row's fields, with its prompt and completion as the index would read them."""
    names = (data.prompt_field, data.completion_field)
    waiting: collections.deque[Any] = collections.deque()

    def only_text() -> Iterator[tuple[str, Any]]:
        seen = False
        for place, fields in rows:
            waiting.append(fields)
            if isinstance(fields, Mapping):
                _check_fields(place, fields, () if seen else names, score_field)
                seen = True
                # The reader sees no other fields: a row with a broken weight can still be scored.
                fields = {name: fields[name] for name in names if name in fields}
            yield place, fields

    for record in records.records_of(only_text(), dataclasses.replace(data, format="demonstrations", layout="fields")):
        fields = waiting.popleft()  # Of this layout, each row is one record.
        if not isinstance(record, records.Skipped):
            assert isinstance(record, records.Feedback | Rejection)
            yield fields, record


def completions_to_score(data: DataConfig, score_field: str) -> Iterator[tuple[Any, records.Feedback | Rejection]]:
    """Every completion of what `data.train` names, and a row of the layout "fields" for it.

    Args:
      data: as training reads it.
      score_field: the field that will be added.

    Yields:
      Fields and completion; a `Rejection` in place of both where a row cannot be used.

    Raises:
      ConfigError: as `records.records_of` does, or the rows have a field `score_field` already.
    """
    for source in sources_of(data):
        for record in records.read_records(source.path, source.data) if source.split == "train" else ():
            if isinstance(record, Rejection):
                yield None, record
            elif not isinstance(record, records.Skipped):
                for completion in records.completions_of(record):
                    row = records.row_of(completion, source.data)
                    _check_fields(record.place, row, (), score_field)
                    yield row, completion


def _check_fields(place: str, fields: Mapping[str, Any], needed: Iterable[str], score_field: str) -> None:
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ConfigError(
            f"{place} has no field {missing[0]!r}. Its fields are {', '.join(map(repr, fields)) or 'none'}. "
            "Set --prompt_field and --completion_field."
        )
    if score_field in fields:
        raise ConfigError(
            f"{place} has a field {score_field!r} already. A score is added under a name of its own, so that no rating "
            "is lost. Set --score_field."
        )


def _truncate(encoded: EncodedRows, data: DataConfig, bos_id: int | None) -> list[np.ndarray]:
    """Prompt and completion of each accepted row, cut to what training keeps of them."""
    num_prompt, num_completion = fit_lengths(
        encoded.prompt_lengths, encoded.completion_lengths,
        max_length=data.max_length, max_prompt_length=data.max_prompt_length,
    )  # fmt: skip
    ends = np.cumsum(np.stack([encoded.prompt_lengths, encoded.completion_lengths], axis=1))
    pieces = np.split(encoded.tokens, ends)
    return [
        np.concatenate([cut_prompt(pieces[2 * i], int(num_prompt[i]), bos_id), pieces[2 * i + 1][: num_completion[i]]])
        for i in range(len(num_prompt))
    ]
