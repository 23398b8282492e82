"""The train button: what it needs, how a run is followed, and what a failed one says."""

import json

import pytest

from kto_jax.config import ConfigError
from kto_jax.thumbs.presses import Presses
from kto_jax.thumbs.training import Training

PROGRAM = """
import pathlib, sys
print("2026-11-29T10:00:00+00:00 reading …", flush=True)
print("2026-11-29T10:00:00+00:00 step 1/2: loss 0.5", flush=True)
folder = pathlib.Path({folder!r})
(folder / "policy").mkdir(parents=True)
{write}
print("finished", flush=True)
sys.exit({code})
"""


def press(press, number):
    return {"press": press, "answer": f"a{number}", "prompt": "Q?", "completion": "A.", "ended": True}


@pytest.fixture
def presses(tmp_path):
    return Presses(tmp_path / "presses.jsonl")


def test_training_needs_both_kinds_of_answers_and_a_model(presses):
    training = Training(presses, "model", "", "kto_chat", {})
    with pytest.raises(ConfigError, match=r"0 good and 0 bad answers .* Press thumbs up"):
        next(training.run())
    presses.append(press("up", 1))
    with pytest.raises(ConfigError, match=r"1 good and 0 bad answers .* Press thumbs down"):
        next(training.run())
    presses.append({"press": "edit", "answer": "a2", "prompt": "Q?", "completion": "B.", "original": "A."})
    training.check()
    with pytest.raises(ConfigError, match="It is held"):
        Training(presses, "", "It is held.", "kto_chat", {}).check()


def run_with(training, monkeypatch, write="(folder / 'policy' / 'config.json').touch()", code=0):
    monkeypatch.setattr(
        training, "command", lambda folder, data: ["-c", PROGRAM.format(folder=str(folder), write=write, code=code)]
    )
    return list(training.run())


def test_a_run_is_followed_to_its_policy_and_each_takes_a_folder(presses, monkeypatch, tmp_path):
    presses.append(press("up", 1)), presses.append(press("down", 2))
    training = Training(presses, "model", "", "kto_chat", {"data.chat_template": "none"})
    command = training.command(tmp_path / "trained_001", tmp_path / "trained_001.jsonl")
    assert command[:3] == ["-m", "kto_jax.train", "--config=kto_chat"]
    assert {"--config.model.path=model", "--config.data.chat_template=none"} <= set(command)
    found = run_with(training, monkeypatch)
    assert found[-1].policy == tmp_path / "trained_001" and found[-1].text == "finished"
    assert (found[-1].step, found[-1].num_steps) == (1, 2) and not training.is_running
    kept = [json.loads(line)["answer"] for line in (tmp_path / "trained_001.jsonl").read_text().splitlines()]
    assert kept == ["a1", "a2"]
    assert run_with(training, monkeypatch)[-1].policy == tmp_path / "trained_002"


def test_a_run_that_fails_says_why(presses, monkeypatch, tmp_path):
    presses.append(press("up", 1)), presses.append(press("down", 2))
    training = Training(presses, "model", "", "kto_chat", {})
    with pytest.raises(ConfigError, match=r"exit code 2: .*finished\. .*trained_001\.log has all .* presses are kept"):
        run_with(training, monkeypatch, code=2)
    with pytest.raises(ConfigError, match="exit code 0"):
        run_with(training, monkeypatch, write="")


def test_one_run_at_a_time_and_closing_ends_it(presses, monkeypatch):
    presses.append(press("up", 1)), presses.append(press("down", 2))
    training = Training(presses, "model", "", "kto_chat", {})
    monkeypatch.setattr(training, "command", lambda folder, data: ["-c", "import signal; signal.pause()"])
    running = training.run()
    next(running)
    assert training.is_running
    with pytest.raises(ConfigError, match="running already"):
        next(training.run())
    training.close()
    with pytest.raises(ConfigError, match="exit code -15"):
        list(running)
