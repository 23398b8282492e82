"""Encoders of the tiny tokenizer, with and without its chat template, and with another."""

import dataclasses
import shutil

import pytest

from kto_jax.data.tokens.tokenizer import make_encoder


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return make_encoder(tokenizer)


@pytest.fixture(scope="session")
def plain(tokenizer):
    return make_encoder(dataclasses.replace(tokenizer, has_chat_template=False))


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """An encoder with another chat template."""

    def make(template):
        shutil.copytree(tokenizer.directory, tmp_path / "other")
        (tmp_path / "other" / "chat_template.jinja").write_text(template)
        return make_encoder(dataclasses.replace(tokenizer, directory=tmp_path / "other"))

    return make
