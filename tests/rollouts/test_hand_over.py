"""Handing a policy to the server that samples, and noticing that it samples from another."""

import sys

import numpy as np
import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.rollouts.hand_over import check_gap, hand_over


def program(tmp_path, text):
    path = tmp_path / "take.py"
    path.write_text(text)
    return f"{sys.executable} {path} --name='my policy'"


def test_a_program_gets_the_folder_behind_its_own_arguments(tmp_path):
    command = program(tmp_path, "import sys; open(sys.argv[-1] + '/taken', 'w').write(sys.argv[1])")
    hand_over(command, tmp_path)
    assert (tmp_path / "taken").read_text() == "--name=my policy"


@pytest.mark.parametrize("text, what", [
    ("import sys; sys.exit('the server is down')", "exit code 1: the server is down. The policy is kept"),
    ("import time; time.sleep(60)", "took more than 0.5 seconds"),
])  # fmt: skip
def test_a_program_that_fails_or_hangs_is_worth_another_try(tmp_path, text, what):
    with pytest.raises(TransientError, match=what):
        hand_over(program(tmp_path, text), tmp_path, timeout=0.5 if "sleep" in text else 60)


@pytest.mark.parametrize("command", ["/no/such/program", "take 'it"])
def test_what_cannot_be_started_is_refused(tmp_path, command):
    with pytest.raises(ConfigError, match="cannot be started"):
        hand_over(command, tmp_path)


def test_a_gap_above_the_limit_is_refused():
    figures = {"old_logps": [np.array([-1.0, -2.0]), np.array([-3.0])],
               "sampled_logps": [np.array([-1.3, -2.0]), np.array([-2.7])]}  # fmt: skip
    check_gap(figures, 0.21, "http://a/v1")
    with pytest.raises(ConfigError, match=r"differ by 0.2 nats per token, more than --max_gap=0.19"):
        check_gap(figures, 0.19, "http://a/v1")
    with pytest.raises(ConfigError, match="differ by nan"):
        check_gap(figures | {"old_logps": [np.array([np.nan, 1.0]), np.array([1.0])]}, 1.0, "http://a/v1")
