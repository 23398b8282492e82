"""A model's tokenizer as a folder: how completions end, and what is refused before a row is read."""

import dataclasses
import json
import shutil

import pytest

from kto_jax.config import ConfigError
from kto_jax.data.tokens import prepare
from kto_jax.data.tokens.encoder import Rendering
from kto_jax.data.tokens.prepare import _prepare
from kto_jax.data.tokens.tokenizer import decode, encode_text, make_encoder
from tests.data.conftest import TINY_MODEL
from tests.data.tokens.chat_models import CHATML, EOS, chat_model, raw


def test_the_prepared_directory_opens_in_transformers_and_the_digest_covers_the_template(tokenizer, tmp_path):
    import transformers

    names = {path.name for path in tokenizer.directory.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    opened = transformers.AutoTokenizer.from_pretrained(tokenizer.directory)
    assert (opened.eos_token_id, len(opened)) == (tokenizer.eos_id, tokenizer.vocab_size) == (EOS, 512)
    (tmp_path / "other.jinja").write_text(CHATML.replace("<|im_start|>", "<|endoftext|>"))
    other = _prepare(TINY_MODEL, tmp_path / "a", str(tmp_path / "other.jinja"))
    none = _prepare(TINY_MODEL, tmp_path / "b", "none")
    assert len({tokenizer.sha256, other.sha256, none.sha256}) == 3 and not none.has_chat_template


def test_a_tokenizer_that_was_prepared_before_is_read_again_only_if_something_has_changed(tmp_path, monkeypatch):
    loads, load = [], prepare._open
    monkeypatch.setattr(prepare, "_open", lambda *paths: (loads.append(1), load(*paths))[1])
    monkeypatch.setattr(prepare, "_prepared", {})
    model = shutil.copytree(TINY_MODEL, tmp_path / "model")
    asked = ("auto", "auto", Rendering(), ("<|new|>",))
    first, again = (_prepare(model, tmp_path / name, *asked) for name in ("a", "b"))
    assert len(loads) == 1 and again == dataclasses.replace(first, directory=tmp_path / "b")
    written = [{path.name: path.read_bytes() for path in info.directory.iterdir()} for info in (first, again)]
    assert written[0] == written[1]
    (model / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|endoftext|>"))
    assert _prepare(model, tmp_path / "c", *asked).sha256 != first.sha256 and len(loads) == 2
    template = tmp_path / "own.jinja"
    for number, text in enumerate((CHATML, CHATML.replace("<|im_start|>", "<|endoftext|>"))):
        template.write_text(text)
        _prepare(model, tmp_path / f"{number}", str(template))
    assert len(loads) == 4 and len(prepare._prepared) == 2


GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


PROSE = (
    "{% for m in messages %}\n### {{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n### assistant\n{% endif %}"
)


def ordinary(directory):
    """A copy of a tokenizer whose added tokens are none of them special."""
    copy = directory.with_name("ordinary")
    shutil.copytree(directory, copy)
    definition = json.loads((copy / "tokenizer.json").read_text())
    definition["added_tokens"] = [token | {"special": False} for token in definition["added_tokens"]]
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    return copy


@pytest.mark.parametrize(
    ("template", "eos", "added", "ends"),
    [
        (CHATML, "<|im_end|>", [], ["<|im_end|>"]),
        (CHATML, "<|endoftext|>", [], ["<|im_end|>", "<|endoftext|>"]),
        (GEMMA, "<eos>", ["<bos>", "<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>", "<eos>"]),
        (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], ["<|eot_id|>"]),
        (LLAMA3, "<|end_of_text|>", ["<|eot_id|>"], ["<|eot_id|>", "<|end_of_text|>"]),
        (MISTRAL, "</s>", ["[INST]", "[/INST]"], ["</s>"]),
        (CHATML.replace("<|im_end|>", " <|im_end|>"), "</s>", [], ["<|im_end|>", "</s>"]),
        (PROSE, "</s>", [], ["</s>"]),
        (PROSE.replace("content }}", "content }}\n### End<|im_end|>"), "</s>", [], ["</s>"]),
        (LLAMA3, "</s>", [], ["</s>"]),
    ],
    ids=[
        "SmolLM2 and Qwen3", "Qwen's base models", "Gemma", "Llama 3", "Llama 3 as first released", "Mistral",
        "a space before", "text alone", "text first", "no control token",
    ],
)  # fmt: skip
def test_completions_end_as_the_chat_template_ends_the_assistants_turn(tmp_path, template, eos, added, ends):
    info = _prepare(chat_model(tmp_path / "model", template, eos, *added), tmp_path / "out", "auto")
    encoder = make_encoder(info)
    prompt, completion = encoder.encode_row("How are you?", "Fine.")
    assert [encoder.token(i) for i in info.stop_ids] == ends and info.eos_id == info.stop_ids[0]
    assert raw(info, completion).lstrip() == "Fine." + ends[0] and completion[-1] == info.eos_id
    said = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
    # What the model reads as a turn of its own is what it was taught to write, but for a space before its end.
    if ends[0] in template and f" {ends[0]}" not in template:
        again = encoder.encode_prompt([*said, {"role": "user", "content": "Good."}])
        start = [*prompt, *completion]
        assert again[: len(start)].tolist() == start
    # Where the control token is not called special, too.
    assert decode(dataclasses.replace(info, directory=ordinary(info.directory)), completion).strip() == "Fine."
    plain = _prepare(tmp_path / "model", tmp_path / "plain", "none")
    assert [encoder.token(i) for i in plain.stop_ids] == [eos]


def test_the_configured_eos_ends_completions_and_becomes_the_tokenizers_own(tmp_path):
    import transformers

    model = chat_model(tmp_path / "model", CHATML, "<|endoftext|>")
    auto = _prepare(model, tmp_path / "auto", "auto")
    for number, asked in enumerate(("<|endoftext|>", "<|im_start|>")):
        info = _prepare(model, tmp_path / f"{number}", "auto", asked)
        encoder = make_encoder(info)
        assert encoder.token(encoder.encode_row("Hello?", "Hi.")[1][-1]) == asked
        assert info.stop_ids == (info.eos_id,) and info.sha256 != auto.sha256
        assert transformers.AutoTokenizer.from_pretrained(info.directory).eos_token == asked
    with pytest.raises(ConfigError, match=r"data.eos_token='<end>' is no token .* such as '<\|endoftext\|>'. Set"):
        _prepare(model, tmp_path / "none", "auto", "<end>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer can be read"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "no tokenizer can be read"),
        (lambda d: (d / "chat_template.jinja").write_text("{{ 1 }}"), "cannot be used: .*changes the completion"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'),
            "no EOS",
        ),
    ],
)
def test_an_unusable_tokenizer_is_refused_and_nothing_is_written(tmp_path, change, message):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        _prepare(tmp_path / "model", tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()


def test_a_template_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.chat_template="):
        _prepare(TINY_MODEL, tmp_path / "out", str(tmp_path / "missing.jinja"))


def test_added_tokens_get_the_next_ids_and_are_control_tokens(tokenizer, tmp_path):
    names = ("<good>", "<|im_end|>", "<bad>")
    info = _prepare(TINY_MODEL, tmp_path / "out", "auto", added_tokens=names)
    size = tokenizer.vocab_size
    assert (info.vocab_size, info.eos_id, info.stop_ids) == (size + 2, tokenizer.eos_id, tokenizer.stop_ids)
    assert info.changes == (f"it has the control tokens <good> ({size}), <bad> ({size + 1}) too",)
    assert encode_text(info, "x<bad><good>").tolist()[-2:] == [size + 1, size]
    assert info.sha256 != tokenizer.sha256
    # In a user's text they are spelt out, like all control tokens.
    assert size not in make_encoder(info).encode_prompt("<good>").tolist()
