import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from kto_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
)
from kto_jax.objectives import check_objective
from kto_jax.plan import Options, main
from kto_jax.planning import compile_step as planning
from kto_jax.planning import smaller_settings as ladder
from kto_jax.planning.compile_step import (
    CompiledStep,
    Lengths,
    Shape,
    assumed_shape,
    count_work,
    empty_batch,
    read_task,
)
from kto_jax.planning.hlo import Collective
from kto_jax.planning.report import cost_per_million, find_bounds, show
from kto_jax.planning.sampling_memory import sampling_bytes
from kto_jax.planning.topology import CHIPS, Topology, open_topology
from kto_jax.training.initial_state import make_abstract_state, make_model
from tests import ROOT

TINY = ROOT / "configs" / "tiny.py"
MODEL = ROOT / "configs" / "tiny_model"
ARCHITECTURES = ROOT / "configs" / "architectures"
KTO = check_objective(ObjectiveConfig())


def config(**fields) -> Config:
    model = ModelConfig(path=str(MODEL), dtype="float32", remat="none")
    data = DataConfig(train="feedback.jsonl", max_length=64, max_prompt_length=48)
    return dataclasses.replace(Config(model=model, data=data, batch_size=16), **fields)


def program(total: int, limit: int = 100, **fields) -> CompiledStep:
    values = dict(
        config=config(), mesh={"data": 8, "fsdp": 1, "tensor": 1}, shape=Shape(8, 64, 64, 2, 1, 1, 16),
        parts={"policy": 10, "reference": 5, "moments": 20, "batch": 1}, arguments=40, temporaries=total - 40,
        refusal="", limit=limit, collectives=(), tokens=512.0, flops=1e15, params=10**9, active_params=10**9,
        weight_bytes=1e9, gradient_bytes=2**30, passes=5, compile_seconds=1.0, host_bytes=2**30,
    )  # fmt: skip
    return CompiledStep(**(values | fields))


# ------------------------------------------------------------------------------------------------ what is assumed


def test_a_batch_of_equal_examples_fills_rows_and_microbatches():
    shape = assumed_shape(config(batch_size=40, microbatch_rows=8), KTO, Lengths(32, 16))
    assert shape == Shape(8, 64, 64, slots=2, room=4, microbatches=3, sequences=40)


def test_pairs_are_adjacent_in_rows_of_twice_the_length():
    shape = assumed_shape(config(batch_size=16), check_objective(ObjectiveConfig(name="dpo")), Lengths(48, 16))
    assert (shape.row_length, shape.sequences, shape.microbatches) == (128, 32, 2)


def test_a_mean_example_that_fits_no_row_is_refused():
    with pytest.raises(ConfigError, match=r"--mean_completion=40 does not fit.*16 of them for completions.*Set --mean"):
        assumed_shape(config(completion_share=0.25), KTO, Lengths(64, 40))


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("name", ["kto", "dpo"])
def test_the_empty_batch_has_the_rows_that_the_objective_reads(name, precomputed):
    objective = check_objective(ObjectiveConfig(name=name))
    shape = assumed_shape(config(), objective, Lengths(32, 16))
    batch = empty_batch(shape, objective, precomputed=precomputed)
    assert batch.matched.tokens.shape == (shape.room, 8, shape.row_length)
    assert batch.unmatched.filled.shape == (shape.room if name == "kto" else 0, 8, shape.slots)
    assert (batch.matched_reference is not None) == precomputed
    assert all(leaf.dtype in (np.int32, np.float32, np.bool_) for leaf in jax.tree.leaves(batch))


def test_a_plan_has_the_shapes_and_types_of_the_batch_that_training_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    from kto_jax.command import read_command
    from kto_jax.training.inputs import read_inputs

    given, _ = read_command([f"--config={TINY}"])
    inputs = read_inputs(given, tmp_path)
    real = inputs.schedule.batch(0)
    shape = assumed_shape(given, inputs.objective, Lengths(20, 8))
    shape = dataclasses.replace(shape, slots=inputs.schedule.num_slots, room=real.matched.tokens.shape[0])
    planned = empty_batch(shape, inputs.objective, precomputed=False)
    described = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), batch) for batch in (planned, real)]
    assert described[0] == described[1]


