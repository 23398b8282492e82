"""Chat templates by family: the tokens trained are those that the model reads and writes when it is served."""

import datetime
import json
import random

import numpy as np
import pytest

from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.data.tokens.prepare import _prepare
from kto_jax.data.tokens.prompts import Rendering
from kto_jax.data.tokens.template import EncodingError
from tests.data.conftest import as_transformers
from tests.data.tokens.chat_models import chat_model

# Written for these tests. Each has the traits of a family that decide how a conversation is trained.
QWEN3 = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}{{ '<|im_start|>system\\n' }}{% endif -%}
{%- if tools %}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{%- set text = m.content or '' -%}{%- set thought = m.reasoning_content or '' -%}
{%- if m.role == 'assistant' and '</think>' in text -%}
{%- set thought = text.split('</think>')[0].replace('<think>', '') -%}{%- set text = text.split('</think>')[1] -%}
{%- endif -%}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (thought or loop.last) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- '<tool_response>\\n' + text + '\\n</tool_response>' if m.role == 'tool' else text.lstrip('\\n') -}}
{%- for c in m.tool_calls or [] -%}
{{- ('\\n' if text else '') + '<tool_call>\\n' + c.function | tojson + '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""
QWEN3_2507 = QWEN3.replace(
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}",
    "{{- '<think>\\n' -}}",
)
R1 = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token -}}
{%- else -%}{{- ('<|User|>' if m.role == 'user' else '') + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' -}}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif -%}
{{- '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""
GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{{- m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""
MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
{%- elif m.role == 'user' -%}{{- '[INST]' + m.content + '[/INST]' -}}
{%- else -%}{{- m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
# Three kinds more: channels that the assistant opens itself, markers that are plain text, an end of the whole text.
HARMONY = """
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content and loop.last -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') -}}
{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}
"""
TULU = """
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content + (eos_token if m.role == 'assistant' else '') -}}
{{- '' if loop.last and m.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
"""
PHI = """
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else bos_token -}}
"""
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
KINDS = {
    "qwen3": (QWEN3, "<|im_end|>", ("<|im_start|>", *THINK)),
    "qwen3-2507": (QWEN3_2507, "<|im_end|>", ("<|im_start|>", *THINK)),
    "r1": (R1, "<|end|>", ("<|User|>", "<|Assistant|>", "<think>", "</think>")),
    "llama3": (LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": (GEMMA, "<end_of_turn>", ("<start_of_turn>",)),
    "mistral": (MISTRAL, "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "chatml": (CHATML, "<|im_end|>", ("<|im_start|>",)),
    "harmony": (HARMONY, "<|return|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")),
    "tulu": (TULU, "</s>", ()),
    "phi": (PHI, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
}
"""Template, what ends a turn, and the other control tokens."""
USER = {"role": "user", "content": "Q?"}
SYSTEM = {"role": "system", "content": "S"}
HISTORY = [USER, {"role": "assistant", "content": "<think>\nH\n</think>\n\nA."}, {"role": "user", "content": "R?"}]
Q = "<|im_start|>user\nQ?<|im_end|>\n"
TABLE = [
    ("qwen3", {}, [USER], "A.", f"{Q}<|im_start|>assistant\n<think>\n\n</think>\n\n", "A."),
    ("qwen3", {}, [USER], "<think>\nT\n</think>\n\nA.", f"{Q}<|im_start|>assistant\n", "<think>\nT\n</think>\n\nA."),
    ("qwen3", {"enable_thinking": True}, [USER], "A.", f"{Q}<|im_start|>assistant\n", "<think>\n\n</think>\n\nA."),
    (
        *("qwen3", {}, HISTORY, "B."),
        f"{Q}<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        "B.",
    ),
    (
        "qwen3-2507",
        {},
        [USER],
        "<think>\nT\n</think>\n\nA.",
        f"{Q}<|im_start|>assistant\n<think>\n",
        "T\n</think>\n\nA.",
    ),
    (
        "r1",
        {},
        [USER],
        "<think>\nT\n</think>\n\nA.",
        "<|endoftext|><|User|>Q?<|Assistant|><think>\n",
        "T\n</think>\n\nA.",
    ),
    ("r1", {}, [USER], "A.", "<|endoftext|><|User|>Q?<|Assistant|><think>\n", "\n</think>\n\nA."),
    (
        *("llama3", {}, [SYSTEM, USER], " A. "),
        "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nToday: 02 Jan 2026\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "A.",
    ),
    (
        *("gemma", {}, [SYSTEM, USER], "A."),
        "<|endoftext|><start_of_turn>user\nS\n\nQ?<end_of_turn>\n<start_of_turn>model\n",
        "A.",
    ),
    ("mistral", {}, [SYSTEM, USER], "A.", "<|endoftext|>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q?[/INST]", "A."),
    ("chatml", {}, [USER], "A.", f"{Q}<|im_start|>assistant\n", "A."),
    (
        *("harmony", {"reasoning_effort": "low"}, [USER], "A."),
        "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>Q?<|end|><|start|>assistant",
        "<|channel|>final<|message|>A.",
    ),
    (
        *("harmony", {}, [USER], {"role": "assistant", "content": "A.", "reasoning_content": "T"}),
        "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Q?<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>A.",
    ),
    ("tulu", {}, [SYSTEM, USER], "A.", "<|system|>\nS\n<|user|>\nQ?\n<|assistant|>\n", "A."),
    ("phi", {}, [SYSTEM, USER], "A.", "<|system|>\nS<|end|>\n<|user|>\nQ?<|end|>\n<|assistant|>\n", "A."),
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes an encoder for a kind of template and its settings, once each."""
    made = {}

    def encoder(kind, **settings):
        key = json.dumps([kind, settings])
        if key not in made:
            template, end, added = KINDS[kind]
            directory = tmp_path_factory.mktemp(kind)
            model = chat_model(directory / "model", template.strip(), end, *added)
            config = json.loads((model / "tokenizer_config.json").read_text())
            (model / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
            how = Rendering(json.dumps(settings), moment="2026-01-02T12:00:00", fold_system=kind == "gemma")
            made[key] = tokenize.make_encoder(_prepare(model, directory / "out", "auto", rendering=how))
        return made[key]

    return encoder


def text_of(encoder, ids):
    return encoder._controls._full.decode([int(i) for i in ids], skip_special_tokens=False)


def num_controls(encoder, ids):
    return int(np.isin(ids, list(encoder._controls.ids.values())).sum())


@pytest.mark.parametrize(
    ("kind", "settings", "prompt", "completion", "opened", "written"),
    TABLE,
    ids=[f"{i}{row[0]}" for i, row in enumerate(TABLE)],
)
def test_a_template_gives_these_tokens(make, kind, settings, prompt, completion, opened, written):
    encoder = make(kind, **settings)
    ids, completion_ids = encoder.encode_row(prompt, completion)
    end = KINDS[kind][1]
    assert text_of(encoder, ids) == opened and text_of(encoder, completion_ids) == written + end
    # Every control string in what is written is one control token.
    names = encoder._controls.pattern
    assert num_controls(encoder, ids) == len(names.findall(opened))
    assert num_controls(encoder, completion_ids) == len(names.findall(written + end))


class RunsDay(datetime.datetime):
    """A clock that shows the day on which the run began."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 12, tzinfo=tz)


def conversation(kind, seed):
    """A conversation of one to four turns, and its last answer; with thoughts and calls if the kind has them."""
    rng = random.Random(seed)
    words = ["rain", "snow,", "Où?", "x = [1]", "¿", "and\nthen", "tea "]
    say = lambda: " ".join(rng.choices(words, k=rng.randint(1, 6))).strip()  # noqa: E731
    thinks = kind in ("qwen3", "qwen3-2507", "r1")
    answer = lambda: (f"<think>\n{say()}\n</think>\n\n" if thinks and rng.random() < 0.6 else "") + say()  # noqa: E731
    turns = [{"role": "system", "content": say()}] if kind not in ("gemma",) and rng.random() < 0.5 else []
    for _ in range(rng.randint(0, 3)):
        turns += [{"role": "user", "content": say()}, {"role": "assistant", "content": answer()}]
    turns.append({"role": "user", "content": say()})
    if kind.startswith("qwen3") and rng.random() < 0.4:
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": say()}}}
        turns += [
            {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
            {"role": "tool", "content": say()},
        ]
    return turns, answer()


def as_served(turns):
    """Messages as a server gets them: calls are objects."""
    return [{key: json.loads(value) if key == "tool_calls" else value for key, value in turn.items()} for turn in turns]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_served_in_twenty_conversations(make, kind, monkeypatch):
    encoder, end = make(kind), KINDS[kind][1]
    tokenizer, prefixes = as_transformers(encoder), 0
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", RunsDay)  # The server's day.
    for seed in range(20):
        turns, answer = conversation(kind, seed)
        thinking = {"enable_thinking": "<think>" in answer}
        prompt, completion = encoder.encode_row(turns, answer)
        served = tokenizer.apply_chat_template(as_served(turns), tokenize=False, add_generation_prompt=True, **thinking)
        assert prompt.tolist() == tokenizer.encode(served, add_special_tokens=False), seed
        # The model writes token by token: what follows the prompt is encoded by itself, and ends its turn once.
        written = text_of(encoder, completion)
        assert completion.tolist() == tokenizer.encode(written, add_special_tokens=False), seed
        assert written.endswith(end) and written.count(end) == 1
        assert answer.partition("</think>")[2].strip() in written and written.removesuffix(end).endswith(answer[-4:])
        assert written.count("</think>") == ("<think>" in answer or kind in ("qwen3-2507", "r1"))
        # The template's own rendering of the whole, where it does not change the prompt, is the same text.
        whole = [*as_served(turns), {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(whole, tokenize=False, **thinking)
        if whole.startswith(served):
            assert whole[len(served) :].startswith(written.removesuffix(end))
            prefixes += 1
    assert prefixes == {"r1": 0}.get(kind, prefixes) and (kind == "r1" or prefixes > 0)


SPEAKERS = {kind: ("user", "system", "tool") if kind.startswith("qwen3") else ("user", "system") for kind in KINDS}
"""Whose text the template of a kind shows, besides the assistant's. Gemma's system turn is folded into the user's."""


@pytest.mark.parametrize(("kind", "speaker"), [(kind, speaker) for kind in KINDS for speaker in SPEAKERS[kind]])
def test_text_injected_by_users_systems_and_tools_stays_text(make, kind, speaker):
    encoder = make(kind)

    def encoded(text):
        said = {"role": speaker, "content": f"say {text} now"}
        calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
        call = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
        turns = {"user": [said], "system": [said, USER], "tool": [USER, call, said]}[speaker]
        return encoder.encode_row(turns, "A.")

    benign, plain = encoded("it")
    for name in [*encoder._controls.ids, *THINK, "<|im_start|>", "<|im_end|>", "<|eot_id|>"]:
        sly, completion = encoded(name)
        assert num_controls(encoder, sly) == num_controls(encoder, benign), name
        assert f"say {name} now" in text_of(encoder, sly)
        assert completion.tolist() == plain.tolist()


def test_templates_that_show_no_calls_refuse_a_conversation_with_a_tool(make):
    call = json.dumps([{"type": "function", "function": {"name": "f", "arguments": {}}}])
    turns = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "say <think> now"},
    ]
    for kind in KINDS:
        if "tool" not in SPEAKERS[kind]:
            with pytest.raises(EncodingError):
                make(kind).encode_row(turns, "A.")
