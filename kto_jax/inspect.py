"""Explains the feedback of a run: `python -m kto_jax.inspect --config=configs/quickstart.py --rows=4`.

Builds the index that training would read, or reopens it, and prints what was read, what was rejected and where, what
the splits and labels hold, how long the rows are, suggested λ, and some rows as they are trained on.
No device is touched.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kto_jax.command import FINISHED, run_command, visible
from kto_jax.config import Config
from kto_jax.config.ranges import Range
from kto_jax.data.index.index import Index
from kto_jax.data.index.manifest import SPLITS
from kto_jax.data.permutation import permute
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.data.truncation import cut_prompt, fit_lengths
from kto_jax.models.weights.load import read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.objectives import auto_weights, check_objective
from kto_jax.storage.folders import scratch_folder
from kto_jax.training import inputs
from kto_jax.training.inputs import count_visits

_ENCODING = {
    "rule": "by rule: {}",
    "end": "ended in {} as text already, which was taken off",
    "thought": "behind an opened thought, without one: {} thought closed",
    "token": "control tokens {} kept",
    "text": "{} in completions is text, not the control token",
    "other_end": "end in {} as text, which is no token of this model",
}
"""Descriptions of the counts in the manifest's "encoding"; docs/data.md explains the rules."""
_NUM_BINS = 10
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MAX_PLACES = 3
_FACTS = {
    "duplicates": "rows that repeat another: prompt, completion and label",
    "contradictory": "completions of a prompt with both labels",
    "train_eval_overlap": "rows of data.eval that are also in data.train",
    "prompts_cut": "prompts that are cut from the left to fit",
    "unused": "rows left out by score_rule or one_per_prompt",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    config: Config
    """Recipe of configs/ by its name, or the path of a config file."""
    rows: Annotated[int, Range(at_least=0)] = 4
    """Examples to print as they are trained on."""
    json: bool = False
    """Print one JSON object with every example as token ids, for programs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if the configuration or the feedback cannot be used."""
    return run_command(inspect, Options, str(__doc__), arguments)


def inspect(given: Options) -> int:
    """Explains the feedback of a run.

    Raises:
      ConfigError: the configuration or the feedback cannot be used.
    """
    with scratch_folder() as scratch:
        index, tokenizer = read_feedback(given.config, scratch)
        if given.json:
            print(json.dumps(as_json(index) | {"warnings": warnings(index, given.config)}))
        else:
            show(index, tokenizer, given.config, given.rows, Console(highlight=False))
    return FINISHED


def read_feedback(config: Config, scratch: Path) -> tuple[Index, TokenizerInfo]:
    """The index that training with `config` reads, and its tokenizer.

    Args:
      config: a run.
      scratch: folder for the tokenizer; needed as long as the tokenizer is.

    Raises:
      ConfigError: the model or the feedback cannot be used.
    """
    files = find_model(config.model.path, config.model.base)
    tokenizer, _, index = inputs.read_feedback(config, files, read_config(files.weights).vocab_size, scratch)
    return index, tokenizer


def as_json(index: Index) -> dict[str, Any]:
    """What was read, as plain data: one example for each completion, and the manifest's counts."""
    names = ("rows", "accepted", "skipped", "rejected", "rejections", "skips", "encoding", "splits", "pairs", "lengths")
    splits = [SPLITS[code] for code in index.splits.tolist()]
    examples = [
        {
            "label": bool(index.desirable[sequence]),
            "split": split,
            "place": index.place(sequence),
            "prompt_ids": index.prompt(sequence).tolist(),
            "completion_ids": index.completion(sequence).tolist(),
        }
        for sequence, split in enumerate(splits)
    ]
    return {"examples": examples, **{name: index.manifest[name] for name in names if name in index.manifest}}


def warnings(index: Index, config: Config) -> list[str]:
    """Sentences on what is likely to be trained on as something else, or not at all."""
    return [*_source_warnings(index), *_text_warnings(index), *_objective_warnings(index, config)]


def _source_warnings(index: Index) -> list[str]:
    """What reading the files warned of, which an index that was built before does not say again."""
    sources = index.manifest["sources"]
    return [f"{source['name']}: {warning}" for source in sources for warning in source.get("warnings", ())]


def _text_warnings(index: Index) -> list[str]:
    """Control strings in completions that are text to this model."""
    counts = index.manifest.get("encoding", {})
    return [
        f"{count:,} completions end in {name!r}, the end of a turn of another model. It is no token of this one, so "
        "the policy would learn to write it as text. Take it off the completions."
        for name, count in counts.get("other_end", {}).items()
    ] + [
        f"completions hold the text {name!r} {count:,} times, which is not the control token of that name. "
        "data.assistant_tokens names the tokens that keep their meaning in completions."
        for name, count in counts.get("text", {}).items()
    ]


def _objective_warnings(index: Index, config: Config) -> list[str]:
    """Completions that the objective leaves out."""
    name, reads = config.objective.name, check_objective(config.objective).reads
    train = index.sequences("train")
    if reads == "pairs":
        pairs = index.pairs("train")
        if not len(pairs):
            return [
                f"0 pairs to train on, and the objective {name!r} reads pairs. A pair is a chosen and a rejected "
                'completion of one prompt: config.data.format="pairs", or a prompt with both labels. Training will '
                "refuse this feedback."
            ]
        left = len(train) - len(np.union1d(pairs, np.asarray(index.rejected)[pairs]))
        if left:
            return [f"{left:,} of {len(train):,} completions to train on are in no pair; {name!r} leaves them out."]
    if reads == "desirable" and (left := int(np.sum(~np.asarray(index.desirable)[train]))):
        return [f"{left:,} of {len(train):,} completions to train on are undesirable; {name!r} leaves them out."]
    return []


def show(index: Index, tokenizer: TokenizerInfo, config: Config, num_rows: int, console: Console) -> None:
    """Prints the explanation of an index.

    Args:
      index: what to explain.
      tokenizer: its tokenizer.
      config: the run; its limits decide which part of a row is trained on.
      num_rows: how many rows to print, drawn from those to train on by `config.seed`.
      console: where to print.
    """
    manifest = index.manifest
    console.print(Text(f"index {index.directory}", "dim"), soft_wrap=True)
    for table in _tables(manifest):
        console.print(table)
    console.print(_weights(*count_visits(index), config), soft_wrap=True)
    for warning in warnings(index, config):
        console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)
    rows = index.sequences("train")
    prompt, completion = _kept(index, rows, config)
    console.print(histogram("tokens of a row to train on: prompt and completion", prompt + completion))
    console.print(histogram("tokens of its completion", completion))
    console.print(_labels(manifest))
    for row in rows[permute(np.arange(min(num_rows, len(rows))), len(rows), (config.seed,))]:
        console.print(_row(index, tokenizer, config, int(row)))


