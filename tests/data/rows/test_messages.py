"""Messages of other makers: content in parts, calls of tools and what tools say."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import DataConfig
from kto_jax.data.rows.records import Rejection, read_records
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.tokens.encoder import EncodingError
from kto_jax.data.tokens.prepare import _prepare
from tests.data.conftest import TINY_MODEL, InProcessWorkers, as_transformers

USER = {"role": "user", "content": "Rain?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Delft"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "12 mm"}
DONE = {"role": "assistant", "content": "Yes, 12 mm."}
# As the templates of Qwen and Hermes write calls.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role -}}
{%- if message.content %}{{ '\\n' + message.content }}{% endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"town": "Delft"}}\n</tool_call>'


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """Makes an encoder of a chat template."""

    def make(template):
        directory = tmp_path_factory.mktemp("template")
        (directory / "template.jinja").write_text(template)
        info = _prepare(TINY_MODEL, directory / "tokenizer", str(directory / "template.jinja"))
        return tokenize.make_encoder(info)

    return make


@pytest.fixture(scope="module")
def encoder(with_template):
    return with_template(TEMPLATE)


def read(path, *rows, **fields):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(str(path), DataConfig(**fields)))


def read_row(tmp_path, row, **fields):
    (record,) = read(tmp_path / "a.jsonl", row, **fields)
    return record


def text_of(encoder, ids):
    return encoder._controls._full.decode(ids.tolist(), skip_special_tokens=False)


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "completion": [{"role": "assistant", "content": parts[:1]}]}
    record = read_row(tmp_path, {**row, "label": True})
    assert (record.prompt, record.completion) == ([USER], "Ra")
    log = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts, "feedback": True}]}
    assert read_row(tmp_path, log, layout="messages").completion == "Rain?"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_conversation_with_calls_and_results_is_a_prompt(tmp_path, encoder, name):
    row = {"prompt": [USER, CALLING, RESULT], "completion": "Yes, 12 mm.", "label": True}
    log = {"messages": [USER, CALLING, RESULT, {**DONE, "feedback": "up"}]}
    (record,) = read(tmp_path / name, row)
    (logged,) = read(tmp_path / f"log-{name}", log, layout="messages", label_map={"up": True})
    assert (logged.prompt, logged.completion) == (record.prompt, record.completion)
    assert record.prompt[1]["content"] == "" and record.prompt[2] == RESULT
    prompt, completion = encoder.encode_row(record.prompt, record.completion)
    messages = [USER, {**CALLING, "content": "", "tool_calls": [
        {**CALL, "function": {"name": "weather", "arguments": {"town": "Delft"}}}
    ]}, RESULT]  # fmt: skip
    expected = as_transformers(encoder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert WRITTEN in expected and "12 mm" in expected
    assert prompt.tolist() == encoder._controls._full.encode(expected, add_special_tokens=False).ids
    assert text_of(encoder, completion[:-1]) == "Yes, 12 mm."


@pytest.mark.parametrize("content", [None, "", " ", [], "Let me look."])
def test_a_completion_that_calls_tools_is_what_the_template_writes(tmp_path, encoder, content):
    record = read_row(tmp_path, {"prompt": [USER], "completion": [{**CALLING, "content": content}], "label": True})
    prompt, completion = encoder.encode_row(record.prompt, record.completion)
    assert np.array_equal(prompt, encoder.encode_prompt([USER]))
    said = "Let me look.\n" if content == "Let me look." else ""
    assert text_of(encoder, completion[:-1]) == said + WRITTEN and completion[-1] == encoder._eos_id


def test_a_pair_may_hold_a_call_against_text_or_against_another_call(tmp_path):
    other = {**CALLING, "tool_calls": [{"name": "weather", "arguments": {"town": "Breda"}}]}
    for rejected, expected in ((DONE, DONE["content"]), (other, None)):
        record = read_row(tmp_path, {"chosen": [USER, CALLING], "rejected": [USER, rejected]}, format="pairs")
        assert record.chosen.prompt == [USER]
        assert json.loads(record.chosen.completion["tool_calls"])[0]["function"]["arguments"] == {"town": "Delft"}
        assert record.rejected.completion == expected or expected is None
    same = read_row(tmp_path, {"chosen": [USER, CALLING], "rejected": [USER, CALLING]}, format="pairs")
    assert same.reason == "chosen and rejected are the same"


def test_control_strings_in_calls_and_results_never_become_control_tokens(tmp_path, encoder):
    sly = {"function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": ["<|im_end|>", 1, None]}}}
    prompt = [USER, {**CALLING, "tool_calls": [sly]}, {**RESULT, "content": "<|im_end|>", "name": "<|im_end|>"}]
    row = {"prompt": prompt, "completion": [{**CALLING, "tool_calls": [sly]}], "label": True}
    record = read_row(tmp_path, row)
    prompt, completion = encoder.encode_row(record.prompt, record.completion)
    counts = [np.isin(ids, list(encoder._controls.ids.values())).sum() for ids in (prompt, completion)]
    assert counts == [7, 1]  # three closed turns and the open one; EOS
    assert text_of(encoder, prompt).count("<|im_end|>") == 6


def test_the_character_that_masks_control_strings_is_in_no_call(tmp_path, encoder):
    call = {"name": "f", "arguments": {"a": "\ue0000\ue000", "b": "<|im_end|>"}}
    record = read_row(tmp_path, {"prompt": [USER], "completion": [{**CALLING, "tool_calls": [call]}], "label": True})
    _, completion = encoder.encode_row(record.prompt, record.completion)
    assert '{"a": "\ue0000\ue000", "b": "<|im_end|>"}' in text_of(encoder, completion)


def test_an_index_holds_calls(make_index, encoder, monkeypatch):
    monkeypatch.setattr(InProcessWorkers, "encoder", staticmethod(lambda info: encoder))
    row = {"prompt": [USER], "completion": [CALLING], "label": True}
    index = make_index([row, {"prompt": "Q?", "completion": "A", "label": False}])
    assert text_of(encoder, index.completion(0)[:-1]) == WRITTEN and index.manifest["rejected"] == 0


def calls(*calls):
    return {**CALLING, "tool_calls": list(calls)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**USER, "content": [{"type": "image_url"}]}, "part of the prompt has type 'image_url', not 'text'"),
        ({**USER, "content": [{"type": "text", "text": 3}]}, "text of a part of the prompt is a number"),
        ({**USER, "content": [{"type": "text", "text": " "}]}, "empty prompt"),
        ({**USER, "content": []}, "empty prompt"),
        ({**USER, "content": None}, "prompt is not text but null"),
        ({**USER, "tool_calls": [CALL]}, "tool_calls of the prompt on a message that is not the assistant's"),
        (calls(), "prompt is not text but null"),
        ({**CALLING, "tool_calls": "weather"}, "tool_calls of the prompt is not a list but text"),
        (calls("weather"), "tool call of the prompt is not an object with a function"),
        (calls({"function": "f"}), "tool call of the prompt is not an object with a function"),
        (calls({"function": {"name": "f"}}), "arguments of a tool call of the prompt are not a JSON object"),
        (calls({"name": "f", "arguments": "{"}), "arguments of a tool call of the prompt are not a JSON object"),
        (
            calls({"name": "f", "arguments": "[" * 99_999}),
            "arguments of a tool call of the prompt are not a JSON object",
        ),
        (calls({"arguments": {}}), "name of a tool call is not text but null"),
        (calls({"name": "f", "arguments": {"a": "\ud800"}}), "lone surrogate in tool_calls"),
        (calls({"id": 7, "function": {"name": "f", "arguments": {}}}), "id of a tool call is not text but a number"),
        ({**RESULT, "name": 7}, "name is not text but a number"),
    ],
)
def test_a_message_that_cannot_be_read_is_rejected_with_its_reason(tmp_path, message, reason):
    row = {"prompt": [message, USER], "completion": "A", "label": True}
    assert read_row(tmp_path, row) == Rejection(reason, f"{tmp_path / 'a.jsonl'}:1")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_TOOLS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
NO_RESULTS = TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'tool'")
OTHER_END = TEMPLATE.replace(
    "{{- '<|im_end|>\\n' -}}", "{{- '<|im_end|>\\n' if not message.tool_calls else '<eom>' -}}"
)
RAISES = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no') }}{% endif %}"
)
OTHER_START = TEMPLATE.replace(
    "{{- '<|im_start|>' + message.role -}}",
    "{{- '<|im_start|>' + ('caller' if message.tool_calls else message.role) -}}",
)

# As the templates of Llama, which write one call, or text.
LLAMA = """\
{%- for m in messages -%}
{%- if 'tool_calls' in m -%}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|im_start|>assistant\\n' + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>ipython\\n' + ({'output': m.content} | tojson) -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content | trim -}}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def test_calls_and_results_are_read_as_llama_writes_them(tmp_path, with_template):
    encoder = with_template(LLAMA)
    record = read_row(tmp_path, {"prompt": [USER, CALLING, RESULT], "completion": [CALLING], "label": True})
    prompt, completion = encoder.encode_row(record.prompt, record.completion)
    assert text_of(encoder, completion[:-1]) == '{"name": "weather", "parameters": {"town": "Delft"}}'
    assert '<|im_start|>ipython\n{"output": "12 mm"}<|im_end|>' in text_of(encoder, prompt)


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "reason"),
    [
        (LLAMA, [USER], {**CALLING, "content": "Look."}, "leaves out what is said beside the tool calls"),
        (LLAMA, [USER], {**CALLING, "tool_calls": [CALL, CALL]}, "one call at once"),
        (CHATML, [USER], CALLING, "the chat template does not show tool calls"),
        (CHATML, [USER, CALLING, RESULT], "A", "the chat template does not show tool calls"),
        (RAISES, [USER], CALLING, "the chat template does not show tool calls"),
        (NO_TOOLS, [USER, DONE, RESULT], "A", "the chat template does not show the messages of tools"),
        (NO_RESULTS, [USER, CALLING, RESULT], "A", "the chat template does not show the messages of tools"),
        (OTHER_END, [USER], CALLING, "the chat template ends tool calls in another way than text"),
        (OTHER_START, [USER], CALLING, "the chat template changes the prompt when calls of tools are added"),
    ],
)
def test_calls_and_results_are_refused_where_the_template_would_lose_them(
    tmp_path, with_template, template, prompt, completion, reason
):
    completion = [completion] if isinstance(completion, dict) else completion
    record = read_row(tmp_path, {"prompt": prompt, "completion": completion, "label": True})
    with pytest.raises(EncodingError, match=reason):
        with_template(template).encode_row(record.prompt, record.completion)


@pytest.mark.parametrize("template", [CHATML, RAISES])
def test_results_are_read_where_a_template_writes_every_role_but_no_calls(tmp_path, with_template, template):
    record = read_row(tmp_path, {"prompt": [USER, DONE, RESULT], "completion": "A", "label": True})
    encoder = with_template(template)
    prompt, _ = encoder.encode_row(record.prompt, record.completion)
    assert "<|im_start|>tool\n12 mm<|im_end|>" in text_of(encoder, prompt)


def test_without_a_template_a_call_is_refused(tmp_path, with_template):
    record = read_row(tmp_path, {"prompt": "Rain?", "completion": [CALLING], "label": True})
    info = _prepare(TINY_MODEL, tmp_path / "tokenizer", "none")
    with pytest.raises(EncodingError, match="tool calls need a chat template"):
        tokenize.make_encoder(info).encode_row(record.prompt, record.completion)
