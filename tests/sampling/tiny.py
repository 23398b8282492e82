"""A tiny random policy, exported as a run exports it."""

import jax

from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import ROOT

TINY = ROOT / "configs" / "tiny_model"


def export(run):
    """A run's folder with a policy as training exports it, and its model, parameters and tokenizer."""
    model = Model.create(read_config(TINY))
    params = model.init_params(jax.random.key(0), "float32")
    tokenizer = prepare_tokenizer(TINY, run / "tokenizer", chat_template="auto")
    save_hugging_face(run / "policy", model, params, tokenizer_dir=tokenizer.directory, model_card="tiny")
    return run, model, params, tokenizer
