"""Tokenizers in GGUF files."""

import json

import pytest
import tokenizers

from kto_jax.config import ConfigError
from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer
from kto_jax.data.tokens.prepare import _prepare
from tests.data.conftest import TINY_MODEL
from tests.data.tokens.chat_models import CHATML, END, EOS


def test_a_gguf_file_gives_the_same_ids_as_the_tokenizer_it_was_made_from(tmp_path):
    import gguf

    definition = json.loads((TINY_MODEL / "tokenizer.json").read_text())
    vocabulary = sorted(definition["model"]["vocab"], key=definition["model"]["vocab"].get)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf_tokenizer(tmp_path / "tiny.gguf")
    original = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    text = "How do I  bake\n bread? 0123 naïve <|im_end|>"
    assert found.backend.encode(text).ids == [END, *original.encode(text).ids]
    assert found.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    info = _prepare(tmp_path / "tiny.gguf", tmp_path / "out", "auto")
    # The class that transformers 4 and 5 both know, and what its output holds for `generate`.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (info.bos_id, info.eos_id, info.vocab_size, info.has_chat_template) == (END, EOS, 512, True)


def test_a_gguf_file_of_an_unknown_kind_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="tokenizer of kind 'llama'"):
        read_gguf_tokenizer(tmp_path / "tiny.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        read_gguf_tokenizer(tmp_path / "broken.gguf")
