"""The mesh, the model on it, and the training state before the first step, abstract or with weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from kto_jax.config import Config, ConfigError, LoraConfig
from kto_jax.devices import processes
from kto_jax.devices.attention_on_mesh import make_layout
from kto_jax.devices.sharding import check_experts, check_heads, check_rows, make_mesh, mesh_shape, shardings
from kto_jax.models.config import TransformerConfig
from kto_jax.models.heads import SCALAR_HEAD
from kto_jax.models.lora import (
    WHOLE,
    adapter_axes,
    adapters_of,
    init_adapters,
    merge_adapters,
    with_magnitudes,
    without_adapters,
)
from kto_jax.models.model import Model, Params
from kto_jax.models.quantised import QUANTISED, cast_params
from kto_jax.models.weights.adapter_names import resolve_lora
from kto_jax.models.weights.load import load_params
from kto_jax.models.weights.model_files import ModelFiles
from kto_jax.models.weights.peft import read_adapters
from kto_jax.objectives import Objective
from kto_jax.training.inputs import Inputs
from kto_jax.training.state import TrainState, abstract_state, create_state


class ModelInputs(Protocol):
    """The inputs that the model and the abstract state need."""

    @property
    def architecture(self) -> TransformerConfig:
        """Architecture of policy and reference."""

    @property
    def objective(self) -> Objective:
        """The objective."""


def make_model(config: Config, inputs: ModelInputs, devices: Sequence[jax.Device] = ()) -> tuple[Mesh, Model]:
    """Makes the device mesh and the model on it.

    Args:
      config: the run.
      inputs: architecture and objective.
      devices: the devices; empty for all available ones.

    Raises:
      ConfigError: the mesh does not fit the devices, the batch or the model, or the devices do not support the
        attention kernel.
    """
    architecture = inputs.architecture
    devices = list(devices) or jax.devices()
    sizes = mesh_shape(config.mesh, len(devices))
    _check_remat(config.model.remat, devices[0].platform)
    if config.microbatch_rows != "auto":
        check_rows(int(config.microbatch_rows), sizes)
    check_heads(architecture.num_heads, architecture.num_kv_heads, sizes)
    check_experts(architecture.num_experts, sizes)
    mesh = make_mesh(config.mesh, devices)
    return mesh, Model.create(
        architecture,
        dtype=config.model.dtype,
        remat=config.model.remat,
        scalar_head=inputs.objective.scalar_head,
        value_tower=inputs.objective.value_tower,
        layout=make_layout(mesh, config.model.attention, config.model.reduce_dtype, config.model.keep_logits),
        lora=resolve_lora(config.lora, architecture) if config.lora.rank else None,
    )


def _check_remat(remat: str, platform: str) -> None:
    """Refuses offloading on devices that use the host's memory.

    Raises:
      ConfigError: naming the platform.
    """
    if remat == "offload" and platform not in ("tpu", "gpu"):
        raise ConfigError(
            f'config.model.remat="offload" cannot be used on {platform}: its memory is the host\'s. Allowed on TPU '
            'and GPU, whose devices copy to the host while they compute. Set config.model.remat to "full".'
        )


def make_abstract_state(
    config: Config, inputs: ModelInputs, model: Model, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and shardings of the run's state.

    Raises:
      ConfigError: the mesh does not divide a dimension of the model.
    """
    if config.lora.rank:
        policy, reference = _abstract_lora_params(config, model, mesh)
    else:
        plain = dataclasses.replace(model, scalar_head="none")
        uses_reference = inputs.objective.uses_reference and not config.reference.precompute
        policy = abstract_params(mesh, model, config.model.param_dtype)
        reference = abstract_params(mesh, plain, config.reference.param_dtype) if uses_reference else {}
    return abstract_state(policy, reference, optimizer, mesh, inputs.objective.initial_state)


def make_state(
    config: Config,
    inputs: Inputs,
    model: Model,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """The state before the first step, with initial weights."""
    key = jax.random.key(config.seed)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.policy)
    if config.lora.rank:
        policy = _initial_adapters(config, inputs, model, layout, key)
    else:
        policy = _initial_weights(config, inputs, model, layout, key)
    reference = initial_reference(config, inputs, model, abstract.reference, policy)
    if config.lora.dora and config.lora.start == "new":
        policy = jax.jit(with_magnitudes, out_shardings=layout)(policy, reference)
    return create_state(policy, reference, optimizer, abstract.step.sharding.mesh, inputs.objective.initial_state)


def initial_reference(config: Config, inputs: Inputs, model: Model, abstract: Params, policy: Params) -> Params:
    """The reference's parameters: loaded, or the policy's in the reference's dtype; {} if `abstract` is empty."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if not abstract:
        return {}
    if config.lora.rank:
        return load_reference(config, inputs, model, layout)
    if config.reference.path:
        return load_reference(config, inputs, dataclasses.replace(model, scalar_head="none"), layout)
    trunk = {name: leaf for name, leaf in policy.items() if name != SCALAR_HEAD}
    return _cast_reference(config, trunk, layout)


def _initial_weights(config: Config, inputs: Inputs, model: Model, layout: Any, key: Array) -> Params:
    """The policy's parameters, loaded or random; only those that `layout` contains."""
    if config.model.init == "random":

        def draw(key: Array) -> Params:
            params = model.init_params(key, config.model.param_dtype)
            return {name: params[name] for name in layout}

        return jax.jit(draw, out_shardings=layout)(key)
    return _load(model, inputs.policy_files, param_dtype=config.model.param_dtype, shardings=layout, key=key)


