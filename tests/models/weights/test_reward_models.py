"""Reward models in Hugging Face directories."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.heads import init_scalar_head
from kto_jax.models.model import Model
from kto_jax.models.weights.classifier import choose_padding, write_padding
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import is_reward_model, load_params, read_config
from tests.models.weights.directories import CARD, assert_equal, load, reward_model, rewrite


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_survives_export_and_import_bitwise_without_an_output_head(config, tmp_path, tied):
    model, params = reward_model(dataclasses.replace(config, tied_head=tied))
    assert "head" not in params
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    back = load_params(model, tmp_path, param_dtype="float32", key=jax.random.key(7))
    assert_equal(back, params)
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in written
    np.testing.assert_array_equal(written["score.weight"], np.asarray(params["scorer"]["weight"])[None])
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["LlamaForSequenceClassification"] and len(values["id2label"]) == 1
    assert not (tmp_path / "generation_config.json").exists()
    assert read_config(tmp_path) == model.config and is_reward_model(tmp_path)


@pytest.mark.parametrize("head", ["reward", "value"])
def test_a_random_scalar_head_is_added_to_a_language_model_by_its_key_and_sharded(config, directory, head):
    model = Model.create(config, scalar_head=head)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    read = partial(load_params, model, directory, param_dtype="bfloat16")
    params, same, other = read(key=jax.random.key(5), shardings=layout), read(key=jax.random.key(5)), read()
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params("float32"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim) or pytest.fail(), params, layout)
    assert_equal(params, same)
    drawn, another = (tree.pop("scorer") for tree in (params, other))
    assert_equal(params, other)
    assert not np.array_equal(jax.tree.leaves(drawn)[-1], jax.tree.leaves(another)[-1])
    assert_equal(
        another, jax.tree.map(lambda x: x.astype("bfloat16"), init_scalar_head(head, config, jax.random.key(0)))
    )


def test_each_device_reads_its_own_part_of_a_reward(config, tmp_path):
    model, params = reward_model(config)
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    back = load_params(model, tmp_path, param_dtype="float32", shardings=layout)
    assert_equal(back, params)
    assert back["scorer"]["weight"].addressable_shards[3].data.shape == (config.embed_dim // 8,)


def test_a_value_head_is_not_exported(config, directory, tmp_path):
    model = Model.create(config, scalar_head="value")
    params = load_params(model, directory, param_dtype="float32")
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card=CARD)
    assert not is_reward_model(tmp_path / "out")
    assert_equal(load(tmp_path / "out"), {name: leaf for name, leaf in params.items() if name != "scorer"})


@pytest.mark.parametrize("head", ["none", "value"])
def test_a_reward_model_is_refused_where_a_language_model_is_needed(config, tmp_path, head):
    model, params = reward_model(config)
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    with pytest.raises(ConfigError, match=r"is a reward model.*language model is needed.*Choose"):
        load_params(Model.create(config, scalar_head=head), tmp_path, param_dtype="float32")


def test_a_classifier_of_several_labels_and_a_language_model_without_its_head_are_refused(config, tmp_path):
    model, params = reward_model(config)
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    rewrite(tmp_path, lambda w: w.update({"score.weight": np.zeros((2, 32), np.float32)}))
    with pytest.raises(ConfigError, match=r"score\.weight \(2, 32\) \(expected \(1, 32\)\)"):
        load_params(model, tmp_path, param_dtype="float32")
    rewrite(tmp_path, lambda w: w.pop("score.weight"))
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        load(tmp_path)


def write_tokenizer(directory, special, **settings):
    directory.mkdir()
    added = [{"id": number, "content": content, "special": True} for content, number in special.items()]
    added.append({"id": 9, "content": "word", "special": False})
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


SPECIAL = {"</s>": 2, "<s>": 1, "<unk>": 0, "<pad>": 63, "<eot>": 3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pad_token": "<pad>", "unk_token": "<unk>"}, (63, "<pad>")),
        ({"pad_token": {"content": "</s>"}, "unk_token": "<unk>", "bos_token": "<s>"}, (0, "<unk>")),
        ({"pad_token": "<eot>", "eos_token": {"content": "<eot>"}, "bos_token": "<s>"}, (1, "<s>")),
        ({"pad_token": "</s>", "unk_token": "word"}, (1, "<s>")),
    ],
    ids=["its own", "unknown", "the tokenizer's own EOS", "another"],
)
def test_padding_of_a_reward_model_is_never_an_eos(config, tmp_path, settings, expected):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", SPECIAL, **settings)
    (tokenizer / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')
    model, params = reward_model(config)
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=tokenizer, model_card=CARD)
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())  # noqa: E731
    assert (read("config.json")["pad_token_id"], read("tokenizer_config.json")["pad_token"]) == expected
    assert read("special_tokens_map.json")["pad_token"] == expected[1]
    assert read("tokenizer_config.json") == settings | {"pad_token": expected[1]}


def test_without_a_special_token_besides_eos_a_reward_model_pads_with_an_id_alone(config, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", {"</s>": 2}, pad_token="</s>", eos_token="</s>")
    assert choose_padding(config, tokenizer) == (1, None) == choose_padding(config, None)
    without_bos = dataclasses.replace(config, bos_id=2, eos_ids=(0, 2))
    assert choose_padding(without_bos, tokenizer) == (1, None)
    assert choose_padding(without_bos, tokenizer, stop_ids=(1, 2)) == (3, None)
    write_padding(tokenizer, None)
    assert json.loads((tokenizer / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