def test_sampling_needs_the_state_the_weights_and_a_cache_for_all_slots():
    run = config(objective=ObjectiveConfig(name="grpo", old_logps="sampled"))
    task, topology = read_task(run), open_topology("local")
    found = sampling_bytes(run, task, topology.devices, num_slots=30)
    model = task.architecture
    rows = (32 + 8) // 8  # of a device: 30 slots and 8 prefixes, each a multiple of 8 devices
    cache = 2 * model.num_layers * model.num_kv_heads * 64 * model.head_dim * 4 * rows
    # Policy and two moments, beside the scalars of the state.
    assert 0 <= found["training state"] - 3 * 4 * model.num_params() < 100
    assert found | {"training state": 0} == {
        "training state": 0, "weights for sampling": 4 * model.num_params(), "KV cache": cache,
    }  # fmt: skip
    planned = program(50, sampling=found)
    assert not planned.fits and dataclasses.replace(planned, sampling={"KV cache": 99}).fits
    console = Console(record=True, file=io.StringIO(), width=200)
    show(planned, topology, Lengths(32, 16), None, console)
    assert "total while sampling, before the step" in console.export_text()


@pytest.mark.parametrize("name, options", [("grpo", {"old_logps": "sampled"}), ("ppo", {})])
def test_a_plan_has_the_figures_of_sampled_tokens(name, options):
    objective = check_objective(ObjectiveConfig(name=name, **options))
    shape = assumed_shape(config(), objective, Lengths(32, 16))
    batch = empty_batch(shape, objective, precomputed=False)
    assert batch.sampled.advantages.shape == (shape.room, 8, shape.completion_length)


@pytest.mark.parametrize("chosen, other", [("float32", "bfloat16 halves"), ("bfloat16", "float32 doubles")])
def test_the_gradients_that_devices_sum_are_reported_with_their_dtype(chosen, other):
    planned = program(50, config=config(model=ModelConfig(dtype="bfloat16", reduce_dtype=chosen)))
    console = Console(record=True, file=io.StringIO(), width=200)
    show(planned, open_topology("local"), Lengths(32, 16), None, console)
    text = console.export_text()
    assert f"the devices sum 1.00 GiB of gradients of the layers' matrices in {chosen}; " in text
    assert f"config.model.reduce_dtype={other} them" in text


def test_the_active_parameters_of_a_mixture_of_experts_are_reported():
    console = Console(record=True, file=io.StringIO(), width=200)
    for active in (3_353_032_704, 30_532_122_624):
        show(
            program(50, params=30_532_122_624, active_params=active),
            open_topology("local"),
            Lengths(32, 16),
            None,
            console,
        )
    text = console.export_text()
    assert text.count("mixture of experts") == 1
    assert "30.53e9 parameters, of which a token passes through 3.35e9; operations count these" in text


def test_operations_are_those_that_training_counts():
    run = config()
    topology = open_topology("local")
    task = read_task(run)
    _, model = planning.make_model(run, task, topology.devices)
    tokens, flops = count_work(model, KTO, Lengths(32, 16), precomputed=False)
    body = task.architecture.flops_per_token(16.5, head=False) * 32
    head = (task.architecture.flops_per_token(1) - task.architecture.flops_per_token(1, head=False)) * 16
    assert tokens == 32
    # Forward and backward of the policy, forward of the reference, and both for the unmatched rows.
    assert flops == pytest.approx((3 + 1 + 2) * (body + head), rel=1e-6)
    assert count_work(model, KTO, Lengths(32, 16), precomputed=True)[1] == pytest.approx(4 * (body + head), rel=1e-6)


# ------------------------------------------------------------------------------------------------ the ladder


def test_the_ladder_continues_until_the_step_fits(monkeypatch):
    totals = iter([300, 200, 90, 10])
    tried = []

    def compiled(changed, *_):
        tried.append(changed)
        return program(next(totals), config=changed)

    monkeypatch.setattr(ladder, "compile_step", compiled)
    run = config(microbatch_rows=32, mesh=MeshConfig(data=2, fsdp=-1))
    rungs = list(ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16)))
    assert [rung.setting for rung in rungs] == ["model.remat=full", "microbatch_rows=8", "mesh.data=1 mesh.fsdp=8"]
    # Each setting is added to those before it.
    assert (tried[2].model.remat, tried[2].microbatch_rows, tried[2].mesh) == ("full", 8, MeshConfig(1, 8))
    assert [rung.program.fits for rung in rungs] == [False, False, True]


