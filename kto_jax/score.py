"""Scores completions with a reward model, from the command line.

python -m kto_jax.score --model=runs/reward --data=feedback.jsonl --out=scored.jsonl
python -m kto_jax.score --model=runs/reward --config=configs/kto_llama.py --out=scored.jsonl

Every row of --out is the row of --data with a field "score" added: train on it with config.data.format=scores. With
--config in place of --data, what is scored is what training reads of config.data.train, in any format, layout or
mixture; each of its completions becomes a row of its own, {prompt, completion, label, score}.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kto_jax.command import FAILED, FINISHED, run_command
from kto_jax.config import Config, ConfigError, DataConfig, MeshConfig
from kto_jax.config.ranges import Count, Precision, Range
from kto_jax.data.rows import files, records
from kto_jax.data.rows.sources import sources_of
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.truncation import cut_prompt, fit_lengths
from kto_jax.data.workers import Workers
from kto_jax.devices.attention_on_mesh import choose_attention
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.sharding import make_mesh
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.shapes import power_of_two
from kto_jax.storage import fetch as sources
from kto_jax.training.resume import rendering_of_run

_SHORTEST = 64
"""Sequences are padded to this length or a power of two above it, so that few shapes are compiled."""
_BATCHES_READ_AHEAD = 32
"""So many batches of rows are read, and sorted by length, before any is scored."""


def open_reward_model(path: str, *, dtype: str) -> tuple[Model, Params, Path]:
    """Loads what is to score.

    Args:
      path: the folder of a run that trained a reward model, or a directory of a sequence classification of one label,
        such as a LlamaForSequenceClassification.
      dtype: what to compute in.

    Returns:
      The model, its parameters, and where its tokenizer is.

    Raises:
      ConfigError: nothing that can be loaded is there, or no reward model.
    """
    source = sources.local_path(path)
    if (source / "policy" / "config.json").is_file():
        source = source / "policy"
    elif (source / "checkpoints").is_dir():
        raise ConfigError(
            f"{source} is a run without a policy/ yet. A run is scored with once it has ended. Let it end, or give a "
            "directory of a sequence classification, such as a LlamaForSequenceClassification."
        )
    if not is_reward_model(source):
        raise ConfigError(
            f"{source} is no reward model. Allowed: a run of the reward objective, or a directory whose config.json "
            "names a sequence classification, such as LlamaForSequenceClassification. Choose another --model."
        )
    attention = choose_attention("auto", make_mesh(MeshConfig(), jax.devices()[:1]))
    config = read_config(source)
    model = Model.create(config, dtype=dtype, remat="none", scorer="reward", packed_attention=attention)
    return model, load_params(model, source, param_dtype=dtype), source


def score_sequences(
    model: Model, params: Params, sequences: Sequence[np.ndarray], *, batch_size: int
) -> Float[np.ndarray, " N"]:
    """The reward of each sequence at its last token.

    Args:
      model: a reward model.
      params: its parameters.
      sequences: token ids of prompt and completion, at least one token each.
      batch_size: sequences scored at once.

    Returns:
      Rewards in the sequences' order, float32 or wider.
    """
    found = np.zeros(len(sequences), jnp.promote_types(model.dtype, jnp.float32))
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(sequences):
        groups.setdefault(max(_SHORTEST, power_of_two(len(ids))), []).append(row)
    for length, group in sorted(groups.items()):
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            tokens_BL = np.zeros((batch_size, length), np.int32)
            lengths_B = np.ones(batch_size, np.int32)  # Of the last batch's empty rows too, whose scores are dropped.
            for place, row in enumerate(rows):
                lengths_B[place] = len(sequences[row])
                tokens_BL[place, : lengths_B[place]] = sequences[row]
            found[rows] = np.asarray(_score_batch(model, params, tokens_BL, lengths_B))[: len(rows)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
    model: Model, params: Params, tokens_BL: Int[Array, "B L"], lengths_B: Int[Array, " B"]
) -> Float[Array, " B"]:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
    segment_ids_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    hidden_BLD = model.hidden_states(params, tokens_BL, segment_ids_BL, positions_BL)
    return model.scores(params, hidden_BLD[jnp.arange(len(lengths_B)), lengths_B - 1])


def score_rows(
    model: Model,
    params: Params,
    tokenizer: tokenize.TokenizerInfo,
    rows: Iterable[tuple[str, Any]],
    data: DataConfig,
    *,
    batch_size: int,
    score_field: str = "score",
) -> Iterator[dict[str, Any] | files.Rejection]:
    """Adds to each row the score of its prompt and completion.

    Args:
      model: a reward model.
      params: its parameters.
      tokenizer: its tokenizer.
      rows: place and fields, as `files.read_rows` gives them.
      data: the fields and limits of the rows; what they hold beside a prompt and a completion does not matter.
      batch_size: rows scored at once.
      score_field: the field that is added.

    Yields:
      Every row in order, with its score, or a `Rejection`.

    Raises:
      ConfigError: the first row lacks a prompt or a completion, or a row has a field `score_field` already.
    """
    pairs = _records(rows, data, score_field)
    yield from score_records(model, params, tokenizer, pairs, data, batch_size=batch_size, score_field=score_field)


def score_records(
    model: Model,
    params: Params,
    tokenizer: tokenize.TokenizerInfo,
    pairs: Iterator[tuple[Any, records.Feedback | files.Rejection]],
    data: DataConfig,
    *,
    batch_size: int,
    score_field: str,
) -> Iterator[dict[str, Any] | files.Rejection]:
    """Adds to rows the score of their prompt, completion and EOS, encoded as training encodes them.

    Args:
      model: a reward model.
      params: its parameters.
      tokenizer: its tokenizer.
      pairs: each row's fields, and what was read of them.
      data: the limits.
      batch_size: rows scored at once.
      score_field: the field that is added.

    Yields:
      Every row in order, with its score, or a `Rejection`.
    """
    limits = tokenize.Limits(data.max_length, data.max_prompt_length, "reject", model.config.vocab_size)
    with Workers(1, tokenize.start_encoder, tokenizer) as workers:
        while chunk := list(itertools.islice(pairs, batch_size * _BATCHES_READ_AHEAD)):
            readable = [record for _, record in chunk if isinstance(record, records.Feedback)]
            encoded = workers.submit(tokenize.encode_feedback, readable, limits).result()
            sequences = _fitted(encoded, data, tokenizer.bos_id)
            scores = iter(score_sequences(model, params, sequences, batch_size=batch_size).tolist())
            reasons = iter(encoded.reasons)
            for fields, record in chunk:
                if isinstance(record, files.Rejection):
                    yield record
                elif (reason := next(reasons)) is not None:
                    yield files.Rejection(reason, record.place)
                elif math.isfinite(score := next(scores)):
                    yield {**fields, score_field: score}
                else:
                    yield files.Rejection(f"its score is {score}", record.place)


def _records(
    rows: Iterable[tuple[str, Any]], data: DataConfig, score_field: str
) -> Iterator[tuple[Any, records.Feedback | files.Rejection]]:
    """Every row's fields, with its prompt and completion as the index would read them."""
    names = (data.prompt_field, data.completion_field)
    waiting: list[Any] = []

    def trimmed() -> Iterator[tuple[str, Any]]:
        seen = False
        for place, fields in rows:
            waiting.append(fields)
            if isinstance(fields, Mapping):
                _check_fields(place, fields, () if seen else names, score_field)
                seen = True
                # Other fields are none of the reader's business: a broken weight does not make a row unscorable.
                fields = {name: fields[name] for name in names if name in fields}
            yield place, fields

    for record in records.records_of(trimmed(), dataclasses.replace(data, format="demonstrations")):
        assert isinstance(record, records.Feedback | files.Rejection)
        yield waiting.pop(), record


