"""Runs that commit bc03b27 started are resumed, with the numbers of its own continuation.

tests/fixtures/runs_of_bc03b27.tar.xz holds three runs of configs/tiny.py on their own model and feedback, stopped after
the checkpoint of step 3, and that commit's metrics of all six steps:

    plain    all weights, float32
    lora     low-rank adapters of rank 2
    int8     an int8 reference, moments in bfloat16, weight decay of all parameters
"""

import json
import tarfile

import pytest

from kto_jax.train import main
from tests import ROOT

RUNS = {
    "plain": [],
    "lora": ["--config.lora.rank=2", "--config.optimizer.learning_rate=1e-2"],
    "int8": [
        "--config.reference.param_dtype=int8", "--config.optimizer.moments_dtype=bfloat16",
        "--config.optimizer.weight_decay=0.1",
    ],
}  # fmt: skip
COMMAND = [
    f"--config={ROOT / 'configs' / 'tiny.py'}", "--config.model.path=model", "--config.data.train=feedback.jsonl",
    "--config.max_steps=6", "--config.checkpoint.every=3", "--config.evaluation.every=3",
    "--config.optimizer.warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests" / "fixtures" / "runs_of_bc03b27.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "plain" else pytest.mark.nightly) for name in RUNS]
)
def test_a_run_of_bc03b27_is_resumed_with_the_same_numbers(name, folder):
    assert main([*COMMAND, *RUNS[name], f"--workdir={name}"]) == 0
    expected, got = rows(folder / name / "expected.jsonl"), rows(folder / name / "metrics.jsonl")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    for before, after in zip(expected, got, strict=True):
        assert {figure: after[figure] for figure in before} == pytest.approx(before, rel=1e-6, abs=1e-6, nan_ok=True)