def test_the_ladder_ends_with_rounded_weights_and_leaves_out_what_is_so_already(monkeypatch):
    monkeypatch.setattr(ladder, "compile_step", lambda changed, *_: program(400, config=changed))
    run = config(mesh=MeshConfig(data=1, fsdp=-1), model=ModelConfig(path=str(MODEL), remat="full"))
    rungs = list(ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16)))
    assert [rung.setting for rung in rungs] == [
        "mesh.fsdp=1 mesh.sequence=8 microbatch_rows=1", "optimizer.moments_dtype=bfloat16",
        "reference.param_dtype=bfloat16", "reference.precompute=True", "model.param_dtype=bfloat16",
        "lora.rank=16 model.param_dtype=float32", "reference.param_dtype=int8", "reference.param_dtype=nf4",
    ]  # fmt: skip
    # Adapters are not rounded, and the frozen weights are as the previous rungs left them.
    *_, adapters, rounded, smallest = (rung.program.config for rung in rungs)
    assert (adapters.lora.rank, adapters.model.param_dtype, adapters.reference.param_dtype) == (
        16,
        "float32",
        "bfloat16",
    )
    assert rounded == dataclasses.replace(adapters, reference=ReferenceConfig(param_dtype="int8", precompute=True))
    assert smallest == dataclasses.replace(adapters, reference=ReferenceConfig(param_dtype="nf4", precompute=True))


def test_the_ladder_leaves_a_run_with_adapters_its_own(monkeypatch):
    monkeypatch.setattr(ladder, "compile_step", lambda changed, *_: program(400, config=changed))
    run = config(lora=LoraConfig(rank=4))
    rungs = list(ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16)))
    settings = [rung.setting for rung in rungs]
    assert settings[-2:] == ["reference.param_dtype=int8", "reference.param_dtype=nf4"]
    assert not [setting for setting in settings if "lora" in setting or "model.param_dtype" in setting]
    assert rungs[-1].program.config.lora.rank == 4


def test_the_ladder_does_not_undo_a_setting_that_needs_less(monkeypatch):
    monkeypatch.setattr(ladder, "compile_step", lambda changed, *_: program(400, config=changed))
    run = config(reference=ReferenceConfig(param_dtype="int8"), model=ModelConfig(path=str(MODEL), remat="offload"))
    rungs = list(ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16)))
    assert not {"model.remat=full", "reference.param_dtype=bfloat16"} & {rung.setting for rung in rungs}


def test_a_reference_in_int8_is_planned_with_a_quarter_of_the_memory():
    run = config(reference=ReferenceConfig(param_dtype="int8"))
    mesh, model = make_model(run, read_task(run))
    state = make_abstract_state(run, read_task(run), model, mesh, optax.sgd(1.0))
    assert 0.25 < planning.device_bytes(state.reference) / planning.device_bytes(state.policy) < 0.28


def test_a_setting_that_the_run_refuses_is_reported_and_skipped(monkeypatch):
    monkeypatch.setattr(ladder, "compile_step", lambda changed, *_: program(400, config=changed))
    run = config(reference=ReferenceConfig(sync_every=5, param_dtype="bfloat16"))
    rungs = ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16))
    refused = {rung.setting: rung.why_not for rung in rungs if rung.program is None}
    assert list(refused) == ["reference.precompute=True", "lora.rank=16 model.param_dtype=float32"]
    assert "sync_every=5 moves the reference" in refused["reference.precompute=True"]
    assert "sync_every=5 cannot be used with config.lora.rank=16" in refused["lora.rank=16 model.param_dtype=float32"]


def test_what_comes_after_a_refused_setting_is_tried_without_it(monkeypatch):
    monkeypatch.setattr(ladder, "compile_step", lambda changed, *_: program(400, config=changed))
    run = config(reference=ReferenceConfig(sync_every=5, param_dtype="bfloat16"))
    rungs = list(ladder.try_settings(program(400, config=run), read_task(run), open_topology("local"), Lengths(32, 16)))
    policy = next(rung.program.config for rung in rungs if rung.setting == "model.param_dtype=bfloat16")
    assert not policy.reference.precompute
    assert "reference.param_dtype=int8" not in [rung.setting for rung in rungs]


# ------------------------------------------------------------------------------------------------ bounds


