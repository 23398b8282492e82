"""The GPU's values and gradients compared with the CPU's in float32.

    KTO_JAX_TESTS_ON=gpu pytest -m gpu tests/gpu

Without that variable they run on the CPU, where the kernels are interpreted: a rehearsal. KTO_JAX_FIGURES names a file
that gets a line of JSON for each comparison.
"""

import functools
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kto_jax.config import MeshConfig
from kto_jax.devices.attention_on_mesh import DECODING_KERNELS, KERNELS, make_layout
from kto_jax.devices.sharding import make_mesh, place_batch, shardings
from kto_jax.losses import token_logps
from kto_jax.models.attention.blockwise import blockwise_attention
from kto_jax.models.attention.cached import cached_attention
from kto_jax.models.attention.dense import dense_attention
from kto_jax.models.model import Model
from kto_jax.sampling.sample import Sampling, sample
from kto_jax.training.state import create_state
from kto_jax.training.step import Recipe, jit_train_step
from tests.models.attention.test_kernels import packed, values_and_gradients
from tests.training.test_step import CONFIG, OBJECTIVE, make_schedule, parameters

pytestmark = pytest.mark.gpu
DEVICE, CPU = jax.devices()[0], jax.devices("cpu")[0]
REHEARSAL = DEVICE.platform == "cpu"
HIGHEST = jax.lax.Precision.HIGHEST
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
GEMMA = {"window": 100, "softcap": 50.0}


def largest_difference(found, expected, name, dtype):
    """The largest difference of any array, as a share of the array's largest value; also written to KTO_JAX_FIGURES."""
    pairs = zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(jax.device_get(expected)), strict=True)
    shares = [np.max(np.abs(np.float64(one) - np.float64(right))) / np.max(np.abs(right)) for one, right in pairs]
    if path := os.environ.get("KTO_JAX_FIGURES"):
        line = {"name": name, "dtype": dtype, "difference": float(max(shares)), "allowed": TOLERANCES[dtype]}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return max(shares)


@pytest.fixture(autouse=True)
def settings(request):
    # By default a GPU multiplies float32 as TF32, which keeps 10 bits.
    precision = "highest" if request.node.callspec.params["dtype"] == "float32" else "default"
    # tokamax promotes ranks.
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision(precision):
        yield


@functools.cache
def attention_inputs(head_dim):
    length = 300 if REHEARSAL else 1000
    tokens = packed([length // 20, 1, length // 2, length // 4], [length], length=length)
    random = np.random.default_rng(head_dim)
    query, weights = random.standard_normal((2, 2, length, 4, head_dim), np.float32)
    key, value = random.standard_normal((2, 2, length, 2, head_dim), np.float32)
    return tokens, (query, key, value, weights * (tokens["segment_ids_RL"] > 0)[..., None, None])


@functools.cache
def dense_on_cpu(head_dim, gemma):
    tokens, arrays = attention_inputs(head_dim)
    attend = partial(dense_attention, precision=HIGHEST, **(GEMMA if gemma else {}), **tokens)
    with jax.default_device(CPU):
        return jax.device_get(values_and_gradients(attend, *arrays))


@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "window and soft-cap"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("mosaic", "bfloat16"), ("triton", "bfloat16"), ("chunked", "bfloat16"), ("chunked", "float32")],
)
def test_attention_is_that_of_the_cpu(kernel, dtype, head_dim, gemma):
    options = GEMMA if gemma else {}
    tokens, arrays = attention_inputs(head_dim)
    arrays = [jax.device_put(jnp.asarray(x, dtype), DEVICE) for x in arrays]
    if kernel == "chunked":
        attend = partial(blockwise_attention, block=128, precision=HIGHEST if dtype == "float32" else None)
    else:
        if reason := KERNELS[kernel].why_missing():
            pytest.skip(reason)
        asked = {"window": options.get("window"), "softcap": options.get("softcap")}
        # A rehearsal asks about a Hopper.
        card = type("Hopper", (), {"compute_capability": "9.0"}) if REHEARSAL else DEVICE
        if reason := KERNELS[kernel].why_not(arrays[0], **asked, device=card):
            pytest.skip(f"{kernel} {reason}")
        attend = partial(KERNELS[kernel].attend, interpret=True) if REHEARSAL else KERNELS[kernel].attend
    found = values_and_gradients(partial(attend, **tokens, **options), *arrays)
    name = f"attention, {kernel}, heads of {head_dim}{', window and soft-cap' * gemma}"
    assert largest_difference(found, dense_on_cpu(head_dim, gemma), name, dtype) < TOLERANCES[dtype]


