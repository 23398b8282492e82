"""The files of a tokenizer: copied as they are, and read without rebuilding the tokenizer.

transformers writes a loaded tokenizer in its own form, which other versions and other programs do not
read, and rebuilds some classes differently from their tokenizer.json. So the base's own files are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (
    *(TOKENIZER, CONFIG, TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    "generation_config.json",
)
"""Files of a tokenizer, and the model's sampling defaults, which an export keeps."""
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def copy_files(source: Path, directory: Path) -> None:
    """Copies the files of a tokenizer, byte for byte."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def read_template(directory: Path) -> str | None:
    """The chat template of a tokenizer, or None.

    Raises:
      ConfigError: a file is not text or not JSON.
    """
    if (directory / TEMPLATE).is_file():
        return _read_text(directory / TEMPLATE) or None
    found = _read_json(directory / CONFIG).get("chat_template")
    found = _read_json(directory / "chat_template.json").get("chat_template") if found is None else found
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def read_special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on by name, if the files name them.

    Raises:
      ConfigError: a file is not JSON.
    """
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG):
        values = _read_json(directory / name)
        for key in _SPECIAL:
            value = values.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
    return tokens


def set_special_tokens(directory: Path, tokens: Mapping[str, str]) -> None:
    """Adds special tokens to a tokenizer's configuration."""
    named = {key: value for key, value in tokens.items() if key in _SPECIAL}
    values = named | _read_json(directory / CONFIG)
    (directory / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def set_eos(directory: Path, token: str) -> None:
    """Makes a token the EOS of the tokenizer in a folder; changes nothing else in its files."""
    for name in (CONFIG, "special_tokens_map.json"):
        path = directory / name
        if path.is_file() and (name == CONFIG or "eos_token" in _read_json(path)):
            path.write_text(json.dumps({**_read_json(path), "eos_token": token}, indent=2, ensure_ascii=False) + "\n")


def add_tokens(directory: Path, tokens: Sequence[str]) -> dict[str, int]:
    """Adds control tokens to the tokenizer in a folder, with the next free ids; returns those that it lacked."""
    import tokenizers

    path = directory / TOKENIZER
    vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    new = [token for token in dict.fromkeys(tokens) if token not in vocab]
    ids = {token: max(vocab.values()) + place for place, token in enumerate(new, start=1)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values = _read_json(path)
    values["added_tokens"] += [{"id": number, "content": token, **plain} for token, number in ids.items()]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return ids


def set_portable_class(directory: Path) -> None:
    """Names the class of a tokenizer that transformers 5 saved as transformers 4 does, so that both open it.

    Version 5 calls the class of a plain tokenizer.json TokenizersBackend, which version 4 does not know, and lists
    further special tokens under a name that version 4 reads as an object.
    """
    values = _read_json(directory / CONFIG)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Version 4 adds token_type_ids otherwise, which no decoder here takes.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    (directory / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def set_template(directory: Path, template: str) -> None:
    """Sets the chat template of the tokenizer in a folder."""
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    values = _read_json(directory / CONFIG)
    if values.pop("chat_template", None) is not None:
        (directory / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}. A tokenizer's files are text. Restore the file.") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {str(error)[:100]}. Restore the file from the model.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}. It must hold an object. Restore the file.")
    return values
