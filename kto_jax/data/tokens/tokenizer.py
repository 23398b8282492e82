"""Tokenizers, in worker processes: the training process imports neither transformers nor torch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.rows.records import Feedback, Preference, completions_of
from kto_jax.data.rows.turns import SAME_COMPLETIONS, Message
from kto_jax.data.tokens import tokenizer_files
from kto_jax.data.tokens.encoder import Encoder, EncodingError, Rendering
from kto_jax.data.truncation import cut_prompt
from kto_jax.data.workers import Workers
from kto_jax.shapes import SAMPLED
from kto_jax.storage.atomic import new_folder


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """A normalised Hugging Face tokenizer directory, and what other modules need to know about it.

    Attributes:
      directory: holds tokenizer.json, tokenizer_config.json and, with a chat template, chat_template.jinja.
      vocab_size: one more than the largest id.
      bos_id: id of the token that begins a sequence, or None.
      eos_id: id of the token that ends every completion: the one with which the chat template ends a turn, or
        else the tokenizer's EOS.
      stop_ids: ids that end a completion as it is written: `eos_id` and the tokenizer's EOS.
      sha256: digest of everything that determines how text becomes ids.
      has_chat_template: whether prompts are rendered by a chat template.
      rendering: how the template is used.
      changes: descriptions of the changes to the base's own files.
      is_dated: whether prompts depend on the time at which they are rendered.
    """

    directory: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    sha256: str
    has_chat_template: bool
    rendering: Rendering = dataclasses.field(default_factory=Rendering)
    changes: tuple[str, ...] = ()
    is_dated: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a row; the fields are those of `DataConfig`, and the size of the model's vocabulary."""

    max_length: int
    max_prompt_length: int
    long_completion: str
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class EncodedRows:
    """Rows returned by a worker. A pair is accepted or rejected as a whole, and counts as two accepted completions.

    Attributes:
      reasons: why a row is rejected, or None; one for each row.
      tokens: ids of prompt and completion of all accepted completions, one after the other, int32.
      prompt_lengths: tokens of each accepted completion's prompt.
      completion_lengths: tokens of each accepted completion, its EOS included.
      prompt_hashes: uint64 of each accepted completion's whole prompt, as `EncodedRecord.canonical` has it.
      pair_hashes: uint64 of each accepted completion and its prompt, whole.
      counts: numbers of accepted completions by treatment, by kind and name: see `Encoder.encode`.
      sampled: figures of every token, 0 for the prompts', float32 [tokens, figures]; empty if no row holds its ids.
    """

    reasons: list[str | None]
    tokens: np.ndarray
    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray
    prompt_hashes: np.ndarray
    pair_hashes: np.ndarray
    counts: collections.Counter[tuple[str, str]]
    sampled: np.ndarray


def prepare_tokenizer(
    model_path: Path,
    directory: Path,
    *,
    chat_template: str,
    eos_token: str = "auto",
    rendering: Rendering | None = None,
    workers: Workers | None = None,
) -> TokenizerInfo:
    """Copies the tokenizer of a model into a folder, in a worker process; the files are copied byte for byte.

    Args:
      model_path: Hugging Face directory with a fast tokenizer, or a .gguf file.
      directory: where to write; replaced if it exists.
      chat_template: "auto" for the tokenizer's own if it has one, "none", or the path of a Jinja file.
      eos_token: what completions end in, which becomes the tokenizer's EOS; "auto" for what the chat template ends the
        assistant's turn in where that is a control token, and for the tokenizer's EOS otherwise.
      rendering: how the template is used.
      workers: from `tokenizing_worker`, to be used again; None starts a process for this call.

    Returns:
      What was written, and what of it differs from the model's own files.

    Raises:
      ConfigError: no fast tokenizer is there, it has no EOS or not the one asked for, or the chat template cannot be
        used.
    """
    arguments = (Path(model_path), Path(directory), chat_template, eos_token, rendering or Rendering())
    with contextlib.nullcontext(workers) if workers else tokenizing_worker() as ready:
        return ready.submit(_prepare, *arguments).result()


def tokenizing_worker() -> Workers:
    """A worker for `prepare_tokenizer` and `encode_prompts`; its start takes longer than encoding many prompts."""
    return Workers(1, _quieten_transformers)


