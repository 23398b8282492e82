import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kto_jax.config import CheckpointConfig, ConfigError, LoraConfig, MeshConfig, OptimizerConfig, TransientError
from kto_jax.devices.sharding import make_mesh, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.int8 import Int8Matrix
from kto_jax.models.lora import Adapter, adapter_axes, init_adapters, merge_adapters
from kto_jax.models.model import Model
from kto_jax.models.quantised import cast_params
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.optimizer import make_learning_rate, make_optimizer
from kto_jax.training.run_folder import write_json
from kto_jax.training.state import abstract_state, create_state
from kto_jax.training.stored_policy import load_policy

ARCHITECTURE = TransformerConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, tied_head=True
)
MODEL = Model.create(ARCHITECTURE)
OPTIMIZER = make_optimizer(OptimizerConfig(), make_learning_rate(OptimizerConfig(), 100))


def make_state(mesh):
    layout = shardings(mesh, MODEL.logical_axes(), MODEL.abstract_params("float32"))
    policy = jax.device_put(MODEL.init_params(jax.random.key(0), "float32"), layout)
    return create_state(policy, policy, OPTIMIZER, mesh, {})


def make_abstract(mesh, model=MODEL):
    abstract = model.abstract_params("float32")
    layout = shardings(mesh, model.logical_axes(), abstract)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, layout)
    return abstract_state(params, params, OPTIMIZER, mesh, {})


@jax.jit(donate_argnums=0)
def advance(state):
    def add(x):
        return x + jnp.ones_like(x)

    moved = {name: jax.tree.map(add, getattr(state, name)) for name in ("step", "policy", "opt_state")}
    return dataclasses.replace(state, **moved)


