"""Align a model: `python -m kto_jax.train --config=configs/quickstart.py --workdir=runs/mine --config.seed=1`.

The same command again continues a run that was interrupted. Exit codes: 0 finished, 1 failed, 2 the configuration, the
data or the model cannot be used, 75 preempted (run again), 130 interrupted from the keyboard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import optax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from kto_jax.checkpoint import Checkpoints
from kto_jax.config import Config, ConfigError, check_overrides, default_config, resolve
from kto_jax.data.batches import prefetch
from kto_jax.evaluation import make_evaluation
from kto_jax.hardware import peak_flops
from kto_jax.inputs import Inputs, read_inputs
from kto_jax.logs import MetricsLog, console
from kto_jax.models.huggingface import load_params
from kto_jax.models.model import Model, Params
from kto_jax.objectives import defaults
from kto_jax.precompute import load_reference, precompute
from kto_jax.preemption import Preemption
from kto_jax.results import write_results, write_samples
from kto_jax.run import RunFolder, check_folder, open_run
from kto_jax.sharding import check_heads, check_rows, constrainer, make_mesh, mesh_shape, place_batch, shardings
from kto_jax.state import TrainState, abstract_state, create_state, make_optimizer, make_schedule
from kto_jax.step import jit_train_step

FAILED, UNUSABLE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = sys.argv if arguments is None else ["train", *arguments]
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nFields of a configuration and their defaults:\n\n{default_config()}")
        return 0
    try:
        config, workdir = read_command(argv)
        return train(config, workdir, shlex.join(["python", "-m", "kto_jax.train", *argv[1:]]))
    except ConfigError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return UNUSABLE


def train(config: Config, workdir: Path, command: str) -> int:
    """Trains a policy, from reading the feedback to the report.

    Args:
      config: the run.
      workdir: its folder; a run found there is continued.
      command: what the report says made it.

    Returns:
      The exit code.

    Raises:
      ConfigError: the configuration, the data or the model cannot be used.
    """
    started = time.monotonic()
    # ------------------------------------------------- what is read; no device is touched yet
    with tempfile.TemporaryDirectory() as scratch:
        inputs = read_inputs(config, Path(scratch))
        check_folder(workdir, config, inputs.index, inputs.architecture)

        # ------------------------------------------------- devices, and the run's folder
        mesh, model = make_model(config, inputs)
        run = open_run(workdir, config, inputs.index, inputs.tokenizer, inputs.architecture)

    moves = config.reference.sync_every > 0
    with (
        run.lock,
        contextlib.closing(Checkpoints(run.path, config.checkpoint, reference_moves=moves)) as checkpoints,
    ):
        if config.reference.precompute:
            inputs = precompute(config, inputs, model, mesh)

        # ------------------------------------------------- state: from the newest checkpoint, or from weights
        schedule = make_schedule(config.optimizer, inputs.num_steps)
        optimizer = make_optimizer(config.optimizer, schedule, value_head=model.scorer == "value")
        state = make_state(config, inputs, model, mesh, optimizer, checkpoints)

        # ------------------------------------------------- the steps
        write_samples("before", model, state, inputs, run, config)
        take_step = jit_train_step(model, inputs.objective, optimizer, schedule, config.reference)
        evaluate = make_evaluation(model, inputs.objective, inputs.held_out, mesh) if inputs.held_out else None
        peak, source = peak_flops(jax.devices()[0], config.model.dtype)
        _announce(config, inputs, mesh, f"{source} peak {peak / 1e9:.0f} GFLOP/s in {config.model.dtype}")
        state, exit_code = take_steps(
            config, inputs, run, mesh, peak * mesh.size, take_step, evaluate, checkpoints, state
        )

        # ------------------------------------------------- the result
        if exit_code == 0:
            write_results(model, state, inputs, run, config, command)
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            console.print(
                f"finished in {minutes} min {seconds} s with {source} {peak / 1e9:.0f} GFLOP/s; host memory at most "
                f"{memory:.1f} GiB; see {workdir}/report.html and {workdir}/policy",
                highlight=False,
                soft_wrap=True,
            )
    return exit_code


def make_model(config: Config, inputs: Inputs) -> tuple[Mesh, Model]:
    """The device mesh and the model upon it.

    Raises:
      ConfigError: the mesh does not fit the devices, the batch or the model; or there are several processes.
    """
    architecture = inputs.architecture
    if jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes were started. One trains, on all devices of its machine. Start one."
        )
    sizes = mesh_shape(config.mesh, jax.device_count())
    check_rows(config.microbatch_rows, sizes)
    check_heads(architecture.num_heads, architecture.num_kv_heads, sizes)
    mesh = make_mesh(config.mesh)
    constrain = constrainer(mesh)
    return mesh, Model.create(
        architecture,
        dtype=config.model.dtype,
        remat=config.model.remat,
        constrain=constrain,
        scorer=inputs.objective.scorer,
    )


def make_state(
    config: Config,
    inputs: Inputs,
    model: Model,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> TrainState:
    """The state of the newest checkpoint; without one, of the first weights, whose reference is then written."""
    plain = dataclasses.replace(model, scorer="none")
    layout, reference_layout = (shardings(mesh, m.logical_axes(), m.abstract_params("float32")) for m in (model, plain))
    reference_dtype = config.reference.param_dtype
    uses_reference = inputs.objective.uses_reference and not config.reference.precompute
    if checkpoints.latest_step is not None:
        policy = _placed_like(model.abstract_params("float32"), layout)
        reference = _placed_like(plain.abstract_params(reference_dtype), reference_layout) if uses_reference else {}
        console.print(f"continuing after step {checkpoints.latest_step}")
        return checkpoints.restore(abstract_state(policy, reference, optimizer, mesh, inputs.objective.initial_state))
    key = jax.random.key(config.seed)
    if config.model.init == "random":
        draw = jax.jit(model.init_params, static_argnums=1, out_shardings=layout)
        policy = draw(key, "float32")
    else:
        policy = load_params(model, inputs.model_path, param_dtype="float32", shardings=layout, key=key)
    if not uses_reference:
        reference = {}
    elif config.reference.path:
        reference = load_reference(config, inputs, plain, reference_layout)
    else:
        trunk = {name: leaf for name, leaf in policy.items() if name != "scorer"}
        reference = jax.tree.map(lambda leaf: leaf.astype(reference_dtype), trunk)
    state = create_state(policy, reference, optimizer, mesh, inputs.objective.initial_state)
    checkpoints.save_reference(state.reference)
    return state


def take_steps(
    config: Config,
    inputs: Inputs,
    run: RunFolder,
    mesh: Mesh,
    peak: float,
    take_step: Callable,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    checkpoints: Checkpoints,
    state: TrainState,
) -> tuple[TrainState, int]:
    """Takes the steps that are left; returns the last state and an exit code, 0 where all were taken.

    `peak` is the FLOP/s of all devices together.
    """
    first, num_steps = int(state.step), inputs.num_steps
    preemption = Preemption()
    log = MetricsLog(run.path, first_step=first, num_steps=num_steps, enabled=jax.process_index() == 0)
    batches = prefetch(
        inputs.plan.batch,
        range(first, num_steps),
        finish=functools.partial(place_batch, mesh),
        num_loaders=config.data.num_loaders,
    )
    exit_code = 0
    waiting_since = time.perf_counter()
    for step, batch in enumerate(batches, start=first + 1):
        clock = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, device_figures = take_step(state, batch)
        figures = {name: float(value) for name, value in jax.device_get(device_figures).items()}
        seconds = time.perf_counter() - clock
        figures["seconds"] = seconds
        figures["wait_seconds"] = clock - waiting_since
        figures["tokens_per_second"] = figures["tokens"] / seconds
        figures["mfu"] = figures["flops"] / seconds / peak
        if figures["num_bad_steps"] >= config.max_bad_steps:
            _report_bad_steps(config, inputs, step)
            exit_code = FAILED
            break
        stopping, last = preemption.requested(step), step == num_steps
        if evaluate and (last or _due(step, config.evaluation.every)):
            figures |= evaluate(state)
        log.write(step, figures)
        if last or stopping or "eval_loss" in figures or _due(step, config.checkpoint.every):
            # Losses against references that differ say nothing of which policy is best.
            comparable = not config.reference.sync_every
            checkpoints.save(step, state, figures.get("eval_loss") if comparable else None)
        if stopping and not last:
            console.print(f"stopped by a signal after step {step}; the same command continues")
            exit_code = preemption.exit_code
            break
        waiting_since = time.perf_counter()
    checkpoints.wait()
    log.close()
    preemption.stop_listening()
    return state, exit_code


def read_command(argv: Sequence[str]) -> tuple[Config, Path]:
    """The resolved configuration and the run's folder, from the command line.

    Raises:
      ConfigError: a flag or a field cannot be used.
    """
    allowed = "Allowed: --config=FILE, --config.FIELD=VALUE and --workdir=FOLDER. Correct the command."
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A config file.", flag_values=values, sys_argv=list(argv))
    flags.DEFINE_string("workdir", "", "The run's folder; for configs/NAME.py, runs/NAME.", flag_values=values)
    check_overrides(argv[1:])
    try:
        rest = values(list(argv))[1:]
        config = None if values.config is None else values.config.to_dict()
    except (flags.Error, ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError,
            TypeError, ValueError) as error:  # fmt: skip
        # Whatever a config file, which is a program, may raise.
        raise ConfigError(f"the command cannot be read: {type(error).__name__}: {error}. {allowed}") from None
    if rest or config is None:
        raise ConfigError(f"{f'{rest[0]!r} is no flag' if rest else '--config is missing'}. {allowed}")
    if "://" in values.workdir:
        raise ConfigError(f"--workdir={values.workdir} is no local folder. Allowed: local folders. Set --workdir.")
    file = config_flags.get_config_filename(values["config"])
    return resolve(config), Path(values.workdir or Path("runs") / Path(file.split(":")[0]).stem)


def _placed_like(abstract: Params, layout: Params) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, layout
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _announce(config: Config, inputs: Inputs, mesh: Mesh, peak: str) -> None:
    usual = defaults(config.objective.name)
    chosen = {name: value for name, value in inputs.objective.options.items() if value != usual.get(name)}
    options = ", ".join(f"{name} {_short(value)}" for name, value in chosen.items())
    console.print(
        f"{config.objective.name}{f' ({options})' if options else ''}: {inputs.num_steps} steps of {config.batch_size} "
        f"{inputs.objective.examples} from {inputs.plan.num_examples} ({inputs.num_desirable} desirable and "
        f"{inputs.num_undesirable} undesirable completions); {len(inputs.index.rows('eval'))} held out; {mesh.size} × "
        f"{jax.devices()[0].device_kind} as {dict(mesh.shape)}; {peak}",
        highlight=False,
    )
    if config.optimizer.warmup_steps >= inputs.num_steps:
        console.print(
            f"warning: all {inputs.num_steps} steps are warm-up (config.optimizer.warmup_steps="
            f"{config.optimizer.warmup_steps}): the learning rate never reaches {config.optimizer.learning_rate}",
            style="yellow",
        )


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _report_bad_steps(config: Config, inputs: Inputs, step: int) -> None:
    rows = ", ".join(inputs.index.place(row) for row in inputs.plan.step(step - 1).rows)
    console.print(
        f"error: {config.max_bad_steps} steps in a row had a loss or gradient that is not finite, the last on {rows}. "
        "Such steps change nothing; the newest checkpoint is finite. Look at these rows, or lower "
        "config.optimizer.learning_rate.",
        style="red",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
