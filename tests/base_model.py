"""A tiny pretrained model, for runs that start from weights."""

import jax

from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import TINY_MODEL


def write_base(folder, dtype="float32"):
    """Writes random weights with the tiny tokenizer; returns the folder."""
    model = Model.create(read_config(TINY_MODEL))
    params = model.init_params(jax.random.key(0), dtype)
    save_hugging_face(folder, model, params, tokenizer_dir=TINY_MODEL, model_card="", dtype=dtype)
    return folder
