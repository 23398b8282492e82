import os
import subprocess
import sys
import types

import jax
import pytest

from kto_jax.config import ConfigError
from kto_jax.planning.topology import open_topology, parse_topology


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5e:4x4", ("v5e", (4, 4), 1)),
        ("v5p:4x4x4", ("v5p", (4, 4, 4), 1)),
        ("2*v6e:16x16", ("v6e", (16, 16), 2)),
        ("tpu7x:2x2x1", ("tpu7x", (2, 2, 1), 1)),
    ],
)
def test_a_name_says_chip_size_and_slices(name, parsed):
    assert parse_topology(name) == parsed


@pytest.mark.parametrize(
    "name", ["", "v5e", "v9:2x2", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "0*v5e:4x4", "v5e:4x4 ", "gpu", "h100:2x2"]
)
def test_a_name_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"is not known\. Allowed: local; v5e, v6e with two.*Set --topology"):
        parse_topology(name)


def test_local_is_the_devices_of_this_machine():
    topology = open_topology("local")
    assert (list(topology.devices), topology.chip, topology.num_chips) == (jax.devices(), None, 8)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu is not installed.*extra \[plan\].*pip install"):
        open_topology("v5e:2x2")


# libtpu takes a process for itself, and looks at its environment once.
DESCRIBE = """
import jax
jax.config.update("jax_platforms", "cpu")
from kto_jax.config import ConfigError
from kto_jax.planning.topology import open_topology
for name in ("v4:2x2x1", "v5e:1x1", "v5e:2x2", "v5e:16x16", "v5p:4x4x4", "v6e:2x4", "tpu7x:2x2x1", "2*v5e:2x2"):
    topology = open_topology(name)
    slices = {getattr(device, "slice_index", 0) for device in topology.devices}
    print(name, len(topology.devices), topology.num_chips, len(slices))
try:
    open_topology("v5e:3x3")
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_libtpu_describes_every_chip_where_there_is_none():
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, check=True, timeout=300)
    *lines, refusal = done.stdout.splitlines()
    assert lines == [
        "v4:2x2x1 4 4 1", "v5e:1x1 1 1 1", "v5e:2x2 4 4 1", "v5e:16x16 256 256 1", "v5p:4x4x4 64 64 1",
        "v6e:2x4 8 8 1", "tpu7x:2x2x1 8 4 1", "2*v5e:2x2 8 8 2",
    ]  # fmt: skip
    assert refusal.startswith("--topology=v5e:3x3 is no slice that the TPU compiler knows")


SLICES = {"2x2": 4, "1x1": 1, "4x4x4": 64, "2x2x1": 4, "16x16": 256}


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for libtpu, which takes a process for itself: knows some slices, and keeps what it was asked for."""
    asked = {}

    def describe(platform, topology_name, **options):
        size = topology_name.partition(":")[2]
        if size not in SLICES:
            raise RuntimeError(f"INVALID_ARGUMENT: bad bounds {size}\nand more")
        asked[topology_name] = options
        count = SLICES[size] * options.get("num_slices", 1)
        return types.SimpleNamespace(devices=[object()] * count * (2 if topology_name.startswith("tpu7x") else 1))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("kto_jax.planning.topology.topologies.get_topology_desc", describe)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "TPU_WORKER_ID": "7"})
    return asked


@pytest.mark.parametrize("name, chips, slices, options", [
    ("v5e:2x2", 4, 1, {}), ("v5e:16x16", 256, 1, {}), ("v5e:1x1", 1, 1, {"chips_per_host_bounds": (1, 1, 1)}),
    ("v5p:4x4x4", 64, 1, {"wrap": (True, True, True)}), ("v4:2x2x1", 4, 1, {"chip_config_name": "megacore"}),
    ("2*v5e:2x2", 8, 2, {"num_slices": 2}), ("tpu7x:2x2x1", 4, 1, {}),
])  # fmt: skip
def test_a_slice_is_described_as_it_is_wired(compiler, name, chips, slices, options):
    topology = open_topology(name)
    assert (topology.num_chips, topology.num_slices) == (chips, slices)
    assert compiler == {name.split("*")[-1]: options}


def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(compiler):
    expected = (
        r"v5e:3x3 is no slice that the TPU compiler knows: INVALID_ARGUMENT: bad bounds 3x3\. Allowed: .* Set --t"
    )
    with pytest.raises(ConfigError, match=expected):
        open_topology("v5e:3x3")


def test_the_compiler_looks_for_no_chip_and_for_no_cloud_unless_it_is_told_to(compiler):
    open_topology("v5e:2x2")
    assert os.environ["TPU_SKIP_MDS_QUERY"] == os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert os.environ["TPU_WORKER_ID"] == "7"