def save_steps(workdir, mesh, losses, keep=2):
    """Takes a step per loss, saving each in the background while the next donates its buffers."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=keep))
    state = make_state(mesh)
    checkpoints.save_reference(state.reference)
    first = jax.device_get(state)
    for step, loss in enumerate(losses, start=1):
        state = advance(state)
        checkpoints.save(step, state, None if loss is None else {"loss": 1.0, "eval_loss": loss})
    state = advance(state)
    checkpoints.wait()
    return checkpoints, first


@pytest.mark.parametrize("metric, figures, kept, best", [
    ("eval_loss", [0.5, 0.2, 0.2, 0.4, 0.4], [2, 4, 5], 2),
    ("eval_auc", [0.9, 0.8, 0.9, 0.7, 0.6], [1, 4, 5], 1),
    ("eval_auc", [0.9, float("nan"), 1.0, 0.7, 0.6], [3, 4, 5], 3),
])  # fmt: skip
def test_the_checkpoint_with_the_best_figure_is_kept_the_first_of_equal_ones(tmp_path, metric, figures, kept, best):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), metric=metric)
    state = make_state(make_mesh(MeshConfig()))
    for step, figure in enumerate(figures, start=1):
        state = advance(state)
        checkpoints.save(step, state, {metric: figure, "eval_z0": 1.0})
    checkpoints.wait()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()) == kept
    assert checkpoints.best_step() == best
    checkpoints.close()


def test_arrays_are_not_compressed(tmp_path):
    """Compression of float32 weights makes a save a quarter longer on CPU, and saves 8 % of the bytes."""
    state = make_state(make_mesh(MeshConfig(), jax.devices()[:1]))
    state = dataclasses.replace(state, policy=jax.device_put({"zeros": jnp.zeros((1024, 1024))}, state.step.sharding))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, None)
    checkpoints.wait()
    files = [path for path in (tmp_path / "checkpoints" / "1").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 4 * 1024 * 1024


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), *jax.device_get((one, other)))))


@pytest.mark.parametrize("restored_on", [
    MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2),
    *(pytest.param(MeshConfig(data=data, fsdp=8 // data), marks=pytest.mark.nightly) for data in (1, 2, 4, 8)),
])  # fmt: skip
def test_the_newest_state_is_restored_bitwise_on_any_mesh(restored_on, tmp_path):
    checkpoints, first = save_steps(tmp_path, make_mesh(MeshConfig(fsdp=4, data=2)), [None, None])
    restored = checkpoints.restore(make_abstract(make_mesh(restored_on)), 2)
    expected = advance(advance(jax.device_put(first)))
    assert restored.step == 2
    assert equal(restored.policy, expected.policy)
    assert equal(restored.opt_state, expected.opt_state)
    assert equal(restored.reference, first.reference)
    assert restored.policy["embed"]["table"].sharding.mesh.shape["tensor"] == max(restored_on.tensor, 1)


def test_a_checkpoint_holds_a_synced_reference_and_the_objectives_state(tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), reference_is_synced=True)
    state = dataclasses.replace(make_state(mesh), objective_state={"running_mean": jnp.array(0.25)})
    checkpoints.save_reference(state.reference)
    moved = dataclasses.replace(state, reference=jax.tree.map(lambda leaf: leaf + 1, state.reference))
    checkpoints.save(1, moved, None)
    checkpoints.wait()
    abstract = make_abstract(mesh)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=abstract.step.sharding)
    restored = checkpoints.restore(dataclasses.replace(abstract, objective_state={"running_mean": number}), 1)
    assert equal(restored.reference, moved.reference)
    assert restored.objective_state == {"running_mean": 0.25}
    assert not (tmp_path / "checkpoints" / "reference").exists()


def test_an_int8_reference_is_restored_on_another_mesh(tmp_path):
    states = []
    for sizes in (MeshConfig(fsdp=4, data=2), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(sizes)
        layout = shardings(mesh, MODEL.logical_axes("int8"), MODEL.abstract_params("int8"))
        kept = jax.jit(cast_params, static_argnums=1, out_shardings=layout)(
            MODEL.init_params(jax.random.key(0), "float32"), "int8"
        )
        states.append(dataclasses.replace(make_state(mesh), reference=kept))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save_reference(states[0].reference)
    checkpoints.save(1, states[0], None)
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[1])
    restored = checkpoints.restore(abstract, 1)
    assert equal(restored.reference, states[0].reference)
    assert jax.tree.map(lambda x: x.sharding, restored.reference) == jax.tree.map(
        lambda x: x.sharding, abstract.reference
    )
    assert restored.reference["embed"]["table"].int8.dtype == "int8"
    with pytest.raises(ConfigError, match="embed/table/int8: missing"):
        plain = make_abstract(make_mesh(MeshConfig()))
        checkpoints.save_reference(states[0].policy)
        checkpoints.restore(dataclasses.replace(plain, reference=abstract.reference), 1)


def as_dictionaries(tree):
    """The tree as versions before 0.2 stored it: a dictionary for each adapter and each int8 matrix."""

    def plain(node):
        if isinstance(node, Adapter):
            return {"a": node.a, "b": node.b}
        return {"int8": node.int8, "scales": node.scales} if isinstance(node, Int8Matrix) else node

    return jax.tree.map(plain, tree, is_leaf=lambda node: isinstance(node, (Adapter, Int8Matrix)))


def test_adapters_and_int8_matrices_that_were_saved_as_dictionaries_are_restored(tmp_path):
    lora, mesh = LoraConfig(rank=2), make_mesh(MeshConfig(fsdp=8))
    params = MODEL.init_params(jax.random.key(0), "float32")
    adapters, frozen = init_adapters(params, lora, jax.random.key(1)), cast_params(params, "int8")
    of_adapters = shardings(mesh, adapter_axes(MODEL.logical_axes(), lora), adapters)
    of_frozen = shardings(mesh, MODEL.logical_axes("int8"), frozen)
    state = create_state(jax.device_put(adapters, of_adapters), jax.device_put(frozen, of_frozen), OPTIMIZER, mesh, {})
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save_reference(as_dictionaries(state.reference))
    before = create_state(as_dictionaries(state.policy), {}, OPTIMIZER, mesh, {})
    checkpoints.save(1, before, None)
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(abstract, 1)
    assert jax.tree.structure(restored) == jax.tree.structure(state) and equal(restored, state)
    write_json(tmp_path / "model.json", write_config_json(ARCHITECTURE))
    write_json(tmp_path / "config.json", {"lora": dataclasses.asdict(lora)})
    _, policy, _ = load_policy(tmp_path)
    expected = merge_adapters(frozen, adapters, lora)
    assert jax.tree.structure(policy) == jax.tree.structure(expected) and equal(policy, expected)


def test_without_a_reference_none_is_written_or_expected(tmp_path):
    mesh = make_mesh(MeshConfig())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = dataclasses.replace(make_state(mesh), reference={})
    checkpoints.save_reference(state.reference)
    checkpoints.save(1, state, None)
    checkpoints.wait()
    restored = checkpoints.restore(dataclasses.replace(make_abstract(mesh), reference={}), 1)
    assert restored.reference == {}
    assert equal(restored.policy, state.policy)
    assert not (tmp_path / "checkpoints" / "reference").exists()


def test_the_optimizer_state_of_a_value_head_is_restored(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=4, data=2))
    model = Model.create(ARCHITECTURE, scalar_head="value")
    optimizer = make_optimizer(OptimizerConfig(), make_learning_rate(OptimizerConfig(), 100), value_head=True)
    layout = shardings(mesh, model.logical_axes(), model.abstract_params("float32"))
    policy = jax.device_put(model.init_params(jax.random.key(0), "float32"), layout)
    state = create_state(policy, {}, optimizer, mesh, {})
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, None)
    checkpoints.wait()
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), policy, layout
    )
    restored = checkpoints.restore(abstract_state(abstract, {}, optimizer, mesh, {}), 1)
    assert equal((restored.policy, restored.opt_state), (state.policy, state.opt_state))


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpoints, _ = save_steps(tmp_path, make_mesh(MeshConfig()), [0.5, 0.1, None, 0.4, None, 0.3])
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"2", "5", "6", "reference"}
    checkpoints.close()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(broken, tmp_path):
    """NaN is not ordered, so a sort could put it anywhere."""
    checkpoints, _ = save_steps(tmp_path, make_mesh(MeshConfig()), [0.5, broken, 0.4, broken, None], keep=1)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"3", "5", "reference"}
    checkpoints.close()


@pytest.mark.parametrize("change, message", [
    ({"num_layers": 3}, r"checkpoint has \(\(2, .*model wants \(\(3, .*and \d+ more"),
    ({"tied_head": False}, r"opt_state/1/0/mu/head/weight: missing.*policy/head/weight: missing"),
])  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_listing_both_sides(change, message, tmp_path):
    mesh = make_mesh(MeshConfig())
    checkpoints, _ = save_steps(tmp_path, mesh, [None])
    other = Model.create(dataclasses.replace(ARCHITECTURE, **change))
    with pytest.raises(ConfigError, match=message):
        checkpoints.restore(make_abstract(mesh, other), 1)


def test_a_reference_written_for_another_model_is_refused(tmp_path):
    mesh = make_mesh(MeshConfig())
    checkpoints, _ = save_steps(tmp_path, mesh, [None])
    abstract = make_abstract(mesh)
    scalar = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ConfigError, match=r"reference is a checkpoint of another model.*extra: missing"):
        checkpoints.restore(dataclasses.replace(abstract, reference=abstract.reference | {"extra": scalar}), 1)


@pytest.mark.parametrize("part, message", [
    ("policy", r"1 is damaged: .* infinite in policy/"), ("opt_state", r"1 is damaged: .* infinite in opt_state/"),
    ("reference", r"reference is damaged: .* infinite in embed/table\. The reference must not change"),
])  # fmt: skip
def test_a_checkpoint_with_a_value_that_is_not_finite_is_refused(part, message, tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=4, data=2))
    state = make_state(mesh)
    leaves, shape = jax.tree.flatten(getattr(state, part))
    place = next(i for i, leaf in enumerate(leaves) if leaf.ndim > 1)
    leaves[place] = leaves[place].at[-1, -1].set(jnp.inf)
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        state = dataclasses.replace(state, **{part: jax.tree.unflatten(shape, leaves)})
        checkpoints.save_reference(state.reference)
        checkpoints.save(1, state, None)
        checkpoints.wait()
        with pytest.raises(ConfigError, match=message):
            checkpoints.restore(make_abstract(mesh), 1)


def test_the_policy_of_a_run_is_loaded_for_sampling(tmp_path):
    checkpoints, first = save_steps(tmp_path, make_mesh(MeshConfig(fsdp=4, data=2)), [None])
    checkpoints.close()
    write_json(tmp_path / "model.json", write_config_json(ARCHITECTURE))
    model, params, tokenizer = load_policy(tmp_path)
    assert model.config == ARCHITECTURE
    assert equal(params, advance(jax.device_put(first)).policy)
    assert len(params["embed"]["table"].sharding.device_set) == 1
    assert tokenizer == tmp_path / "tokenizer"


def test_a_folder_without_a_run_or_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        load_policy(tmp_path)
    write_json(tmp_path / "model.json", write_config_json(ARCHITECTURE))
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        load_policy(tmp_path)


def test_processes_that_see_different_checkpoints_are_told_to_try_again(tmp_path, monkeypatch):
    monkeypatch.setattr("kto_jax.training.checkpoints.processes.exchange_text", lambda word: ["4", "2"])
    with (
        contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints,
        pytest.raises(TransientError, match=r"different newest checkpoints .* steps 4, 2"),
    ):
        checkpoints.agree_on_latest_step()
