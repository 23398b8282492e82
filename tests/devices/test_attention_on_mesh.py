"""Attention as a run lays it over its mesh. The kernels themselves are tested in models/test_kernels.py."""

import importlib.util
import re
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.attention import measure, memory
from kto_jax.config import ConfigError, MeshConfig
from kto_jax.devices import attention_on_mesh
from kto_jax.devices.attention_on_mesh import MeshAttention, choose_attention
from kto_jax.devices.sharding import make_mesh
from kto_jax.models.attention import splash, triton
from kto_jax.models.attention.blockwise import blockwise_attention
from kto_jax.planning.topology import open_topology
from tests import ROOT

HIGHEST = jax.lax.Precision.HIGHEST


def draw(rows, length, heads=4, kv_heads=2, head_dim=8):
    random = np.random.default_rng(0)
    query, weights = random.standard_normal((2, rows, length, heads, head_dim), np.float32)
    key, value = random.standard_normal((2, rows, length, kv_heads, head_dim), np.float32)
    places = np.arange(length, dtype=np.int32) % (length // 2)
    positions = np.broadcast_to(places, (rows, length))
    segments = np.broadcast_to(1 + np.arange(length, dtype=np.int32) // (length // 2), (rows, length))
    return (query, key, value, weights), (segments, positions)


def values_and_gradients(attend, tokens, query, key, value, weights):
    precision = HIGHEST if query.dtype == jnp.float32 else None
    options = {"segment_ids_RL": tokens[0], "positions_RL": tokens[1], "precision": precision}
    mixed, pull_back = jax.vjp(partial(attend, **options), query, key, value)
    return mixed, *pull_back(weights)


def test_rows_and_heads_on_several_devices_attend_as_on_one_and_ask_no_other_device():
    arrays, tokens = draw(rows=8, length=640)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = [PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec(("data", "fsdp"))]
    heads, rows = (NamedSharding(mesh, spec) for spec in layout)
    attend = choose_attention("auto", mesh)
    assert attend == MeshAttention(mesh, "chunked") and hash(attend) == hash(MeshAttention(mesh, "chunked"))
    program = jax.jit(partial(values_and_gradients, attend), in_shardings=((rows,) * 2, heads, heads, heads, heads))
    compiled = program.lower(tokens, *arrays).compile()
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text())
    placed = jax.device_put((tokens, *arrays), ((rows,) * 2, heads, heads, heads, heads))
    expected = jax.jit(partial(values_and_gradients, blockwise_attention))(tokens, *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), compiled(*placed), expected)


