"""Uses whose package is missing are refused with the command that installs it, before anything is imported."""

import importlib.util
from pathlib import Path

import pytest

from kto_jax import curves
from kto_jax.config import ConfigError, default_config
from kto_jax.config.packages import is_installed, require
from kto_jax.data.rows.files import SourceFile, fetch_hub, read_rows
from kto_jax.data.rows.tfds import tfds_file
from kto_jax.data.tokens import prepare
from kto_jax.data.tokens.gguf_tokenizer import read_gguf_tokenizer
from kto_jax.judges.judges import check_names
from kto_jax.models.weights.gguf import GgufWeights
from kto_jax.training.trackers import check_trackers
from tests import TINY_MODEL


def test_an_import_hook_that_raises_counts_as_missing(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(name)

    assert is_installed("numpy") and not is_installed("no_such_package")
    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    assert not is_installed("numpy")


def test_the_error_names_what_pip_installs():
    require("numpy", "the use", "leave it")
    with pytest.raises(ConfigError, match=r"^the use needs the package no_such, which .* pip install no_such, or"):
        require("no_such", "the use", "leave it")


@pytest.mark.parametrize("use, message", [
    (lambda path: check_names(["vader"]), "judge 'vader' .* pip install vaderSentiment, or take 'vader' out"),
    (lambda path: check_names(["feedback"]), "judge 'feedback' .* pip install scikit-learn"),
    (lambda path: check_trackers(("tensorboard",)), "tracker 'tensorboard' .* pip install tensorboardX"),
    (lambda path: default_config(), "pip install ml_collections, or let get_config"),
    (lambda path: fetch_hub("hub:org/name/train", path), "hub:org/name/train.* pip install datasets, or name a local"),
    (lambda path: list(read_rows(SourceFile(path / "x.parquet", "x"))), "'x' .* pip install pyarrow, or convert"),
    (lambda path: list(read_rows(SourceFile(path / "x.jsonl.zst", "x"))), "'x' .* pip install pyarrow, or convert"),
    (lambda path: tfds_file("tfds:name/train"), "'tfds:name/train' .* pip install tensorflow-datasets, or name a"),
    (lambda path: GgufWeights(Path("x.gguf")), "x.gguf needs .* pip install gguf, or set a Hugging Face directory"),
    (lambda path: read_gguf_tokenizer(Path("x.gguf")), "x.gguf needs .* pip install gguf, or set a Hugging Face"),
    (lambda path: curves.write(path / "curves"), "the figure needs .* pip install matplotlib, or see docs"),
    # In this process: `prepare_tokenizer` calls it in another.
    (lambda path: prepare._prepare(TINY_MODEL, path / "t", str(path / "c.jinja")),
     "c.jinja'\\) needs .* pip install jinja2, or set config.data.chat_template=none"),
])  # fmt: skip
def test_a_use_without_its_package_is_refused_in_three_parts(tmp_path, monkeypatch, use, message):
    (tmp_path / "c.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr("kto_jax.config.packages.is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=message) as refused:
        use(tmp_path)
    assert "which is not installed. kto_jax runs without" in str(refused.value)