def _initial_adapters(config: Config, inputs: Inputs, model: Model, layout: Any, key: Array) -> Params:
    """Adapters whose product is 0, or those that are trained further; and the initial weights of all else."""
    layers, others = {"layers": layout["layers"]}, {name: layout[name] for name in layout if name != "layers"}
    if config.lora.start == "continue":
        adapters = _load_adapters(config, inputs, model, layers)
    else:
        # From a separate key, so that they do not change the other values.
        draw = jax.jit(
            lambda key: init_adapters(model.abstract_params("float32"), _lora(model), key), out_shardings=layers
        )
        adapters = draw(jax.random.fold_in(key, 2))
    return adapters | (_initial_weights(config, inputs, model, others, key) if others else {})


def _load_adapters(config: Config, inputs: Inputs, model: Model, layout: Any) -> Params:
    """The adapters that are trained further, as they were."""
    assert inputs.policy_files.adapter is not None, "check_start refuses this"
    del config
    found = read_adapters(inputs.policy_files.adapter, model, _lora(model))
    place = lambda values, sharding: jax.make_array_from_callback(values.shape, sharding, values.__getitem__)  # noqa: E731
    return jax.tree.map(place, found, layout)


def load_reference(config: Config, inputs: Inputs, model: Model, layout: Any) -> Params:
    """The reference's parameters, loaded, or random if the policy's initial weights are.

    Args:
      config: the run.
      inputs: the run's inputs.
      model: the architecture.
      layout: sharding of every parameter of the reference, from `reference_shardings`; it has no scalar head.
    """
    if config.lora.start == "continue":
        base = ModelFiles(inputs.policy_files.weights)
        plain = without_adapters(layout)
        whole = {WHOLE[name]: plain.pop(WHOLE[name]) for name in config.lora.modules_to_save}
        frozen = _load(model, base, param_dtype=config.reference.param_dtype, shardings=plain)
        if whole:  # These the reference has as they were, too.
            trained = _load(model, inputs.policy_files, param_dtype=config.reference.param_dtype, shardings=whole)
            frozen |= trained
        adapters = _load_adapters(config, inputs, model, adapters_of(layout))
        return merge_adapters(frozen, adapters, _lora(model))
    if config.model.init == "random" and not config.reference.path:

        def draw(key: Array) -> Params:
            params = model.init_params(key, config.model.param_dtype)
            return cast_params({name: params[name] for name in layout}, config.reference.param_dtype)

        return jax.jit(draw, out_shardings=layout)(jax.random.key(config.seed))
    # Without a path the reference is the policy's initial weights, rounded as the policy is.
    if config.reference.path or config.model.param_dtype == "float32":
        kept = config.reference.param_dtype
        return _load(model, inputs.reference_files, param_dtype=kept, shardings=layout)
    mesh = jax.tree.leaves(layout)[0].mesh
    rounded = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(mesh, model, config.model.param_dtype))
    first = _load(model, inputs.reference_files, param_dtype=config.model.param_dtype, shardings=rounded)
    return _cast_reference(config, first, layout)


def _cast_reference(config: Config, params: Params, layout: Any) -> Params:
    """Placed parameters, cast to the reference's dtype."""
    kept = config.reference.param_dtype
    if kept not in QUANTISED:
        return cast_params(params, kept)
    return jax.jit(cast_params, static_argnums=1, out_shardings=layout)(params, kept)


def _abstract_lora_params(config: Config, model: Model, mesh: Mesh) -> tuple[Params, Params]:
    """The trained parameters of a LoRA run (adapters, what is trained whole, a scalar head), and the frozen ones."""
    abstract, axes = model.abstract_params("float32"), model.logical_axes()
    adapters = jax.eval_shape(lambda key: init_adapters(abstract, _lora(model), key), jax.random.key(0))
    policy = _with_shardings(mesh, adapter_axes(axes, _lora(model)), adapters)
    for part in (WHOLE[name] for name in _lora(model).modules_to_save):
        policy |= _with_shardings(mesh, {part: axes[part]}, {part: abstract[part]})
    frozen = _abstract_reference(config, model, mesh)
    if model.scalar_head != "none":
        policy |= _with_shardings(mesh, {SCALAR_HEAD: axes[SCALAR_HEAD]}, {SCALAR_HEAD: abstract[SCALAR_HEAD]})
    return policy, frozen


def reference_shardings(config: Config, model: Model, mesh: Mesh) -> Any:
    """Sharding of every parameter of the reference."""
    return jax.tree.map(lambda leaf: leaf.sharding, _abstract_reference(config, model, mesh))


def _abstract_reference(config: Config, model: Model, mesh: Mesh) -> Params:
    """The reference's parameters, without a scalar head; with adapters as they were, if these are trained further."""
    frozen = abstract_params(mesh, model, config.reference.param_dtype)
    frozen.pop(SCALAR_HEAD, None)
    if not (config.lora.rank and config.lora.start == "continue"):
        return frozen
    abstract, axes = model.abstract_params("float32"), model.logical_axes()
    adapters = jax.eval_shape(lambda key: init_adapters(abstract, _lora(model), key), jax.random.key(0))
    adapters = _with_shardings(mesh, adapter_axes(axes, _lora(model)), adapters)
    return merge_adapters(frozen, adapters, _lora(model))


def _lora(model: Model) -> LoraConfig:
    assert model.lora is not None, "a run of adapters"
    return model.lora


def abstract_params(mesh: Mesh, model: Model, dtype: str) -> Params:
    """Shapes and shardings of a model's parameters in a dtype."""
    return _with_shardings(mesh, model.logical_axes(dtype), model.abstract_params(dtype))


def _with_shardings(mesh: Mesh, axes: Any, abstract: Any) -> Params:
    layout = shardings(mesh, axes, abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, layout
    )


def _load(*arguments: Any, **options: Any) -> Params:
    """`load_params`; if it fails on one process, it raises on all."""
    return processes.call_on_all(functools.partial(load_params, *arguments, **options))
