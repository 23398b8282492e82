"""Align a model: `python -m kto_jax.train --config=configs/quickstart.py --workdir=runs/mine --config.seed=1`.

The same command resumes an interrupted run. Exit codes: 0 finished, 1 failed, 2 the configuration, the data or the
model cannot be used, 75 preempted (run again), 130 interrupted from the keyboard.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kto_jax.command import PREEMPTED, TrainOptions, answer_help, run_command
from kto_jax.training.ending import run_to_end  # before JAX

if __name__ == "__main__":  # The imports below take seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Launch scripts restart a run that ends with this code, but none that a signal ends.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
    answer_help(TrainOptions, str(__doc__))
    if os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) == "0":
        print("importing JAX …", file=sys.stderr, flush=True)

import jax
from jax.sharding import Mesh

from kto_jax.config import Config, ConfigError
from kto_jax.devices import processes
from kto_jax.devices.attention_on_mesh import choose_attention
from kto_jax.devices.chips import peak_flops
from kto_jax.devices.compilation import Program, keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.devices.sharding import abstract_batch, check_lengths
from kto_jax.models.model import Model
from kto_jax.models.weights.load import is_multimodal
from kto_jax.models.weights.model_files import ModelFiles
from kto_jax.objectives import defaults
from kto_jax.planning.out_of_memory import explained_out_of_memory
from kto_jax.planning.rows_that_fit import resolve_rows
from kto_jax.progress import console, next_lines
from kto_jax.reports.results import write_results, write_samples
from kto_jax.storage.bucket import is_bucket
from kto_jax.storage.folders import scratch_folder
from kto_jax.storage.run_place import RunPlace, open_place
from kto_jax.training.agreement import compare_config, compare_inputs
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.evaluation import make_evaluation, measure_reference
from kto_jax.training.initial_state import make_abstract_state, make_model, make_state
from kto_jax.training.inputs import Inputs, read_inputs
from kto_jax.training.kept import Start, continue_state
from kto_jax.training.loop import Job, take_steps
from kto_jax.training.patience import Patience, read_patience
from kto_jax.training.pinning import pin_sources
from kto_jax.training.precompute import precompute
from kto_jax.training.preemption import Preemption
from kto_jax.training.reference import check_error, choose_dtype, describe_error, is_rounded
from kto_jax.training.result import choose_export_dtype, choose_result
from kto_jax.training.resume import with_recorded_settings, with_template_date
from kto_jax.training.run_folder import RunFolder, check_folder, open_run, record_part, write_json
from kto_jax.training.step import make_recipe
from kto_jax.training.trackers import check_trackers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "kto_jax.train", *arguments])

    def run_once(given: TrainOptions) -> int:
        if "://" in given.workdir and not is_bucket(given.workdir):
            raise ConfigError(
                f"--workdir={given.workdir} cannot be used. Allowed: a local folder, gs://BUCKET/FOLDER or "
                "s3://BUCKET/FOLDER. Set --workdir."
            )
        with Preemption() as preemption:
            return train(given.config, given.workdir, command, preemption)

    return run_command(run_once, TrainOptions, str(__doc__), arguments)


def train(
    config: Config, workdir: str | Path, command: str, preemption: Preemption, *, start: Start | None = None
) -> int:
    """Trains a policy, from reading the feedback to the report.

    Args:
      config: the run.
      workdir: its folder, on a disk or in a bucket; a run found there is resumed.
      command: the command line, for the report.
      preemption: handles the signals of this process.
      start: where the run starts and what it leaves, if it is one of several of this process.

    Returns:
      The exit code.

    Raises:
      ConfigError: the configuration, the data or the model cannot be used.
      TransientError: running the same command again may help.
    """
    started, start = time.monotonic(), start or Start()
    check_trackers(config.trackers)
    keep_compiled()
    use_most_gpu_memory()
    processes.join(config.processes)
    console.quiet = not processes.is_first()
    compare_config(config)
    with contextlib.ExitStack() as stack:
        opened = open_place(
            str(workdir),
            writes=processes.is_first(),
            shared=processes.num_processes() > 1,
            is_stopping=preemption.was_signalled,
        )
        place = processes.call_on_all(lambda: stack.enter_context(opened))
        exit_code = train_in(place, config, command, preemption, start)
        if exit_code == 0:
            place.push()
        if exit_code == 0 and start.exports and start.saves:
            _print_next_steps(place, config, time.monotonic() - started)
    return exit_code


def train_in(place: RunPlace, config: Config, command: str, preemption: Preemption, start: Start) -> int:
    """Trains a policy in an open folder; see `train`."""
    workdir = place.path
    with scratch_folder() as scratch:
        # ------------------------------------------------- what is read, and the devices
        with console.phase("reading the configuration of the model and the feedback"):
            config = pin_sources(with_recorded_settings(config, workdir), workdir)
            config = with_template_date(processes.call_on_all(lambda: choose_export_dtype(choose_dtype(config))))
            inputs, mesh, model = processes.call_on_all(lambda: prepare(config, workdir, Path(scratch)))
            compare_inputs(inputs)
        if config.microbatch_rows == "auto":
            config, inputs = resolve_rows(config, inputs, workdir)

        # ------------------------------------------------- the run's folder
        run = open_run(place, config, inputs.index, inputs.tokenizer, inputs.architecture)

    moves = config.reference.sync_every > 0
    with (
        run.lock,
        explained_out_of_memory(config, inputs),
        contextlib.closing(
            Checkpoints(run.path, config.checkpoint, metric=config.evaluation.metric, reference_is_synced=moves)
        ) as checkpoints,
        processes.exit_if_one_is_lost(PREEMPTED, config.processes.timeout_seconds / 4),
    ):
        if config.reference.precompute:
            inputs = precompute(config, inputs, model, mesh, run.path)

        # ------------------------------------------------- the step's program, compiled while weights are read
        recipe = make_recipe(config, inputs.objective, model, inputs.num_steps)
        recipe, take_step = start.kept.step(config, recipe, inputs.num_steps)
        abstract = make_abstract_state(config, inputs, model, mesh, recipe.optimizer)
        first_step = checkpoints.agree_on_latest_step() or 0
        if first_step < inputs.num_steps:
            take_step.begin(abstract, abstract_batch(mesh, inputs.schedule.batch(first_step)))

        # ------------------------------------------------- state: from the newest checkpoint, or from weights
        if first_step:
            console.print(f"continuing after step {first_step}")
        with console.phase("reading weights"):
            if first_step:
                start.kept.drop()
                state = checkpoints.restore_newest(abstract)
                first_step = int(state.step)
            else:
                if start.after is not None:
                    state = continue_state(config, inputs, model, recipe, abstract, start)
                else:
                    state = make_state(config, inputs, model, recipe.optimizer, abstract)
                if start.saves:
                    checkpoints.save_reference(state.reference)
            jax.block_until_ready(state)
        if first_step == 0 and is_rounded(config):
            _report_reference(config, run, measure_reference(model, inputs.objective, inputs.schedule, mesh, state))
        write_samples("before", model, state, inputs, run, config)
        patience = read_patience(config.evaluation, run.path, first_step)

        # ------------------------------------------------- the steps
        if processes.is_first():
            record_part(run.path, first_step, config)
            if first_step < inputs.num_steps and not patience.is_exhausted:
                (run.path / "samples_after.json").unlink(missing_ok=True)  # of a run that is made longer
        job = _make_job(config, inputs, mesh, model, take_step, patience, saves=start.saves)
        state, exit_code = take_steps(job, place, checkpoints, preemption, state)

        # ------------------------------------------------- the result
        if exit_code == 0:
            state, notes = choose_result(config, inputs.num_steps, checkpoints, abstract, state, patience)
            for note in notes:
                console.print(note)
            if start.exports:
                with console.working("writing the policy, samples and the report"):
                    write_results(model, state, inputs, run, config, command, notes)
            start.kept.leave(run.path, config, model, state)
    return exit_code


def _make_job(
    config: Config, inputs: Inputs, mesh: Mesh, model: Model, take_step: Program, patience: Patience, *, saves: bool
) -> Job:
    """The loop's inputs; prints a summary of them."""
    with console.working("measuring the speed of the device"):
        peak, source = peak_flops(jax.local_devices()[0], config.model.dtype)
    _print_summary(config, inputs, mesh, f"{source} peak {peak / 1e9:.0f} GFLOP/s in {config.model.dtype}")
    return Job(
        config=config,
        inputs=inputs,
        mesh=mesh,
        take_step=take_step,
        evaluate=make_evaluation(model, inputs.objective, inputs.held_out, mesh) if inputs.held_out else None,
        patience=patience,
        peak=peak * mesh.size,
        peak_is_measured=source == "measured",
        saves=saves,
    )


