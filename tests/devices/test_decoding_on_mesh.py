"""The attention of decoding as a run lays it over its mesh. models/attention tests the kernels themselves."""

import dataclasses
import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import MeshConfig
from kto_jax.devices import attention_on_mesh
from kto_jax.devices.attention_on_mesh import DECODING_KERNELS, MeshDecoding, choose_decoding, make_layout
from kto_jax.devices.sharding import AXES, make_mesh
from kto_jax.models.attention import flash_decoding
from kto_jax.models.attention.cached import cached_attention
from kto_jax.models.model import Model
from kto_jax.planning.topology import open_topology
from kto_jax.sampling.sample import Sampling, sample
from tests.training.test_step import CONFIG, parameters

QUERY, KEY = jnp.zeros((6, 1, 6, 128), jnp.bfloat16), jnp.zeros((6, 2, 1024, 128), jnp.bfloat16)


@pytest.fixture(autouse=True)
def forgotten_fallbacks():
    attention_on_mesh._log_cached.cache_clear()


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel of GPUs, which accepts any dtype, reads caches from 256 positions on, and counts its calls here."""
    calls = []

    def attend(*arrays, **options):
        calls.append(arrays[0].shape)
        return flash_decoding.flash_decoding(*arrays, interpret=True, **options)

    kernel = DECODING_KERNELS["flash_decoding"]._replace(attend=attend, why_not=lambda *_, **options: "")
    monkeypatch.setitem(DECODING_KERNELS, "flash_decoding", kernel)
    monkeypatch.setattr(attention_on_mesh, "SHORTEST_CACHE", 256)
    return calls


def mesh_of(platform, **device):
    return SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform, **device)]), shape=dict.fromkeys(AXES, 1), size=1
    )


def draw(slots, length=256, tokens=1):
    random = np.random.default_rng(0)
    query = random.standard_normal((slots, tokens, 8, 64), np.float32)
    key, value = random.standard_normal((2, slots, 2, length, 64), np.float32)
    return query, key, value


def test_each_platform_has_its_kernel_and_other_devices_and_settings_none():
    assert choose_decoding("auto", mesh_of("tpu")).name == "paged"
    assert choose_decoding("splash", mesh_of("tpu")).name == "paged"
    assert choose_decoding("auto", mesh_of("gpu")).name == "flash_decoding"
    assert choose_decoding("auto", mesh_of("cpu")).name == "cached"
    assert choose_decoding("chunked", mesh_of("tpu")).name == choose_decoding("dense", mesh_of("gpu")).name == "cached"


def test_what_a_kernel_lacks_is_logged_once_with_the_cost(caplog):
    card = {"compute_capability": "9.0"}
    on_gpu = MeshDecoding(mesh_of("gpu", **card), "flash_decoding").uses_kernel
    assert on_gpu(QUERY, KEY, window=9, softcap=None) and not caplog.messages
    assert not any(on_gpu(QUERY, KEY, window=None, softcap=2.0) for _ in range(2))
    assert len(caplog.messages) == 1
    assert re.search(
        r"'cached' \(XLA matmuls over the whole cache.*flash_decoding has no soft-caps.* 2\.0", caplog.text
    )
    assert not on_gpu(QUERY[..., :96], KEY) and "a power of two from 16 to 256, and these have 96" in caplog.text
    older = MeshDecoding(mesh_of("gpu", compute_capability="7.5"), "flash_decoding").uses_kernel
    assert not older(QUERY, KEY) and "needs compute capability 8.0" in caplog.messages[-1]
    assert not on_gpu(QUERY, jnp.zeros((6, 2, 1088, 128))) and "a multiple of 128 positions" in caplog.messages[-1]


def test_what_paged_attention_lacks_is_logged(caplog):
    on_tpu = MeshDecoding(mesh_of("tpu", device_kind="TPU v5 lite"), "paged").uses_kernel
    assert on_tpu(QUERY, KEY, window=None, softcap=2.0) and not caplog.messages
    assert not on_tpu(QUERY, KEY, window=9) and "paged has no windows" in caplog.messages[-1]
    assert not on_tpu(QUERY.astype(jnp.float32), KEY) and "paged needs bfloat16" in caplog.messages[-1]
    assert not on_tpu(QUERY[..., :64], KEY) and "a multiple of 128, and these have 64" in caplog.messages[-1]
    many = jax.ShapeDtypeStruct((4096, 8, 2176, 128), jnp.bfloat16)
    assert not on_tpu(QUERY, many) and "lists at most 131072 pages" in caplog.messages[-1]
    two_cores = MeshDecoding(mesh_of("tpu", device_kind="TPU v5"), "paged").uses_kernel
    assert not two_cores(QUERY, KEY) and "a TPU v5 has two" in caplog.messages[-1]


def test_a_missing_kernel_is_logged(monkeypatch, caplog):
    monkeypatch.setitem(
        DECODING_KERNELS, "paged", DECODING_KERNELS["paged"]._replace(why_missing=lambda: "JAX 0 does not have it")
    )
    decoding = choose_decoding("auto", mesh_of("tpu", device_kind="TPU v5 lite"))
    assert not caplog.messages and not decoding.uses_kernel(QUERY, KEY)
    assert "because paged JAX 0 does not have it" in caplog.text


def test_slots_and_heads_on_several_devices_attend_as_on_one_and_ask_no_other_device(interpreted):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec, cache = (PartitionSpec(("data", "fsdp"), *axes) for axes in ((None, "tensor"), ("tensor",)))
    shardings = tuple(NamedSharding(mesh, each) for each in (spec, cache, cache, PartitionSpec(("data", "fsdp"))))
    arrays, positions = draw(8), jnp.asarray([[-1], [0], [7], [99], [100], [127], [128], [255]])
    decoding = MeshDecoding(mesh, "flash_decoding")

    def attend(query, key, value, positions):
        return decoding(query, key, value, positions_BL=positions, window=100)

    compiled = jax.jit(attend, in_shardings=shardings).lower(*arrays, positions).compile()
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text())
    assert interpreted[0] == (2, 1, 4, 64)
    found = compiled(*jax.device_put((*arrays, positions), shardings))
    expected = cached_attention(*arrays, positions_BL=positions, window=100, precision=jax.lax.Precision.HIGHEST)
    here = np.asarray(positions)[:, 0] >= 0
    np.testing.assert_allclose(np.asarray(found)[here], np.asarray(expected)[here], rtol=1e-5, atol=1e-5)


def test_prefill_short_caches_and_slots_that_devices_cannot_share_read_the_whole_cache(interpreted, caplog):
    decoding = MeshDecoding(make_mesh(MeshConfig(data=8)), "flash_decoding")
    for arrays in (draw(8, tokens=2), draw(8, length=128), draw(3)):
        positions = jnp.broadcast_to(jnp.arange(arrays[0].shape[1], dtype=jnp.int32), arrays[0].shape[:2])
        np.testing.assert_array_equal(
            decoding(*arrays, positions_BL=positions), cached_attention(*arrays, positions_BL=positions)
        )
    assert not interpreted and len(caplog.messages) == 1
    assert "needs slots that 8 devices can share equally, and there are 3" in caplog.text


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)], ids=["one device", "four"])
def test_completions_by_the_kernel_are_those_without_it(sizes, interpreted, monkeypatch):
    # The cache of such short completions on a CPU has 64 positions.
    monkeypatch.setattr(attention_on_mesh, "SHORTEST_CACHE", 64)
    monkeypatch.setattr(attention_on_mesh, "CACHE_UNIT", 64)
    data, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor), jax.devices()[: data * tensor])
    layout = make_layout(mesh)
    assert layout.cached_attention == MeshDecoding(mesh, "cached")
    prompts, completions = [[3, 4, 5], [7, 8, 9, 10, 11], [6]], []
    for name in ("cached", "flash_decoding"):
        model = Model.create(CONFIG, layout=dataclasses.replace(layout, cached_attention=MeshDecoding(mesh, name)))
        params = jax.device_put(parameters("float32")[1], NamedSharding(mesh, PartitionSpec()))
        sampling = Sampling(temperature=0.0, max_new_tokens=12)
        completions.append(sample(model, params, prompts, sampling, eos_id=97, key=jax.random.key(0), batch_size=2))
    assert interpreted
    for plain, by_kernel in zip(*completions, strict=True):
        np.testing.assert_array_equal(plain, by_kernel)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_paged_attention_compiles_for_a_tpu_with_heads_and_slots_on_several_chips():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), list(open_topology("v5e:2x2").devices))
    decoding = choose_decoding("auto", mesh)
    assert decoding.name == "paged"
    spec, cache = (NamedSharding(mesh, PartitionSpec("data", *axes)) for axes in ((None, "tensor"), ("tensor",)))
    arrays = (
        jax.ShapeDtypeStruct((8, 1, 32, 128), jnp.bfloat16, sharding=spec),
        *[jax.ShapeDtypeStruct((8, 8, 1024, 128), jnp.bfloat16, sharding=cache)] * 2,
        jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))),
    )

    def attend(query, key, value, positions):
        return decoding(query, key, value, positions_BL=positions)

    text = jax.jit(attend).lower(*arrays).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text and "all-gather" not in text
    assert not re.search(r"bf16\[(4,4,1024|1,32,512|16,1024),128\]\S* copy\(", text)
