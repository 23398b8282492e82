"""What the benchmark beside the peers counts, and that it runs."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import kto
from benchmarks.kto_sets import as_lists, pad_batch, padding, sequences
from benchmarks.peers.jax_turn import load_batch, save_batch
from tests import ROOT
from tests.synthetic import make_index, make_schedule


@pytest.fixture
def batch():
    index = make_index(16, max_length=40)
    return make_schedule(index, batch_size=16, row_length=64, microbatch_rows=2, max_length=40).batch(0)


def test_xla_counts_the_operations_that_the_formula_counts():
    assert 1.0 <= kto.flops_check()["ratio"] < 1.01


def test_padded_rows_hold_the_examples_of_packed_ones(batch):
    padded = pad_batch(batch)
    assert sequences(padded.matched) == sequences(batch.matched)
    assert sequences(padded.unmatched) == sequences(batch.unmatched)
    np.testing.assert_array_equal(padded.desirable[padded.matched.filled], batch.desirable[batch.matched.filled])
    assert padded.matched.filled.shape == (1, 16, 1) and padded.matched.filled.all()
    real = sum(int((rows.segment_ids > 0).sum()) for rows in (batch.matched, batch.unmatched))
    assert padding([padded]) == 1 - real / (padded.matched.tokens.size + padded.unmatched.tokens.size)
    assert padding([batch]) < padding([padded])


def test_sequences_are_the_tokens_of_their_segments(batch):
    found = sequences(batch.matched)
    assert sum(len(prompt) + len(completion) for prompt, completion in found) == (batch.matched.segment_ids > 0).sum()
    assert sum(len(completion) for _, completion in found) == (batch.matched.target_segments > 0).sum()
    row = batch.matched.tokens[0, 0]
    prompt, completion = found[0]
    assert (prompt + completion) == row[: len(prompt) + len(completion)].tolist()


def test_a_batch_with_fewer_unmatched_rows_is_refused(batch):
    even = dataclasses.replace(batch, weights=np.ones_like(batch.weights))
    assert len(as_lists(even)["unmatched"]) == 16
    filled = batch.unmatched.filled.copy()
    filled[0, 0, 0] = False
    with pytest.raises(AssertionError):
        as_lists(dataclasses.replace(even, unmatched=dataclasses.replace(batch.unmatched, filled=filled)))


def test_a_written_batch_is_read_back(batch, tmp_path):
    save_batch(tmp_path / "batch.npz", batch)
    read = load_batch(str(tmp_path / "batch.npz"))
    assert jax.tree.structure(read) == jax.tree.structure(batch)
    jax.tree.map(np.testing.assert_array_equal, read, batch)


def test_the_summary_is_of_medians_without_the_warm_up():
    def turn(seconds, loss=0.5):
        return {"seconds": [100.0, *seconds], "losses": [0.5, loss, 0.5], "peak_bytes": 7, "device_peak_bytes": None}

    result = {
        "peak_flops": [10.0, 20.0, 30.0],
        "steps": [{"tokens": 10.0, "flops": 100.0}, {"tokens": 30.0, "flops": 300.0}],
        "turns": {
            "kto_jax": [turn([1, 1]), turn([1, 3]), turn([2, 2])],
            "plain_jax": [turn([2, 2]), turn([4, 4]), turn([6, 6], loss=0.625)],
        },
    }
    summary = kto.summarise(result)
    assert summary["kto_jax"]["tokens_per_second"] == 10
    assert summary["kto_jax"]["share_of_peak"] == 5
    assert summary["plain_jax"]["tokens_per_second"] == 5
    assert summary["plain_jax"]["ratio"] == 2
    assert summary["plain_jax"]["seconds"] == 4
    assert summary["plain_jax"]["peak_bytes"] == 7
    assert summary["plain_jax"]["first_loss_difference"] == 0
    assert summary["plain_jax"]["loss_difference"] == 0.125


@pytest.mark.exhaustive
def test_the_benchmark_runs_at_small_size(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    out, profile = tmp_path / "kto.json", tmp_path / "profile"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.kto", "--small", f"--out={out}", f"--profile={profile}"],
        cwd=ROOT, env=environment, check=True, timeout=600,
    )  # fmt: skip
    result = json.loads(out.read_text())["small"]
    assert list(result["summary"]) == ["kto_jax", "padded", "plain_jax"] and not result["failed"]
    assert all(len(turns) == 2 for turns in result["turns"].values())
    assert all(figures["loss_difference"] < 1e-5 for figures in result["summary"].values())
    assert all(any((profile / name).rglob("perfetto_trace.json.gz")) for name in result["summary"])
    assert str(ROOT) not in out.read_text()
