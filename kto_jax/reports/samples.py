"""Completions before and after training, and the judges' verdicts on them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax.config import SamplesConfig
from kto_jax.data.index.index import Index
from kto_jax.data.tokens.tokenizer import TokenizerInfo, decode
from kto_jax.judges import judges
from kto_jax.models.model import Model, Params
from kto_jax.sampling.sample import Sampling, sample
from kto_jax.shapes import PackedRows
from kto_jax.training.forward import packed_logps
from kto_jax.training.run_folder import write_json

# Prompts per batch: on CPU a decoding step of many rows costs little more than one of a single row.
_SAMPLING_BATCH = 64
# Rows per batch of the perplexity.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Samples:
    """Completions of held-out prompts.

    Attributes:
      prompts: decoded, without the tokenizer's control tokens.
      completions: decoded.
      perplexity: under the reference, over all completion tokens; None without a reference.
    """

    prompts: list[str]
    completions: list[str]
    perplexity: float | None


def held_out_prompts(index: Index, count: int) -> list[np.ndarray]:
    """Returns the ids of the first `count` distinct held-out prompts, in source order."""
    rows = index.sequences("eval")
    _, first = np.unique(np.asarray(index.prompt_hashes)[rows], return_index=True)
    return [np.asarray(index.prompt(row)) for row in rows[np.sort(first)[:count]]]


def write_samples(
    model: Model,
    policy: Params,
    reference: Params,
    tokenizer: TokenizerInfo,
    prompts: Sequence[np.ndarray],
    config: SamplesConfig,
    seed: int,
) -> Samples:
    """Completes the prompts with the policy and computes the completions' perplexity under the reference, if any."""
    completions = sample(
        model,
        policy,
        list(prompts),
        Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens),
        eos_id=sorted({*tokenizer.stop_ids, *model.config.eos_ids}),
        key=jax.random.key(seed),
        batch_size=min(len(prompts), _SAMPLING_BATCH),
    )
    return Samples(
        prompts=[decode(tokenizer, ids) for ids in prompts],
        completions=[decode(tokenizer, ids).strip() for ids in completions],
        perplexity=perplexity(model, reference, prompts, completions) if reference else None,
    )


def perplexity(model: Model, params: Params, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> float:
    """Returns exp of the mean negative log-probability (nats) of all completion tokens given their prompts."""
    length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    score = jax.jit(lambda params, rows: jnp.sum(packed_logps(model, params, rows)))
    total = 0.0
    for start in range(0, len(prompts), _ROWS):
        batch = list(zip(prompts, completions, strict=True))[start : start + _ROWS]
        total += float(score(params, _one_per_row(batch, length)))
    return math.exp(-total / sum(len(completion) for completion in completions))


def _one_per_row(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> PackedRows:
    """Returns rows of one example each, right-padded to `length`; unused rows are all padding."""
    tokens, segment_ids, predictors, targets, target_segments = np.zeros((5, _ROWS, length), np.int32)
    for row, (prompt, completion) in enumerate(examples):
        ids = np.concatenate([prompt, completion])
        tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
        predictors[row, : len(completion)] = len(prompt) - 1 + np.arange(len(completion))
        targets[row, : len(completion)], target_segments[row, : len(completion)] = completion, 1
    positions = np.where(segment_ids > 0, np.arange(length, dtype=np.int32)[None], 0)
    filled = np.arange(_ROWS)[:, None] < len(examples)
    return PackedRows(tokens, segment_ids, positions, predictors, targets, target_segments, filled)


def judge(
    index: Index, tokenizer: TokenizerInfo, names: Sequence[str], before: Samples, after: Samples
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the verdicts (judges and perplexity) for the report, and notes on how reliable the judges are."""
    rows = index.sequences("judge")
    texts = [decode(tokenizer, index.completion(row)) for row in rows] if "feedback" in names else []
    labels = np.asarray(index.desirable)[rows[: len(texts)]]
    prompts = np.asarray(index.prompt_hashes)[rows[: len(texts)]]
    verdicts: list[dict[str, Any]] = []
    notes: list[str] = []
    for name in names:
        fitted = judges.fit_judge(name, texts, labels, prompts)
        verdicts += judges.compare(name, fitted, before.completions, after.completions)
        if fitted.quality:
            notes.append(
                f"The judge {name} was fitted on {fitted.quality['examples']:.0f} labelled completions outside the "
                f"training set; on unseen prompts it agrees with {fitted.quality['accuracy']:.0%} of the labels (AUC "
                f"{fitted.quality['auc']:.2f})."
            )
    if before.perplexity is not None:
        perplexities = {"before": before.perplexity, "after": after.perplexity}
        verdicts.append({"judge": "reference", "figure": "perplexity of the completions", **perplexities})
    return verdicts, notes


def save_samples(path: Path, samples: Samples) -> None:
    """Writes samples to the run's folder, so that a report can be written after a restart."""
    write_json(path, dataclasses.asdict(samples))


def load_samples(path: Path) -> Samples:
    """Reads a file that `save_samples` wrote."""
    return Samples(**json.loads(path.read_text(encoding="utf-8")))
