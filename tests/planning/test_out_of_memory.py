"""Running out of memory: the error names settings that fit, the command ends with 1, and no checkpoint changes."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from kto_jax.config import Config, OutOfMemory
from kto_jax.devices.compilation import Program
from kto_jax.planning import out_of_memory
from kto_jax.planning.out_of_memory import explained_out_of_memory
from kto_jax.planning.smaller_settings import Rung
from kto_jax.train import main
from tests import ROOT
from tests.planning.test_rows_that_fit import GIB, program

ALLOCATION = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes."
TINY = [
    "--config=configs/tiny.py", "--config.max_steps=3", "--config.evaluation.max_examples=8",
    "--config.checkpoint.every=1", "--config.data.holdout=0",
]  # fmt: skip


def explain(monkeypatch, rungs, error=ALLOCATION, total=90 * GIB, config=None):
    """The message for a step that needs `total`, if these settings are tried: (setting, bytes that it then needs)."""
    config = config or Config()

    def needing(config, total):
        return dataclasses.replace(program(8, total, 2, limit=80 * GIB), config=config)

    # Shorter rows need half of what the last setting needs.
    compiled = iter([total, rungs[-1][1] // 2])
    monkeypatch.setattr(out_of_memory, "compile_step", lambda config, *_: needing(config, next(compiled)))
    monkeypatch.setattr(
        out_of_memory,
        "try_settings",
        lambda tried, *_: iter([Rung(name, "", needing(tried.config, size)) for name, size in rungs]),
    )
    inputs = SimpleNamespace(
        schedule=SimpleNamespace(longest_row=SimpleNamespace(length=4096)), architecture=None, objective=None
    )
    with pytest.raises(OutOfMemory) as raised, explained_out_of_memory(config, inputs):
        raise jax.errors.JaxRuntimeError(f"{error}\nmore lines")
    return str(raised.value)


def test_the_settings_that_fit_are_named_beside_those_of_the_run(monkeypatch):
    message = explain(monkeypatch, [("model.remat=full", 85 * GIB), ("microbatch_rows=1", 40 * GIB)])
    assert message.startswith(
        f"the devices are out of memory: {ALLOCATION}. The run has config.microbatch_rows=8, rows"
    )
    assert "rows of 4096 tokens, model.remat=full and mesh {'data': -1" in message
    assert "needs 90 of 80 GiB" in message
    assert "It fits with --config.model.remat=full --config.microbatch_rows=1 (40 of 80 GiB" in message
    assert "config.batch_size=32 may stay" in message and "No checkpoint was overwritten" in message
    assert "more lines" not in message


def test_shorter_rows_are_the_last_resort_and_may_not_suffice(monkeypatch):
    message = explain(monkeypatch, [("model.remat=full", 85 * GIB)])
    half = Config().data.max_length // 2
    settings = f"--config.model.remat=full --config.data.max_length={half} --config.row_length=2048"
    assert f"It fits with {settings} (42.5" in message
    message = explain(monkeypatch, [("model.remat=full", 300 * GIB)])
    assert "Not even --config.model.remat=full" in message and "take more devices" in message


def test_one_process_of_several_does_not_compile_alone(monkeypatch):
    monkeypatch.setattr(out_of_memory.processes, "num_processes", lambda: 2)
    assert "python -m kto_jax.plan --topology=" in explain(monkeypatch, [("model.remat=full", 1)])


def test_other_errors_of_the_runtime_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained_out_of_memory(Config(), None):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_ends_with_1_and_resumes_from_its_checkpoint(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    call, calls = Program.__call__, []

    def fails_at_the_third_step(self, state, batch):
        calls.append(1)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError(ALLOCATION)
        return call(self, state, batch)

    monkeypatch.setattr(Program, "__call__", fails_at_the_third_step)
    assert main([*TINY, f"--workdir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr()
    assert f"error: the devices are out of memory: {ALLOCATION}" in printed.err and "It fits with" in printed.err
    assert main([*TINY, f"--workdir={tmp_path / 'run'}"]) == 0
    assert "continuing after step 2" in capsys.readouterr().err
