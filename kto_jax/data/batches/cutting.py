"""Truncates a step's sequences to fit; pairs share a prompt, and control tokens end the prompt."""

from __future__ import annotations

import numpy as np

from kto_jax.data.index.index import Index
from kto_jax.data.truncation import cut_prompt, fit_lengths

Controls = tuple[np.ndarray, np.ndarray]
"""Ids that end the prompt of undesirable and of desirable completions."""
_NO_CONTROL = np.zeros(0, np.int32)


class Cutter:
    """Truncates prompts and completions of an index.

    A prompt and a completion belong to one sequence, or, to estimate z0, to two sequences with different prompts.

    Args:
      index: the sequences.
      max_length: maximum tokens of a prompt and a completion together.
      unit: 2 if sequences come in pairs, chosen and rejected next to each other; else 1.
      controls: control tokens; they count as prompt and are never truncated. None for none.
    """

    def __init__(self, index: Index, *, max_length: int, unit: int = 1, controls: Controls | None = None):
        self._index, self._max_length, self._unit, self._controls = index, max_length, unit, controls
        self.max_prompt_length = int(index.manifest["data"]["max_prompt_length"])
        self._bos_id = index.manifest["tokenizer"]["bos_id"]

    def lengths(self, prompts: np.ndarray, completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of tokens that are kept.

        Args:
          prompts: the sequences whose prompts are read [sequences].
          completions: the sequences whose completions follow them [sequences].

        Returns:
          Tokens of each prompt, including its control, and of each completion [sequences].
        """
        control = self.control_lengths(completions)
        num_prompt, num_completion = fit_lengths(
            self._index.prompt_lengths[prompts],
            self._index.num_completion(completions),
            max_length=self._max_length - control,
            max_prompt_length=self.max_prompt_length - control,
        )
        # Both completions of a pair follow the same truncated prompt: the shorter one.
        shared = np.repeat(num_prompt.reshape(-1, self._unit).min(axis=1), self._unit)
        return shared + control, num_completion

    def control_lengths(self, completions: np.ndarray) -> np.ndarray:
        """Tokens of the control before each completion [sequences]."""
        if self._controls is None:
            return np.zeros(len(completions), np.int64)
        return np.where(self._index.desirable[completions], len(self._controls[1]), len(self._controls[0]))

    def cut(self, prompt: int, completion: int, num_prompt: int, num_completion: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of one prompt and one completion, truncated to lengths from `lengths`.

        Args:
          prompt: the sequence whose prompt is read.
          completion: the sequence whose completion follows it.
          num_prompt: tokens of the prompt, including its control.
          num_completion: tokens of the completion.
        """
        control = _NO_CONTROL if self._controls is None else self._controls[int(self._index.desirable[completion])]
        kept = cut_prompt(self._index.prompt(prompt), num_prompt - len(control), self._bos_id)
        return np.concatenate([kept, control]), self._index.completion(completion)[:num_completion]