def test_rows_that_the_devices_cannot_share_equally_attend_as_on_one():
    arrays, tokens = draw(rows=4, length=96)
    attend = choose_attention("auto", make_mesh(MeshConfig(data=3), jax.devices()[:3]))
    found = jax.jit(partial(values_and_gradients, attend))(tokens, *arrays)
    expected = jax.jit(partial(values_and_gradients, blockwise_attention))(tokens, *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("name", "sizes", "kv_heads"),
    [("chunked", (2, 1, 4, 1), 4), ("chunked", (1, 2, 4, 1), 2), ("dense", (1, 1, 4, 2), 2)],
    ids=["a head each", "two devices to a key", "two devices to a key, beside tensor"],
)
def test_devices_that_share_a_row_attend_as_one_and_exchange_heads_alone(name, sizes, kv_heads):
    rows = sizes[0] * sizes[1]
    arrays, tokens = draw(rows=rows, length=96, heads=8, kv_heads=kv_heads)
    mesh = make_mesh(MeshConfig(*sizes))
    layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", "tensor"))
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    attend = partial(choose_attention(name, mesh), window=30, softcap=2.0)
    program = jax.jit(partial(values_and_gradients, attend), in_shardings=((by_row,) * 2, *(layout,) * 4))
    compiled = program.lower(tokens, *arrays).compile()
    text = compiled.as_text()
    assert "all-to-all" in text and not re.search(r"all-gather|all-reduce|collective-permute", text)
    found = compiled(*jax.device_put((tokens, *arrays), ((by_row,) * 2, *(layout,) * 4)))
    expected = jax.jit(partial(values_and_gradients, partial(blockwise_attention, window=30, softcap=2.0)))(
        tokens, *arrays
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_rows_that_their_devices_cannot_share_equally_attend_as_on_one():
    arrays, tokens = draw(rows=1, length=30, heads=4, kv_heads=2)
    attend = choose_attention("chunked", make_mesh(MeshConfig(data=1, sequence=4), jax.devices()[:4]))
    found = jax.jit(partial(values_and_gradients, attend))(tokens, *arrays)
    expected = jax.jit(partial(values_and_gradients, blockwise_attention))(tokens, *arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_a_kernel_is_refused_where_its_devices_are_not():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    message = r"attention='splash' is a kernel that runs on tpu .* these are cpu.*here: auto, dense, chunked\. Set"
    with pytest.raises(ConfigError, match=message):
        choose_attention("splash", mesh)


class GpuMesh:
    """A mesh of one device that calls itself a GPU."""

    devices = np.array([SimpleNamespace(platform="gpu")])


@pytest.fixture
def without_kernels(monkeypatch):
    """A JAX from which the kernels have been removed."""
    for module in (splash, triton):
        module._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.attention", None)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.tpu.splash_attention", None)
    attention_on_mesh._log_fallback.cache_clear()


def test_auto_falls_back_to_chunked_and_logs_it_once_if_jax_has_no_kernel(without_kernels, caplog):
    assert [choose_attention("auto", GpuMesh()).name for _ in range(2)] == ["chunked"] * 2
    assert len(caplog.messages) == 1 and "has no kernel 'triton'" in caplog.text and '"chunked" instead' in caplog.text


def test_a_kernel_that_jax_does_not_have_is_refused_by_name(without_kernels):
    with pytest.raises(
        ConfigError, match=r"attention='triton' is a kernel that JAX .* does not have.*dense, chunked\."
    ):
        choose_attention("triton", GpuMesh())


def test_auto_is_triton_on_a_gpu_where_chunked_does_what_triton_cannot():
    attend = choose_attention("auto", GpuMesh())
    assert attend.name == "triton"
    supports = attention_on_mesh.KERNELS["triton"].supports
    assert supports(jnp.zeros(1, jnp.bfloat16), window=None, softcap=None)
    assert not supports(jnp.zeros(1), window=None, softcap=None)
    assert not supports(jnp.zeros(1, jnp.bfloat16), window=3, softcap=None)
    assert not supports(jnp.zeros(1, jnp.bfloat16), window=None, softcap=2.0)


def test_no_kernel_is_imported_before_it_is_chosen():
    program = """
        import sys
        import kto_jax.devices.attention_on_mesh, kto_jax.models.model
        print([name for name in sys.modules if name.startswith("jax.experimental.pallas.ops")])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_measured_of_attention_agrees_with_dense_and_grows_with_the_length_alone():
    row = measure(96, repeats=1)
    assert row["difference"] < 1e-5
    assert memory(2048, "chunked") < 4.2 * memory(512, "chunked")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize(("dtype", "options"), [("bfloat16", {}), ("float32", {"window": 300, "softcap": 50.0})])
def test_splash_compiles_for_a_tpu_with_heads_and_rows_on_several_chips(dtype, options):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), list(open_topology("v5e:2x2").devices))
    attend = choose_attention("auto", mesh)
    assert attend.name == "splash"
    spec = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arrays, tokens = draw(rows=4, length=700, heads=8, kv_heads=2, head_dim=64)
    arrays = [jax.ShapeDtypeStruct(x.shape, dtype, sharding=spec) for x in arrays]
    tokens = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in tokens]
    program = partial(values_and_gradients, partial(attend, **options))
    text = jax.jit(program).lower(tokens, *arrays).compile().as_text()
    assert all(name in text for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"))
    assert "all-gather" not in text
