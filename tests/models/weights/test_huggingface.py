import dataclasses
import json
import os
import struct
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.heads import init_scorer
from kto_jax.models.model import Model
from kto_jax.models.weights import huggingface
from kto_jax.models.weights.classifier import choose_padding, write_padding
from kto_jax.models.weights.huggingface import load_params, read_config, save_hugging_face
from kto_jax.models.weights.safetensors_files import SafetensorsWeights

CARD = "# A model\n"
NORM = "model.norm.weight"


def draw_weights(config, dtype=np.float32):
    """Weights under Hugging Face's names."""
    random = np.random.default_rng(0)
    shapes = huggingface.expected_shapes(config)
    return {name: random.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def write_model(directory, config, weights=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(write_config_json(config)))
    safetensors.numpy.save_file(draw_weights(config) if weights is None else weights, directory / "model.safetensors")
    return directory


@pytest.fixture
def directory(config, tmp_path):
    return write_model(tmp_path / "model", config)


@pytest.fixture(scope="session")
def weights(config):
    return draw_weights(config)


def load(directory, **options):
    return load_params(Model.create(read_config(directory)), directory, param_dtype="float32", **options)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_lie_where_their_names_say(config, tmp_path, tied):
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


@pytest.mark.parametrize(("tied", "max_shard_bytes"), [(True, 4_000_000), (False, 20_000)])
def test_a_model_survives_export_and_import_bitwise(config, tmp_path, tied, max_shard_bytes):
    config = dataclasses.replace(config, tied_head=tied)
    params = load(write_model(tmp_path / "model", config))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "secret.txt").write_text("not to be copied")
    save = partial(save_hugging_face, tmp_path / "out", Model.create(config), params, tokenizer_dir=tokenizer)
    save(model_card=CARD, max_shard_bytes=max_shard_bytes)
    out = tmp_path / "out"
    assert_equal(load(out), params)
    assert read_config(out) == config
    names = {file.name for file in out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
    } <= names and "secret.txt" not in names
    assert (out / "README.md").read_text() == CARD
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) == 1) is tied and all(file.stat().st_size < max_shard_bytes + 4000 for file in files)
    # A second export replaces the first and leaves nothing beside it.
    save(model_card="# Another\n", stop_ids=(7, 2))
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert (out / "README.md").read_text() == "# Another\n" and len(list(out.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".out*"))


def test_an_export_in_bfloat16_holds_rounded_weights(config, directory, weights, tmp_path):
    model = Model.create(config)
    options = {"tokenizer_dir": None, "model_card": CARD}
    save_hugging_face(tmp_path / "out", model, load(directory), dtype="bfloat16", **options)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, values in weights.items():
        assert written[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(written[name], values.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(tmp_path / "out"))} == {"float32"}


def test_a_failed_export_leaves_the_earlier_one_whole(config, directory, tmp_path, monkeypatch):
    save = partial(save_hugging_face, tmp_path / "out", Model.create(config), tokenizer_dir=None, model_card=CARD)
    params = load(directory)
    save(params)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save(params)
    assert_equal(load(tmp_path / "out"), params)


def test_an_export_never_replaces_what_is_not_a_model(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="new or empty directory"):
        save_hugging_face(tmp_path, Model.create(config), {}, tokenizer_dir=None, model_card=CARD)
    assert (tmp_path / "thesis.txt").exists()


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
    for name, shape in huggingface.expected_shapes(config).items():
        parts = 4 if len(shape) == 2 else 2
        assert reads[name] == [np.prod(shape) // parts] * parts


def test_an_export_of_sharded_parameters_equals_that_of_whole_ones(config, directory, weights, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp"))  # noqa: E731
    model = Model.create(config)
    params = load(directory, shardings=jax.tree.map(spread, model.abstract_params("float32")))
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card=CARD)
    assert_equal(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), weights)


