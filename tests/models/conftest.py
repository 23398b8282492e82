from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.models.config import TransformerConfig
from kto_jax.models.model import Model


@pytest.fixture(scope="session")
def config():
    return TransformerConfig(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_length=128,
        initializer_range=0.2, bos_id=1, eos_ids=(2,),
    )  # fmt: skip


@pytest.fixture(scope="session")
def model(config):
    return Model.create(config, remat="none")


@pytest.fixture(scope="session")
def params(model):
    return draw_params(model)


def draw_params(model):
    """Random parameters whose norms are not one, so that a missing norm is visible."""

    def tilt(leaf):
        is_norm = leaf.shape in ((model.config.embed_dim,), stacked_norm)
        return leaf * jnp.linspace(0.5, 1.5, leaf.shape[-1])[(None,) * (leaf.ndim - 1)] if is_norm else leaf

    stacked_norm = (model.config.num_layers, model.config.embed_dim)
    return jax.jit(lambda: jax.tree.map(tilt, model.init_params(jax.random.key(0), "float32")))()


def draw_tokens(seed, rows, length):
    return np.random.default_rng(seed).integers(0, 64, (rows, length), dtype=np.int32)


def whole_rows(tokens_RL):
    """Segment ids and positions of rows that hold one sequence each."""
    positions = np.broadcast_to(np.arange(tokens_RL.shape[1], dtype=np.int32)[None], tokens_RL.shape)
    return np.ones_like(tokens_RL), positions


@partial(jax.jit, static_argnums=0)
def hidden_states(model, params, tokens_RL, segment_ids_RL, positions_RL):
    """Compiled once per model and shape; the bare method would compile every operation."""
    return model.hidden_states(params, tokens_RL, segment_ids_RL, positions_RL)


@partial(jax.jit, static_argnums=0)
def decode(model, params, cache, tokens_BL, positions_BL):
    """As `hidden_states`."""
    return model.decode(params, cache, tokens_BL, positions_BL)