def prepare(config: Config, workdir: Path, scratch: Path) -> tuple[Inputs, Mesh, Model]:
    """The run's inputs, the devices and the model on them; writes nothing in the run's folder.

    Raises:
      ConfigError: the configuration, the data, the model or the folder cannot be used.
    """
    inputs = read_inputs(config, scratch)
    check_folder(workdir, config, inputs.index, inputs.architecture)
    mesh, model = make_model(config, inputs)
    check_lengths(inputs.schedule.row_lengths, dict(mesh.shape))
    return inputs, mesh, model


def _print_summary(config: Config, inputs: Inputs, mesh: Mesh, peak: str) -> None:
    usual = defaults(config.objective.name)
    chosen = {name: value for name, value in inputs.objective.options.items() if value != usual.get(name)}
    options = ", ".join(f"{name} {_format(value)}" for name, value in chosen.items())
    console.print(
        f"{config.objective.name}{f' ({options})' if options else ''}: {inputs.num_steps} steps of {config.batch_size} "
        f"{inputs.objective.examples} from {inputs.schedule.num_examples} ({inputs.num_desirable} desirable and "
        f"{inputs.num_undesirable} undesirable completions); {len(inputs.index.sequences('eval'))} held out; "
        f"{mesh.size} × {jax.devices()[0].device_kind} as {dict(mesh.shape)}; "
        f"{choose_attention(config.model.attention, mesh).name} attention; {peak}",
    )
    if inputs.policy_files.adapter is not None:
        console.print(_describe_start(config, inputs.policy_files))
    if is_multimodal(inputs.policy_files.weights):
        console.print(
            f"{inputs.policy_files.weights} also reads images: only its language model is trained and exported; the "
            "other weights are left out"
        )
    if config.optimizer.warmup_steps >= inputs.num_steps:
        console.print(
            f"warning: all {inputs.num_steps} steps are warm-up (config.optimizer.warmup_steps="
            f"{config.optimizer.warmup_steps}): the learning rate never reaches {config.optimizer.learning_rate}",
            style="yellow",
        )


