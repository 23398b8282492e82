"""The flags of a run of online training, and the record of them in its folder."""

import dataclasses
import json

import pytest

from kto_jax.config import ConfigError, resolve
from kto_jax.config.recipes import load
from kto_jax.rollouts.options import Options, open_folder
from tests import ROOT


@pytest.fixture
def options():
    return Options(config=resolve(load(str(ROOT / "configs" / "online_quickstart.py"))[1]), workdir="x")


def test_a_run_of_an_earlier_version_which_lacks_settings_is_resumed(options, tmp_path):
    open_folder(tmp_path, options).close()
    record = json.loads((tmp_path / "online.json").read_text())
    del record["weight_cap"], record["config"]["objective"]["kl_target"]
    (tmp_path / "online.json").write_text(json.dumps(record))
    open_folder(tmp_path, options).close()
    assert json.loads((tmp_path / "online.json").read_text())["weight_cap"] == options.weight_cap


@pytest.mark.parametrize("changed", [{"weight_cap": 3.0}, {"num_samples": 7}, {"seed": 1}])
def test_a_run_with_other_settings_is_refused_and_may_be_longer(options, tmp_path, changed):
    open_folder(tmp_path, options).close()
    other = (
        dataclasses.replace(options, config=dataclasses.replace(options.config, **changed))
        if "seed" in changed
        else dataclasses.replace(options, **changed)
    )
    with pytest.raises(ConfigError, match="differs in " + ("config" if "seed" in changed else next(iter(changed)))):
        open_folder(tmp_path, other)
    open_folder(tmp_path, dataclasses.replace(options, rounds=options.rounds + 1)).close()
