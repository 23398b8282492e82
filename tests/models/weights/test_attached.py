"""Adapters attached to parameters in memory are those that are added to the weights while these are read."""

from functools import partial

import jax
import numpy as np
import pytest

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.lora import AdaptedMatrix, init_adapters, merge_adapters, with_magnitudes
from kto_jax.models.model import Model
from kto_jax.models.weights.adapter_folder import PREFIX
from kto_jax.models.weights.attached import attach_adapters
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.peft import save_adapters
from tests.models.conftest import draw_tokens, hidden_states, whole_rows
from tests.models.families.family_files import FILES
from tests.models.weights.directories import assert_equal, load
from tests.models.weights.test_adapter_folder import load_files, write_adapter


def summed(params):
    """The same parameters as arrays."""
    is_adapted = lambda node: isinstance(node, AdaptedMatrix)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype("float32"), params, is_leaf=is_adapted)


near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "lora"), [
    ("phi3", LoraConfig(rank=3, alpha=6.0, rank_pattern=("query=2",), alpha_pattern=("down=5",))),
    pytest.param(
        *("mixtral", LoraConfig(rank=3, alpha=6.0, targets=("value", "gate", "down"), rank_stabilised=True)),
        marks=pytest.mark.nightly,
    ),
    ("qwen2", LoraConfig(rank=3, alpha=6.0, dora=True, targets=("query", "down"), modules_to_save=("embedding",))),
])  # fmt: skip
def test_adapters_of_every_kind_are_attached_to_the_matrices_that_they_belong_to(family, lora, tmp_path):
    model = Model.create(read_config_json(FILES[family]), remat="none")
    params = model.init_params(jax.random.key(0), "float32")
    save_hugging_face(tmp_path / "model", model, params, tokenizer_dir=None, model_card="")
    drawn = with_magnitudes(init_adapters(params, lora, jax.random.key(1)), params)
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), drawn)
    if lora.modules_to_save:
        trained["embed"] = {"table": params["embed"]["table"] + 1}
    options = {"lora": lora, "base": str(tmp_path / "model"), "tokenizer_dir": None, "model_card": ""}
    save_adapters(tmp_path / "adapter", model, trained, **options)
    attached = attach_adapters(model, params, tmp_path / "adapter", "the base")
    jax.tree.map(near, summed(attached), load_files(tmp_path / "adapter"))
    tokens = draw_tokens(0, 2, 8)
    got = hidden_states(model, attached, tokens, *whole_rows(tokens))
    near(got, hidden_states(model, merge_adapters(params, trained, lora), tokens, *whole_rows(tokens)), atol=1e-4)


def test_a_layer_without_an_adapter_stays_and_the_base_is_shared(config, directory, tmp_path):
    params, norm = load(directory), np.full(config.embed_dim, 7, np.float32)
    write_adapter(tmp_path / "adapter", config, layers=[1], tensors={f"{PREFIX}model.norm.weight": norm})
    attached = attach_adapters(Model.create(config), params, tmp_path / "adapter", "the base")
    jax.tree.map(near, summed(attached), load_files(tmp_path / "adapter"))
    np.testing.assert_array_equal(attached["final_norm"]["scale"], norm)
    assert attached["layers"]["attention"]["query"]["weight"].frozen is params["layers"]["attention"]["query"]["weight"]
    assert attached["embed"]["table"] is params["embed"]["table"]
    assert_equal(params, load(directory))


def test_adapters_of_another_base_and_of_adapters_are_refused(config, directory, tmp_path):
    write_adapter(tmp_path / "other", config, shape=(48, 24))
    write_adapter(tmp_path / "adapter", config)
    model, params = Model.create(config), load(directory)
    with pytest.raises(ConfigError, match=r"other are not for the base the base: 2 of 2 matrices differ"):
        attach_adapters(model, params, tmp_path / "other", "the base")
    attached = attach_adapters(model, params, tmp_path / "adapter", "the base")
    with pytest.raises(ConfigError, match=r"the base has adapters of its own.*Give its base as --model"):
        attach_adapters(model, attached, tmp_path / "adapter", "the base")
