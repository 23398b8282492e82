"""Online rounds on a tiny random model: what they leave, what resumes them, and what is refused."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import kto_jax.online
from kto_jax.config import resolve
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model
from kto_jax.models.weights import load
from kto_jax.models.weights.value_head import FILE as VALUE_HEAD
from kto_jax.models.weights.value_head import load_value_head
from kto_jax.online import main
from kto_jax.rollouts import rounds
from kto_jax.rollouts.measure import measure, read_figures
from kto_jax.train import train
from kto_jax.training.checkpoint_reading import StoredTree
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.preemption import Preemption
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
    "--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=0", "--label=median", "--cut=train",
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


class Killed(BaseException):
    """What no handler of errors sees."""


@pytest.mark.slow
def test_rounds_of_which_no_checkpoint_was_written_are_trained_again_from_their_completions(
    flags, tmp_path, monkeypatch, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [*flags, "--config.objective.name=grpo", "--held_out=0", "--config.data.holdout=0", "--rounds=4"]
    complete, sampled = rounds.complete, []
    monkeypatch.setattr(rounds, "complete", lambda *args, **kwargs: (sampled.append(1), complete(*args, **kwargs))[1])

    def killed_in_round_3(config, run, *args, **kwargs):
        if run.parent.name == "round_003":
            raise Killed
        return train(config, run, *args, **kwargs)

    monkeypatch.setattr(kto_jax.online, "train", killed_in_round_3)
    with pytest.raises(Killed):
        main([*settings, "--save_every=2", f"--workdir={killed}"])
    assert [row["saved"] for row in read(killed / "rounds.jsonl")] == [False, True, False] and len(sampled) == 4
    left = [list((killed / f"round_{n:03}" / "run" / "checkpoints").glob("[0-9]*")) for n in range(3)]
    assert [bool(steps) for steps in left] == [False, True, False]

    monkeypatch.setattr(kto_jax.online, "train", train)
    capsys.readouterr()
    assert main([*settings, "--save_every=3", f"--workdir={killed}"]) == 0
    assert "from the completions that are there: round 3" in " ".join(capsys.readouterr().err.split())
    assert len(sampled) == 4, "those of the last round were there too"
    assert [row["saved"] for row in read(killed / "rounds.jsonl")] == [False, True, True, True]
    assert main([*settings, f"--workdir={whole}"]) == 0
    for number in range(4):
        assert read(killed / f"round_{number:03}/rollout.jsonl") == read(whole / f"round_{number:03}/rollout.jsonl")
    for name, values in policy(whole, 3).items():
        assert (policy(killed, 3)[name] == values).all(), name


@pytest.mark.slow
def test_a_signal_saves_a_round_that_would_not_be_and_a_finished_run_can_be_continued(flags, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings, trained = [*flags, "--held_out=0", "--config.data.holdout=0"], []

    def run(*more, at_round_2=lambda: None):
        def recorded(config, run, *args, **kwargs):
            trained.append(run.parent.name)
            if run.parent.name == "round_002":
                at_round_2()
            return train(config, run, *args, **kwargs)

        trained.clear()
        monkeypatch.setattr(kto_jax.online, "train", recorded)
        return main([*settings, *more])

    def kill():
        raise Killed

    poll = Checkpoints.poll

    def stop_in_its_first_step():
        monkeypatch.setattr(Checkpoints, "poll", lambda self: (os.kill(os.getpid(), signal.SIGTERM), poll(self)))

    assert run("--rounds=1", f"--workdir={parts}") == 0
    assert not (parts / "round_000" / "run" / "checkpoints").exists(), "the next round reads policy/"
    longer = ["--rounds=4", "--save_every=4", f"--workdir={parts}"]
    with pytest.raises(Killed):
        run(*longer, at_round_2=kill)
    # Fewer rounds than there are: nothing is forgotten.
    assert run("--rounds=1", f"--workdir={parts}") == 0 and not trained
    assert len(read(parts / "rounds.jsonl")) == 2
    (parts / "round_001" / "run" / "of_before").touch()
    assert run(*longer, at_round_2=stop_in_its_first_step) == 75
    monkeypatch.setattr(Checkpoints, "poll", poll)
    assert trained == ["round_001", "round_002"] and len(read(parts / "rounds.jsonl")) == 2
    assert not (parts / "round_001" / "run" / "of_before").exists()
    assert (parts / "round_002" / "run" / "checkpoints" / "1").is_dir()
    assert run(*longer) == 0 and trained == ["round_002", "round_003"]
    assert [row["saved"] for row in read(parts / "rounds.jsonl")] == [True, False, False, True]

    assert run("--rounds=4", f"--workdir={whole}") == 0
    for name, values in policy(whole, 3).items():
        assert (policy(parts, 3)[name] == values).all(), name


@pytest.fixture
def per_round(monkeypatch):
    """Counts what is compiled and read, by kind and round."""
    counts, numbers = collections.Counter(), [-1]

    def count(kind, owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (counts.update([(kind, numbers[-1])]), call(*args))[1])

    run_round = kto_jax.online._Online.run_round
    count("weights", load, "_read_params")
    count("checkpoints", StoredTree, "read")
    monkeypatch.setattr(
        kto_jax.online._Online,
        "run_round",
        lambda self, n, *others: (numbers.append(n), run_round(self, n, *others))[1],
    )

    def listen(name, seconds, **others):
        if name.endswith("backend_compile_duration"):
            counts["programs", numbers[-1]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", pytest.param("kto", marks=pytest.mark.nightly)])
def test_later_rounds_compile_no_program_and_read_no_weights(flags, tmp_path, per_round, name):
    # All prompts have as many tokens, so that the shapes of all rounds are the same.
    rows = [{"prompt": f"Name thing {i}."} for i in range(20, 50)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    settings = ["--held_out=0", "--config.data.holdout=0", f"--config.objective.name={name}", f"--workdir={run}"]
    assert main([*flags, *settings, "--rounds=3"]) == 0
    assert per_round["weights", 0] and per_round["programs", 0]
    assert not [what for what in per_round if what[0] != "programs" and what[1] > 0]
    # A new optimizer's state is made of the last step's policy by a program of its own, for all rounds.
    assert per_round["programs", 1] <= (name == "kto"), per_round
    assert not (run / "round_001" / "run" / "policy").exists() and (run / "round_002" / "run" / "report.html").exists()
    if name == "kto":  # Ordinary training on the feedback of a round, from files, makes the same policy.
        assert main([*flags, *settings, "--rounds=4", "--keep=2"]) == 0
        again = resolve(json.loads((run / "round_003" / "run" / "config.json").read_text()))
        path = str(run / "round_002" / "run" / "policy")
        again = dataclasses.replace(again, model=dataclasses.replace(again.model, path=path))
        with Preemption() as preemption:
            assert train(again, tmp_path / "again", "python -m kto_jax.train", preemption) == 0
        trained = safetensors.numpy.load_file(tmp_path / "again" / "policy" / "model.safetensors")
        assert all((values == trained[key]).all() for key, values in policy(run, 3).items())


@pytest.mark.parametrize("name, kind", [
    ("sft", "binary_feedback"), pytest.param("dpo", "pairwise_feedback", marks=pytest.mark.slow),
])  # fmt: skip
def test_other_objectives_train_online(flags, tmp_path, name, kind):
    run = tmp_path / "run"
    assert main([*flags, f"--config.objective.name={name}", "--rounds=2", f"--workdir={run}"]) == 0
    for number in range(2):
        feedback = read(run / f"round_{number:03}" / "feedback.jsonl")
        assert feedback and {row["type"] for row in feedback} == {kind}
        metrics = read(run / f"round_{number:03}" / "run" / "metrics.jsonl")
        assert all(row["num_bad_steps"] == 0 for row in metrics)


EPOCHS = ["--config.batch_size=4", "--config.epochs=2"]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [
    pytest.param(
        *("grpo", ["--config.objective.variant=dapo", "--config.objective.kl_weight=0.1"]), marks=pytest.mark.nightly
    ),
    ("ppo", ["--config.objective.value_warmup=2", "--config.objective.value_detached=False"]),
    pytest.param(
        "ppo", ["--config.objective.value_warmup=2", "--config.objective.value_tower=True"], marks=pytest.mark.nightly
    ),
    pytest.param(
        "ppo", ["--config.lora.rank=4", "--config.optimizer.learning_rate=0.01"], marks=pytest.mark.nightly
    ),
])  # fmt: skip
def test_policy_gradients_train_on_the_sampled_tokens_for_several_epochs(flags, tmp_path, name, options):
    run = tmp_path / "run"
    assert (
        main(
            [*flags, f"--config.objective.name={name}", *options, *EPOCHS, "--rounds=2", "--keep=2", f"--workdir={run}"]
        )
        == 0
    )
    log = read(run / "rounds.jsonl")
    for number, row in enumerate(log):
        folder = run / f"round_{number:03}"
        sampled = {tuple(row["completion_ids"]): row for row in read(folder / "rollout.jsonl")}
        feedback = read(folder / "feedback.jsonl")
        assert feedback and all(tuple(one["output_ids"]) in sampled for one in feedback)
        assert any(not sampled[tuple(one["output_ids"])]["ended"] for one in feedback), "cut ones are trained on"
        metrics = read(folder / "run" / "metrics.jsonl")
        assert len(metrics) == 2 * -(-len(feedback) // 4) and all(step["num_bad_steps"] == 0 for step in metrics)
        # The ratio is 1 at the first update, and moves while the old log-probabilities stay.
        assert metrics[0]["old_kl"] < 1e-8
        if name == "grpo" or number:
            assert metrics[0]["clipped"] == 0 and metrics[-1]["old_kl"] > 1e-6 and row["clipped"] > 0
        assert 0 <= row["gap_mean"] <= row["gap_max"] <= 1e-4
        assert row["entropy"] > 0 and 0 < row["sampling_share"] < 1
    assert log[0]["kl_completion"] == 0 and log[1]["kl_completion"] != 0
    if name == "ppo":
        assert (run / "round_001" / "run" / "adapter").is_dir() == any("lora" in option for option in options)
        if any("value_warmup" in option for option in options):
            warmed = [read(run / f"round_{number:03}" / "run" / "metrics.jsonl") for number in (0, 1)]
            assert warmed[1][0]["updates"] > len(warmed[0]), "kept from round 0"
        assert "explained_variance" in log[1] and log[0]["value_loss"] > 0
        if "--config.lora.rank=4" not in options:
            assert_values_are_of_the_round_before(run)


def assert_values_are_of_the_round_before(run):
    """The values of round 1 are those of the head, and its tower, that round 0 ended with."""
    ended = run / "round_000" / "run"
    head, plain = load_value_head(ended / VALUE_HEAD), Model.create(load.read_config(ended / "policy"))
    model = dataclasses.replace(plain, scalar_head="value", value_tower=TOWER in head)
    params = load.load_params(plain, ended / "policy", param_dtype="float32") | {SCALAR_HEAD: head}
    rows = read(run / "round_001" / "rollout.jsonl")
    ids = [[np.asarray(row[name], np.int32) for row in rows] for name in ("prompt_ids", "completion_ids")]
    expected = np.concatenate(measure(model, params, *ids, row_length=64, microbatch_rows=8).values)
    found = np.concatenate(read_figures(run / "round_001" / "tokens.npz")["values"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("change, why", [
    (["--config.objective.name=grpo", "--temperature=0.7"], "its ratios are of log-probabilities at temperature 1"),
    (["--config.objective.name=ppo", "--optimizer=new"], "would start every round with a new value head"),
    (["--config.lora.rank=4", "--optimizer=kept", "--reference=previous"], "Set --reference=initial"),
    (["--config.objective.name=ppo", "--config.objective.kl_target=6", "--reference=previous"], "that sampled is 0"),
    (["--resample=1", "--num_samples=1"], "Set --num_samples to at least 2"),
    (["--spread_of=letters"], "is none of the rewards. Allowed: "),
    (["--optimizer=kept", "--config.optimizer.schedule=linear"], "ends with the first round"),
    (["--sample_from=here:80", "--sample_model=a", "--hand_over=b"], "--sample_from=here:80 is no address"),
    (["--sample_from=http://here:80/v1", "--sample_model=a"], "Set --hand_over."),
    (["--max_gap=0.5"], "--max_gap=0.5 without --sample_from has no effect"),
    (["--label=best"], "--label='best' is no rule"),
    (["--config.model.init=random"], 'config.model.init="random" cannot be used'),
    (["--config.objective.name=ppo_offline"], "config.objective.name='ppo_offline' cannot be trained online"),
    (["--config.lora.rank=4"], "Set --reference=previous"),
    (["--reward=lowercas"], "is no reward"),
    (["--config.objective.name=dpo", "--config.row_length=100"], "a pair of data.max_length=64 does not fit a row of"),
])  # fmt: skip
def test_what_cannot_be_trained_online_is_refused_before_anything_is_written(flags, tmp_path, capsys, change, why):
    assert main([*flags, *change, f"--workdir={tmp_path / 'run'}"]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ppo(flags):
    # Four slots for 16 completions: sampling is several calls.
    settings = ["--config.checkpoint.every=1", "--rounds=3", "--keep=3", "--batch_size=4",
                "--config.objective.kl_target=0.5", "--config.objective.kl_horizon=20"]  # fmt: skip
    return [*flags, "--config.objective.name=ppo", "--config.objective.value_tower=True", *EPOCHS, *settings]


@pytest.mark.nightly
def test_a_run_killed_anywhere_in_a_round_ends_bitwise_as_one_that_was_not(ppo, tmp_path):
    whole = tmp_path / "whole"
    assert main([*ppo, f"--workdir={whole}"]) == 0
    steps = len(read(whole / "round_001" / "run" / "metrics.jsonl"))
    weights = [row["kl_weight"] for row in read(whole / "rounds.jsonl")]
    assert len(set(weights)) == 3, "adapted to the KL of each round"
    assert 5 < steps < 10, "so that the third kill is in the second epoch"
    for point in ("sampling", "update", "epochs"):
        killed = tmp_path / point
        command = [sys.executable, "-m", "tests.commands.killed_online", point, *ppo, f"--workdir={killed}"]
        result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
        folder = killed / "round_001"
        assert (folder / "rollout.jsonl").exists() == (point != "sampling")
        assert (folder / "run" / "checkpoints" / "5").exists() == (point == "epochs")
        assert main([*ppo, f"--workdir={killed}"]) == 0
        assert [row["kl_weight"] for row in read(killed / "rounds.jsonl")] == weights
        for number in (1, 2):
            for name in ("rollout.jsonl", "feedback.jsonl"):
                own, expected = (run / f"round_{number:03}" / name for run in (killed, whole))
                assert read(own) == read(expected), (point, number, name)
            for name, values in policy(whole, number).items():
                assert (policy(killed, number)[name] == values).all(), (point, number, name)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled(flags, tmp_path, capsys):
    assert main([*flags, "--max_new_tokens=60", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "Training cuts no sampled token. Set config.data.max_length=" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "round_000").exists()


def test_a_reward_is_needed(flags, tmp_path, capsys):
    assert main([flag for flag in flags if "--reward" not in flag] + [f"--workdir={tmp_path / 'run'}"]) == 2
    assert "--reward is missing" in capsys.readouterr().err
