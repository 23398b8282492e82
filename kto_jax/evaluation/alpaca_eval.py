"""AlpacaEval's files: outputs of a model, and annotations of a judge (github.com/tatsu-lab/alpaca_eval).

    outputs_NAME.json   [{"instruction", "output", "generator", "dataset"}, ...]
    annotations.json    [{..., "output_1", "output_2", "generator_1", "generator_2", "annotator", "preference"}, ...]

A preference of 1 is for output_1, the baseline's; 2 for output_2, the evaluated model's; 1.5 is a tie, null no verdict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.pair_judges import Judgement
from kto_jax.rollouts.prompts import PromptRow
from kto_jax.sampling.complete import Prompt, is_prompt
from kto_jax.storage.atomic import write_json


def is_outputs(path: str) -> bool:
    """Whether a path names a file of outputs rather than a model."""
    return path.endswith(".json") and Path(path).is_file()


def instruction_of(prompt: Prompt) -> str:
    """A prompt as AlpacaEval has it: text, or the content of a single user message."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def write_outputs(path: Path, answers: Sequence[Answer], generator: str, dataset: str) -> None:
    """Writes a file of outputs. A conversation is also kept as `messages`, which AlpacaEval ignores."""
    write_json(
        path,
        [
            {"instruction": instruction_of(one.prompt), "output": one.text, "generator": generator, "dataset": dataset}
            | ({} if isinstance(one.prompt, str) else {"messages": one.prompt})
            for one in answers
        ],
    )


def read_outputs(path: str) -> tuple[list[Answer], str]:
    """The completions in a file of outputs, and the generator's name.

    Raises:
      ConfigError: the file cannot be read, or an entry has no instruction or output; names it.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Allowed: a JSON list of outputs as AlpacaEval has them. Correct the file."
        ) from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"{path} holds {type(rows).__name__ if rows else 'no outputs'}. Allowed: a JSON list of objects with an "
            "instruction and an output. Correct the file."
        )
    answers = [_answer_of(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1)]
    names = {str(row.get("generator") or Path(path).stem) for row in rows}
    if len(names) > 1:
        raise ConfigError(
            f"{path} holds outputs of {len(names)} generators ({', '.join(sorted(names)[:5])}). Allowed: one. Split it."
        )
    return answers, names.pop()


def _answer_of(row: Any, place: str) -> Answer:
    prompt: Any = row.get("messages", row.get("instruction")) if isinstance(row, dict) else None
    if not is_prompt(prompt) or not isinstance(row.get("output"), str):
        raise ConfigError(
            f"{place} has no instruction or no output with text. Every entry is an object with both. Correct the file."
        )
    known = PromptRow(prompt, row, place)
    return Answer(prompt, row["output"].strip(), known.key, row, place)


def align(evaluated: Sequence[Answer], baseline: Sequence[Answer]) -> list[Answer]:
    """The baseline's completions in the order of the evaluated model's: the n-th of a prompt beside the n-th.

    Raises:
      ConfigError: the two do not complete the same prompts equally often.
    """
    waiting: dict[str, list[Answer]] = {}
    for one in baseline:
        waiting.setdefault(one.key, []).append(one)
    found = []
    for one in evaluated:
        if not waiting.get(one.key):
            raise _unequal(one, "the baseline")
        found.append(waiting[one.key].pop(0))
    if rest := [one for left in waiting.values() for one in left]:
        raise _unequal(rest[0], "the evaluated model")
    return found


def _unequal(one: Answer, missing: str) -> ConfigError:
    return ConfigError(
        f"{missing} has no completion beside that of {one.place or instruction_of(one.prompt)[:80]!r}. Both must "
        "complete the same prompts equally often. Correct the files of outputs."
    )


def write_annotations(
    path: Path,
    judgements: Sequence[Judgement],
    evaluated: Sequence[Answer],
    baseline: Sequence[Answer],
    names: tuple[str, str],
) -> None:
    """Writes the verdicts of all judges, the average of both orders where there are two.

    Args:
      path: the file.
      judgements: of each judge.
      evaluated: completions of the evaluated model, output_2.
      baseline: those of the baseline, output_1.
      names: of the evaluated model and of the baseline.
    """
    rows = []
    for judgement in judgements:
        for ours, theirs, share in zip(evaluated, baseline, judgement.verdicts.shares.tolist(), strict=True):
            rows.append(
                {
                    "instruction": instruction_of(ours.prompt),
                    "output_1": theirs.text,
                    "generator_1": names[1],
                    "output_2": ours.text,
                    "generator_2": names[0],
                    "annotator": judgement.judge,
                    "preference": None if math.isnan(share) else 1 + share,
                }
            )
    write_json(path, rows)
