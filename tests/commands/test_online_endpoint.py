"""Online rounds that a server samples, here a thread with our own sampler."""

import shlex
import sys

import numpy as np
import pytest

from kto_jax.online import main
from tests.commands.test_online import EPOCHS, flags, read  # noqa: F401 (a fixture)
from tests.sampling.openai_server import Server, serve

SEND = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], sys.argv[2].encode()).read()"


@pytest.fixture
def server(flags, monkeypatch):  # noqa: F811
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    path = next(flag for flag in flags if "model.path" in flag).partition("=")[2]
    with serve(Server(path)) as running:
        yield running


@pytest.mark.nightly
def test_a_server_samples_from_the_policies_that_it_is_handed(flags, tmp_path, capsys, server):  # noqa: F811
    run, url = tmp_path / "run", server.url
    send = shlex.join([sys.executable, "-c", SEND, url.replace("/v1", "/load")])
    command = [*flags, *EPOCHS, "--config.objective.name=grpo", "--config.optimizer.learning_rate=0.001", "--rounds=3",
               "--keep=3", f"--sample_from={url}", "--sample_model=policy", f"--hand_over={send}",
               "--hand_over_every=2", "--weight_cap=1.02", "--max_gap=0.3", f"--workdir={run}"]  # fmt: skip

    server.shift = -0.5
    assert main(command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "differ by 0.5 nats per token, more than --max_gap=0.3" in message, message
    server.shift, asked = 0.0, len(server.asked)
    for path in run.glob("round_000/*"):
        path.unlink()  # what was sampled wrongly
    assert main(command) == 0
    assert server.loaded[1:] == [str(run / f"round_{number:03}" / "run" / "policy") for number in (1, 2)]
    assert len(server.asked) == asked + 3 * 8 + len(read(run / "held_out_after_003_rounds.jsonl")) // 2

    log = read(run / "rounds.jsonl")
    assert log[0]["gap_max"] <= 1e-4 and log[2]["gap_max"] <= 1e-4, "sampled from the policy before the round"
    assert 1e-3 < log[1]["gap_mean"] < 0.3 and log[1]["weights_cut"] > 0, "sampled from the initial one"
    assert log[0]["weight"] == pytest.approx(1, abs=1e-5) and log[1]["weight"] != pytest.approx(1, abs=1e-5)
    weights, rollout = [], read(run / "round_001" / "rollout.jsonl")
    for row in read(run / "round_001" / "feedback.jsonl"):
        ids = row["prompt_ids"], row["output_ids"]
        sampled = next(one for one in rollout if (one["prompt_ids"], one["completion_ids"]) == ids)
        ratio = np.exp(np.array(row["old_logps"]) - sampled["logps"])
        found = np.array(row["advantages"]) / np.minimum(ratio, 1.02)
        np.testing.assert_allclose(found, found[0], rtol=1e-4)
        weights.extend(ratio)
    assert max(weights) > 1.02
