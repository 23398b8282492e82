"""Where the training of each round starts, and what of it is written."""

import dataclasses
import json

import pytest

from kto_jax.config import LoraConfig, ReferenceConfig, default_config, resolve
from kto_jax.devices import processes
from kto_jax.objectives import check_objective
from kto_jax.rollouts.options import Options, objective_config
from kto_jax.rollouts.runs import Runs


def config_with(**parts):
    config = default_config()
    config.model.path, config.data.train = "initial", "prompts.jsonl"
    return dataclasses.replace(resolve(config), **parts)


def runs(folder, name="kto", config=None, **flags):
    config = config or config_with()
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name=name))
    return Runs(Options(config, rounds=6, **flags), check_objective(objective_config(config)), folder)


@pytest.mark.parametrize("change, exported", [
    ({"keep": 2}, [4, 5]),
    ({"keep": 1, "sample_from": "http://here/v1", "hand_over_every": 3}, [2, 5]),
    ({"keep": 1, "config": config_with(lora=LoraConfig(rank=4))}, [0, 1, 2, 3, 4, 5]),
    ({"keep": 1, "reference": "previous", "config": config_with(reference=ReferenceConfig(param_dtype="int8"))},
     [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_policies_are_written_where_a_folder_is_read(tmp_path, change, exported):
    assert [number for number in range(6) if runs(tmp_path, **change).is_exported(number)] == exported


@pytest.mark.parametrize("name, rank, start", [
    ("kto", 0, (True, False)), ("grpo", 0, (True, True)), ("kto", 4, (False, False)), ("grpo", 4, (True, True)),
])  # fmt: skip
def test_a_round_starts_where_the_round_before_ended(tmp_path, name, rank, start):
    found = runs(tmp_path, name, config_with(lora=LoraConfig(rank=rank)))
    assert found.start_of(0).after is None
    later = found.start_of(2)
    assert (later.after == found.run_of(1), later.keeps_optimizer) == start
    reads_policy = later.after is None
    assert found.config_of(2).model.path == (str(found.run_of(1) / "policy") if reads_policy else "initial")
    assert found.config_of(2).reference.path == ("initial" if name == "kto" and not rank else "")


def test_a_round_that_an_earlier_version_began_keeps_its_configuration(tmp_path):
    found = runs(tmp_path)
    found.run_of(1).mkdir(parents=True)
    policy = str(found.run_of(0) / "policy")
    (found.run_of(1) / "config.json").write_text(json.dumps({"model": {"path": policy}}))
    assert found.config_of(1).model.path == policy and found.config_of(2).model.path == "initial"


@pytest.mark.parametrize("checkpoint, num_processes, forgotten", [
    ("4", 1, []),
    ("4", 2, [1, 2]),
    ("4.damaged", 1, [1, 2]),
    (None, 1, [1, 2]),
])  # fmt: skip
def test_unsaved_rounds_are_forgotten_unless_the_next_one_can_continue(
    tmp_path, monkeypatch, checkpoint, num_processes, forgotten
):
    """Several processes gather the policy before a round even if it is sampled, so that nothing can continue."""
    monkeypatch.setattr(processes, "num_processes", lambda: num_processes)
    found = runs(tmp_path)
    rows = [{"round": 0}, {"round": 1, "saved": False}, {"round": 2, "saved": False}]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(4):
        found.run_of(number).mkdir(parents=True)
    if checkpoint:
        (found.run_of(3) / "checkpoints" / checkpoint).mkdir(parents=True)
        (found.run_of(3) / "checkpoints" / checkpoint / "VERIFIED").touch()
    assert list(found.forget_unsaved()) == forgotten
    assert found.log() == (rows[:1] if forgotten else rows)
    assert [number for number in range(4) if not found.run_of(number).exists()] == forgotten