def encode_prompts(
    tokenizer: TokenizerInfo, prompts: Sequence[str | list[Message]], workers: Workers | None = None
) -> list[np.ndarray]:
    """Encodes prompts for sampling, in a worker process, exactly as those of the index are.

    Args:
      tokenizer: the tokenizer.
      prompts: texts (one user turn each if there is a chat template) or chat messages.
      workers: from `tokenizing_worker`, to be used again; None starts a process for this call.

    Returns:
      Ids of each prompt, closed by the generation prompt, int32.

    Raises:
      ConfigError: a prompt cannot be encoded.
    """
    with contextlib.nullcontext(workers) if workers else tokenizing_worker() as ready:
        return ready.submit(_encode_prompts, tokenizer, list(prompts)).result()


def decode(tokenizer: TokenizerInfo, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, without special tokens and end tokens. Imports neither transformers nor torch."""
    kept = [int(i) for i in ids if i not in tokenizer.stop_ids]
    return _backend(tokenizer.directory / "tokenizer.json").decode(kept, skip_special_tokens=True)


def token_of(directory: Path, token_id: int) -> str:
    """The token with an id, of a tokenizer's directory. Imports neither transformers nor torch."""
    return str(_backend(directory / "tokenizer.json").id_to_token(token_id))


def encode_text(tokenizer: TokenizerInfo, text: str) -> np.ndarray:
    """Ids of a text as it is, without template, BOS or EOS, int32. Imports neither transformers nor torch."""
    backend = _backend(tokenizer.directory / "tokenizer.json")
    return np.asarray(backend.encode(text, add_special_tokens=False).ids, np.int32)


@functools.lru_cache(maxsize=4)
def _backend(path: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path))


# Everything below runs in the workers.

_Encoded = tuple[np.ndarray, np.ndarray, int, int]
"""Ids of the prompt and of the completion as they are stored, hash of the prompt, hash of both."""
_encoder: Any = None


def start_encoder(tokenizer: TokenizerInfo) -> None:
    """Prepares a worker for `encode_feedback`."""
    global _encoder
    _quieten_transformers()
    _encoder = make_encoder(tokenizer)


def _quieten_transformers() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


def make_encoder(tokenizer: TokenizerInfo) -> Encoder:
    """An `Encoder` in this process, which then imports transformers if there is a chat template."""
    return Encoder(
        tokenizer.directory,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.has_chat_template,
        stop_ids=tokenizer.stop_ids,
        rendering=tokenizer.rendering,
    )


def encode_feedback(rows: Sequence[Feedback | Preference], limits: Limits) -> EncodedRows:
    """Encodes rows in a worker that was started with a tokenizer.

    Args:
      rows: what to encode.
      limits: of a row.

    Returns:
      The encoded rows, with the reasons of rejected ones.
    """
    reasons: list[str | None] = []
    accepted: list[_Encoded] = []
    sampled: list[np.ndarray] = []
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for row in rows:
        try:
            if completions_of(row)[0].sampled is not None:
                encoded, figures, counted = _sampled_record(_encoder, row, limits)
                sampled += figures
            else:
                encoded, counted = _encode_record(_encoder, row, limits)
            accepted += encoded
            counts.update(counted)
            reasons.append(None)
        except EncodingError as error:
            reasons.append(str(error))
    pieces = [piece for prompt, completion, _, _ in accepted for piece in (prompt, completion)]
    return EncodedRows(
        reasons,
        np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        np.array([len(row[0]) for row in accepted], np.int32),
        np.array([len(row[1]) for row in accepted], np.int32),
        np.array([row[2] for row in accepted], np.uint64),
        np.array([row[3] for row in accepted], np.uint64),
        counts,
        np.concatenate(sampled) if sampled else np.zeros((0, len(SAMPLED)), np.float32),
    )