def _describe_start(config: Config, files: ModelFiles) -> str:
    if config.lora.start == "continue":
        use = "trained further"
    elif config.lora.rank:
        use = 'merged into the base, and new ones are trained (config.lora.start="new")'
    else:
        use = "merged into the base, all of whose weights are trained"
    return f"the run starts from {files}: these adapters are {use}"


def _report_reference(config: Config, run: RunFolder, errors: dict[str, float]) -> None:
    console.print(describe_error(config, errors))
    if processes.is_first():
        write_json(run.path / "reference_error.json", errors)
    check_error(config, errors)


def _format(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_next_steps(place: RunPlace, config: Config, seconds: float) -> None:
    minutes, seconds = divmod(round(seconds), 60)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"finished in {minutes} min {seconds} s; host memory at most {memory:.1f} GiB")
    report = f"{place.name}/report.html and " if (place.path / "report.html").exists() else ""
    console.print(f"see {report}{place.name}/policy")
    run, is_remote = str(place.name), is_bucket(str(place.name))
    measure = "" if config.data.holdout or config.data.eval else " --judge=JUDGE --prompts=FILE"
    commands = (
        f"score --model={run} --data=FILE --out=FILE" if config.objective.name == "reward" else f"chat --model={run}",
        f"evaluate --run={run}{measure}{' --out=evaluation' if is_remote else ''}",
        f"export --run={run}{' --to=exported' if is_remote else ''}",
    )
    for line in next_lines(*commands):
        console.print(line)


if __name__ == "__main__":
    run_to_end(main)
