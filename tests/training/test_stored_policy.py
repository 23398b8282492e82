"""The policy of a run's newest checkpoint, or of the one before it if that is damaged."""

import shutil

import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.models.families.config_json import write_config_json
from kto_jax.training import stored_policy
from kto_jax.training.run_folder import write_json
from kto_jax.training.stored_policy import load_checkpoint, load_policy
from tests.training.test_checkpoints import ARCHITECTURE
from tests.training.test_verified_checkpoints import flip, largest_file, save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "run"
    states = save_steps(folder, count=3)
    write_json(folder / "model.json", write_config_json(ARCHITECTURE))
    write_json(folder / "config.json", {"evaluation": {}})
    return folder, states


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(stored_policy.console, "print", lambda text, **_: lines.append(text))
    return lines


def damage(run, step):
    flip(largest_file(run / "checkpoints" / str(step) / "state" / "d"), 8 * 700)


def holds(policy, state):
    return np.array_equal(policy["embed"]["table"], state.policy["embed"]["table"])


def test_the_newest_checkpoint_is_read_and_nothing_is_said(run, saved, said):
    step, stored = load_checkpoint(run)
    assert step == 3 and holds(stored.policy, saved[1][3]) and said == []


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_read(run, saved, said):
    damage(run, 3)
    step, stored = load_checkpoint(run)
    assert step == 2 and holds(stored.policy, saved[1][2])
    assert len(said) == 2 and said[0].startswith("warning: ") and "3 is damaged: " in said[0]
    assert said[1] == "taking the checkpoint of step 2 instead" and (run / "checkpoints" / "3").exists()


@pytest.mark.parametrize("how", ["flag", "setting", "number"])
def test_strict_and_a_chosen_step_refuse_a_damaged_checkpoint(run, said, how):
    damage(run, 3)
    if how == "setting":
        write_json(run / "config.json", {"checkpoint": {"strict": True}})
    with pytest.raises(
        ConfigError, match=r"3 is damaged: .*\. A whole checkpoint is needed\. .*kto_jax\.verify --run="
    ):
        load_checkpoint(run, "3" if how == "number" else "last", strict=how == "flag")
    assert said == []


def test_if_every_checkpoint_is_damaged_the_run_is_refused(run, said):
    damage(run, 2)
    damage(run, 3)
    with pytest.raises(ConfigError, match=r"3 is damaged: .* 1 older ones are damaged too\. A whole"):
        load_policy(run)
    assert said == []


def test_a_foreign_folder_with_a_higher_number_is_passed_over(run, said):
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "30")
    assert load_checkpoint(run)[0] == 3 and "30 is damaged: it is the checkpoint of step 2" in said[0]
