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
from kto_jax.models.attention import mosaic
from kto_jax.models.attention.blockwise import blockwise_attention
from kto_jax.models.attention.of_jax import kernels_of_jax
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

    def __init__(self, compute_capability="9.0"):
        self.devices = np.array([SimpleNamespace(platform="gpu", compute_capability=compute_capability)])


@pytest.fixture(autouse=True)
def forgotten_fallbacks():
    attention_on_mesh._log_fallback.cache_clear()


@pytest.fixture
def without_kernels(monkeypatch):
    """A JAX from which the kernels have been removed, beside no tokamax."""
    for cached in (kernels_of_jax, mosaic._module):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.attention", None)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.tpu.splash_attention", None)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention.pallas_mosaic_gpu", None)


@pytest.fixture
def with_tokamax(monkeypatch):
    monkeypatch.setitem(
        attention_on_mesh.KERNELS, "mosaic", attention_on_mesh.KERNELS["mosaic"]._replace(why_missing=lambda: "")
    )


def test_auto_falls_back_to_chunked_and_logs_it_once_if_no_kernel_is_installed(without_kernels, caplog):
    assert [choose_attention("auto", GpuMesh()).name for _ in range(2)] == ["chunked"] * 2
    assert len(caplog.messages) == 1
    assert re.search(r"'chunked' \(a loop .*because mosaic: tokamax is not .*; triton: JAX .* not have it", caplog.text)


def test_a_kernel_that_is_not_installed_is_refused_by_name(without_kernels):
    with pytest.raises(ConfigError, match=r"attention='triton' is .*: JAX .* does not have it\. .*dense, chunked\."):
        choose_attention("triton", GpuMesh())
    with pytest.raises(ConfigError, match=r"attention='mosaic' is .*: tokamax is not installed.*pip install"):
        choose_attention("mosaic", GpuMesh())


def test_auto_on_a_gpu_is_mosaic_then_triton_then_chunked_each_with_its_reason(with_tokamax, caplog):
    attend = choose_attention("auto", GpuMesh())
    assert attend.name == "mosaic"
    narrow, wide = jnp.zeros((1, 1, 1, 256), jnp.bfloat16), jnp.zeros((1, 1, 1, 512), jnp.bfloat16)
    plain = {"window": None, "softcap": None}
    assert attend.kernel_for(narrow, window=9, softcap=2.0) == "mosaic" and not caplog.messages
    assert [attend.kernel_for(wide, **plain) for _ in range(2)] == ["triton"] * 2
    assert len(caplog.messages) == 1
    assert re.search(
        r"'triton' \(.*repeats keys.*mosaic supports heads of at most 256, and these have 512", caplog.text
    )
    assert attend.kernel_for(wide, window=9, softcap=None) == "chunked"
    assert "triton has no windows" in caplog.messages[-1]
    assert attend.kernel_for(narrow.astype(jnp.float32), **plain) == "chunked"
    assert "mosaic needs bfloat16, and queries are float32; triton needs bfloat16" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("card", "kernel"),
    [("7.5", "chunked"), ("8.0", "triton"), ("9.0", "mosaic"), ("10.3", "mosaic"), ("12.0", "triton")],
)
def test_each_generation_of_cards_gets_a_kernel_that_runs_on_it(card, kernel, with_tokamax):
    query = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
    assert choose_attention("auto", GpuMesh(card)).kernel_for(query, window=None, softcap=None) == kernel


def test_a_kernel_chosen_by_name_is_never_replaced_by_one_that_is_preferred(with_tokamax):
    query = jnp.zeros((1, 1, 1, 64), jnp.bfloat16)
    attend = choose_attention("triton", GpuMesh())
    assert attend.kernel_for(query, window=None, softcap=None) == "triton"
    assert attend.kernel_for(query, window=9, softcap=None) == "chunked"


def test_no_kernel_is_imported_before_it_is_chosen():
    program = """
        import sys
        import kto_jax.devices.attention_on_mesh, kto_jax.models.model
        print([name for name in sys.modules if name.startswith(("jax.experimental.pallas.ops", "tokamax"))])
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
