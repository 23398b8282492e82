"""What the fuzzers of the readers feed: mutated files and hostile templates, and the readers that must refuse them.

A reader takes bytes or text and returns, or raises the error of its kind. Anything else, and memory beyond
`memory_limit`, is a crash.
"""

import atexit
import contextlib
import dataclasses
import json
import resource
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import gguf
import safetensors.numpy
from hypothesis import strategies as st

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import read_records
from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer
from kto_jax.data.tokens.template import ChatTemplate, EncodingError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.models.weights.gguf import GgufWeights
from kto_jax.models.weights.load import check_names, read_config
from kto_jax.models.weights.safetensors_files import SafetensorsWeights
from tests.data.index.test_fuzz import GOOD, JUNK, mutated_line, places_of
from tests.models.weights.directories import draw_weights, write_model
from tests.models.weights.test_gguf import write_gguf

CONFIG = TransformerConfig(
    vocab_size=32, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32, max_length=64
)
LIMIT = 1 << 30
"""Bytes that a reader may take beyond what the process holds; its inputs have a few kilobytes."""
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
FOLDER = Path(tempfile.mkdtemp(prefix="kto_jax-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


@contextlib.contextmanager
def memory_limit():
    """Makes an allocation beyond `LIMIT` fail with a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@st.composite
def mutated_bytes(draw, whole, head):
    """A file with a few bytes or numbers changed, cut out or repeated, mostly in its first `head` bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(head if draw(st.integers(0, 7)) else len(data), len(data))))
        match draw(st.integers(0, 5)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(NUMBERS)) & 0xFFFFFFFF)
            case 2:
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
            case 3:
                del data[at : at + draw(st.sampled_from([1, 4, 8, 64, len(data)]))]
            case 4:
                data[at:at] = draw(st.binary(max_size=8))
            case 5:
                data[at:at] = data[at : at + 32]
    return bytes(data)


@st.composite
def mutated_json(draw, values):
    """A JSON value with one to three places replaced by junk."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places_of(values))))
        junk = json.loads(json.dumps(draw(st.one_of(JUNK, st.sampled_from([*NUMBERS, -(2**63), 1e308, "BF16"])))))
        if not path:
            return junk
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = junk
    return values


def _safetensors():
    return safetensors.numpy.save(draw_weights(CONFIG))


@st.composite
def safetensors_files(draw):
    """A safetensors file with a mutated header or mutated bytes."""
    whole = _SAFETENSORS
    (size,) = struct.unpack("<Q", whole[:8])
    if draw(st.booleans()):
        header = json.dumps(draw(mutated_json(json.loads(whole[8 : 8 + size])))).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + size :]
    return draw(mutated_bytes(whole, 8 + size))


def read_safetensors(data):
    """Reads all tensors of a file."""
    (FOLDER / "model.safetensors").write_bytes(data)
    weights = SafetensorsWeights(FOLDER)
    check_names(weights, Model.create(CONFIG), FOLDER)
    for name, shape in weights.shapes.items():
        weights.read(name, (slice(None),) * len(shape))


def gguf_files():
    """A GGUF file with mutated bytes."""
    return mutated_bytes(_GGUF, _GGUF_HEAD)


def read_gguf(data):
    """Reads the architecture, all tensors and the tokenizer of a file."""
    path = FOLDER / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        read_gguf_tokenizer(path)
    weights = GgufWeights(path)
    check_names(weights, Model.create(weights.config), path)
    for name, shape in weights.shapes.items():
        weights.read(name, (slice(None),) * len(shape))


def configs():
    """A config.json with mutated values."""
    return mutated_json(json.loads((write_model(FOLDER / "model", CONFIG) / "config.json").read_text()))


def read_model_config(values):
    """Reads an architecture."""
    (FOLDER / "model" / "config.json").write_text(json.dumps(values))
    read_config(FOLDER / "model")


@st.composite
def feedback_files(draw):
    """Lines of feedback in any layout, mutated as values and then as bytes."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    line = draw(mutated_line(GOOD[kind]))
    if draw(st.booleans()):
        line = draw(mutated_bytes(line, len(line)))
    return kind, draw(st.sampled_from([".jsonl", ".json", ".csv"])), line


def read_feedback(case):
    """Reads the records of a file."""
    (layout, format), suffix, line = case
    path = FOLDER / f"rows{suffix}"
    good = json.dumps(GOOD[layout, format][0]).encode()
    path.write_bytes(b"[" + good + b",\n" + line + b"]" if suffix == ".json" else good + b"\n" + line)
    for record in read_records(str(path), DataConfig(layout=layout, format=format)):
        assert record.place


