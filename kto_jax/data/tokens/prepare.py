"""A model's tokenizer as a folder: copied byte for byte, and tried before any row is read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.tokens import tokenizer_files
from kto_jax.data.tokens.encoder import EncodingError, Rendering
from kto_jax.data.tokens.tokenizer import TokenizerInfo, make_encoder, tokenizing_worker
from kto_jax.data.workers import Workers
from kto_jax.storage.atomic import new_folder


def prepare_tokenizer(
    model_path: Path,
    directory: Path,
    *,
    chat_template: str,
    eos_token: str = "auto",
    rendering: Rendering | None = None,
    added_tokens: Sequence[str] = (),
    workers: Workers | None = None,
) -> TokenizerInfo:
    """Copies the tokenizer of a model into a folder, in a worker process; the files are copied byte for byte.

    Args:
      model_path: Hugging Face directory with a fast tokenizer, or a .gguf file.
      directory: where to write; replaced if it exists.
      chat_template: "auto" for the tokenizer's own if it has one, "none", or the path of a Jinja file.
      eos_token: what completions end in, which becomes the tokenizer's EOS; "auto" for what the chat template ends the
        assistant's turn in where that is a control token, and for the tokenizer's EOS otherwise.
      rendering: how the template is used.
      added_tokens: control tokens to add to it.
      workers: from `tokenizing_worker`, to be used again; None starts a process for this call.

    Returns:
      What was written, and what of it differs from the model's own files.

    Raises:
      ConfigError: no fast tokenizer is there, it has no EOS or not the one asked for, or the chat template cannot be
        used.
    """
    arguments = (Path(model_path), Path(directory), chat_template, eos_token, rendering or Rendering(), added_tokens)
    with contextlib.nullcontext(workers) if workers else tokenizing_worker() as ready:
        return ready.submit(_prepare, *arguments).result()


# Everything below runs in the worker.


_prepared: dict[str, tuple[TokenizerInfo, dict[str, bytes]]] = {}
"""What this process prepared last, with the files, by `_key`: each round of online training prepares the tokenizer of
the model that it samples and that of the model that it trains, and a large one takes seconds to load."""
_NUM_PREPARED = 2


def _prepare(
    model_path: Path,
    directory: Path,
    chat_template: str,
    eos_token: str = "auto",
    rendering: Rendering = Rendering(),  # noqa: B008 (it is frozen)
    added_tokens: Sequence[str] = (),
) -> TokenizerInfo:
    settings = chat_template, eos_token, rendering, tuple(added_tokens)
    key = _key(model_path, settings)
    if key not in _prepared:
        info = _write(model_path, directory, *settings)
        if key is not None:
            _prepared[key] = info, {path.name: path.read_bytes() for path in directory.iterdir()}
        for oldest in list(_prepared)[:-_NUM_PREPARED]:
            del _prepared[oldest]
        return info
    info, files = _prepared[key]
    with new_folder(directory) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return dataclasses.replace(info, directory=directory)


def _key(model_path: Path, settings: tuple[str, str, Rendering, tuple[str, ...]]) -> str | None:
    """Digest of all that decides what is written; None if that would have to be read from a large file."""
    if not model_path.is_dir():
        return None
    digest, template = hashlib.sha256(repr(settings).encode()), settings[0]
    read = [model_path / name for name in (*tokenizer_files.FILES, "config.json")]
    for path in (*read, *([] if template in ("auto", "none") else [Path(template)])):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"\0{path.name}\0{path.is_file()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _write(
    model_path: Path,
    directory: Path,
    chat_template: str,
    eos_token: str,
    rendering: Rendering,
    added_tokens: Sequence[str],
) -> TokenizerInfo:
    with new_folder(directory) as partial:
        changes = _write_files(model_path, partial)
        if added_tokens and (ids := tokenizer_files.add_tokens(partial, added_tokens)):
            changes.append(f"it has the control tokens {', '.join(f'{name} ({i})' for name, i in ids.items())} too")
        special_tokens = tokenizer_files.read_special_tokens(partial)
        backend = _open(partial, model_path)
        vocab = backend.get_vocab(with_added_tokens=True)
        if eos_token != "auto" and eos_token != special_tokens.get("eos_token"):
            if eos_token not in vocab:
                raise ConfigError(
                    f'data.eos_token={eos_token!r} is no token of the tokenizer. It is "auto" or a token, such as '
                    f"{special_tokens.get('eos_token')!r}. Set config.data.eos_token."
                )
            tokenizer_files.set_eos(partial, eos_token)
            special_tokens["eos_token"] = eos_token
            changes.append(f"its EOS is {eos_token!r}")
        if chat_template not in ("auto", "none"):
            tokenizer_files.set_template(partial, _read_template(chat_template))
            changes.append(f"its chat template is {Path(chat_template).name}")
        if special_tokens.get("eos_token") not in vocab:
            raise ConfigError(
                f"the tokenizer of {model_path} has no EOS token. Every completion ends in one. "
                "Set config.data.eos_token to one of its tokens."
            )
        info = _describe(partial, vocab, special_tokens, chat_template != "none", rendering)
        info = _try_template(info, chat_template, find_end=eos_token == "auto")
    return dataclasses.replace(info, directory=directory, changes=tuple(changes))


def _write_files(model_path: Path, directory: Path) -> list[str]:
    """Writes a model's tokenizer into an empty folder; returns descriptions of what differs from the model's own."""
    if model_path.is_dir() and (model_path / tokenizer_files.TOKENIZER).is_file():
        tokenizer_files.copy_files(model_path, directory)
        if "eos_token" not in tokenizer_files.read_special_tokens(directory):
            # Some classes have special tokens that no file names.
            found = _load(model_path).special_tokens_map
            if isinstance(found.get("eos_token"), str):
                tokenizer_files.set_special_tokens(directory, found)
                return [f"its special tokens are those of its class: {', '.join(map(str, found.values()))}"]
        return []
    _load(model_path).save_pretrained(directory)
    tokenizer_files.set_portable_class(directory)
    return ["its files were made by transformers from the model's own"]


def _open(directory: Path, model_path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(directory / tokenizer_files.TOKENIZER))
    except Exception as error:
        # The library raises plain exceptions.
        raise _unreadable(model_path, error) from error


def _unreadable(model_path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"no tokenizer can be read from {model_path}: {type(error).__name__}: {str(error)[:200]}. "
        "A fast tokenizer is needed (tokenizer.json, tokenizer_config.json). Add the files to the directory."
    )


def _load(model_path: Path) -> Any:
    import transformers

    if model_path.suffix == ".gguf":
        from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer

        found = read_gguf_tokenizer(model_path)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=found.backend, chat_template=found.chat_template, **found.special_tokens
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # transformers raises its parsers' errors; the user needs the path and one line.
        raise _unreadable(model_path, error) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {model_path} is not a fast one. A tokenizer.json is needed. "
            "Convert it with transformers."
        )
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'data.chat_template={path!r} cannot be read: {error}. It is "auto", "none" or the path of a Jinja file. '
            "Check the path."
        ) from error


def _describe(
    directory: Path, vocab: dict[str, int], special_tokens: dict[str, str], has_template: bool, rendering: Rendering
) -> TokenizerInfo:
    template = tokenizer_files.read_template(directory) if has_template else None
    bos_id, eos_id = vocab.get(special_tokens.get("bos_token", "")), vocab[special_tokens["eos_token"]]
    digest = hashlib.sha256((directory / tokenizer_files.TOKENIZER).read_bytes())
    digest.update(f"\0{template or ''}\0{bos_id}\0{eos_id}".encode())
    return TokenizerInfo(
        directory=directory,
        vocab_size=max(vocab.values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=(eos_id,),
        sha256=digest.hexdigest(),
        has_chat_template=template is not None,
        rendering=rendering,
    )


def _ending_in(info: TokenizerInfo, turn_end: int) -> TokenizerInfo:
    """The same tokenizer, whose completions end in `turn_end`."""
    if turn_end == info.eos_id:
        return info
    digest = hashlib.sha256(f"{info.sha256}\0{turn_end}".encode()).hexdigest()
    return dataclasses.replace(info, eos_id=turn_end, stop_ids=(turn_end, info.eos_id), sha256=digest)


def _try_template(info: TokenizerInfo, chat_template: str, *, find_end: bool) -> TokenizerInfo:
    """Refuses a template that cannot render two plain turns, before any record is read.

    Returns:
      The tokenizer, whose completions end as the template ends the second turn, if requested. Its digest holds
      the rendering, and the time only if prompts depend on it.
    """
    if info.has_chat_template:
        require(
            "jinja2", f"the chat template (data.chat_template={chat_template!r})", "set config.data.chat_template=none"
        )
    try:
        encoder = make_encoder(info)
        encoder.encode_row("How are you?", "Fine.")
        turn_end = encoder.find_turn_end() if info.has_chat_template and find_end else None
    except EncodingError as error:
        raise ConfigError(
            f"the chat template (data.chat_template={chat_template!r}) cannot be used: {error}. It must write a user "
            "turn, then the completion unchanged. Set config.data.chat_template to another Jinja file, or to none."
        ) from error
    if turn_end is not None:
        info = _ending_in(info, turn_end)
    rendering = info.rendering if encoder.is_dated else dataclasses.replace(info.rendering, moment="")
    if rendering != Rendering():
        parts = json.dumps(dataclasses.asdict(rendering), sort_keys=True)
        info = dataclasses.replace(info, sha256=hashlib.sha256(f"{info.sha256}\0{parts}".encode()).hexdigest())
    return dataclasses.replace(info, rendering=rendering, is_dated=encoder.is_dated)
