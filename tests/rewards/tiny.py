"""A tiny random reward model, and rows to score."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import ROOT

TINY = ROOT / "configs" / "tiny_model"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
ROWS = [
    {"prompt": "Name a film.", "completion": "Jaws.", "id": 7, "weight": "broken"},
    {"prompt": CHAT, "completion": [{"role": "assistant", "content": "Fine, and you? " * 12}], "label": True},
    {"prompt": "Name a film.", "completion": "Heat, of course, what else could it be?", "note": "\ud800"},
]


def export(run):
    """A run's folder with a reward model as training exports it, and its model, parameters and tokenizer."""
    config = dataclasses.replace(read_config(TINY), initializer_range=0.2)
    model = Model.create(config, scalar_head="reward", remat="none")
    params = model.init_params(jax.random.key(0), "float32")
    tokenizer = prepare_tokenizer(TINY, run / "tokenizer", chat_template="auto")
    save_hugging_face(run / "policy", model, params, tokenizer_dir=tokenizer.directory, model_card="tiny")
    return run, model, params, tokenizer


def naive(model, params, ids):
    """The score of one sequence, by itself and unpadded."""
    tokens = jnp.asarray(ids)[None]
    hidden_states = jax.jit(model.hidden_states)
    hidden = hidden_states(params, tokens, jnp.ones_like(tokens), jnp.arange(tokens.size)[None])
    return float(hidden[0, -1].astype(jnp.float32) @ params["scorer"]["weight"])


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def places(rows):
    return [(f"x:{number}", row) for number, row in enumerate(rows, start=1)]
