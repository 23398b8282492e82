from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.losses import balance_loss, z_loss
from tests.losses import oracle

LAYERS, EXPERTS, PER_TOKEN, TOKENS = 2, 4, 2, 10


def drawn(tokens=TOKENS):
    """What routers may do with this many tokens."""
    random = np.random.default_rng(tokens)
    logits = random.normal(0, 2, (LAYERS, tokens, EXPERTS))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1)[..., :PER_TOKEN]
    return SimpleNamespace(
        counts=np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in chosen]).astype("f"),
        probabilities=probabilities.sum(1).astype("f"),
        squared_normalizers=np.square(np.log(np.exp(logits).sum(-1))).sum(1).astype("f"),
    )


def losses(routed, tokens):
    counts, probabilities = jnp.sum(routed.counts, axis=0), jnp.sum(routed.probabilities, axis=0)
    number = float(tokens * LAYERS)
    return balance_loss(counts, probabilities, number), z_loss(jnp.sum(routed.squared_normalizers), number)


def test_the_losses_equal_an_independent_version():
    routed = drawn()
    np.testing.assert_allclose(losses(routed, TOKENS), oracle.router_losses(routed, TOKENS), rtol=1e-6)


def test_a_balanced_load_gives_the_experts_per_token_and_one_busy_expert_more():
    even = jnp.full(EXPERTS, TOKENS * PER_TOKEN / EXPERTS), jnp.full(EXPERTS, TOKENS / EXPERTS)
    assert balance_loss(*even, float(TOKENS)) == pytest.approx(PER_TOKEN)
    busy = jnp.array([TOKENS, TOKENS, 0, 0.0]), jnp.array([0.7, 0.3, 0, 0]) * TOKENS
    assert balance_loss(*busy, float(TOKENS)) == pytest.approx(EXPERTS)


def test_the_gradient_of_the_balance_loss_is_the_load():
    routed = drawn()
    counts, probabilities = (jnp.asarray(leaf.sum(0)) for leaf in (routed.counts, routed.probabilities))
    gradient = jax.grad(balance_loss, argnums=1)(counts, probabilities, 20.0)
    np.testing.assert_allclose(gradient, EXPERTS * counts / 20**2, rtol=1e-6)
