"""Model directories to load, and their contents."""

import json

import jax
import numpy as np
import safetensors.numpy

from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.tensors import expected_shapes

CARD = "# A model\n"


def draw_weights(config, dtype=np.float32):
    """Weights under Hugging Face's names."""
    random = np.random.default_rng(0)
    shapes = expected_shapes(config)
    return {name: random.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def write_model(directory, config, weights=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(write_config_json(config)))
    safetensors.numpy.save_file(draw_weights(config) if weights is None else weights, directory / "model.safetensors")
    return directory


def load(directory, **options):
    return load_params(Model.create(read_config(directory)), directory, param_dtype="float32", **options)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def rewrite(directory, change):
    """Changes the weights of a model directory."""
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    file = directory / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    change(weights)
    safetensors.numpy.save_file(weights, file)


def reward_model(config):
    model = Model.create(config, scalar_head="reward")
    return model, model.init_params(jax.random.key(1), "float32")
