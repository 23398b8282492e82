"""Adapters that peft wrote: added to the weights of their base, or refused with what differs."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.lora import init_adapters, merge_adapters, with_magnitudes
from kto_jax.models.model import Model
from kto_jax.models.weights.adapter_folder import PREFIX, named_base, read_adapter_folder
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import is_reward_model, load_params, read_config, weights_digest
from kto_jax.models.weights.model_files import find_model
from kto_jax.models.weights.peft import read_adapters, save_adapters
from tests.models.families.family_files import FILES
from tests.models.weights.directories import assert_equal, load, write_model

QUERY = "model.layers.{}.self_attn.q_proj"


def write_adapter(folder, config, *, module=QUERY, layers=None, rank=2, shape=None, tensors=(), **settings):
    """An adapter folder as peft writes it; every layer has an adapter on `module`."""
    random = np.random.default_rng(1)
    out, size_in = shape or (config.num_heads * config.head_dim, config.embed_dim)
    held = dict(tensors)
    for layer in range(config.num_layers) if layers is None else layers:
        name = PREFIX + module.format(layer)
        held[f"{name}.lora_A.weight"] = random.standard_normal((rank, size_in)).astype(np.float32)
        held[f"{name}.lora_B.weight"] = random.standard_normal((out, rank)).astype(np.float32)
    folder.mkdir()
    safetensors.numpy.save_file(held, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(folder.parent / "model")}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return held


def load_files(path, base="", **options):
    files = find_model(str(path), str(base))
    return load_params(Model.create(read_config(files.weights)), files, param_dtype="float32", **options)


@pytest.mark.parametrize("settings, scale", [
    ({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"self_attn.q_proj": 2}}, 1.0),
])  # fmt: skip
def test_adapters_are_added_to_the_weights_with_their_scale(config, directory, weights, tmp_path, settings, scale):
    held = write_adapter(tmp_path / "adapter", config, **settings)
    found, plain = load_files(tmp_path / "adapter"), load(directory)
    for layer in range(config.num_layers):
        name = QUERY.format(layer)
        a, b = (held[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        wanted = weights[f"{name}.weight"] + scale * (b @ a)
        np.testing.assert_allclose(
            found["layers"]["attention"]["query"]["weight"][layer], wanted.T, rtol=1e-6, atol=1e-6
        )
    found["layers"]["attention"]["query"] = plain["layers"]["attention"]["query"]
    assert_equal(found, plain)


def test_each_device_reads_the_sum_of_its_own_part(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda leaf: jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "fsdp"))  # noqa: E731
    shardings = jax.tree.map(spread, Model.create(config).abstract_params("float32"))
    near = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(near, load_files(tmp_path / "adapter", shardings=shardings), load_files(tmp_path / "adapter"))


def test_a_module_that_was_trained_whole_takes_the_place_of_the_base_s(config, directory, tmp_path):
    norm = np.full(config.embed_dim, 7, np.float32)
    write_adapter(tmp_path / "adapter", config, tensors={f"{PREFIX}model.norm.weight": norm})
    np.testing.assert_array_equal(load_files(tmp_path / "adapter")["final_norm"]["scale"], norm)


def test_adapters_for_another_base_are_refused_with_what_differs(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config, shape=(48, 24), layers=[0, 9])
    message = (
        rf"are not for the base .*: 2 of 2 matrices differ \(model.layers.0.self_attn.q_proj.weight \(48, 24\) here, "
        rf"\({config.num_heads * config.head_dim}, {config.embed_dim}\) in the base, .*layers.9.* missing in the base\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_files(tmp_path / "adapter")


@pytest.mark.parametrize("settings, message", [
    ({"peft_type": "IA3"}, "has peft_type='IA3'"), ({"use_dora": True}, "q_proj without lora_magnitude_vector"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'"), ({"bias": "all"}, "has bias='all'"),
    ({"lora_alpha": None}, "has lora_alpha=None"),
    ({"tensors": {f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 4), np.float32)}}, "lora_embedding_A"),
    ({"tensors": {f"{PREFIX}x.lora_A.weight": np.ones((2, 4), np.float32)}}, "not read: x"),
])  # fmt: skip
def test_adapters_that_are_no_plain_sum_are_refused_by_name(config, tmp_path, settings, message):
    write_adapter(tmp_path / "adapter", config, **settings)
    with pytest.raises(ConfigError, match=message):
        read_adapter_folder(tmp_path / "adapter")


def test_pickled_adapters_are_refused(config, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ConfigError, match="never from pickled files"):
        read_adapter_folder(tmp_path / "adapter")


def test_the_base_is_the_one_that_is_set_or_else_the_one_that_is_named(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    assert find_model(str(tmp_path / "adapter")).weights == directory
    other = write_model(tmp_path / "other", config)
    assert find_model(str(tmp_path / "adapter"), str(other)).weights == other
    with pytest.raises(ConfigError, match=r"is set for .*, which is a whole model"):
        find_model(str(directory), str(other))
    with pytest.raises(ConfigError, match="which holds adapters too"):
        find_model(str(tmp_path / "adapter"), str(tmp_path / "adapter"))


@pytest.mark.parametrize("base, message", [(None, "names no base"), ("gone/away/x", "cannot be found: gone/away/x")])
def test_a_base_that_is_not_there_is_refused_with_the_setting_to_set(config, tmp_path, base, message):
    write_adapter(tmp_path / "adapter", config, base_model_name_or_path=base)
    with pytest.raises(ConfigError, match=rf"{message}.*Set config.model.base"):
        find_model(str(tmp_path / "adapter"))


def test_the_revision_of_a_base_on_the_hub_is_kept(config, tmp_path):
    write_adapter(tmp_path / "adapter", config, base_model_name_or_path="org/name", revision="v1")
    assert named_base(tmp_path / "adapter") == "org/name@v1"


def test_a_folder_of_adapters_and_a_whole_model_is_refused(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    (tmp_path / "adapter" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds adapters .* and a whole model"):
        find_model(str(tmp_path / "adapter"))


def test_adapters_are_part_of_the_digest_and_say_whether_they_reward(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    files = find_model(str(tmp_path / "adapter"))
    assert weights_digest(files) != weights_digest(directory) and not is_reward_model(files)
    before = weights_digest(files)
    write_adapter(tmp_path / "second", config, task_type="SEQ_CLS", rank=3)
    second = find_model(str(tmp_path / "second"))
    assert weights_digest(second) != before and is_reward_model(second)


def test_written_adapters_are_read_back_to_be_trained_further(config, directory, tmp_path):
    model, lora = Model.create(config), LoraConfig(rank=3, alpha=6.0, targets=("query", "down"))
    drawn = init_adapters(load(directory), lora, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, drawn)
    options = {"lora": lora, "base": str(directory), "tokenizer_dir": None, "model_card": ""}
    save_adapters(tmp_path / "adapter", model, adapters, **options)
    assert_equal(read_adapters(tmp_path / "adapter", model, lora), adapters)
    given = LoraConfig(rank=4, alpha=6.0)
    with pytest.raises(ConfigError, match=r"Set --config.lora.rank=3 --config.lora.targets=query,down, or config.lora"):
        read_adapters(tmp_path / "adapter", model, given)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ConfigError, match=r"adapter is damaged: adapter_model.safetensors differs from SHA256SUMS"):
        read_adapters(tmp_path / "adapter", model, lora)


def test_adapters_of_experts_have_the_names_of_their_matrices_and_are_read_back(tmp_path):
    model = Model.create(read_config_json(FILES["mixtral"]))
    lora = LoraConfig(rank=3, alpha=6.0, targets=("value", "gate", "down"))
    params = model.init_params(jax.random.key(0), "float32")
    drawn = init_adapters(params, lora, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), drawn)
    save_hugging_face(tmp_path / "model", model, params, tokenizer_dir=None, model_card="")
    options = {"lora": lora, "base": str(tmp_path / "model"), "tokenizer_dir": None, "model_card": ""}
    save_adapters(tmp_path / "adapter", model, adapters, **options)
    name = f"{PREFIX}model.layers.2.block_sparse_moe.experts.3.w2.lora_A.weight"
    stored = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(stored[name], adapters["layers"]["mlp"]["down"]["weight"].a[2, 3].T)
    assert_equal(read_adapters(tmp_path / "adapter", model, lora), adapters)
    summed = jax.tree.map(
        lambda leaf: leaf.astype("float32"), merge_adapters(params, adapters, lora),
        is_leaf=lambda node: hasattr(node, "frozen"),
    )  # fmt: skip
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), load_files(tmp_path / "adapter"), summed)


def test_written_adapters_of_every_kind_are_read_back(config, directory, tmp_path):
    model = Model.create(config)
    lora = LoraConfig(
        rank=3, alpha=6.0, targets=("query", "down"), rank_pattern=("down=2",), alpha_pattern=("query=5",),
        rank_stabilised=True, dora=True, modules_to_save=("embedding",),
    )  # fmt: skip
    params = load(directory)
    adapters = with_magnitudes(init_adapters(params, lora, jax.random.key(1)), params)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    trained = adapters | {"embed": {"table": params["embed"]["table"] + 1}}
    options = {"lora": lora, "base": str(directory), "tokenizer_dir": None, "model_card": ""}
    save_adapters(tmp_path / "adapter", model, trained, **options)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["use_dora"]) == (True, True)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"down_proj": 2}, {"q_proj": 5.0})
    assert settings["modules_to_save"] == (["embed_tokens", "lm_head"] if config.tied_head else ["embed_tokens"])
    assert_equal(read_adapters(tmp_path / "adapter", model, lora), adapters)
    laid = jax.tree.map(
        lambda leaf: leaf.astype("float32"), merge_adapters(params, trained, lora),
        is_leaf=lambda node: hasattr(node, "frozen"),
    )  # fmt: skip
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), load_files(tmp_path / "adapter"), laid)
    message = r"Set .*--config.lora.rank_stabilised=True --config.lora.dora=True --config.lora.rank_pattern=down=2"
    with pytest.raises(ConfigError, match=message):
        read_adapters(tmp_path / "adapter", model, LoraConfig(rank=3, alpha=6.0, targets=("query", "down")))


def test_dora_cannot_be_added_to_other_adapters(config, directory, tmp_path):
    write_adapter(tmp_path / "adapter", config)
    lora = LoraConfig(rank=3, dora=True, targets=("up",))
    adapters = init_adapters(load(directory), lora, jax.random.key(1))
    options = {"base": str(directory), "tokenizer_dir": None, "model_card": "", "merged": tmp_path / "adapter"}
    with pytest.raises(ConfigError, match=r"DoRA is no sum.*\"continue\", or merge"):
        save_adapters(tmp_path / "both", Model.create(config), adapters, lora=lora, **options)


@pytest.mark.parametrize(("saved", "message"), [
    ({"model.embed_tokens": 1.0}, "holds only model.embed_tokens.weight"),
    ({"model.embed_tokens": 1.0, "lm_head": 2.0}, "an embedding and a head that differ"),
    ({"model.embed_tokens": 1.0, "lm_head": 1.0}, None),
])  # fmt: skip
def test_a_tied_base_takes_only_an_embedding_and_a_head_that_are_equal(config, tmp_path, saved, message):
    tied = dataclasses.replace(config, tied_head=True)
    write_model(tmp_path / "model", tied)
    shape = (config.vocab_size, config.embed_dim)
    held = {f"{PREFIX}{name}.weight": np.full(shape, value, np.float32) for name, value in saved.items()}
    write_adapter(tmp_path / "adapter", tied, tensors=held)
    if message is None:
        assert (load_files(tmp_path / "adapter")["embed"]["table"] == 1).all()
    else:
        with pytest.raises(ConfigError, match=rf"{message}.*Both must be there and equal"):
            load_files(tmp_path / "adapter")


@pytest.mark.parametrize("options", [
    {"layers": [0]}, {"module": "model.layers.{}.x"},
    {"tensors": {f"{PREFIX}model.norm.weight": np.ones(8, np.float32)}},
])  # fmt: skip
def test_adapters_that_cannot_be_trained_further_are_refused(config, tmp_path, options):
    write_adapter(tmp_path / "adapter", config, **options)
    with pytest.raises(ConfigError, match=r'cannot be trained further.*Set config.lora.start to "new"'):
        read_adapters(tmp_path / "adapter", Model.create(config), LoraConfig(rank=2, alpha=6.0, targets=("query",)))


def test_new_adapters_are_written_together_with_those_that_the_frozen_weights_hold(config, directory, tmp_path):
    """Their sum, on the original base, is the policy."""
    write_adapter(tmp_path / "adapter", config, alpha_pattern={"q_proj": 5})
    model, lora = Model.create(config), LoraConfig(rank=3, alpha=4.0, targets=("query", "up"))
    frozen = load_files(tmp_path / "adapter")
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(frozen, lora, jax.random.key(1)))
    options = {"lora": lora, "base": str(directory), "tokenizer_dir": None, "model_card": ""}
    save_adapters(tmp_path / "both", model, adapters, merged=tmp_path / "adapter", **options)
    settings = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], sorted(settings["target_modules"])) == (5, 5, ["q_proj", "up_proj"])
    summed = jax.tree.map(
        lambda leaf: leaf.astype("float32"), merge_adapters(frozen, adapters, lora),
        is_leaf=lambda node: hasattr(node, "frozen"),
    )  # fmt: skip
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), load_files(tmp_path / "both"), summed)