@pytest.mark.parametrize("window", [None, 100], ids=["plain", "window"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [("flash_decoding", "bfloat16"), ("cached", "bfloat16"), ("cached", "float32")]
)
def test_decoding_attention_is_that_of_the_cpu(kernel, dtype, head_dim, window):
    random, slots, length = np.random.default_rng(head_dim), 6, 256 if REHEARSAL else 2048
    query = random.standard_normal((slots, 1, 12, head_dim), np.float32)
    key, value = random.standard_normal((2, slots, 4, length, head_dim), np.float32)
    positions = np.linspace(0, length - 1, slots, dtype=np.int32)[:, None]
    options = {"positions_BL": jnp.asarray(positions), "window": window}
    with jax.default_device(CPU):
        expected = jax.device_get(cached_attention(query, key, value, precision=HIGHEST, **options))
    arrays = [jax.device_put(jnp.asarray(x, dtype), DEVICE) for x in (query, key, value)]
    attend = partial(cached_attention, precision=HIGHEST if dtype == "float32" else None)
    if kernel != "cached":
        # A rehearsal asks about a Hopper.
        card = type("Hopper", (), {"compute_capability": "9.0"}) if REHEARSAL else DEVICE
        if reason := DECODING_KERNELS[kernel].why_not(
            arrays[0], window=window, softcap=None, device=card, sequences=24, length=length
        ):
            pytest.skip(f"{kernel} {reason}")
        attend = partial(DECODING_KERNELS[kernel].attend, **({"interpret": True} if REHEARSAL else {}))
    found = jax.jit(partial(attend, **options))(*arrays)
    name = f"decoding, {kernel}, heads of {head_dim}{', window' * (window is not None)}"
    assert largest_difference(found, expected, name, dtype) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_and_their_gradients_are_those_of_the_cpu(dtype):
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((2, 100, 64)), 0.3 * random.standard_normal((64, 1000))
    # Both sides get the same rounded numbers, so that only the arithmetic differs.
    hidden, head = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))
    targets = random.integers(0, 1000, (2, 100))

    def total(hidden, head):
        logps = token_logps(hidden, head, jnp.asarray(targets))
        return jnp.sum(logps), logps

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    with jax.default_device(CPU):
        expected = jax.device_get(run(*jax.device_put((hidden, head), CPU)))
    found = run(*(jax.device_put(x.astype(dtype), DEVICE) for x in (hidden, head)))
    assert largest_difference(found, expected, "log-probabilities", dtype) < TOLERANCES[dtype]


def one_step(device, dtype):
    mesh = make_mesh(MeshConfig(), [device])
    model = Model.create(CONFIG, dtype=dtype, layout=make_layout(mesh))
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    policy, reference = (jax.device_put(params, layout) for params in parameters("float32"))
    recipe = Recipe(model, OBJECTIVE, optax.sgd(1.0), lambda _: 1.0)
    state = create_state(policy, reference, recipe.optimizer, mesh, OBJECTIVE.initial_state)
    batch = place_batch(mesh, make_schedule(96, 8)[1].batch(0))
    before = jax.device_get(policy)
    state, figures = jit_train_step(recipe)(state, batch)
    return figures["loss"], jax.tree.map(np.subtract, jax.device_get(state.policy), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_that_of_the_cpu(dtype):
    loss, update = one_step(DEVICE, dtype)
    right_loss, right_update = one_step(CPU, "float32")
    found, expected = ([x, optax.tree.norm(y)] for x, y in ((loss, update), (right_loss, right_update)))
    assert largest_difference(found, expected, "a step: loss and norm of the update", dtype) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampled_tokens_are_the_likeliest_of_the_cpu(dtype):
    params = parameters("float32")[1]
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11]]
    model = Model.create(CONFIG, dtype=dtype, layout=make_layout(make_mesh(MeshConfig(), [DEVICE])))
    with jax.default_device(DEVICE):
        written = sample(
            model, jax.device_put(params, DEVICE), prompts, Sampling(temperature=0.0, max_new_tokens=12), eos_id=97,
            key=jax.random.key(0),
        )  # fmt: skip
    exact = Model.create(CONFIG, dtype="float32")
    with jax.default_device(CPU):
        for prompt, completion in zip(prompts, written, strict=True):
            ids = np.array([[*prompt, *completion]], np.int32)
            places = np.arange(ids.shape[1], dtype=np.int32)[None]
            hidden = exact.hidden_states(jax.device_put(params, CPU), ids, np.ones_like(ids), places)
            logits = np.asarray(exact.logits(jax.device_put(params, CPU), hidden))[0, len(prompt) - 1 : -1]
            chosen = logits[np.arange(len(completion)), completion]
            name = f"sampling, greedy, {len(prompt)} tokens of prompt"
            assert largest_difference(chosen, logits.max(-1), name, dtype) < TOLERANCES[dtype]
