"""The value head in a file of its own."""

import jax
import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.models.config import TransformerConfig
from kto_jax.models.heads import apply_scalar_head, init_scalar_head
from kto_jax.models.weights.value_head import load_value_head, save_value_head

CONFIG = TransformerConfig(vocab_size=11, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)


def test_a_head_is_read_as_it_was_written(tmp_path):
    head = init_scalar_head("value", CONFIG, jax.random.key(0))
    head["last"] = {"weight": head["first"]["weight"][0], "bias": head["last"]["bias"] + 0.5}
    save_value_head(tmp_path / "head.safetensors", jax.device_get(head))
    found = load_value_head(tmp_path / "head.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(head)
    jax.tree.map(np.testing.assert_array_equal, found, head)
    hidden = jax.random.normal(jax.random.key(1), (3, 8))
    np.testing.assert_array_equal(apply_scalar_head("value", found, hidden), apply_scalar_head("value", head, hidden))


def test_a_missing_or_damaged_file_is_named(tmp_path):
    for content in (None, b"nothing"):
        if content:
            (tmp_path / "head.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"head.safetensors cannot be read: .*the value head that a round ended"):
            load_value_head(tmp_path / "head.safetensors")