def completions_to_score(
    data: DataConfig, score_field: str
) -> Iterator[tuple[Any, records.Feedback | files.Rejection]]:
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
            if isinstance(record, files.Rejection):
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


def _fitted(encoded: tokenize.EncodedRows, data: DataConfig, bos_id: int | None) -> list[np.ndarray]:
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


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    model: str = ""
    """The folder of a reward model's run, or a sequence classification model. Required."""
    data: str = ""
    """What to score: a .jsonl, .json, .csv or .parquet file, also .gz or .bz2."""
    out: str = ""
    """The JSONL file to write; an existing file is replaced. Required."""
    config: Config | None = None
    """In place of --data: a recipe whose config.data.train is scored."""
    prompt_field: str = "prompt"
    """Field with the prompt: text or chat messages."""
    completion_field: str = "completion"
    """Field with the completion: text or one assistant message."""
    score_field: str = "score"
    """Field to add."""
    max_length: Annotated[int, Range(at_least=2)] | None = None
    """As config.data.max_length. Default: that of the run."""
    max_prompt_length: Count | None = None
    """As config.data.max_prompt_length. Default: that of the run."""
    batch_size: Count = 16
    """Completions scored at once."""
    dtype: Precision = "float32"
    """Dtype of the computation."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own. "none": plain text. Otherwise the path of a Jinja file."""
    eos_token: str = ""
    """What completions end in, as data.eos_token. Empty: as the run trained."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Returns:
      0 where rows were scored, 1 where none could be, 2 where the user asked for what cannot be done.
    """
    return run_command(score, Options, str(__doc__), arguments)


