"""A row's tools reach the chat template, and nothing in them becomes a control token."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import DataConfig
from kto_jax.data.rows.records import Rejection, read_records
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.tokens.encoder import EncodingError
from kto_jax.data.tokens.prepare import prepare_tokenizer
from tests.data.conftest import TINY_MODEL, as_transformers

WEATHER = {
    "function": {
        "description": "The weather of a town.",
        "name": "weather",
        "parameters": {"properties": {"town": {"type": "string"}}, "required": ["town"], "type": "object"},
    },
    "type": "function",
}
"""Its keys are sorted, as pyarrow 18 writes those of any object."""
ROW = {"prompt": "Rain?", "completion": "No.", "label": True}
TEMPLATE = """\
{%- macro turn(role) %}{{ '<|im_start|>' + role + '\\n' + caller() + '<|im_end|>\\n' }}{% endmacro -%}
{%- if tools %}{% call turn('system') %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endcall %}{% endif -%}
{%- for message in messages %}{% call turn(message.role) %}{{ message.content }}{% endcall %}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools")
    (directory / "template.jinja").write_text(TEMPLATE)
    template = str(directory / "template.jinja")
    info = prepare_tokenizer(TINY_MODEL, directory / "tokenizer", chat_template=template)
    return tokenize.make_encoder(info)


def read(path, *rows, **fields):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(str(path), DataConfig(**fields)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("pack", [lambda tools: tools, json.dumps])
def test_tools_are_rendered_by_the_chat_template_as_transformers_renders_them(tmp_path, encoder, name, pack):
    row = {**ROW, "tools": pack([WEATHER])}
    (record,) = read(tmp_path / name, row)
    prompt, completion = encoder.encode_row(record.prompt, record.completion)
    text = as_transformers(encoder).apply_chat_template(
        [{"role": "user", "content": "Rain?"}], tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert "weather" in text and prompt.tolist() == encoder._controls._full.encode(text, add_special_tokens=False).ids
    plain = encoder.encode_row("Rain?", "No.")
    assert len(plain[0]) < len(prompt) and np.array_equal(plain[1], completion)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_leave_the_prompt_as_it_is(tmp_path, tools):
    (record,) = read(tmp_path / "a.jsonl", {**ROW, "tools": tools})
    assert record.prompt == "Rain?"


def test_control_strings_in_tools_never_become_control_tokens(encoder, tmp_path):
    sly = {"type": "function", "function": {"name": "<|im_end|>", "<|im_start|>": ["<|im_end|>", 1, None, True]}}
    (record,) = read(tmp_path / "a.jsonl", {**ROW, "tools": [sly]})
    prompt, _ = encoder.encode_row(record.prompt, record.completion)
    honest, _ = encoder.encode_row(read(tmp_path / "b.jsonl", {**ROW, "tools": [WEATHER]})[0].prompt, "No.")
    controls = [np.isin(ids, list(encoder._controls.ids.values())).sum() for ids in (prompt, honest)]
    assert controls[0] == controls[1] == 5
    assert encoder._controls._full.decode(prompt.tolist(), skip_special_tokens=False).count("<|im_end|>") == 4


def test_every_kind_of_row_may_have_tools_and_their_field_may_have_another_name(tmp_path):
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    path, fields = tmp_path / "a.jsonl", {"functions": [WEATHER]}
    offered = [{"role": "tools", "content": json.dumps([WEATHER])}, user]
    pair = {"chosen": [user, assistant], "rejected": [user, {**assistant, "content": "B"}]}
    (record,) = read(path, {**pair, **fields}, format="pairs", tools_field="functions")
    assert record.chosen.prompt == record.rejected.prompt == offered
    log = {"messages": [user, {**assistant, "feedback": True}]}
    (record,) = read(path, {**log, **fields}, layout="messages", tools_field="functions")
    assert record.prompt == offered
    (record,) = read(path, {**log, **fields}, layout="messages")
    assert record.prompt == [user]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("hammer", "tools is not JSON"),
        ('{"name": "x"}', "tools is not a list of objects"),
        (WEATHER, "tools is not a list of objects"),
        (["weather"], "tools is not a list of objects"),
        (3, "tools is not a list of objects"),
        ([{"name": "\ud800"}], "lone surrogate in tools"),
        ("[" * 100_000 + "]" * 100_000, "tools is not JSON"),
    ],
)
def test_tools_that_are_no_schemas_are_rejected(tmp_path, tools, reason):
    path = tmp_path / "a.jsonl"
    first, bad = read(path, ROW, {**ROW, "tools": tools})
    assert bad == Rejection(reason, f"{path}:2") and not isinstance(first, Rejection)


def test_a_role_of_a_row_is_never_that_of_the_tools(tmp_path):
    messages = [{"role": "tools", "content": "[]"}, {"role": "user", "content": "Q"}]
    (bad,) = read(tmp_path / "a.jsonl", {**ROW, "prompt": messages})
    assert bad.reason.startswith("role of the prompt is not known: 'tools'")


def test_tools_are_refused_where_the_template_would_leave_them_out(tmp_path, tokenizer, encoder):
    (record,) = read(tmp_path / "a.jsonl", {**ROW, "tools": [WEATHER]})
    with pytest.raises(EncodingError, match="the chat template does not show tools"):
        tokenize.make_encoder(tokenizer).encode_row(record.prompt, "No.")
    deep = [{"role": "tools", "content": "[" * 5000 + "]" * 5000}, *record.prompt[1:]]
    with pytest.raises(EncodingError, match=r"nested too deeply"):
        encoder.encode_row(deep, "No.")
