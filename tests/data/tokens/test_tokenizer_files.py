"""The files of a tokenizer: what is read from them in each form that models have, and what changes leave as it was."""

import json

import pytest
import tokenizers

from kto_jax.config import ConfigError
from kto_jax.data.tokens import tokenizer_files
from tests import TINY_MODEL


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny tokenizer."""
    tokenizer_files.copy_files(TINY_MODEL, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def read(path):
    return json.loads(path.read_text())


def write(path, values):
    path.write_text(json.dumps(values))


def test_only_the_files_of_a_tokenizer_are_copied_and_byte_for_byte(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names <= set(tokenizer_files.FILES)
    assert (TINY_MODEL / "config.json").exists() and "config.json" not in names
    assert all((folder / name).read_bytes() == (TINY_MODEL / name).read_bytes() for name in names)


@pytest.mark.parametrize("stored, expected", [
    ("{{ a }}", "{{ a }}"), ("", None), (None, None),
    ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ([{"name": "tool_use", "template": "t"}], None), ({"default": "d"}, "d"),
])  # fmt: skip
def test_a_template_is_found_in_every_form_of_the_configuration(tmp_path, stored, expected):
    write(tmp_path / "tokenizer_config.json", {"chat_template": stored})
    assert tokenizer_files.read_template(tmp_path) == expected


def test_a_template_of_its_own_file_precedes_those_of_json_files(tmp_path):
    assert tokenizer_files.read_template(tmp_path) is None
    write(tmp_path / "chat_template.json", {"chat_template": "third"})
    assert tokenizer_files.read_template(tmp_path) == "third"
    write(tmp_path / "tokenizer_config.json", {"chat_template": "second"})
    assert tokenizer_files.read_template(tmp_path) == "second"
    (tmp_path / "chat_template.jinja").write_text("first")
    assert tokenizer_files.read_template(tmp_path) == "first"


def test_a_template_that_is_set_is_the_only_one(folder):
    write(folder / "chat_template.json", {"chat_template": "old"})
    before = read(folder / "tokenizer_config.json") | {"chat_template": "older"}
    write(folder / "tokenizer_config.json", before)
    tokenizer_files.set_template(folder, "{{ 'é' }}")
    assert tokenizer_files.read_template(folder) == "{{ 'é' }}"
    assert not (folder / "chat_template.json").exists()
    assert read(folder / "tokenizer_config.json") == {k: v for k, v in before.items() if k != "chat_template"}


def test_special_tokens_are_read_as_text_or_objects_and_the_configuration_precedes(tmp_path):
    write(tmp_path / "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "other": "x"})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<end>", "pad_token": None})
    assert tokenizer_files.read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "<end>"}


def test_special_tokens_are_added_but_none_is_replaced(folder):
    before = read(folder / "tokenizer_config.json")
    assert before["eos_token"] and "cls_token" not in before
    tokenizer_files.set_special_tokens(folder, {"eos_token": "x", "cls_token": "é", "strange": "y"})
    assert read(folder / "tokenizer_config.json") == before | {"cls_token": "é"}


def test_an_eos_is_set_wherever_one_was_named(folder):
    write(folder / "special_tokens_map.json", {"eos_token": "a", "bos_token": "b"})
    before = read(folder / "tokenizer_config.json")
    tokenizer_files.set_eos(folder, "<é>")
    assert read(folder / "special_tokens_map.json") == {"eos_token": "<é>", "bos_token": "b"}
    assert read(folder / "tokenizer_config.json") == before | {"eos_token": "<é>"}
    write(folder / "special_tokens_map.json", {"bos_token": "b"})
    tokenizer_files.set_eos(folder, "z")
    assert read(folder / "special_tokens_map.json") == {"bos_token": "b"}


def test_control_tokens_get_the_next_ids_and_are_never_split(folder):
    def opened():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    size = opened().get_vocab_size(with_added_tokens=True)
    added = tokenizer_files.add_tokens(folder, ["<|good|>", "<|im_start|>", "<|bad|>", "<|good|>"])
    assert added == {"<|good|>": size, "<|bad|>": size + 1}
    ids = opened().encode("a<|bad|> b<|good|>", add_special_tokens=False).ids
    assert ids.count(size) == ids.count(size + 1) == 1 and ids[-1] == size
    assert opened().decode(ids, skip_special_tokens=True) == "a b"


def test_a_tokenizer_of_transformers_5_gets_the_names_of_version_4(folder):
    before = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "eos_token": "é"}
    write(folder / "tokenizer_config.json", before)
    tokenizer_files.set_portable_class(folder)
    assert read(folder / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<x>"], "eos_token": "é",
    }  # fmt: skip
    kept = {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"image": "<x>"}}
    write(folder / "tokenizer_config.json", kept)
    tokenizer_files.set_portable_class(folder)
    assert read(folder / "tokenizer_config.json") == kept


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe", r"tokenizer_config\.json is not UTF-8: .* A tokenizer's files are text\. Restore the file\."),
    (b'{"a": ', r"tokenizer_config\.json is not JSON: .* Restore the file from the model\."),
    (b"[1]", r"tokenizer_config\.json holds a list\. It must hold an object\. Restore the file\."),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(folder, content, message):
    (folder / "tokenizer_config.json").write_bytes(content)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for reads in (tokenizer_files.read_template, tokenizer_files.read_special_tokens):
        with pytest.raises(ConfigError, match=message):
            reads(folder)
