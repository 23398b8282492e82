"""Text to and from token ids, in worker processes: the training process imports neither transformers nor torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.rows.turns import Message
from kto_jax.data.tokens.encoder import Encoder, EncodingError, Rendering
from kto_jax.data.workers import Workers


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


def tokenizing_worker() -> Workers:
    """A worker for `prepare_tokenizer` and `encode_prompts`; its start takes longer than encoding many prompts."""
    return Workers(1, quieten_transformers)


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


def quieten_transformers() -> None:
    """Keeps transformers in this process from printing advice."""
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


_kept: tuple[TokenizerInfo, Encoder] | None = None


def kept_encoder(tokenizer: TokenizerInfo) -> Encoder:
    """The `Encoder` that this process made last if it is of the same tokenizer, wherever that lies, else a new one."""
    global _kept
    anywhere = dataclasses.replace(tokenizer, directory=Path(), changes=())
    if _kept is None or _kept[0] != anywhere:
        _kept = anywhere, make_encoder(tokenizer)
    return _kept[1]


def _encode_prompts(tokenizer: TokenizerInfo, prompts: list[str | list[Message]]) -> list[np.ndarray]:
    encoder, encoded = kept_encoder(tokenizer), []
    for number, prompt in enumerate(prompts, start=1):
        try:
            encoded.append(encoder.encode_prompt(prompt))
        except EncodingError as error:
            raise ConfigError(
                f"prompt {number} cannot be encoded: {error}. Prompts are text, or messages where the tokenizer has a "
                "chat template. Change the prompt or the template."
            ) from error
    return encoded
