"""Models that answer on the chat page, as streams of text: those on this machine.

Everything that uses the device, the tokenizer or the weights runs in one thread, in the order in which it was asked
for: a few tokens of one answer, then a few of the next. So several people are answered at once, and nobody waits for
another's whole answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.models.unstacked import unstack_layers
from kto_jax.sampling.complete import LanguageModel, open_language_model
from kto_jax.sampling.sample import Sampling, check_prompts
from kto_jax.sampling.slots import Request, Slots
from kto_jax.shapes import power_of_two

_TOKENS_AT_ONCE = 4
"""Tokens of an answer between those of others; a reader sees them appear together."""
_CACHE_LENGTH = 1024
"""Positions of a cache to begin with, so that few conversations grow it, which compiles."""

Messages = Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn.

    Attributes:
      temperature: divides the logits; 0 always takes the most likely token.
      max_new_tokens: an answer that has not ended by then is cut.
    """

    temperature: float = 0.7
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class Piece:
    """An answer so far.

    Attributes:
      text: all of it, not only what is new.
      num_tokens: how many tokens were drawn; 0 if that is not known.
      ended: whether the model ended it; of a finished stream, False means that it was cut.
    """

    text: str
    num_tokens: int = 0
    ended: bool = False


def whole_characters(text: str) -> str:
    """The text with the halves of characters (UTF-16 surrogates) joined, or replaced by � where one is missing.

    Neither a file nor a browser takes halves, and JSON of an endpoint or a browser may hold them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Answering(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """What people call the model: the path that it was read from, or its name at an endpoint."""

    def stream(self, messages: Messages, settings: Settings, seed: int) -> Iterator[Piece]:
        """Answers a conversation whose last turn is the user's.

        Args:
          messages: role and content of each turn.
          settings: how the answer is drawn.
          seed: of the sampling.

        Yields:
          The answer so far, each time longer; the last one is whole.

        Raises:
          ConfigError: the conversation cannot be answered; says why.
          TransientError: the model cannot be reached.
        """


class Device:
    """The thread in which all models of this machine run; close it last."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    def run(self, function: Any, *arguments: Any) -> Any:
        """The result of a call in that thread, after those that were asked for before."""
        return self._thread.submit(function, *arguments).result()

    def close(self) -> None:
        """Ends the thread after its current call."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class LocalModel:
    """A model on this machine.

    Args:
      name: the path that it was read from.
      model: what answers.
      device: the thread in which it runs.
    """

    def __init__(self, name: str, model: LanguageModel, device: Device) -> None:
        self.name = name
        self.model, self._device = model, device
        self._eos_ids = sorted({*model.tokenizer.stop_ids, *model.model.config.eos_ids})

    def warm_up(self) -> None:
        """Reads the weights and compiles the programs, so that the first answer does not wait for that."""
        for _ in self.stream([{"role": "user", "content": "Hello"}], Settings(max_new_tokens=2), 0):
            pass

    def stream(self, messages: Messages, settings: Settings, seed: int) -> Iterator[Piece]:
        """See `Answering`."""
        slots = self._device.run(self._begin, messages, settings, seed)
        ids: list[int] = []
        ended, count = False, 1
        while not ended and len(ids) < settings.max_new_tokens:
            steps = self._device.run(slots.decode, 1, count)
            count = _TOKENS_AT_ONCE
            ids += steps.tokens_KB[: int(steps.counts_B[0]) - len(ids), 0].tolist()
            ended = ids[-1] in self._eos_ids
            text = tokenize.decode(self.model.tokenizer, ids)
            # A character of several tokens is not whole before its last one.
            yield Piece(text if ended else text.rstrip("\ufffd"), len(ids), ended)

    def _begin(self, messages: Messages, settings: Settings, seed: int) -> Slots:
        model = self.model
        (ids,) = tokenize.encode_prompts(model.tokenizer, [[dict(message) for message in messages]], model.workers)
        check_prompts(model.model.config, [ids], settings.max_new_tokens)
        needed = len(ids) + settings.max_new_tokens
        context = model.model.config.max_length
        slots = Slots(
            model.model,
            unstack_layers(model.decoding_params),
            num_slots=1,
            parts=1,
            # Powers of two, so that few lengths are compiled.
            max_length=min(max(power_of_two(needed), _CACHE_LENGTH), context),
            sampling=Sampling(
                np.float32(settings.temperature), np.float32(1), np.int32(0), np.int32(settings.max_new_tokens)
            ),
            eos_ids=np.asarray(self._eos_ids, np.int32),
            key=jax.random.key(seed),
            mesh_wide=None,
            min_length=_CACHE_LENGTH,
        )
        slots.fill({0: Request(0, np.asarray(ids, np.int32))})
        return slots


class LocalModels:
    """Opens models of this machine, and closes them all.

    Args:
      dtype: what they compute in.
      chat_template: as `open_language_model` takes it.
    """

    def __init__(self, *, dtype: str, chat_template: str) -> None:
        self._dtype, self._chat_template = dtype, chat_template
        self._device = Device()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> LocalModels:
        return self

    def __exit__(self, *error: object) -> None:
        self._device.close()
        self._opened.close()

    def open(self, path: str, like: LocalModel | None = None) -> LocalModel:
        """Opens a model.

        Args:
          path: as `open_language_model` takes it.
          like: a model whose tokenizer and chat template this one is asked with; its own without.

        Raises:
          ConfigError: it cannot be opened.
          TransientError: the Hub cannot be reached.
        """
        return LocalModel(path, self._device.run(self._open, path, like), self._device)

    def _open(self, path: str, like: LocalModel | None) -> LanguageModel:
        opening = open_language_model(path, dtype=self._dtype, chat_template=self._chat_template)
        if like is None:
            # A copy, which alone holds the weights: they are freed with it.
            return dataclasses.replace(self._opened.enter_context(opening))
        with opening as model:  # Its own tokenizer is closed, and the weights are still to be read.
            return dataclasses.replace(model, tokenizer=like.model.tokenizer, workers=like.model.workers)


def reference_of(path: str) -> str:
    """The model that a run started from, or its `reference.path`; empty if `path` is no run.

    Raises:
      ConfigError: the run started from random weights, which are in no file, or from adapters on a base of its own.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == "policy" else folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own, model = config["reference"], config["model"]
        found, base = (own["path"], own.get("base")) if own["path"] else (model["path"], model.get("base"))
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    if (model.get("init") == "random" and not own["path"]) or base:
        reason = f"adapters on {base}" if base else "random weights, which it did not keep"
        raise ConfigError(
            f"the run {path} started from {reason}. A reference is one model in a file. Set --reference=MODEL, or "
            "--answers=policy."
        )
    return str(found)
