"""Weights written to a Hugging Face directory."""

import dataclasses
import json
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import ConfigError
from kto_jax.models.model import Model
from kto_jax.models.weights import export
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from kto_jax.models.weights.model_files import find_model
from tests.models.weights.directories import CARD, assert_equal, load, write_model


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_of_an_export_is_found_when_it_is_read(config, directory, tmp_path, dtype):
    save = partial(save_hugging_face, tokenizer_dir=None, model_card=CARD, dtype=dtype)
    save(tmp_path / "out", Model.create(config), load(directory), max_shard_bytes=8000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "out" / "SHA256SUMS").read_text().count("\n") == len(shards) + 3
    (tmp_path / "out" / "README.md").write_text("# Edited\n")
    assert find_model(str(tmp_path / "out")) and load(tmp_path / "out")
    for path, share in ((shards[0], 0.99), (shards[1], 0.5), (tmp_path / "out" / "config.json", 0.7)):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[int(len(whole) * share)] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ConfigError, match=rf"out is damaged: {path.name} differs from SHA256SUMS\."):
            load(tmp_path / "out") if path in shards else find_model(str(tmp_path / "out"))
        path.write_bytes(whole)


def test_an_export_reports_the_effect_of_rounding(config, directory, tmp_path):
    save = partial(save_hugging_face, tmp_path / "out", Model.create(config), tokenizer_dir=None, model_card=CARD)
    start = load(directory)
    exact = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), start)
    assert save(exact, dtype="bfloat16").largest == 0
    # A sixteenth of the spacing of bfloat16: rounding undoes all of it.
    moved = jax.tree.map(lambda leaf: leaf * (1 + 2**-11), exact)
    rounding = save(moved, dtype="bfloat16", start=exact)
    assert rounding.largest == pytest.approx(2**-11, rel=1e-2) and rounding.undone == pytest.approx(1, rel=1e-2)
    kept = save(moved, dtype="float32", start=exact)
    assert (kept.largest, kept.undone) == (0, 0)
    assert np.isnan(save(moved, dtype="bfloat16").undone)


@pytest.mark.parametrize("value, dtype", [(np.nan, "float32"), (1e5, "float16")])
def test_weights_that_are_not_finite_are_not_written(config, directory, tmp_path, value, dtype):
    params = load(directory)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(value)
    with pytest.raises(ConfigError, match=rf"1 weights of model.norm.weight are not finite in {dtype}"):
        save_hugging_face(
            tmp_path / "out", Model.create(config), params, tokenizer_dir=None, model_card=CARD, dtype=dtype
        )
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_earlier_one_whole(config, directory, tmp_path, monkeypatch):
    save = partial(save_hugging_face, tmp_path / "out", Model.create(config), tokenizer_dir=None, model_card=CARD)
    params = load(directory)
    save(params)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(export, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save(params)
    assert_equal(load(tmp_path / "out"), params)


def test_an_export_never_replaces_what_is_not_a_model(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="new or empty directory"):
        save_hugging_face(tmp_path, Model.create(config), {}, tokenizer_dir=None, model_card=CARD)
    assert (tmp_path / "thesis.txt").exists()


def test_an_export_of_sharded_parameters_equals_an_unsharded_one(config, directory, weights, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp"))  # noqa: E731
    model = Model.create(config)
    params = load(directory, shardings=jax.tree.map(spread, model.abstract_params("float32")))
    save_hugging_face(tmp_path / "out", model, params, tokenizer_dir=None, model_card=CARD)
    assert_equal(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), weights)
