"""A model directory with random weights."""

import pytest

from tests.models.weights.directories import draw_weights, write_model


@pytest.fixture
def directory(config, tmp_path):
    return write_model(tmp_path / "model", config)


@pytest.fixture(scope="session")
def weights(config):
    return draw_weights(config)
