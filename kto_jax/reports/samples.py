"""Completions before and after training, and the judges' verdicts on them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kto_jax.config import SamplesConfig
from kto_jax.data.index.index import Index
from kto_jax.data.tokens.tokenizer import TokenizerInfo, decode
from kto_jax.data.tokens.transcript import read_turns
from kto_jax.evaluation.intervals import mean_interval
from kto_jax.judges import judges
from kto_jax.models.model import Model, Params
from kto_jax.sampling.logps import completion_logps
from kto_jax.sampling.sample import Sampling, sample
from kto_jax.training.run_folder import write_json

# Prompts per batch: on CPU a decoding step of many rows costs little more than one of a single row.
_SAMPLING_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Samples:
    """Completions of held-out prompts.

    Attributes:
      prompts: chat messages, or text without the tokenizer's control tokens.
      completions: decoded.
      perplexity: under the reference, over all completion tokens; None without a reference.
      ended: whether each completion ended by itself, and was not cut; empty if an earlier version wrote the file.
      num_tokens: length of each completion; likewise.
    """

    prompts: list[Any]
    completions: list[str]
    perplexity: float | None
    ended: list[bool] = dataclasses.field(default_factory=list)
    num_tokens: list[int] = dataclasses.field(default_factory=list)


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
    eos_ids = {*tokenizer.stop_ids, *model.config.eos_ids}
    completions = sample(
        model,
        policy,
        list(prompts),
        Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens),
        eos_id=sorted(eos_ids),
        key=jax.random.key(seed),
        batch_size=min(len(prompts), _SAMPLING_BATCH),
    )
    return Samples(
        prompts=[read_turns(tokenizer, ids) for ids in prompts],
        completions=[decode(tokenizer, ids).strip() for ids in completions],
        perplexity=perplexity(model, reference, prompts, completions) if reference else None,
        ended=[int(ids[-1]) in eos_ids for ids in completions],
        num_tokens=[len(ids) for ids in completions],
    )


def perplexity(model: Model, params: Params, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> float:
    """Returns exp of the mean negative log-probability (nats) of all completion tokens given their prompts."""
    logps = completion_logps(model, params, prompts, completions)
    return math.exp(-float(logps.sum()) / sum(len(completion) for completion in completions))


def judge(
    index: Index, tokenizer: TokenizerInfo, names: Sequence[str], before: Samples, after: Samples
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the verdicts (judges and perplexity) for the report, and notes on how reliable the judges are.

    A judge's verdict also has `low` and `high`, the 95 % interval of its change over prompts, `prompts`, their number,
    and `accuracy` of the judge itself if that is known.
    """
    rows = index.sequences("judge")
    texts = [decode(tokenizer, index.completion(row)) for row in rows] if "feedback" in names else []
    labels = np.asarray(index.desirable)[rows[: len(texts)]]
    prompts = np.asarray(index.prompt_hashes)[rows[: len(texts)]]
    verdicts: list[dict[str, Any]] = []
    notes: list[str] = []
    for name in names:
        fitted = judges.fit_judge(name, texts, labels, prompts)
        verdicts += _with_intervals(
            judges.compare(name, fitted, before.completions, after.completions), fitted, before, after
        )
        if fitted.quality:
            notes.append(
                f"The judge {name} was fitted on {fitted.quality['examples']:.0f} labelled completions outside the "
                f"training set; on unseen prompts it agrees with {100 * fitted.quality['accuracy']:.0f} % of the "
                f"labels (AUC {fitted.quality['auc']:.2f})."
            )
    if before.perplexity is not None:
        perplexities = {"before": before.perplexity, "after": after.perplexity}
        verdicts.append({"judge": "reference", "figure": "perplexity of the completions", **perplexities})
    return verdicts, notes


def _with_intervals(
    verdicts: list[dict[str, Any]], judge: judges.Judge, before: Samples, after: Samples
) -> list[dict[str, Any]]:
    old, new = judge.each(before.completions), judge.each(after.completions)
    keys = [json.dumps(prompt) for prompt in before.prompts]
    found = []
    for verdict in verdicts:
        bounds = (-1.0, 1.0) if "share" in verdict["figure"] else None
        change = mean_interval(new[verdict["figure"]] - old[verdict["figure"]], keys, bounds=bounds)
        interval = {"low": change.low, "high": change.high} if change.is_known else {}
        known = {"accuracy": judge.quality["accuracy"]} if "accuracy" in judge.quality else {}
        found.append({**verdict, **interval, **known, "prompts": len(set(keys))})
    return found


def save_samples(path: Path, samples: Samples) -> None:
    """Writes samples to the run's folder, so that a report can be written after a restart."""
    write_json(path, dataclasses.asdict(samples))


def load_samples(path: Path) -> Samples:
    """Reads a file that `save_samples` wrote."""
    return Samples(**json.loads(path.read_text(encoding="utf-8")))