def _encode_record(encoder: Encoder, record: Feedback | Preference, limits: Limits) -> tuple[list[_Encoded], Any]:
    """The completions of a record as they are stored, and counts."""
    completions = completions_of(record)
    encoded = encoder.encode(completions[0].prompt, [each.completion for each in completions])
    # Text that differs may be the same once the chat template has trimmed it.
    if len(completions) == 2 and np.array_equal(encoded.completions[0], encoded.completions[1]):
        raise EncodingError(SAME_COMPLETIONS)
    prompt, canonical = encoded.prompt, encoded.canonical
    stored = []
    for completion in encoded.completions:
        largest = max(prompt.max(initial=0), completion.max(initial=0))
        if largest >= limits.vocab_size:
            raise EncodingError(f"token {encoder.token(int(largest))!r} ({largest}) is outside the model's vocabulary")
        # Hashes are of whole texts, so that neither split nor pairing depends on truncation.
        prompt_hash = _hash(canonical)
        pair_hash = _hash(np.concatenate([[len(canonical)], canonical, completion]))
        if len(completion) > limits.max_length - 1:
            if limits.long_completion == "reject":
                raise EncodingError(
                    "completion longer than data.max_length; data.long_completion='cut' keeps its beginning"
                )
            # The completion is cut in any case, so the prompt keeps its share instead of a single token.
            kept = min(len(prompt), limits.max_prompt_length, limits.max_length // 2)
            completion = completion[: limits.max_length - kept]
        stored.append((cut_prompt(prompt, limits.max_length - 1, encoder.bos_id), completion, prompt_hash, pair_hash))
    if len(stored) == 2 and np.array_equal(stored[0][1], stored[1][1]):
        raise EncodingError(SAME_COMPLETIONS)  # The two are equal after truncation.
    return stored, encoded.counts


def _sampled_record(
    encoder: Encoder, record: Feedback | Preference, limits: Limits
) -> tuple[list[_Encoded], list[np.ndarray], Any]:
    """The completions of a record that holds their ids, the figures of all tokens, and counts. Nothing is cut."""
    stored: list[_Encoded] = []
    figures = []
    for row in completions_of(record):
        assert row.sampled is not None
        prompt, completion = row.sampled.prompt, row.sampled.completion
        largest = int(max(prompt.max(), completion.max()))
        if largest >= limits.vocab_size:
            raise EncodingError(f"token {encoder.token(largest)!r} ({largest}) is outside the model's vocabulary")
        if len(prompt) + len(completion) > limits.max_length:
            raise EncodingError("sampled tokens are more than data.max_length, and none may be cut")
        pair = np.concatenate([[len(prompt)], prompt, completion])
        stored.append((prompt, completion, _hash(prompt), _hash(pair)))
        figures.append(np.concatenate([np.zeros((len(prompt), len(SAMPLED)), np.float32), row.sampled.figures]))
    if len(stored) == 2 and stored[0][3] == stored[1][3]:
        raise EncodingError(SAME_COMPLETIONS)
    return stored, figures, {("rule", "sampled"): len(stored)}


def _hash(ids: np.ndarray) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


_prompt_encoder: tuple[TokenizerInfo, Encoder] | None = None


def _encode_prompts(tokenizer: TokenizerInfo, prompts: list[str | list[Message]]) -> list[np.ndarray]:
    global _prompt_encoder
    if _prompt_encoder is None or _prompt_encoder[0] != tokenizer:
        _prompt_encoder = tokenizer, make_encoder(tokenizer)
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            encoded.append(_prompt_encoder[1].encode_prompt(prompt))
        except EncodingError as error:
            raise ConfigError(
                f"prompt {number} cannot be encoded: {error}. Prompts are text, or messages where the tokenizer has a "
                "chat template. Change the prompt or the template."
            ) from error
    return encoded


def _prepare(
    model_path: Path,
    directory: Path,
    chat_template: str,
    eos_token: str = "auto",
    rendering: Rendering = Rendering(),  # noqa: B008 (it is frozen)
) -> TokenizerInfo:
    with new_folder(directory) as partial:
        changes = _write_files(model_path, partial)
        special_tokens = tokenizer_files.read_special_tokens(partial)
        backend = _open(partial, model_path)
        vocab = backend.get_vocab(with_added_tokens=True)
        if eos_token != "auto" and eos_token != special_tokens.get("eos_token"):
            if eos_token not in vocab:
                raise ConfigError(
                    f'data.eos_token={eos_token!r} is no token of the tokenizer. It is "auto" or a token, such as '
                    f"{special_tokens.get('eos_token')!r}. Set config.data.eos_token."
                )
            tokenizer_files.set_eos(partial, eos_token)
            special_tokens["eos_token"] = eos_token
            changes.append(f"its EOS is {eos_token!r}")
        if chat_template not in ("auto", "none"):
            tokenizer_files.set_template(partial, _read_template(chat_template))
            changes.append(f"its chat template is {Path(chat_template).name}")
        if special_tokens.get("eos_token") not in vocab:
            raise ConfigError(
                f"the tokenizer of {model_path} has no EOS token. Every completion ends in one. "
                "Set config.data.eos_token to one of its tokens."
            )
        info = _describe(partial, vocab, special_tokens, chat_template != "none", rendering)
        info = _try_template(info, chat_template, find_end=eos_token == "auto")
    return dataclasses.replace(info, directory=directory, changes=tuple(changes))


def _write_files(model_path: Path, directory: Path) -> list[str]:
    """Writes a model's tokenizer into an empty folder; returns descriptions of what differs from the model's own."""
    if model_path.is_dir() and (model_path / tokenizer_files.TOKENIZER).is_file():
        tokenizer_files.copy_files(model_path, directory)
        if "eos_token" not in tokenizer_files.read_special_tokens(directory):
            # Some classes have special tokens that no file names.
            found = _load(model_path).special_tokens_map
            if isinstance(found.get("eos_token"), str):
                tokenizer_files.set_special_tokens(directory, found)
                return [f"its special tokens are those of its class: {', '.join(map(str, found.values()))}"]
        return []
    _load(model_path).save_pretrained(directory)
    tokenizer_files.set_portable_class(directory)
    return ["its files were made by transformers from the model's own"]


def _open(directory: Path, model_path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(directory / tokenizer_files.TOKENIZER))
    except Exception as error:
        # The library raises plain exceptions.
        raise _unreadable(model_path, error) from error


def _unreadable(model_path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"no tokenizer can be read from {model_path}: {type(error).__name__}: {str(error)[:200]}. "
        "A fast tokenizer is needed (tokenizer.json, tokenizer_config.json). Add the files to the directory."
    )


def _load(model_path: Path) -> Any:
    import transformers

    if model_path.suffix == ".gguf":
        from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer

        found = read_gguf_tokenizer(model_path)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=found.backend, chat_template=found.chat_template, **found.special_tokens
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # transformers raises its parsers' errors; the user needs the path and one line.
        raise _unreadable(model_path, error) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {model_path} is not a fast one. A tokenizer.json is needed. "
            "Convert it with transformers."
        )
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'data.chat_template={path!r} cannot be read: {error}. It is "auto", "none" or the path of a Jinja file. '
            "Check the path."
        ) from error


