"""Token ids that rows hold beside their text, with figures of each token, as online training writes them.

prompt_ids          ids of the prompt, closed by the generation prompt
output_ids          ids of the text in `output`, with its EOS if it has one; for any other column likewise
old_logps, reference_logps, advantages, values, returns      one number for each of these ids; may be absent
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kto_jax.data.rows.turns import BadRowError
from kto_jax.shapes import SAMPLED


@dataclasses.dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens of a prompt and a completion.

    Attributes:
      prompt: ids, int32.
      completion: ids, int32; the last one is the EOS unless the completion was cut.
      figures: of each completion token, in the order of `SAMPLED`, float32 [completion, figures]; 0 where the row has
        none.
    """

    prompt: np.ndarray
    completion: np.ndarray
    figures: np.ndarray


def sampled_tokens(fields: Mapping[str, Any], column: str) -> SampledTokens:
    """The tokens of a row.

    Args:
      fields: the row.
      column: that holds the completion's text.

    Raises:
      BadRowError: ids are missing or are none, or figures do not belong to them.
    """
    prompt, completion = (_ids(fields, name) for name in ("prompt_ids", f"{column}_ids"))
    figures = np.zeros((len(completion), len(SAMPLED)), np.float32)
    for number, name in enumerate(SAMPLED):
        if name in fields:
            figures[:, number] = _figures(fields[name], name, len(completion))
    return SampledTokens(prompt, completion, figures)


def _ids(fields: Mapping[str, Any], name: str) -> np.ndarray:
    given = fields.get(name)
    if given is None:
        raise BadRowError(f"missing field {name!r}, which data.sampled_tokens reads")
    whole = isinstance(given, list) and all(type(each) is int and 0 <= each < 2**31 for each in given)
    if not whole or not given:
        raise BadRowError(f"{name} is not a list of token ids: {str(given)[:40]!r}")
    return np.asarray(given, np.int32)


def _figures(given: Any, name: str, count: int) -> np.ndarray:
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        found = np.zeros(0, np.float32)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise BadRowError(f"{name} is not a list of {count} finite numbers, one for each id: {str(given)[:40]!r}")
    return found
