"""Online rounds on a tiny random model: what they leave, what resumes them, and what is refused."""

import json

import pytest
import safetensors.numpy

from kto_jax.online import main
from tests import ROOT
from tests.sampling.tiny import export

REWARD = """
import pathlib
broken = pathlib.Path(__file__).with_name("broken")
def letters(completions, **columns):
    if broken.exists():
        raise OSError("the service is down")
    return [float(len(set(text))) for text in completions]
"""
SHORT = [
    "--config=configs/tiny.py", "--config.model.init=pretrained", "--config.epochs=1", "--config.evaluation.every=0",
    "--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=0", "--label=median", "--keep_cut",
    "--prompts_per_round=8", "--num_samples=2", "--max_new_tokens=6", "--config.batch_size=8", "--keep=1",
]  # fmt: skip


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "own.py").write_text(REWARD)
    rows = [{"prompt": f"Name thing {i}."} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = export(tmp_path / "model")[0]
    model = model / "policy" if (model / "policy").is_dir() else model
    return [*SHORT, f"--config.model.path={model}", f"--config.data.train={tmp_path}/prompts.jsonl",
            f"--reward={tmp_path}/own.py:letters"]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy(run, number):
    return safetensors.numpy.load_file(run / f"round_{number:03}" / "run" / "policy" / "model.safetensors")


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(flags, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*flags, "--rounds=2", f"--workdir={whole}"]) == 0
    log = read(whole / "rounds.jsonl")
    assert [row["round"] for row in log] == [0, 1] and all(row["completions"] == 16 for row in log)
    assert not (whole / "round_000" / "run" / "policy").exists(), "--keep=1"
    feedback = read(whole / "round_001" / "feedback.jsonl")
    assert {row["type"] for row in feedback} == {"binary_feedback"} and {row["label"] for row in feedback} == {0, 1}
    assert "held-out reward changed by" in capsys.readouterr().err
    assert json.loads((whole / "held_out.json").read_text()).keys() == {"before", "after"}

    # The reward fails after the completions were sampled, which are kept; then the run is ended between rounds.
    (tmp_path / "broken").touch()
    assert main([*flags, "--rounds=1", f"--workdir={parts}"]) == 2
    assert "raised OSError: the service is down" in capsys.readouterr().err
    sampled = (parts / "held_out_after_000_rounds.jsonl").read_text()
    (tmp_path / "broken").unlink()
    assert main([*flags, "--rounds=1", f"--workdir={parts}"]) == 0
    kept = [{**row, "reward": None, "rewards": None} for row in read(parts / "held_out_after_000_rounds.jsonl")]
    assert kept == [{**json.loads(line), "reward": None, "rewards": None} for line in sampled.splitlines()]
    assert main([*flags, "--rounds=2", f"--workdir={parts}"]) == 0
    for name, values in policy(whole, 1).items():
        assert (policy(parts, 1)[name] == values).all(), name
    assert read(parts / "round_001" / "rollout.jsonl") == read(whole / "round_001" / "rollout.jsonl")

    assert main([*flags, "--rounds=2", "--label=mean", f"--workdir={whole}"]) == 2
    assert "holds another run, which differs in label" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [
    ("grpo", "scalar_feedback"), ("dpo", "pairwise_feedback"), ("sft", "binary_feedback"),
])  # fmt: skip
def test_other_objectives_train_online(flags, tmp_path, name, kind):
    run = tmp_path / "run"
    previous = "--reference=previous"  # at the first step the policy is then the reference
    assert main([*flags, f"--config.objective.name={name}", previous, "--rounds=2", f"--workdir={run}"]) == 0
    for number in range(2):
        feedback = read(run / f"round_{number:03}" / "feedback.jsonl")
        assert feedback and {row["type"] for row in feedback} == {kind}
        metrics = read(run / f"round_{number:03}" / "run" / "metrics.jsonl")
        assert all(row["num_bad_steps"] == 0 for row in metrics)
        if name == "grpo":
            assert metrics[0]["rewards_desirable"] == pytest.approx(0, abs=1e-5) and metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize("change, why", [
    (["--config.objective.name=grpo"], "its reference is the policy that sampled the completions"),
    (["--label=best"], "--label='best' is no rule"),
    (["--config.model.init=random"], 'config.model.init="random" cannot be used'),
    (["--config.objective.name=ppo_offline"], "config.objective.name='ppo_offline' cannot be trained online"),
    (["--config.lora.rank=4"], "Set --reference=previous"),
    (["--reward=lowercas"], "is no reward"),
])  # fmt: skip
def test_what_cannot_be_trained_online_is_refused_before_anything_is_written(flags, tmp_path, capsys, change, why):
    assert main([*flags, *change, f"--workdir={tmp_path / 'run'}"]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_reward_is_needed(flags, tmp_path, capsys):
    assert main([flag for flag in flags if "--reward" not in flag] + [f"--workdir={tmp_path / 'run'}"]) == 2
    assert "--reward is missing" in capsys.readouterr().err