def _describe(
    directory: Path, vocab: dict[str, int], special_tokens: dict[str, str], has_template: bool, rendering: Rendering
) -> TokenizerInfo:
    template = tokenizer_files.read_template(directory) if has_template else None
    bos_id, eos_id = vocab.get(special_tokens.get("bos_token", "")), vocab[special_tokens["eos_token"]]
    digest = hashlib.sha256((directory / tokenizer_files.TOKENIZER).read_bytes())
    digest.update(f"\0{template or ''}\0{bos_id}\0{eos_id}".encode())
    return TokenizerInfo(
        directory=directory,
        vocab_size=max(vocab.values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=(eos_id,),
        sha256=digest.hexdigest(),
        has_chat_template=template is not None,
        rendering=rendering,
    )


def _ending_in(info: TokenizerInfo, turn_end: int) -> TokenizerInfo:
    """The same tokenizer, whose completions end in `turn_end`."""
    if turn_end == info.eos_id:
        return info
    digest = hashlib.sha256(f"{info.sha256}\0{turn_end}".encode()).hexdigest()
    return dataclasses.replace(info, eos_id=turn_end, stop_ids=(turn_end, info.eos_id), sha256=digest)


def _try_template(info: TokenizerInfo, chat_template: str, *, find_end: bool) -> TokenizerInfo:
    """Refuses a template that cannot render two plain turns, before any record is read.

    Returns:
      The tokenizer, whose completions end as the template ends the second turn, if requested. Its digest holds
      the rendering, and the time only if prompts depend on it.
    """
    if info.has_chat_template:
        require(
            "jinja2", f"the chat template (data.chat_template={chat_template!r})", "set config.data.chat_template=none"
        )
    try:
        encoder = make_encoder(info)
        encoder.encode_row("How are you?", "Fine.")
        turn_end = encoder.find_turn_end() if info.has_chat_template and find_end else None
    except EncodingError as error:
        raise ConfigError(
            f"the chat template (data.chat_template={chat_template!r}) cannot be used: {error}. It must write a user "
            "turn, then the completion unchanged. Set config.data.chat_template to another Jinja file, or to none."
        ) from error
    if turn_end is not None:
        info = _ending_in(info, turn_end)
    rendering = info.rendering if encoder.is_dated else dataclasses.replace(info.rendering, moment="")
    if rendering != Rendering():
        parts = json.dumps(dataclasses.asdict(rendering), sort_keys=True)
        info = dataclasses.replace(info, sha256=hashlib.sha256(f"{info.sha256}\0{parts}".encode()).hexdigest())
    return dataclasses.replace(info, rendering=rendering, is_dated=encoder.is_dated)
