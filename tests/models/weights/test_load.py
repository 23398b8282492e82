"""Weights read from a Hugging Face directory."""

import dataclasses
import json
import os
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import ConfigError
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params, read_config, weights_digest
from kto_jax.models.weights.safetensors_files import SafetensorsWeights
from kto_jax.models.weights.tensors import expected_shapes
from tests.models.weights.directories import assert_equal, draw_weights, load, rewrite, write_model

NORM = "model.norm.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_loaded_by_their_names(config, tmp_path, tied):
    config = dataclasses.replace(config, tied_head=tied)
    weights = draw_weights(config)
    params = load(write_model(tmp_path / "model", config, weights))
    np.testing.assert_array_equal(params["embed"]["table"], weights["model.embed_tokens.weight"])
    for layer in range(config.num_layers):
        prefix, ours = f"model.layers.{layer}.", params["layers"]
        key, down = weights[prefix + "self_attn.k_proj.weight"], weights[prefix + "mlp.down_proj.weight"]
        np.testing.assert_array_equal(ours["attention"]["key"]["weight"][layer], key.T)
        np.testing.assert_array_equal(ours["mlp"]["down"]["weight"][layer], down.T)
        norm = weights[prefix + "post_attention_layernorm.weight"]
        np.testing.assert_array_equal(ours["mlp_norm"]["scale"][layer], norm)
    assert ("head" in params) is not tied
    if not tied:
        np.testing.assert_array_equal(params["head"]["weight"], weights["lm_head.weight"].T)


def test_each_device_reads_its_own_part_and_every_value_once(config, directory, monkeypatch):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rules = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    model = Model.create(config)
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*map(rules.get, axes))),
        model.logical_axes(),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    expected, reads = load(directory), {}
    read = SafetensorsWeights.read

    def record(self, name, index):
        part = read(self, name, index)
        reads.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(SafetensorsWeights, "read", record)
    params = load(directory, shardings=shardings)
    assert_equal(params, expected)
    placed = jax.tree.map(lambda leaf, sharding: sharding.is_equivalent_to(leaf.sharding, leaf.ndim), params, shardings)
    assert all(jax.tree.leaves(placed))
    for name, shape in expected_shapes(config).items():
        parts = 4 if len(shape) == 2 else 2
        assert reads[name] == [np.prod(shape) // parts] * parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), r"missing: model\.norm\.weight"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "unexpected: extra"),
        (lambda w: w.update({NORM: np.zeros(33, np.float32)}), r"norm\.weight \(33,\) \(expected \(32,\)"),
        (lambda w: w.update({NORM: np.zeros(32, np.int32)}), r"norm\.weight is I32; F64, F32, F16, BF16"),
    ],
    ids=["missing", "unexpected", "misshaped", "integers"],
)
def test_weights_that_do_not_match_the_config_are_listed(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(ConfigError, match=message):
        load(directory)


def test_buffers_of_old_exports_and_a_copy_of_a_tied_head_are_accepted(config, tmp_path):
    config = dataclasses.replace(config, tied_head=True)
    weights = draw_weights(config)
    expected = load(write_model(tmp_path / "plain", config, weights))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    extra["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    assert_equal(load(write_model(tmp_path / "old", config, weights | extra)), expected)
    for row in (0, -1, slice(8, None)):
        extra["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        extra["lm_head.weight"][row] += 1
        with pytest.raises(ConfigError, match=r"lm_head\.weight differs"):
            load(write_model(tmp_path / "other", config, weights | extra))
    extra["lm_head.weight"] = weights["model.embed_tokens.weight"][1:].copy()
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs"):
        load(write_model(tmp_path / "other", config, weights | extra))
    del weights["model.embed_tokens.weight"]
    with pytest.raises(ConfigError, match=r"missing: model\.embed_tokens\.weight\. Names"):
        load(write_model(tmp_path / "other", config, weights | extra))


def lie(file, change):
    """Rewrites the header of a safetensors file."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = [0, 128]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        lambda file: lie(file, lambda header: header["model.norm.weight"].update(shape=[1 << 40])),
        lambda file: lie(file, overlap),
    ],
    ids=["truncated", "empty", "endless header", "shape lies", "offsets overlap"],
)
def test_a_damaged_file_or_a_false_header_is_refused(directory, damage):
    damage(directory / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load(directory)


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_are_not_finite_are_refused(directory, value, param_dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda weights: weights[name].__setitem__((3, 5), value))
    with pytest.raises(ConfigError, match=r"NaN or infinite in layers\.mlp\.up\.weight"):
        load_params(Model.create(read_config(directory)), directory, param_dtype=param_dtype)


def test_files_outside_the_index_are_neither_read_nor_part_of_the_digest(directory, config):
    params, digest = load(directory), weights_digest(directory)
    (directory / "consolidated.safetensors").write_bytes(b"in another form")
    assert weights_digest(directory) == digest
    index(directory, dict.fromkeys(expected_shapes(config), "model.safetensors"))
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"of an older export")
    assert_equal(load(directory), params)
    assert weights_digest(directory) == digest
    (directory / "model.safetensors").write_bytes(b"another model")
    assert weights_digest(directory) != digest


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "{absolute}", "link.safetensors", "sub/x.safetensors", "a\0b"]
)
def test_an_index_cannot_reach_outside_of_its_directory(directory, tmp_path, name):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((directory / "model.safetensors").read_bytes())
    os.symlink(outside, directory / "link.safetensors")
    index(directory, {"model.norm.weight": name.format(absolute=outside)})
    with pytest.raises(ConfigError, match="is outside it"):
        load(directory)


def test_the_links_of_the_hubs_cache_are_followed(config, weights, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    write_model(snapshot, config)
    os.rename(snapshot / "model.safetensors", blobs / "0123")
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    np.testing.assert_array_equal(load(snapshot)["embed"]["table"], weights["model.embed_tokens.weight"])


def test_a_wrong_index_is_refused(directory, weights):
    index(directory, {"model.norm.weight": "model.safetensors"})
    with pytest.raises(ConfigError, match=r"disagree about lm_head\.weight, .* and 12 more"):
        load(directory)
    index(directory, dict.fromkeys(weights, "gone.safetensors"))
    with pytest.raises(ConfigError, match=r"lacks gone\.safetensors"):
        load(directory)
    index(directory, ["model.safetensors"])
    with pytest.raises(ConfigError, match="no weight_map"):
        load(directory)


def test_a_tensor_in_two_files_is_refused(directory):
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, directory / "x.safetensors")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, directory / "y.safetensors")
    (directory / "model.safetensors").unlink()
    weights = SafetensorsWeights(directory, "x.safetensors")
    with pytest.raises(ConfigError, match=r"y\.safetensors holds a, which another file also holds"):
        weights._open(directory / "y.safetensors", {"a"})


def test_pickled_weights_are_refused_unopened(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config_json(config)))
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("change", [
    {"num_attention_heads": 0}, {"hidden_size": "64"}, {"rope_theta": "x"}, {"rope_scaling": "x"}, {"architectures": 5},
    {"num_hidden_layers": 10**9}, {"rms_norm_eps": []}, {"model_type": ["llama"], "architectures": None},
], ids=str)  # fmt: skip
def test_values_of_a_wrong_kind_in_config_json_are_refused(config, tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(write_config_json(config) | change))
    with pytest.raises(ConfigError, match="The model"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not readable JSON"), ("[]", "must hold an object"), ("[" * 100_000, "not readable JSON"),
])  # fmt: skip
def test_a_broken_config_json_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)
