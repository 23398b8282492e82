"""Digests of arrays on the devices, checked against an independent sum in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kto_jax.config import MeshConfig
from kto_jax.devices.sharding import make_mesh
from kto_jax.training.leaf_digests import differing, digest_leaves

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint32", "int32", "bool"]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def oracle(array):
    """The definition, element by element in Python's integers."""
    flat = np.ascontiguousarray(np.asarray(array)).reshape(-1)
    bits = flat.view(WORDS[flat.dtype.itemsize]).tolist()
    return f"{sum(bit * (2 * index + 1) for index, bit in enumerate(bits)) % 2**32:08x}"


def make_array(dtype, shape=(8, 16)):
    values = np.random.default_rng(0).normal(size=shape) * 100
    return values.astype(jnp.dtype(dtype)) if dtype != "bool" else values > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_the_weighted_sum_of_the_bits(dtype):
    array = make_array(dtype)
    assert digest_leaves({"a": {"b": jnp.asarray(array)}}) == {"a/b": oracle(array)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("sizes, spec", [
    (MeshConfig(data=8), PartitionSpec()),
    (MeshConfig(data=1, fsdp=8), PartitionSpec("fsdp")),
    (MeshConfig(data=1, fsdp=8), PartitionSpec(None, "fsdp")),
    (MeshConfig(data=1, fsdp=2, tensor=4), PartitionSpec("fsdp", "tensor")),
    (MeshConfig(data=1, fsdp=4, tensor=2), PartitionSpec("tensor", "fsdp")),
    (MeshConfig(data=2, fsdp=4), PartitionSpec(("data", "fsdp"))),
    (MeshConfig(data=2, fsdp=4), PartitionSpec(None, ("fsdp", "data"))),
])  # fmt: skip
def test_a_digest_is_the_same_in_every_sharding(sizes, spec, dtype):
    mesh, array = make_mesh(sizes), make_array(dtype)
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    scalar = jax.device_put(jnp.int32(7), NamedSharding(mesh, PartitionSpec()))
    alone = jax.device_put(jnp.float32(0.25), SingleDeviceSharding(jax.devices()[3]))
    found = digest_leaves([placed, scalar, alone])
    assert found == {"0": oracle(array), "1": "00000007", "2": oracle(np.float32(0.25))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_flip_of_one_bit_is_found(dtype):
    array = make_array(dtype)
    before, random = digest_leaves([jnp.asarray(array)]), np.random.default_rng(1)
    found = 0
    for _ in range(40):
        broken = array.copy()
        data = broken.reshape(-1).view(np.uint8)
        data[random.integers(len(data))] ^= np.uint8(1 << random.integers(8))
        found += differing(before, digest_leaves([jnp.asarray(broken)])) == ["0"]
    assert found == 40


def test_swapped_elements_change_the_digest():
    assert digest_leaves([jnp.array([1.0, 2.0])]) != digest_leaves([jnp.array([2.0, 1.0])])


def test_random_keys_and_elements_of_64_bits_have_digests():
    key = jax.random.key(3)
    assert digest_leaves([key]) == {"0": oracle(jax.random.key_data(key))}
    with jax.enable_x64(True):
        wide = np.random.default_rng(0).normal(size=(4, 2))
        assert digest_leaves([jnp.asarray(wide)]) == {"0": oracle(wide.view(np.uint32))}


def test_the_sums_of_all_processes_are_added(monkeypatch):
    monkeypatch.setattr("kto_jax.training.leaf_digests.processes.exchange_text", lambda word: [word, "[4294967295]"])
    assert digest_leaves([jnp.int32(7)]) == {"0": "00000006"}


def test_an_empty_tree_has_no_digests():
    assert digest_leaves({}) == {}