def test_the_slowest_of_peak_memory_and_links_bounds_the_step():
    topology = Topology("v5e:2x2", tuple(jax.devices()[:4]), CHIPS["v5e"])
    gather = Collective("all-gather", (None,), 4, int(200e9), False)
    bounds = find_bounds(program(100, collectives=(gather, gather)), topology)
    assert bounds.compute == pytest.approx(1e15 / (4 * 197e12))
    # Five passes over the weights, the reference once, policy and moments read and written.
    assert bounds.memory == pytest.approx((5e9 + 5 + 2 * 30) / 819e9)
    assert bounds.network == pytest.approx(2 * 0.75 * 200e9 / 200e9)
    assert bounds.exposed == bounds.network
    assert bounds.seconds == bounds.network + bounds.compute


def test_a_collective_beside_computation_adds_no_time_of_its_own():
    topology = Topology("v5e:2x2", tuple(jax.devices()[:4]), CHIPS["v5e"])
    beside, alone = (Collective("all-gather", (), 4, int(4e9), False, overlaps) for overlaps in (True, False))
    bounds = find_bounds(program(100, collectives=(beside, alone)), topology)
    assert bounds.exposed == pytest.approx(0.75 * 4e9 / 200e9)
    assert bounds.network == 2 * bounds.exposed
    assert bounds.seconds == max(bounds.compute + bounds.exposed, bounds.memory, bounds.network)


def test_traffic_between_slices_is_bounded_by_their_network():
    topology = Topology("2*v5e:2x2", tuple(jax.devices()), CHIPS["v5e"], 2)
    reduce = Collective("all-reduce", (), 2, int(25e9), True)
    bounds = find_bounds(program(100, collectives=(reduce,)), topology)
    assert (bounds.network, bounds.slices) == (0, pytest.approx(25e9 / (25e9 / 8)))


def test_cost_follows_from_chips_price_and_time():
    assert cost_per_million(3600.0, 2e6, 4, 1.5) == pytest.approx(3.0)


def test_a_refused_program_never_fits_and_counts_the_state_that_it_would_hold():
    refused = program(0, arguments=None, temporaries=7, refusal="RESOURCE_EXHAUSTED", limit=10**9)
    assert (refused.total, refused.fits) == (36 + 7, False)


# ------------------------------------------------------------------------------------------------ the command


def test_a_plan_for_this_machine_says_that_it_fits(capsys, tmp_path):
    code = main([f"--config={TINY}", "--topology=local", "--mean_length=40", f"--json={tmp_path / 'plan.json'}"])
    printed = capsys.readouterr().out
    assert code == 0
    assert re.search(r"fits: .* of .* on each device", printed)
    assert "16 examples per step, each of 40 tokens, 20 of them completion" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["total_bytes"] < plan["limit_bytes"]
    params = plan["part_bytes"]["policy"]
    # The first moment and the second, and the counters of the optimizer.
    assert 2 * params < plan["part_bytes"]["moments"] < 2 * params + 64
    assert plan["batch"]["microbatches"] == 2
    assert sum(row["bytes"] for row in plan["collectives"]) >= params


def test_a_plan_that_does_not_fit_says_what_would(capsys, monkeypatch):
    monkeypatch.setattr("kto_jax.plan.compile_step", lambda given, *_: program(2**31, limit=2**30, config=given))
    monkeypatch.setattr(ladder, "compile_step", lambda given, *_: program(2**29, limit=2**30, config=given))
    assert main([f"--config={TINY}", "--topology=local", "--config.model.remat=none"]) == 3
    printed = capsys.readouterr().out
    assert "does not fit: 2.00 GiB of 1.00 GiB on each device" in printed
    assert re.search(r"as given .*2\.00 GiB .*no", printed)
    assert re.search(r"model\.remat=full .*512\.00 MiB .*yes", printed)
    assert "it fits with model.remat=full" in printed


def test_what_a_plan_says_would_fit_names_each_field_once_with_its_last_value(capsys, monkeypatch):
    def compiled(given, *_):
        return program(1 if given.lora.rank else 2**31, limit=2**30, config=given)

    monkeypatch.setattr("kto_jax.plan.compile_step", compiled)
    monkeypatch.setattr(ladder, "compile_step", compiled)
    assert main([f"--config={TINY}", "--topology=local"]) == 3
    *_, said = capsys.readouterr().out.strip().splitlines()
    fields = dict(field.split("=") for field in said.removeprefix("it fits with ").split())
    assert said.count("=") == len(fields)
    assert (fields["lora.rank"], fields["model.param_dtype"]) == ("16", "float32")
    assert (fields["mesh.fsdp"], fields["mesh.sequence"]) == ("1", "8")