def histogram(title: str, values: np.ndarray) -> Table:
    """Text bars: bins of equal width up to the 99th percentile, and one for all larger values.

    Args:
      title: what is counted.
      values: integers, at least one.
    """
    low, high = int(values.min()), int(np.percentile(values, 99))
    width = max(1, -(-(high - low + 1) // _NUM_BINS))
    numbers = np.minimum((values - low) // width, (high - low) // width + 1)
    counts = {}
    for number, count in enumerate(np.bincount(numbers.astype(np.int64))):
        start = low + number * width
        beyond = number > (high - low) // width
        counts[f"{start:,} or more" if beyond else f"{start:,} to {start + width - 1:,}"] = int(count)
    return bars(title, counts)


def bars(title: str, counts: Mapping[str, int]) -> Table:
    """One text bar for each count; the largest count has a full bar."""
    table = _table(title, "", ("", "right"), "")
    most = max([1, *counts.values()])
    for name, count in counts.items():
        # Every nonzero count has a visible bar.
        eighths = max(round(8 * _BAR_WIDTH * count / most), min(count, 1))
        table.add_row(name, f"{count:,}", Text("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip(), "cyan"))
    return table


def _tables(manifest: Mapping[str, Any]) -> list[Table]:
    counts = ("rows", "accepted", "skipped", "rejected")
    sources = _table("sources", "name", "split", "layout", *((name, "right") for name in counts))
    for source in manifest["sources"]:
        numbers = (f"{source[name]:,}" for name in counts)
        sources.add_row(Text(source["name"]), source["split"], source.get("layout", ""), *numbers)
    if len(manifest["sources"]) > 1:
        sources.add_row("all", "", "", *(f"{manifest[name]:,}" for name in counts))
    splits = _table("splits", "", *((name, "right") for name in ("desirable", "undesirable", "prompts", "pairs")))
    for name, split in manifest["splits"].items():
        splits.add_row(name, *(f"{n:,}" for n in (*split.values(), manifest["pairs"][name])))
    points = list(manifest["lengths"]["total"])
    lengths = _table("tokens of the accepted rows", "", *((point, "right") for point in points))
    for name, figures in manifest["lengths"].items():
        lengths.add_row(name, *(f"{figures[point]:,.0f}" for point in points))
    facts = _table("to know", "", ("", "right"), "")
    for name, meaning in _FACTS.items():
        facts.add_row(name, f"{manifest[name]:,}", Text(meaning, "dim"))
    return [
        sources,
        *_mixture(manifest),
        *_rejections(manifest),
        *_skips(manifest),
        *_encoding(manifest),
        splits,
        lengths,
        facts,
        *_scores(manifest),
    ]


def _mixture(manifest: Mapping[str, Any]) -> list[Table]:
    """What each source contributes to an epoch, if there are several."""
    counts, shares = ("desirable", "undesirable", "pairs"), ("completions", "pairs")
    columns = ("weight", *counts, *(f"share of {kind}" for kind in shares))
    table = _table("an epoch of the sources to train on", "name", *((name, "right") for name in columns))
    for source in manifest["sources"]:
        if source["split"] == "train":
            numbers = (f"{source['train'][name]:,}" for name in counts)
            percents = (f"{source['share'][kind]:.1%}" for kind in shares)
            table.add_row(Text(source["name"]), f"{source['weight']:g}", *numbers, *percents)
    return [table] if table.row_count > 1 else []


def _rejections(manifest: Mapping[str, Any]) -> list[Table]:
    first = collections.defaultdict(list)
    for rejection in manifest["rejections"]["first"]:
        first[rejection["reason"]].append(rejection["place"])
    table = _table("rejected", "reason", ("rows", "right"), "first places")
    for reason, count in manifest["rejections"]["histogram"].items():
        table.add_row(visible(reason), f"{count:,}", Text(", ".join(first[reason][:_MAX_PLACES])))
    return [table] if table.row_count else []


def _skips(manifest: Mapping[str, Any]) -> list[Table]:
    """Rows that were skipped without an error."""
    table = _table("skipped", "reason", ("rows", "right"))
    for reason, count in manifest.get("skips", {}).items():
        table.add_row(visible(reason), f"{count:,}")
    return [table] if table.row_count else []


def _encoding(manifest: Mapping[str, Any]) -> list[Table]:
    """How completions were encoded, and which control tokens were kept."""
    table = _table("completions", "", ("", "right"))
    for kind, counts in manifest.get("encoding", {}).items():
        for name, count in counts.items():
            table.add_row(visible(_ENCODING[kind].format(name)), f"{count:,}")
    return [table] if table.row_count else []


def _scores(manifest: Mapping[str, Any]) -> list[Table]:
    tables = []
    for scale in manifest.get("scores", ()):
        table = _table("scores", "", ("", "right"))
        for name, value in scale.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(name, Text(f"{value:g}" if isinstance(value, int | float) else text))
        tables.append(table)
    return tables


def _weights(desirable: int, undesirable: int, config: Config) -> Text:
    """The λ that the counts of an epoch suggest."""
    text = Text(f"{desirable:,} desirable and {undesirable:,} undesirable rows to train on ", "bold")
    if not desirable or not undesirable:
        text.append("are of one label: thumbs need both, and λ cannot make up for it.")
        if config.data.format == "scores":
            text.append(" Set config.data.score_threshold between the lowest and the highest score.")
        return text
    auto = dataclasses.replace(config.objective, desirable_weight="auto", undesirable_weight="auto")
    weights = auto_weights(auto, desirable, undesirable)
    text.append(
        f"ask for λ_D = {weights[0]:.4g} and λ_U = {weights[1]:.4g}, which bring λ_D n_D / (λ_U n_U) from "
        f"{desirable / undesirable:.3g} to {weights[0] * desirable / (weights[1] * undesirable):.3g}. "
    )
    set_to = f"{config.objective.desirable_weight} and {config.objective.undesirable_weight}"
    return text.append(f"config.objective has desirable_weight and undesirable_weight {set_to}.", "dim")


def _labels(manifest: Mapping[str, Any]) -> Table:
    return bars(
        "labels",
        {
            f"{split} {label}": counts[label]
            for split, counts in manifest["splits"].items()
            for label in ("desirable", "undesirable")
            if counts["prompts"]
        },
    )


def _kept(index: Index, rows: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's prompt and completion that are trained on."""
    return fit_lengths(
        index.prompt_lengths[rows],
        index.completion_lengths[rows],
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )


def _row(index: Index, tokenizer: TokenizerInfo, config: Config, row: int) -> Group:
    """A row as it is trained on: the prompt dim; the completion, which the mask lets through, bold between ⟦ and ⟧."""
    (num_prompt,), (num_completion,) = _kept(index, np.array([row]), config)
    prompt = cut_prompt(index.prompt(row), int(num_prompt), tokenizer.bos_id)
    was = f" (cut from {len(index.prompt(row))})" if len(prompt) < len(index.prompt(row)) else ""
    label = "desirable" if index.desirable[row] else "undesirable"
    score = f" · score {index.scores[row]:g}" if "scores" in index.manifest else ""
    head = (
        f"row {row} · {index.place(row)} · {label} · weight {index.weights[row]:g}{score} · {len(prompt)} tokens of "
        f"prompt{was}, {num_completion} of completion"
    )
    completion = index.completion(row)[:num_completion]
    text = Text.assemble(
        (_decode(tokenizer, prompt), "dim"), ("⟦", "cyan"), (_decode(tokenizer, completion), "bold"), ("⟧", "cyan")
    )
    return Group(Rule(style="dim"), Text(head, "green" if index.desirable[row] else "red"), Padding(text, (0, 0, 0, 2)))


def _decode(tokenizer: TokenizerInfo, ids: np.ndarray) -> str:
    """The text of ids, including special tokens: what the model reads."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    return visible(backend.decode(ids.tolist(), skip_special_tokens=False))


def _table(title: str, *columns: str | tuple[str, str]) -> Table:
    headers = [column if isinstance(column, tuple) else (column, "left") for column in columns]
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(name for name, _ in headers))
    for name, justify in headers:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


if __name__ == "__main__":
    sys.exit(main())