VALUES = [
    "messages", "messages[0]", "messages[0].content", "bos_token", "tools", "loop", "self", "cycler",
    "namespace()", "range(3)", "range(99999999)", "'x' * 99", "'x' * 999999999", "10 ** 9 ** 9", "1 / 0", "''",
    "none", "{}", "[]", "messages.__class__", "''.__class__.__mro__[1].__subclasses__()",
    "self._TemplateReference__context", "raise_exception('no')", "strftime_now('%Y')", "lipsum.__globals__",
    "joiner.__init__.__globals__", "undefined.a", "messages | tojson", "messages | map('upper') | list",
    "'%999999999d' % 1", "'{0.__class__}'.format(messages)", "'\\ud800'", "'<|im_end|>'",
    "messages | attr('__class__')", "namespace(a=1)", "caller()", "(" * 50 + "1" + ")" * 50,
]  # fmt: skip
FILTERS = [
    "upper", "trim", "length", "list", "first", "last", "sort", "tojson(indent=99)", "join('x')", "batch(2)",
    "center(99)", "center(999999999)", "replace('x', 'y')", "indent(9)", "wordwrap(1)", "urlize", "pprint",
    "random", "sum", "format", "map(attribute='__class__')", "selectattr('role')", "groupby('role')",
    "dictsort", "xmlattr", "slice(2)", "int", "string",
]  # fmt: skip
FORMS = [
    "{{{{ {0} }}}}", "{{% if {0} %}}{1}{{% endif %}}", "{{% for x in {0} %}}{1}{{% endfor %}}",
    "{{% set x = {0} %}}{1}", "{{% macro f(x) %}}{1}{{{{ f({0}) }}}}{{% endmacro %}}{{{{ f(1) }}}}",
    "{{% include {0} %}}", "{{% import {0} as x %}}",
    "{{% for x in {0} recursive %}}{{{{ loop({0}) }}}}{{% endfor %}}",
    "{{% filter upper %}}{1}{{% endfilter %}}", "{{% generation %}}{1}{{% endgeneration %}}",
    "{{% call f() %}}{1}{{% endcall %}}", "{{% raw %}}{1}{{% endraw %}}",
    "{{% for x in {0} %}}{{% break %}}{{% endfor %}}", "{1}{{# {0}", "{{% extends {0} %}}", "{{{{ {0}",
    "{1}{{% endif %}}", "{{% with x = {0} %}}{1}{{% endwith %}}", "{{% block b %}}{1}{{% endblock %}}",
    "{{% set ns.a = {0} %}}",
]  # fmt: skip


@st.composite
def templates(draw):
    """A chat template of hostile and broken parts."""
    text = draw(st.sampled_from(["", "{{ messages[0].content }}", "{{ bos_token }}"]))
    for _ in range(draw(st.integers(1, 3))):
        value = draw(st.sampled_from(VALUES))
        for _ in range(draw(st.integers(0, 2))):
            value = f"({value}) | {draw(st.sampled_from(FILTERS))}"
        text = draw(st.sampled_from(FORMS)).format(value, text)
    return text


def render(source):
    """Renders a conversation."""
    template = ChatTemplate(source, {"bos_token": "<s>"})
    text = template.render([{"role": "user", "content": "Hello?"}], add_generation_prompt=True)
    assert isinstance(text, str) and len(text) < 1 << 21


@dataclasses.dataclass(frozen=True)
class Target:
    """What is fuzzed: inputs, the reader of one, and the error that it may raise."""

    inputs: object
    read: object
    error: type = ConfigError


def check(target, given):
    """Reads an input within the limit of memory; returns whether it was accepted."""
    with warnings.catch_warnings(), memory_limit():
        # NumPy warns of overflow in the sizes that gguf computes and then refuses.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            target.read(given)
        except target.error as refusal:
            assert len(str(refusal)) < 5000
            return False
    return True


def _gguf():
    path = FOLDER / "whole.gguf"
    write_gguf(path, CONFIG, gguf.GGMLQuantizationType.Q8_0, vocabulary=["<s>", "a", "b", "ab"])
    whole = path.read_bytes()
    return whole, gguf.GGUFReader(path).data_offset


_SAFETENSORS = _safetensors()
_GGUF, _GGUF_HEAD = _gguf()
TARGETS = {
    "safetensors": Target(safetensors_files(), read_safetensors),
    "gguf": Target(gguf_files(), read_gguf),
    "config.json": Target(configs(), read_model_config),
    "feedback": Target(feedback_files(), read_feedback),
    "templates": Target(templates(), render, EncodingError),
}
