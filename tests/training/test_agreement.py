"""Processes that differ are refused before they compute anything; test_processes.py tries it with real ones."""

import json

import pytest

from kto_jax.config import ConfigError, resolve
from kto_jax.devices import processes
from kto_jax.training.agreement import compare_config
from tests import TINY_MODEL

CONFIG = {"model": {"path": str(TINY_MODEL)}, "data": {"train": "a.jsonl"}}


@pytest.fixture
def second(monkeypatch):
    """Sets what the second process of two says."""

    def says(**changes):
        monkeypatch.setattr(processes, "exchange_text", lambda word: [word, json.dumps(json.loads(word) | changes)])

    return says


def test_equal_processes_pass(second):
    second()
    compare_config(resolve(CONFIG))


def test_another_setting_or_package_is_named_with_both_values(second):
    second(**{"config.seed": "7", "config.objective.name": "'dpo'", "the version of jax": "'0.1'"})
    with pytest.raises(
        ConfigError, match=r"config\.seed is 7 on process 1 and 0 on process 0; .*'dpo' on process 1.*jax is"
    ):
        compare_config(resolve(CONFIG))


def test_many_differences_are_counted(second):
    second(
        **{
            f"config.{name}": "?"
            for name in ("seed", "epochs", "batch_size", "max_steps", "max_bad_steps", "row_length")
        }
    )
    with pytest.raises(ConfigError, match="and 1 more"):
        compare_config(resolve(CONFIG))


def test_the_same_files_may_be_in_other_folders(monkeypatch):
    said = []
    monkeypatch.setattr(processes, "exchange_text", lambda word: said.append(word) or [word])
    compare_config(resolve(CONFIG))
    compare_config(resolve({"model": {"path": "/elsewhere"}, "data": {"train": "/elsewhere/a.jsonl"}}))
    assert said[0] == said[1]