def _check_files(options: Options, feedback: DataConfig | None) -> list[files.SourceFile]:
    """What is to be read."""
    missing = [f"--{name}" for name in ("model", "data", "out") if not getattr(options, name)]
    if feedback is not None and options.data:
        raise ConfigError("--data and --config are given; one of them says what is scored. Take one of the two out.")
    if missing and not (feedback is not None and missing == ["--data"]):
        raise ConfigError(
            f"{', '.join(missing)} not given; --model, --data (or --config) and --out are needed. Set them."
        )
    paths = [source.path for source in sources_of(feedback)] if feedback is not None else [options.data]
    found, out = [file for path in paths for file in files.expand(path)], Path(options.out)
    if out.is_dir() or (out.exists() and any(out.samefile(file.path) for file in found)):
        raise ConfigError(f"--out={out} is --data or a directory; it must be another file. Choose another --out.")
    return found


def _data_of_run(model: str) -> dict[str, Any]:
    """The lengths and the EOS that a run trained with; the defaults where the model is no run's folder or policy."""
    folder = Path(model).parent if Path(model).name == "policy" else Path(model)
    names = ("max_length", "max_prompt_length", "eos_token")
    config, manifest = folder / "config.json", folder / "manifest.json"
    if not ((folder / "policy").is_dir() and config.is_file() and manifest.is_file()):
        return {name: getattr(DataConfig, name) for name in names}
    data, eos_id = json.loads(config.read_text())["data"], json.loads(manifest.read_text())["tokenizer"]["eos_id"]
    # What it was, not how it was chosen: older runs chose otherwise.
    return {name: data[name] for name in names[:2]} | {"eos_token": tokenize.token_of(folder / "policy", eos_id)}


def score(options: Options) -> int:
    """Scores a file or the feedback of a recipe; returns the exit code.

    Raises:
      ConfigError: a flag, the feedback or the model cannot be used.
    """
    feedback = options.config.data if options.config else None
    found, out = _check_files(options, feedback), Path(options.out)
    trained_with = _data_of_run(options.model)
    data = DataConfig(
        prompt_field=options.prompt_field, completion_field=options.completion_field,
        max_length=options.max_length or trained_with["max_length"],
        max_prompt_length=options.max_prompt_length or trained_with["max_prompt_length"],
    )  # fmt: skip
    keep_compiled()
    model, params, tokenizer_path = open_reward_model(options.model, dtype=options.dtype)
    if data.max_length > model.config.max_length:
        raise ConfigError(
            f"--max_length={data.max_length} is beyond the model's context of {model.config.max_length} tokens. "
            f"Allowed: up to {model.config.max_length}. Set --max_length."
        )
    partial = out.with_name(f".{out.name}.partial")
    counts = {"scored": 0, "rejected": 0}
    with tempfile.TemporaryDirectory(prefix="kto_jax-") as directory:
        tokenizer = tokenize.prepare_tokenizer(
            tokenizer_path,
            Path(directory) / "tokenizer",
            chat_template=options.chat_template,
            eos_token=options.eos_token or trained_with["eos_token"],
            rendering=rendering_of_run(Path(options.model)),
        )
        how: dict[str, Any] = {"batch_size": options.batch_size, "score_field": options.score_field}
        if feedback is None:
            rows = itertools.chain.from_iterable(map(files.read_rows, found))
            scored = score_rows(model, params, tokenizer, rows, data, **how)
        else:
            completions = completions_to_score(feedback, options.score_field)
            scored = score_records(model, params, tokenizer, completions, data, **how)
        try:
            _write(partial, scored, counts)
            if counts["scored"]:
                partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    print(f"{counts['scored']} rows scored, {counts['rejected']} rejected", file=sys.stderr)
    return FINISHED if counts["scored"] else FAILED


def _write(file: Path, rows: Iterable[dict[str, Any] | files.Rejection], counts: dict[str, int]) -> None:
    try:
        stream = file.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out cannot be written: {error}. It must lie in a directory that is there. Choose another --out."
        ) from error
    with stream:
        for row in rows:
            if isinstance(row, files.Rejection):
                counts["rejected"] += 1
                print(f"{row.place}: {row.reason}", file=sys.stderr)
            else:
                counts["scored"] += 1
                stream.write(json.dumps(row, default=str) + "\n")  # ASCII: a field may hold half a surrogate pair.


if __name__ == "__main__":
    sys.exit(main())
