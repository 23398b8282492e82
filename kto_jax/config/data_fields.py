"""The fields of the configuration that say where the feedback is and how it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from kto_jax.config.ranges import Auto, Count, Fraction, Labels, Number, Probability, Range, Seed

Layout = (
    Literal["auto", "fields", "messages", "sharegpt", "alpaca", "openai", "trl"]
    | Literal["halos", "hh", "shp", "oasst", "oasst_trees", "ultrafeedback", "kto_mix", "compared", "ranked"]
    | Literal["open_webui", "librechat", "anythingllm", "gradio", "langfuse", "langsmith", "argilla", "presses"]
)
Role = Literal["system", "developer", "user", "assistant", "tool"]
Sources = str | tuple[str | Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the feedback is and how it is read."""

    train: Sources = ""
    """Files (.jsonl, .json, .csv, .tsv, each also with .gz, .bz2 or .zst; .xlsx, .parquet, .arrow, .feather),
    directories of them, globs, all also in a bucket (`gs://`, `s3://`); `hub:org/name/split`,
    `hub:org/name:config/split@REVISION`, `tfds:name/split`, `tfds-dir:path:split`, or
    `wheel:NAME==VERSION/path/in/wheel`. In a tuple, a mapping gives a source settings of its
    own: `{"source": "hh.jsonl", "layout": "hh", "format": "pairs", "weight": 0.5}`. The weight is how often an epoch
    visits each record of that source. Required."""
    eval: Sources = ""
    """Held-out feedback, written as `train` but without weights. Empty holds out the share `holdout` of `train`."""
    holdout: Fraction = 0.05
    """Share of the prompts, chosen by hash, that is kept for evaluation when `eval` is empty."""
    judge_holdout: Fraction = 0.0
    """Share of the prompts, chosen by hash, that is kept to fit the feedback judge."""
    format: Literal["thumbs", "pairs", "scores", "demonstrations"] = "thumbs"
    """What a record holds besides its prompt. "thumbs": a completion and a label. "pairs": a chosen and a rejected
    completion. "scores": a completion and a number. "demonstrations": a completion, taken as desirable. Objectives on
    pairs also read thumbs and scores, matched within each prompt; objectives on thumbs also read pairs, one completion
    at a time."""
    layout: Layout = "auto"
    """Where a record holds it. "auto": looks at the first rows, reports what it chose, and refuses if two layouts fit.
    "fields": in the fields named below. "messages": in the messages of a chat log that have `feedback`, or beside them
    for the last one. Others: as that format, dataset or export has it (docs/data.md has a table)."""
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Columns that get another name before the rows are read: {"dialog": "messages"}."""
    prompt_field: str = "prompt"
    """Field with the prompt: text or chat messages. Pairs may lack it: chosen and rejected are then whole
    conversations, as messages or as "Human: ... Assistant: ..." text, whose last turn is the completion. Any field may
    be a dotted path into objects and lists: "data.question", "votes.0.value"."""
    prompt_template: str = ""
    """Template that builds the prompt from the record's fields, such as "Review the film {title}."; it replaces
    `prompt_field`."""
    completion_field: str = "completion"
    """Field with the completion."""
    label_field: str | tuple[str, ...] = "label"
    """Field with the label: true is desirable, false undesirable. If several fields are named, any of them may hold it;
    a record whose labels disagree is skipped and counted."""
    unlabelled: Literal["skip", "reject"] = "skip"
    """What happens to a record without a label or score: it is skipped and counted, or rejected."""
    label_map: Labels = dataclasses.field(default_factory=dict)
    """Meaning of each label that is not a boolean: True desirable, False undesirable, None skips the record."""
    roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)
    """What the messages' words for roles mean: {"customer": "user", "bot": "assistant"}."""
    system_field: str = ""
    """Field with a system message to put before the prompt, if any."""
    assistant_turns: Literal["all", "last"] = "all"
    """Demonstrations that are whole conversations: train on "all" turns of the assistant, or on the "last"."""
    chosen_field: str = "chosen"
    """Field with the chosen completion of a pair."""
    rejected_field: str = "rejected"
    """Field with the rejected completion of a pair."""
    score_field: str = "score"
    """Field with the score."""
    score_rule: Literal["threshold", "mean", "median", "prompt_mean", "prompt_median", "bernoulli"] = "threshold"
    """Which scores are desirable. "threshold": at least `score_threshold`. "mean", "median": above that of all records.
    "prompt_mean", "prompt_median": above that of the same prompt. Records equal to the mean or median are skipped.
    "bernoulli": at random, with probability sigmoid(score)."""
    score_threshold: Number = 0.0
    """Smallest desirable score under the rule "threshold"."""
    one_per_prompt: bool = False
    """Keep one completion of each prompt, chosen at random, so that no prompt has both labels."""
    seed: Seed = 0
    """Seed of what is random in reading the feedback: "bernoulli" labels, `one_per_prompt` and matched pairs."""
    tools_field: str = "tools"
    """Field with the tools that the prompt offers, if any: a list of JSON schemas, or that list as text. They are
    passed to the chat template, which must show them."""
    weight_field: str = "weight"
    """Field with the example's weight in the loss, if any."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own, if it has one. "none": plain text. Otherwise the path of a Jinja file."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables for the chat template, such as {"enable_thinking": True} or {"reasoning_effort": "low"}. Without
    `enable_thinking`, a prompt invites a thought if one of its completions holds one."""
    template_date: str = "auto"
    """Date, as 2026-11-28, that a chat template shows. "auto": the day on which the run began, which stays with it."""
    fold_system: bool = False
    """Put a system turn at the beginning of the user's turn, for templates that take no system turn (Gemma)."""
    assistant_tokens: Auto | tuple[str, ...] = "auto"
    """Control tokens that keep their meaning in the assistant's text. "auto": those of thoughts and of calls of tools.
    In all other text control tokens are spelled out."""
    eos_token: str = "auto"
    """Token that ends every completion. "auto": the token with which the chat template ends the assistant's turn, or
    else the tokenizer's EOS. Any other token also becomes the tokenizer's EOS."""
    max_length: Annotated[int, Range(at_least=2)] = 1024
    """Longest prompt plus completion, in tokens. Prompts are cut first, from the left."""
    max_prompt_length: Count = 512
    """Longest prompt, in tokens, when prompt and completion do not fit into `max_length`, which must be larger."""
    sampled_tokens: bool = False
    """Train on the token ids that rows hold beside their text, as the feedback of online rounds does, and encode
    nothing. The model's tokenizer must be the one that they were sampled with."""
    long_completion: Literal["reject", "cut"] = "reject"
    """What happens to a completion longer than `max_length`: "reject" the record, or "cut" it and omit its EOS."""
    max_rejected: Probability = 0.001
    """Share of the records that may be rejected before the run refuses to start."""
    num_workers: Count | Auto = "auto"
    """Processes that tokenize; "auto" uses the machine's cores."""
    num_loaders: Annotated[int, Range(at_least=0, zero="a thread")] = 0
    """Processes that prepare batches ahead of the step. A thread is enough unless steps are very short."""
    index_store: str = ""
    """Folder or bucket (`gs://bucket/indices`, `s3://bucket/indices`) that shares finished indices between hosts and
    runs: one host builds, the others copy. Empty: every host builds its own in its cache."""


SOURCE_FIELDS = (
    *("format", "layout", "rename", "prompt_field", "prompt_template", "completion_field", "label_field", "label_map"),
    *("unlabelled", "roles", "system_field", "assistant_turns"),
    *("chosen_field", "rejected_field", "score_field", "score_rule", "score_threshold", "tools_field", "weight_field"),
)
"""Fields of `DataConfig` that each source may set for itself."""
SourceWeight = Annotated[float, Range(above=0, at_most=1000)]
