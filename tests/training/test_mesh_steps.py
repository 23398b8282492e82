"""Ten steps over every mesh, on fake devices and in real processes: the same numbers as on one device."""

import functools
import itertools
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from kto_jax.config import MeshConfig
from tests import ROOT
from tests.training.mesh_steps import CONFIG, EXPERTS, NUM_STEPS, OPTIMIZERS, ten_steps

TOLERANCES = {"sgd": 1e-5, "adamw": 1e-9}
# data, fsdp, sequence, tensor
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) in (2, 4, 8)]
# And expert.
EXPERT_MESHES = [
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(sizes) == 8 and sizes[-1] > 1
]
PROCESSES = [
    (2, (2, 1, 1, 1)), (2, (1, 2, 1, 2)), (2, (1, 1, 2, 1)), (2, (2, 1, 2, 1)), (4, (2, 2, 1, 1)), (4, (1, 4, 1, 1)),
    (4, (1, 2, 1, 2)), (4, (1, 1, 1, 4)), (4, (1, 1, 4, 1)), (4, (1, 2, 2, 1)),
]  # fmt: skip


@functools.cache
def one_device(name, config=CONFIG):
    with jax.enable_x64(OPTIMIZERS[name][0] == "float64"):
        return ten_steps(name, MeshConfig(), jax.devices()[:1], config)


def assert_same(name, got, config=CONFIG):
    wanted, tolerance = one_device(name, config), TOLERANCES[name]
    np.testing.assert_array_equal(got["rows"], wanted["rows"])
    assert wanted["log"].shape == (NUM_STEPS, 3)
    assert np.all(wanted["log"][:, 1] > 0.5)
    np.testing.assert_allclose(got["log"], wanted["log"], rtol=tolerance)
    moved = np.linalg.norm(wanted["after"] - wanted["before"])
    assert moved > 0.05 * np.linalg.norm(wanted["before"])
    assert np.linalg.norm(got["after"] - wanted["after"]) <= tolerance * moved
    np.testing.assert_allclose(got["after"], wanted["after"], rtol=0, atol=tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ten_steps_over_a_mesh_equal_those_of_one_device(mesh, name):
    with jax.enable_x64(OPTIMIZERS[name][0] == "float64"):
        got = ten_steps(name, MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])
    assert_same(name, got)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("mesh", EXPERT_MESHES, ids=str)
def test_ten_steps_of_a_mixture_of_experts_over_a_mesh_equal_those_of_one_device(mesh, name):
    with jax.enable_x64(OPTIMIZERS[name][0] == "float64"):
        got = ten_steps(name, MeshConfig(*mesh), jax.devices(), EXPERTS)
    assert_same(name, got, EXPERTS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("count, mesh", PROCESSES, ids=str)
def test_ten_steps_in_several_processes_equal_those_of_one_device(count, mesh, name, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    per_process = math.prod(mesh) // count
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={per_process}",
    }
    command = [
        sys.executable,
        "-m",
        "tests.training.mesh_steps",
        str(tmp_path / "out.npz"),
        name,
        ",".join(map(str, mesh)),
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(number)})
        for number in range(count)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert_same(name, np.load(tmp_path / "out.npz"))