def test_a_plan_reports_that_no_setting_helps(capsys, monkeypatch):
    monkeypatch.setattr("kto_jax.plan.compile_step", lambda given, *_: program(2**31, config=given))
    monkeypatch.setattr(ladder, "compile_step", lambda given, *_: program(2**31, config=given))
    assert main([f"--config={TINY}", "--topology=local"]) == 3
    assert "none of these makes it fit: take more chips" in capsys.readouterr().out


def test_the_ladder_can_be_left_out(capsys, monkeypatch):
    monkeypatch.setattr("kto_jax.plan.compile_step", lambda *_: program(200, refusal="RESOURCE_EXHAUSTED: no room"))
    assert main([f"--config={TINY}", "--topology=local", "--ladder=false"]) == 3
    printed = capsys.readouterr().out
    assert "refused: RESOURCE_EXHAUSTED: no room" in printed and "settings that need less" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology is missing. Allowed: v4, v5e"),
        (["--topology=v9:2x2"], "--topology=v9:2x2 is not known"),
        (["--topology=local", "--mean_length=65"], "Allowed: a mean length from 2 to config.data.max_length=64"),
        (["--topology=local", "--mean_length=x"], "--mean_length='x' cannot be used. Allowed: an integer, 2 or more"),
        (["--topology=local", "--mean_length=8", "--mean_completion=8"], "and a shorter completion"),
        (
            ["--topology=local", "--price_per_chip_hour=-1"],
            "--price_per_chip_hour=-1 cannot be used. Allowed: a",
        ),
        (["--topology=local", "--ladder=maybe"], "Allowed: True or False"),
        (["--topology=local", "--toplogy=v5e:2x2"], "Did you mean '--topology'?"),
        (["--topology=local", "--json"], "--json lacks its value"),
        (["--topology=local", "--config.mesh.fsdp=3"], "does not multiply to the 8 devices"),
        (["--topology=local", "--config.reference.sync_mix=0.5"], "has no use: reference.sync_every is 0"),
        (["--topology=local", "--config.data.max_length=4096"], "beyond the model's context"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(flags, message, capsys):
    assert main([f"--config={TINY}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{field.name}" in printed for field in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama_3_1_8b", 8.03), ("llama_3_1_70b", 70.55), ("llama_3_2_1b", 1.236), ("gemma_3_1b", 1.0)],
)
def test_the_architectures_have_the_published_number_of_parameters(name, billions):
    task = read_task(config(model=ModelConfig(path=str(ARCHITECTURES / name))))
    assert task.architecture.num_params() / 1e9 == pytest.approx(billions, abs=0.005)


PLAN = [sys.executable, "-m", "kto_jax.plan", f"--config={TINY}", "--config.model.dtype=bfloat16"]


@pytest.mark.slow
def test_the_ladder_compiles_a_step_that_needs_less(capsys, monkeypatch):
    run = config(microbatch_rows=32, batch_size=64)
    task, topology = read_task(run), open_topology("local")
    first = planning.compile_step(run, task, topology, Lengths(32, 16))
    first = dataclasses.replace(first, limit=first.total - 1)
    monkeypatch.setattr(planning, "device_limit", lambda topology: first.limit)
    *_, last = ladder.try_settings(first, task, topology, Lengths(32, 16))
    assert last.program.fits and last.program.total < first.total


@pytest.mark.slow
def test_a_real_tpu_program_is_compiled_on_a_machine_without_one(tmp_path):
    pytest.importorskip("libtpu")
    file = tmp_path / "plan.json"
    fsdp = ["--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.batch_size=64"]
    done = subprocess.run(
        [*PLAN, "--topology=v5e:2x2", f"--json={file}", *fsdp], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(file.read_text())
    assert (plan["num_devices"], plan["mesh"]["fsdp"], plan["limit_bytes"]) == (4, 4, 16 * 2**30)
    kinds = {row["kind"] for row in plan["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert any(row["loops"] == "microbatches × 2" for row in plan["collectives"])


@pytest.mark.slow
def test_a_program_of_two_slices_crosses_their_network(tmp_path):
    pytest.importorskip("libtpu")
    file = tmp_path / "plan.json"
    fsdp = ["--config.mesh.data=2", "--config.mesh.fsdp=-1"]
    done = subprocess.run(
        [*PLAN, "--topology=2*v5e:2x2", f"--json={file}", *fsdp], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(file.read_text())
    assert sum(row["bytes"] for row in plan["collectives"] if row["crosses_slices"]) > plan["part_bytes"]["policy"]
