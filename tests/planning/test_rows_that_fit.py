"""microbatch_rows="auto": the most rows that fit, found by compiling, and kept when the run is continued."""

import dataclasses
import itertools
import json
import os

import jax
import pytest

from kto_jax.command import read_command
from kto_jax.config import Config, ConfigError, MeshConfig, default_config, resolve
from kto_jax.plan import main as plan_command
from kto_jax.planning import rows_that_fit as fitting
from kto_jax.planning.compile_step import CompiledStep, Shape, host_memory
from kto_jax.planning.topology import CHIPS, Topology
from kto_jax.train import main
from kto_jax.training.inputs import read_inputs
from kto_jax.training.logs import read_metrics
from tests import ROOT

HERE = Topology("local", tuple(jax.devices()))
GIB = 2**30
TINY = [
    "--config=configs/tiny.py", "--config.microbatch_rows=auto", "--config.max_steps=2",
    "--config.evaluation.max_examples=8", "--config.checkpoint.every=1",
]  # fmt: skip
DEMONSTRATIONS = ["--config.objective.name=sft", "--config.batch_size=64", "--config.row_length=auto"]


def program(rows, total, microbatches, limit=100 * GIB, refusal=""):
    return CompiledStep(
        config=Config(), mesh={}, shape=Shape(rows, 64, 64, 4, 4, microbatches, 16), parts={}, arguments=0,
        temporaries=total, refusal=refusal, limit=limit, collectives=(), tokens=1.0, flops=1.0, params=1,
        active_params=1, weight_bytes=1.0, gradient_bytes=0.0, passes=1, compile_seconds=0.0, host_bytes=0,
    )  # fmt: skip


def find(compile_rows, numbers=(2, 4, 8, 16, 32)):
    """The rows that are found, why, and what was compiled on the way."""
    tried = []

    def compile_and_note(rows):
        tried.append(rows)
        return compile_rows(rows)

    found, why = fitting.find_rows(numbers, compile_and_note, HERE)
    return found.shape.rows, why, tried


# ------------------------------------------------------------------------------------------------ the search


def test_rows_are_doubled_until_they_do_not_fit():
    # Half of the host's memory may be taken: 50 GiB.
    assert find(lambda rows: program(rows, 4 * rows * GIB, 9)) == (8, "16 would take 64.00 GiB", [2, 4, 8, 16])


def test_a_program_that_the_compiler_refuses_does_not_fit():
    rows, why, _ = find(lambda rows: program(rows, rows * GIB, 9, refusal="out of memory" if rows > 4 else ""))
    assert (rows, why) == (4, "8 would take at least 8.00 GiB")


