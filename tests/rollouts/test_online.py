"""Parts of an online run that need no model: feedback with advantages, the hand-over, and what is said of a round."""

import dataclasses
import json
import shlex
import sys

import numpy as np
import pytest

from kto_jax.objectives import check_objective
from kto_jax.online import _Online
from kto_jax.rollouts.options import Options, objective_config
from tests.rollouts.test_advantages import figures, rows
from tests.rollouts.test_runs import config_with, runs

NOTE = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"


def online(folder, name="grpo", config=None, **flags):
    found = runs(folder, name, config, **flags)
    options = Options(found.options.config, rounds=6, **flags)
    return _Online(options, check_objective(objective_config(options.config)), None, found, [], [], None, "command")


def sampled(*rewards):
    """Completions of one prompt, as a round samples them."""
    return [
        {**row, "num_tokens": len(row["completion_ids"]), "rewards": {"r": row["reward"]}} for row in rows(*rewards)
    ]


def feedback_of(run, number, rollout, by_token):
    run.runs.folder_of(number).mkdir(parents=True, exist_ok=True)
    labelled = run._write_feedback(number, rollout, by_token)
    text = (run.runs.folder_of(number) / "feedback.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == json.loads(json.dumps(labelled.rows))
    return labelled.rows


@pytest.mark.parametrize("flags, cap", [
    ({}, None), ({"sample_from": "http://here/v1", "sample_model": "a", "hand_over": "b", "weight_cap": 1.5}, 1.5),
])  # fmt: skip
def test_tokens_of_a_server_are_weighed_up_to_a_cap_and_own_ones_are_not(tmp_path, capsys, flags, cap):
    rollout = sampled(0, 1, 3)
    by_token = figures(rollout)
    # The server gave the first completion 0.2 nats less per token, the last one nat less.
    by_token["sampled_logps"] = [old - less for old, less in zip(by_token["old_logps"], (0.2, 0, 1.0), strict=True)]
    expected = np.array([-4 / 3, -1 / 3, 5 / 3]) * (1 if cap is None else [np.exp(0.2), 1, 1.5])
    written = feedback_of(online(tmp_path, **flags), 0, rollout, by_token)
    scale = written[1]["advantages"][0] / (-1 / 3)  # by the deviation of the group
    for row, value, length in zip(written, expected, (3, 1, 2), strict=True):
        np.testing.assert_allclose(row["advantages"], [value * scale] * length, rtol=1e-5)
    assert "3 completions with advantages, 1 of them positive" in " ".join(capsys.readouterr().err.split())


def test_thumbs_and_pairs_are_counted_and_what_is_not_used_is_said(tmp_path, capsys):
    rollout = sampled(0, 1, 2)
    rollout[1]["ended"] = False
    thumbs = feedback_of(online(tmp_path / "kto", "kto", label="0.5", cut="drop"), 0, rollout, {})
    assert [row["label"] for row in thumbs] == [0, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "reward 1.000 over 3 completions; 2 thumbs, 1 of them desirable; not used: 1 " in said
    feedback_of(online(tmp_path / "dpo", "dpo", cut="drop"), 0, rollout, {})
    assert "over 3 completions; 1 pairs; not used:" in " ".join(capsys.readouterr().err.split())


def test_a_policy_is_handed_over_unless_its_round_is_sampled_already(tmp_path):
    noted = tmp_path / "noted"
    command = shlex.join([sys.executable, "-c", NOTE, str(noted)])
    flags = {"sample_from": "http://here/v1", "sample_model": "a", "hand_over": command}
    run = online(tmp_path / "run", **flags)
    policy = run.runs.run_of(1) / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").touch()
    run._hand_over(2)
    assert noted.read_text().splitlines() == [str(policy)]
    run.runs.folder_of(3).mkdir(parents=True)
    (run.runs.folder_of(3) / "rollout.jsonl").touch()
    run._hand_over(3)
    online(tmp_path / "own")._hand_over(2)  # no server
    assert len(noted.read_text().splitlines()) == 1


def test_a_finished_round_is_recorded_with_what_keeps_it_from_teaching(tmp_path, capsys):
    run = online(tmp_path)
    run.runs.run_of(0).mkdir(parents=True)
    metrics = [{"step": step, "loss": 0.5, "clipped": 0.9} for step in (1, 2)]
    (run.runs.run_of(0) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run.runs.run_of(0) / "manifest.json").write_text('{"rejections": {"histogram": {"too long": 2}}}')
    run._record(0, {"reward": 1.0, "cut": 1.0, "no_spread": 0.95, "completions": 8.0}, {"cut": 3})
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: no completion ended within" in said and "warning: for 95% of the prompts all" in said
    (row,) = run.runs.log()
    assert (row["round"], row["reward"], row["clipped"]) == (0, 1.0, 0.9)
    assert row["dropped"] == {"cut": 3, "rejected: too long": 2}


def test_a_penalty_of_the_kl_follows_the_round_before(tmp_path):
    config = config_with()
    objective = dataclasses.replace(config.objective, kl_target=6.0, kl_horizon=100.0, kl_weight=0.2)
    run = online(tmp_path, "ppo", config=dataclasses.replace(config, objective=objective))
    assert run._rule().kl_weight == 0.2
    before = {"round": 0, "kl_weight": 0.2, "kl_completion": 60.0, "completions": 10}
    (tmp_path / "rounds.jsonl").write_text(json.dumps(before) + "\n")
    assert run._rule().kl_weight == pytest.approx(0.2 * (1 + 0.2 * 10 / 100))
    assert online(tmp_path, "kto")._rule() is None
