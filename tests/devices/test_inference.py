"""Models that are only read, on one device and over several."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kto_jax.devices import inference
from kto_jax.devices.chips import CHIPS
from kto_jax.devices.inference import place_model, report_devices, whole_parts
from kto_jax.models.weights.load import read_config
from tests import TINY_MODEL

CONFIG = read_config(TINY_MODEL)


def axes(placed):
    mesh = jax.tree.leaves(placed.shardings)[0].mesh
    return {name: size for name, size in mesh.shape.items() if size > 1}


def test_a_machine_of_cpus_holds_a_model_on_one_device_unless_all_are_asked_for():
    assert place_model(CONFIG, dtype="float32").shardings is None
    assert place_model(CONFIG, dtype="float32", devices="auto").shardings is None
    assert place_model(CONFIG, dtype="float32", devices="all", available=jax.devices()[:1]).shardings is None
    assert axes(place_model(CONFIG, dtype="float32", devices="all")) != {}


@pytest.mark.parametrize(
    ("num_kv_heads", "vocab_size", "num_devices", "expected"),
    [
        (2, 512, 8, {"data": 4, "tensor": 2}),
        (4, 512, 4, {"tensor": 4}),
        (4, 512, 6, {"data": 3, "tensor": 2}),
        (4, 510, 4, {"data": 2, "tensor": 2}),
        (1, 512, 4, {"data": 4}),
    ],
)
def test_as_many_devices_as_can_share_the_heads_do_and_the_others_divide_rows(
    num_kv_heads, vocab_size, num_devices, expected
):
    config = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=num_kv_heads, vocab_size=vocab_size)
    assert axes(place_model(config, dtype="float32", devices="all", available=jax.devices()[:num_devices])) == expected


@pytest.mark.parametrize(("share", "expected"), [(1.0, {"data": 4, "tensor": 2}), (0.2, {"fsdp": 4, "tensor": 2})])
def test_weights_that_half_of_a_device_does_not_hold_are_divided_further(monkeypatch, share, expected):
    model = place_model(CONFIG, dtype="float32").model
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract_params("float32")))
    small = dataclasses.replace(CHIPS["h100"], hbm_bytes=int(share * num_bytes))
    monkeypatch.setattr(inference, "find_chip", lambda kind: small)
    assert axes(place_model(CONFIG, dtype="float32", devices="all")) == expected


def test_rows_are_raised_to_what_the_devices_divide():
    placed = place_model(CONFIG, dtype="float32", devices="all")
    draw = jax.jit(lambda: placed.model.init_params(jax.random.key(0), "float32"), out_shardings=placed.shardings)
    assert [whole_parts(count, draw()) for count in (1, 4, 5)] == [4, 4, 8]
    one = jax.device_put(np.zeros(3), SingleDeviceSharding(jax.devices()[0]))
    assert whole_parts(5, {"x": one}) == 5


def test_what_is_used_is_reported_if_there_are_several_devices(capsys, monkeypatch):
    report_devices(place_model(CONFIG, dtype="float32"))
    report_devices(place_model(CONFIG, dtype="float32", devices="all"))
    assert capsys.readouterr().err.splitlines() == [
        "uses 1 of 8 devices; --devices=all uses all", "uses 8 of 8 devices: data=4 × tensor=2",
    ]  # fmt: skip
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    report_devices(place_model(CONFIG, dtype="float32"))
    assert capsys.readouterr().err == ""