def test_there_are_no_more_rows_than_a_batch_fills():
    found = find(lambda rows: program(rows, rows, microbatches=-(-5 // rows)), (1, 2, 4, 8, 16))
    assert found == (8, "a batch fills no more", [1, 2, 4, 8])


def test_if_none_fits_the_fewest_rows_are_returned():
    assert find(lambda rows: program(rows, 60 * GIB, 9)) == (2, "the mesh can share no fewer", [2])


def test_devices_that_share_a_row_get_the_only_possible_number():
    assert find(lambda rows: program(rows, GIB, 9), [4]) == (4, "devices that share a row take one at a time", [4])


def test_a_program_that_does_not_fit_on_another_process_does_not_fit(monkeypatch):
    monkeypatch.setattr(fitting.processes, "exchange_text", lambda word: [word, "False"])
    assert find(lambda rows: program(rows, GIB, 9))[0] == 2


def test_a_device_of_its_own_is_filled_further_than_the_memory_of_a_host():
    chip = dataclasses.replace(HERE, chip=CHIPS["v5e"])
    assert fitting.usable_bytes(program(1, GIB, 1), HERE) == 50 * GIB
    assert fitting.usable_bytes(program(1, GIB, 1), chip) == 95 * GIB


@pytest.mark.parametrize("sizes, numbers", [
    (MeshConfig(), [8, 16, 32]),
    (MeshConfig(data=2, fsdp=2, tensor=2), [4, 8, 16]),
    (MeshConfig(tensor=8), [1, 2, 4]),
    (MeshConfig(data=4, sequence=2), [4]),
])  # fmt: skip
def test_only_numbers_that_the_mesh_can_shard_are_tried(sizes, numbers):
    assert list(itertools.islice(fitting.candidates(Config(mesh=sizes), 8), 3)) == numbers


def test_the_memory_of_a_container_is_the_limit_of_its_control_group(tmp_path):
    group = tmp_path / "memory.max"
    installed = host_memory(group)
    assert installed == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group.write_text("max\n")
    assert host_memory(group) == installed
    group.write_text(f"{GIB}\n")
    assert host_memory(group) == GIB


@pytest.mark.parametrize("given", [0, -8, "most", 1.5, True])
def test_other_texts_and_numbers_below_one_are_refused(given):
    values = default_config()
    values.model.path = values.data.train = "x"
    values.microbatch_rows = given
    with pytest.raises(ConfigError, match=r'microbatch_rows=.*Allowed: .*"auto"\. Correct config.microbatch_rows'):
        resolve(values)


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Demonstrations, which are the least to compile: (the run, what it reads)."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(folder / "cache"))
        config, _ = read_command([*TINY, *DEMONSTRATIONS])
        return config, read_inputs(config, folder)


def settle(inputs, workdir, monkeypatch, compile_for, rows_before=None):
    """The rows that are settled on, and those that were compiled."""
    tried = []

    def compile_and_note(config, *arguments, **options):
        tried.append(config.microbatch_rows)
        return compile_for(config, *arguments, **options)

    monkeypatch.setattr(fitting, "compile_for", compile_and_note)
    if rows_before:
        (workdir / "config.json").write_text(json.dumps({"microbatch_rows": rows_before}))
    config, settled = fitting.resolve_rows(*inputs, workdir)
    assert config.microbatch_rows == settled.schedule.microbatch_rows == settled.held_out.microbatch_rows
    return config.microbatch_rows, tried


def growing(config, *_, **__):
    """10 GiB for 8 rows, 50 may be taken."""
    return program(config.microbatch_rows, config.microbatch_rows * 10 * GIB // 8, 9)


def test_rows_are_found_by_compiling_for_the_longest_rows(inputs, tmp_path, monkeypatch, capsys):
    compile_for, compiled = fitting.compile_for, []

    def with_little_room(*arguments, **options):
        found = compile_for(*arguments, **options)
        # Half of the limit is room for the first program and a little more, not for the second.
        compiled.append(dataclasses.replace(found, limit=compiled[0].limit if compiled else int(2.02 * found.total)))
        return compiled[-1]

    assert settle(inputs, tmp_path, monkeypatch, with_little_room) == (8, [8, 16])
    small, large = compiled
    assert small.total < large.total and large.shape.rows == 16
    lengths = [small.shape.row_length, inputs[1].schedule.longest_row.length]
    assert lengths[0] == lengths[1] >= inputs[1].schedule.batch(0).matched.tokens.shape[-1]
    said = " ".join(capsys.readouterr().err.split())
    assert "microbatch_rows: 8, for which the step takes 0.00 of" in said and "; 16 would take" in said


@pytest.mark.parametrize("before, rows, tried", [
    (None, 32, [8, 16, 32, 64]),
    (16, 16, [16]),
    (12, 32, [8, 16, 32, 64]),  # cannot be shared by 8 devices
    (64, 32, [64, 8, 16, 32, 64]),  # does not fit
])  # fmt: skip
def test_a_resumed_run_keeps_its_rows_if_it_can(before, rows, tried, inputs, tmp_path, monkeypatch):
    assert settle(inputs, tmp_path, monkeypatch, growing, before) == (rows, tried)


def test_all_processes_take_the_rows_that_the_first_one_remembers(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting.processes, "exchange_text", lambda word: ["8" if word == "24" else word, word])
    assert settle(inputs, tmp_path, monkeypatch, growing, 24) == (8, [8])


def test_processes_on_one_host_share_its_memory(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting.processes, "exchange_text", lambda word: [word, word])
    assert settle(inputs, tmp_path, monkeypatch, growing) == (16, [8, 16, 32])


def test_a_run_with_little_memory_is_tried_with_the_fewest_rows(inputs, tmp_path, monkeypatch):
    needs_much = lambda config, *_, **__: program(config.microbatch_rows, 60 * GIB, 9)  # noqa: E731
    assert settle(inputs, tmp_path, monkeypatch, needs_much) == (8, [8])


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def in_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))


def said_by(capsys, code, *arguments, command=main):
    assert command([*TINY, *arguments]) == code
    said = capsys.readouterr()
    return " ".join((said.err + said.out).split())


def test_a_step_that_does_not_fit_is_refused_and_nothing_is_written(in_the_project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "compile_for", lambda config, *_, **__: program(config.microbatch_rows, 120 * GIB, 4))
    said = said_by(capsys, 2, f"--workdir={tmp_path / 'run'}")
    assert (
        "with 8 rows the step needs 120.00 GiB of each device, and the mesh can share no fewer. Allowed: up to" in said
    )
    assert "the 100.00 GiB that a device has. Take more devices" in said
    assert not (tmp_path / "run").exists()


def test_a_plan_finds_the_rows_too(in_the_project, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fitting, "compile_step", lambda config, *_: program(config.microbatch_rows, 20 * GIB, 1))
    out = tmp_path / "plan.json"
    said = said_by(capsys, 0, "--topology=local", "--mean_length=32", f"--json={out}", command=plan_command)
    assert "microbatch_rows: 8; a batch fills no more" in said
    assert json.loads(out.read_text())["batch"]["microbatches"] == 1


@pytest.mark.slow
def test_a_run_records_its_rows_and_is_resumed_with_them(in_the_project, tmp_path, capsys):
    run = tmp_path / "run"
    command = [
        f"--workdir={run}",
        "--config.objective.name=sft",
        "--config.max_steps=1",
        "--config.samples.num_prompts=0",
    ]
    said = said_by(capsys, 0, *command)
    rows = json.loads((run / "config.json").read_text())["microbatch_rows"]
    assert rows in (8, 16) and f"microbatch_rows: {rows}, for which" in said and "; a batch fills no more" in said
    assert "; as the run began" in said_by(capsys, 0, *command)
    assert json.loads((run / "config.json").read_text())["microbatch_rows"] == rows
    assert len(read_metrics(run / "metrics.jsonl")) == 1
