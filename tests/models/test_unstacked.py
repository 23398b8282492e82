"""Layers taken apart for decoding. How fast that is on a CPU, benchmarks.generation measures."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import MeshConfig
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models import unstacked
from kto_jax.models.int8 import Int8Matrix
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.models.unstacked import split_stack, transpose_layers, unstack_layers
from tests.training.test_step import CONFIG, parameters


@pytest.fixture
def on_gpus(monkeypatch):
    """Devices that are treated as GPUs with 1 GiB left."""
    monkeypatch.setattr(unstacked, "_are_views_possible", lambda layers: False)
    monkeypatch.setattr(unstacked, "_are_on_gpus", lambda layers: not isinstance(layers, tuple))
    monkeypatch.setattr(unstacked, "_free_bytes", lambda device: 2**30)
    unstacked._log_no_room.cache_clear()


def on_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Model.create(CONFIG)
    return jax.device_put(
        parameters("float32")[1], shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    )


def check_layers(params, layers):
    assert len(layers) == CONFIG.num_layers
    for number, layer in enumerate(layers):
        jax.tree.map(lambda stack, one, n=number: np.testing.assert_array_equal(stack[n], one), params["layers"], layer)


def test_the_arrays_of_a_stack_are_sharded_as_it_is():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    stack = jax.device_put(
        np.arange(3 * 4 * 8.0).reshape(3, 4, 8), NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    )
    arrays = split_stack(stack)
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(array, stack[number])
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), 2)
    assert len(arrays) == 3


def test_gpus_with_room_get_copies_of_the_layers(on_gpus):
    params = on_mesh()
    separate = unstack_layers(params)
    check_layers(params, separate["layers"])
    assert not params["layers"]["mlp"]["up"]["weight"].is_deleted()
    assert unstack_layers(separate) is separate


def test_gpus_without_room_keep_the_stacks_and_say_so_once(on_gpus, monkeypatch, caplog):
    params = on_mesh()
    # A part of the layers on each device, by shards.
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params["layers"]))
    monkeypatch.setattr(unstacked, "_free_bytes", lambda device: int(1.2 * part) - 1)
    assert unstack_layers(params) is params and unstack_layers(params) is params
    assert caplog.messages == [
        "decoding copies every layer's weights in every step, because separate layers would take 0 GiB more on a GPU "
        "that has 0 GiB left"
    ]
    monkeypatch.setattr(unstacked, "_free_bytes", lambda device: int(1.2 * part) + 1)
    assert isinstance(unstack_layers(params)["layers"], tuple)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_taken_apart_for_good_need_no_room_and_are_not_transposed_on_gpus(dtype, on_gpus, monkeypatch):
    monkeypatch.setattr(unstacked, "_free_bytes", lambda device: 0)
    params = cast_params(jax.device_put(parameters("float32")[1]), dtype)
    taken = dict(params)
    separate = transpose_layers(taken)
    assert "layers" not in taken
    check_layers(params, separate["layers"])
    assert isinstance(separate["layers"][0]["mlp"]["up"]["weight"], Int8Matrix) == (dtype == "int8")


def test_other_devices_keep_the_stacks():
    params = on_mesh()  # several CPU devices
    assert unstack_layers(params) is params and transpose_layers(params) is params
