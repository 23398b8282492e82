"""Models whose vocabulary grows: new rows of embedding and head are the mean of the others."""

import dataclasses

import jax
import numpy as np
import pytest

from kto_jax.models.model import Model
from kto_jax.models.weights.load import load_params
from tests.models.weights.directories import load, write_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [3, 8])
def test_new_rows_are_the_mean_of_the_others(config, tmp_path, tied, more):
    config = dataclasses.replace(config, tied_head=tied)
    directory = write_model(tmp_path / "model", config)
    before, size = load(directory), config.vocab_size
    grown = Model.create(dataclasses.replace(config, vocab_size=size + more))
    found = load_params(grown, directory, param_dtype="float32")
    tables = [(found["embed"]["table"], before["embed"]["table"])]
    tables += [] if tied else [(found["head"]["weight"].T, before["head"]["weight"].T)]
    for table, own in tables:
        np.testing.assert_array_equal(table[:size], own)
        mean = np.mean(np.asarray(own, np.float64), axis=0).astype(np.float32)
        np.testing.assert_array_equal(table[size:], np.tile(mean, (more, 1)))
    for part in ("layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, found[part], before[part])


def test_each_device_reads_its_own_rows_of_a_grown_vocabulary(config, directory):
    size = config.vocab_size
    grown = Model.create(dataclasses.replace(config, vocab_size=size * 2))  # whole shards are new
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), grown.abstract_params("float32"))
    spread["embed"]["table"] = jax.NamedSharding(mesh, jax.P("tensor"))
    found = load_params(grown, directory, param_dtype="float32", shardings=spread)
    jax.tree.map(np.testing.assert_array_equal, found, load_params(grown, directory, param_dtype="float32"))
