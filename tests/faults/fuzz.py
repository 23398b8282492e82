"""What the fuzzers of the readers feed: mutated files and hostile templates, and the readers that must refuse them.

A reader takes bytes or text and returns, or raises the error of its kind. Anything else, and memory beyond
`memory_limit`, is a crash. Inputs are numbered: each follows from its number.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import random
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import gguf
import safetensors.numpy

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import read_records
from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer
from kto_jax.data.tokens.template import ChatTemplate, EncodingError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model
from kto_jax.models.weights.gguf import GgufWeights
from kto_jax.models.weights.load import check_names, read_config
from kto_jax.models.weights.safetensors_files import SafetensorsWeights
from kto_jax.models.weights.tensors import expected_shapes
from tests.data.index.test_fuzz import GOOD
from tests.models.weights.directories import draw_weights, write_model
from tests.models.weights.test_gguf import write_gguf
from tests.mutations import mutate_bytes, mutate_line, mutate_values

CONFIG = TransformerConfig(
    vocab_size=32, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32, max_length=64
)
LIMIT = 1 << 30
"""Bytes that a reader may take beyond what the process holds; its inputs have a few kilobytes."""
_MEMORY = Path("/dev/shm")
FOLDER = Path(tempfile.mkdtemp(prefix="kto_jax-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
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


def _safetensors():
    return safetensors.numpy.save(draw_weights(CONFIG))


def safetensors_file(chance):
    """A safetensors file with a mutated header or mutated bytes."""
    whole = _SAFETENSORS
    (size,) = struct.unpack("<Q", whole[:8])
    if chance.randrange(2):
        header = json.dumps(mutate_values(chance, json.loads(whole[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + size :]
    return mutate_bytes(chance, whole, 8 + size)


@functools.lru_cache(maxsize=64)
def model_of(config):
    """The model of an architecture: many inputs have the same one, and it takes longer than all else."""
    return Model.create(config)


@functools.lru_cache(maxsize=64)
def _shapes(config):
    return expected_shapes(config)


def check_weights(weights, config, path):
    """Checks the names, then reads all tensors."""
    shapes = mock.patch("kto_jax.models.weights.load.expected_shapes", lambda config, reward: dict(_shapes(config)))
    with shapes:
        check_names(weights, model_of(config), path)
    for name, shape in weights.shapes.items():
        weights.read(name, (slice(None),) * len(shape))


def read_safetensors(data):
    """Reads all tensors of a file."""
    (FOLDER / "model.safetensors").write_bytes(data)
    check_weights(SafetensorsWeights(FOLDER), CONFIG, FOLDER)


def gguf_file(chance):
    """A GGUF file with mutated bytes."""
    return mutate_bytes(chance, _GGUF, _GGUF_HEAD)


def read_gguf(data):
    """Reads the architecture, all tensors and the tokenizer of a file."""
    path = FOLDER / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        read_gguf_tokenizer(path)
    weights = GgufWeights(path)
    check_weights(weights, weights.config, path)


def config_values(chance):
    """A config.json with mutated values."""
    return mutate_values(chance, _CONFIG_VALUES)


def read_model_config(values):
    """Reads an architecture."""
    (FOLDER / "model" / "config.json").write_text(json.dumps(values))
    read_config(FOLDER / "model")


def feedback_file(chance):
    """Lines of feedback in any layout, mutated as values and then as bytes."""
    kind = chance.choice(sorted(GOOD))
    line = mutate_line(chance, GOOD[kind])
    if chance.randrange(2):
        line = mutate_bytes(chance, line, len(line))
    return kind, chance.choice([".jsonl", ".json", ".csv"]), line


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


def template(chance):
    """A chat template of hostile and broken parts."""
    text = chance.choice(["", "{{ messages[0].content }}", "{{ bos_token }}"])
    for _ in range(chance.randint(1, 3)):
        value = chance.choice(VALUES)
        for _ in range(chance.randint(0, 2)):
            value = f"({value}) | {chance.choice(FILTERS)}"
        text = chance.choice(FORMS).format(value, text)
    return text


def render(source):
    """Renders a conversation; endless templates are stopped sooner than elsewhere, because there are hundreds."""
    template = ChatTemplate(source, {"bos_token": "<s>"})
    with mock.patch("kto_jax.data.tokens.template._RENDER_SECONDS", 0.05):
        text = template.render([{"role": "user", "content": "Hello?"}], add_generation_prompt=True)
    assert isinstance(text, str) and len(text) < 1 << 21


@dataclasses.dataclass(frozen=True)
class Target:
    """What is fuzzed: what makes an input of a source of chance, the reader of one, and the error that it may raise."""

    draw: Callable[[random.Random], object]
    read: Callable[[object], object]
    error: type = ConfigError


def check(target, number):
    """Reads the input of a number within the limit of memory; returns whether it was accepted."""
    given = target.draw(random.Random(number))
    try:
        with memory_limit():
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
_CONFIG_VALUES = json.loads((write_model(FOLDER / "model", CONFIG) / "config.json").read_text())
TARGETS = {
    "safetensors": Target(safetensors_file, read_safetensors),
    "gguf": Target(gguf_file, read_gguf),
    "config.json": Target(config_values, read_model_config),
    "feedback": Target(feedback_file, read_feedback),
    "templates": Target(template, render, EncodingError),
}
