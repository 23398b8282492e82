"""Prompts of online training: rows of a file without completions, some of them held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.permutation import permute
from kto_jax.data.rows import files
from kto_jax.data.rows.examples import template_fields
from kto_jax.data.rows.rejection import Rejection
from kto_jax.data.rows.sources import sources_of
from kto_jax.data.rows.turns import lookup
from kto_jax.sampling.complete import Prompt, is_prompt


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Attributes:
      prompt: text or chat messages.
      columns: the row it came from, for reward functions.
      place: `file:line`.
    """

    prompt: Prompt
    columns: Mapping[str, Any]
    place: str

    @property
    def key(self) -> str:
        """Identifies the prompt by its text."""
        return hashlib.sha256(json.dumps(self.prompt, sort_keys=True).encode()).hexdigest()


def read_prompts(data: DataConfig) -> tuple[list[PromptRow], list[PromptRow]]:
    """The prompts to train on, and those that are held out: a share `data.holdout`, chosen by the prompt's text.

    Args:
      data: `train` names the files; `prompt_field`, `prompt_template` and `system_field` say what a prompt is.

    Returns:
      Two lists; a prompt that occurs several times is in one of them, once.

    Raises:
      ConfigError: a file cannot be read, a row has no prompt, or no prompt is left to train on.
    """
    found: dict[str, PromptRow] = {}
    for source in sources_of(dataclasses.replace(data, eval=())):
        for file in files.expand(source.path):
            for place, fields in files.read_rows(file):
                row = _prompt_of(place, fields, source.data)
                found.setdefault(row.key, row)
    kept: list[PromptRow] = []
    held_out: list[PromptRow] = []
    for key, row in found.items():
        (held_out if int(key[:12], 16) < data.holdout * 16**12 else kept).append(row)
    if not kept:
        raise ConfigError(
            f"config.data.train={data.train!r} holds {len(found)} prompts, and config.data.holdout={data.holdout} "
            "leaves none to train on. Online training needs at least one. Add prompts, or lower config.data.holdout."
        )
    return kept, held_out


def _prompt_of(place: str, fields: Any, data: DataConfig) -> PromptRow:
    if isinstance(fields, Rejection):
        raise ConfigError(f"{place} cannot be read: {fields.reason}. Every row holds a prompt. Correct the file.")
    names = template_fields(data.prompt_template) if data.prompt_template else [data.prompt_field]
    missing = [name for name in names if lookup(fields, name) is None]
    if missing:
        columns = ", ".join(map(repr, fields)) if isinstance(fields, Mapping) else "none"
        raise ConfigError(
            f"{place} has no {missing[0]!r}; its columns are {columns}. Every row needs a prompt. Set "
            "config.data.prompt_field or config.data.prompt_template."
        )
    prompt: Any = lookup(fields, data.prompt_field)
    if data.prompt_template:
        prompt = data.prompt_template.format_map(fields)
    system = lookup(fields, data.system_field) if data.system_field else None
    if system:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": system}, *turns]
    if not is_prompt(prompt):
        raise ConfigError(
            f"{place}: the prompt is {str(prompt)[:80]!r}. Allowed: some text, or messages of a role and a content. "
            "Correct the row."
        )
    return PromptRow(prompt, fields, place)


def prompts_of_round(prompts: Sequence[PromptRow], number: int, count: int, seed: int) -> list[PromptRow]:
    """The prompts of one round: each pass over all prompts has an order of its own.

    Args:
      prompts: all prompts to train on.
      number: of the round, from 0.
      count: prompts of a round; if there are fewer, all.
      seed: of the order.
    """
    count = min(count, len(prompts))
    places = np.arange(number * count, (number + 1) * count)
    passes, within = np.divmod(places, len(prompts))
    chosen = [permute(within[passes == one], len(prompts), (seed, int(one))) for one in np.unique(passes)]
    return [prompts[place] for place in np.concatenate(chosen)]