def rewrite(directory, change):
    """Changes the weights of a model directory."""
    file = directory / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    change(weights)
    safetensors.numpy.save_file(weights, file)


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
def test_weights_that_do_not_fit_the_config_are_named(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(ConfigError, match=message):
        load(directory)


def test_buffers_of_old_exports_and_a_tied_heads_copy_are_let_pass(config, tmp_path):
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
def test_a_damaged_or_lying_file_is_refused(directory, damage):
    damage(directory / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load(directory)


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_files_that_no_index_names_are_neither_read_nor_part_of_the_digest(directory, config):
    params, digest = load(directory), huggingface.weights_digest(directory)
    (directory / "consolidated.safetensors").write_bytes(b"in another form")
    assert huggingface.weights_digest(directory) == digest
    index(directory, dict.fromkeys(huggingface.expected_shapes(config), "model.safetensors"))
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"of an older export")
    assert_equal(load(directory), params)
    assert huggingface.weights_digest(directory) == digest
    (directory / "model.safetensors").write_bytes(b"another model")
    assert huggingface.weights_digest(directory) != digest


@pytest.mark.parametrize("name", ["../model/model.safetensors", "{absolute}", "link.safetensors", "sub/x.safetensors"])
def test_an_index_cannot_reach_outside_of_its_directory(directory, tmp_path, name):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((directory / "model.safetensors").read_bytes())
    os.symlink(outside, directory / "link.safetensors")
    index(directory, {"model.norm.weight": name.format(absolute=outside)})
    with pytest.raises(ConfigError, match="lies outside of it"):
        load(directory)


def test_the_links_of_the_hubs_cache_are_followed(config, weights, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    write_model(snapshot, config)
    os.rename(snapshot / "model.safetensors", blobs / "0123")
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    np.testing.assert_array_equal(load(snapshot)["embed"]["table"], weights["model.embed_tokens.weight"])


def test_an_index_that_is_not_true_is_refused(directory, weights):
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
    weights = SafetensorsWeights.__new__(SafetensorsWeights)
    weights.shapes, weights._slices, weights._files = {}, {}, {}
    weights._open(directory / "x.safetensors", {"a"})
    with pytest.raises(ConfigError, match=r"y\.safetensors holds a, which another file holds too"):
        weights._open(directory / "y.safetensors", {"a"})


def test_pickled_weights_are_refused_unopened(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config_json(config)))
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "no readable JSON"), ("[]", "must hold an object")])
def test_a_broken_config_json_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def reward_model(config):
    model = Model.create(config, scorer="reward")
    return model, model.init_params(jax.random.key(1), "float32")


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
    assert read_config(tmp_path) == model.config and huggingface.is_reward_model(tmp_path)


@pytest.mark.parametrize("scorer", ["reward", "value"])
def test_a_scorer_is_drawn_onto_a_language_model_by_its_key_and_placed(config, directory, scorer):
    model = Model.create(config, scorer=scorer)
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
    assert_equal(another, jax.tree.map(lambda x: x.astype("bfloat16"), init_scorer(scorer, config, jax.random.key(0))))


def test_each_device_reads_its_own_part_of_a_reward(config, tmp_path):
    model, params = reward_model(config)
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    back = load_params(model, tmp_path, param_dtype="float32", shardings=layout)
    assert_equal(back, params)
    assert back["scorer"]["weight"].addressable_shards[3].data.shape == (config.embed_dim // 8,)


def test_a_value_scorer_is_not_exported(config, directory, tmp_path):
    model = Model.create(config, scorer="value")
    params = load_params(model, directory, param_dtype="float32")
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card=CARD)
    assert not huggingface.is_reward_model(tmp_path / "out")
    assert_equal(load(tmp_path / "out"), {name: leaf for name, leaf in params.items() if name != "scorer"})


@pytest.mark.parametrize("scorer", ["none", "value"])
def test_a_reward_model_is_refused_where_a_language_model_is_needed(config, tmp_path, scorer):
    model, params = reward_model(config)
    save_hugging_face(tmp_path, model, params, tokenizer_dir=None, model_card=CARD)
    with pytest.raises(ConfigError, match=r"is a reward model.*language model is needed.*Choose"):
        load_params(Model.create(config, scorer=scorer), tmp_path, param_dtype="float32")


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


def test_without_a_special_token_that_is_no_eos_a_reward_model_pads_with_an_id_alone(config, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", {"</s>": 2}, pad_token="</s>", eos_token="</s>")
    assert choose_padding(config, tokenizer) == (1, None) == choose_padding(config, None)
    without_bos = dataclasses.replace(config, bos_id=2, eos_ids=(0, 2))
    assert choose_padding(without_bos, tokenizer) == (1, None)
    assert choose_padding(without_bos, tokenizer, stop_ids=(1, 2)) == (3, None)
    write_padding(tokenizer, None)
    assert json.loads((tokenizer / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
