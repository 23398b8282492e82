"""Tokenizers with other control tokens and chat templates, and their text with control tokens shown."""

import json
import shutil

import tokenizers

from tests.data.conftest import TINY_MODEL

END, START, EOS = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|> (which is the EOS)


def raw(tokenizer, ids):
    """Text with special tokens shown."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    return backend.decode([int(i) for i in ids], skip_special_tokens=False)


CHATML = (TINY_MODEL / "chat_template.jinja").read_text()


def chat_model(directory, template, eos, *added):
    """The tiny model's tokenizer with other control tokens, EOS and template."""
    shutil.copytree(TINY_MODEL, directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([eos, *added])
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(template)
    return directory
