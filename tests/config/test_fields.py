"""Every field of a configuration is documented and has a range, and what names its values elsewhere is complete."""

import dataclasses
import functools
import typing

import pytest

from kto_jax.config import Config
from kto_jax.config.convert import hints
from kto_jax.config.documentation import config_table, documentation
from kto_jax.config.fields import OBJECTIVE_NAMES
from kto_jax.config.ranges import base, choices, number_range, options
from kto_jax.config.resolve import fields_of
from kto_jax.objectives import OBJECTIVES

FIELDS = [(name, kind, field.name) for name, kind, field in fields_of()]
FREE = {
    "model.path": "a place", "model.base": "a place", "reference.path": "a place", "reference.base": "a place",
    "data.index_store": "a place",
    "data.train": "sources, checked entry by entry", "data.eval": "sources, checked entry by entry",
    "data.prompt_template": "a text with fields of the record", "data.label_map": "labels are the data's",
    "data.roles": "words for roles are the data's", "data.rename": "columns of the data",
    "data.chat_template": "a file, or a word", "data.chat_template_kwargs": "names are the template's",
    "data.template_date": "a date, checked in rules.py", "data.assistant_tokens": "tokens of the tokenizer",
    "data.eos_token": "a token of the tokenizer",
    "model.added_tokens": "any texts", "lora.targets": "names or expressions, checked with the model",
    "lora.rank_pattern": "checked with the model", "lora.alpha_pattern": "checked with the model",
    "objective.name": "objectives may be added; checked with them", "objective.variant": "checked with the objective",
    "objective.f_divergence": "checked with the objective",
    "objective.good_control": "any text", "objective.bad_control": "any text",
    "samples.judges": "judges may be added; checked with them",
} | {f"data.{name}_field": "a column of the data" for name in (
    "prompt", "completion", "label", "chosen", "rejected", "score", "tools", "weight", "system",
)}  # fmt: skip
"""Fields that take any text or mapping, and why."""


def is_bounded(hint):
    """Whether every alternative of a type is a list of values, a truth value, or a number with a range."""
    for option in options(hint):
        kind = base(option)
        if typing.get_origin(kind) is tuple:
            if not choices(kind):
                return False
        elif not (choices(kind) or kind is bool or number_range(option)):
            return False
    return True


printed_table = functools.cache(config_table)


@pytest.mark.parametrize("name, kind, field", FIELDS, ids=[name for name, _, _ in FIELDS])
def test_a_field_is_documented_and_has_a_range_or_a_reason_for_none(name, kind, field):
    text = documentation(kind).get(field, "")
    assert text and text[-1] in ".)", f"{name}: {text!r}"
    assert is_bounded(hints(kind)[field]) != (name in FREE), f"{name}: give it a range, or its reason in FREE"
    assert f"--config.{name}\n" in printed_table()


def test_every_reason_belongs_to_a_field():
    assert FREE.keys() <= {name for name, _, _ in FIELDS}


def test_the_defaults_are_in_their_ranges():
    for name, kind, field in FIELDS:
        default = next(one.default for one in dataclasses.fields(kind) if one.name == field)
        for option in options(hints(kind)[field]):
            bounds = number_range(option)
            if bounds and type(default) is base(option):
                assert default in bounds or default in choices(hints(kind)[field]), name


def test_the_configuration_knows_the_names_of_all_objectives():
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES
    assert Config().objective.name in OBJECTIVE_NAMES
