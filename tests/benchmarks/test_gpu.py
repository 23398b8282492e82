"""The runner of benchmarks/gpu.sh: parts with figures are skipped, and what a failed part had measured is kept."""

import dataclasses
import json
import sys

import pytest

from benchmarks import gpu

FIGURES = {
    "correctness": [{"name": "a step", "dtype": "float32", "difference": 1e-6, "allowed": 1e-5}],
    "step_1b": {
        "results": [
            {
                "length": 4096, "seconds": [2.0], "tokens": 1000.0, "flops": 4e12, "peak_flops": 8e12,
                "peak_source": "published", "peak_bytes": 2**30, "attention": "mosaic", "compile_seconds": 9.0,
            }
        ]
    },
    "head": {
        "a shape": {
            "contenders": {"kept": {"milliseconds": 60.0, "megabytes": 3000.0}, "dense": {"error": "out of memory"}}
        }
    },
    "decode": {"summary": {"16": {"kto_jax": 200.0, "transformers": 100.0, "ratio": 2.0}}},
    "trl": {
        "random": {"summary": {"trl": {"tokens_per_second": 9.0, "peak_bytes": 2**30, "ratio": 2.0}}, "failed": {}}
    },
}  # fmt: skip


@pytest.fixture
def taken(monkeypatch):
    """Runs no part: each has its figures above. Returns the names of the parts that were to run."""
    names = []

    def take(name, part, options, limit):
        names.append(name)
        return {"status": "done", "seconds": 1.0, "expected": 2, "title": part.title, "figures": FIGURES.get(name)}

    monkeypatch.setattr(gpu, "take", take)
    return names


def run(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", f"--out={out}", *arguments])
    gpu.main()


def test_parts_with_figures_are_skipped_and_all_are_in_the_table(taken, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--rehearse", "--parts", *FIGURES)
    assert taken == list(FIGURES)
    table = (tmp_path / "gpu.md").read_text()
    assert "500 tokens/s, MFU 25.0% of the published peak, 1.00 GiB, mosaic" in table
    assert "float32: 1 comparisons, at most 1.0e-06 (a step)" in table
    assert (
        "kept: 60.0 ms, 3,000 MB; dense: out of memory" in table
        and "ratio 2.00" in table
        and "kto_jax by it 2.00" in table
    )
    taken.clear()
    run(monkeypatch, tmp_path, "--rehearse", "--parts", "head", "step_8b")
    assert taken == ["step_8b"] and "head: figures are there already" in capsys.readouterr().out


def test_no_part_starts_that_the_time_left_is_too_short_for(taken, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--budget=40", "--parts", "step_1b", "head")
    assert taken == ["head"] and "step_1b: not started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("raise SystemExit(3)", "failed: exit code 3, see gpu.log"),
        ("import time; time.sleep(60)", "reached its limit of"),
    ],
)
def test_a_part_that_fails_or_takes_too_long_keeps_what_it_wrote(program, status, tmp_path, monkeypatch):
    module = tmp_path / "part.py"
    module.write_text(f"import sys\nopen(sys.argv[1], 'w').write('[1]')\n{program}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = dataclasses.replace(gpu.PARTS["head"], command="part OUT")
    options = type("Options", (), {"out": tmp_path, "rehearse": False})
    # The file exists well before the limit, which the sleep alone reaches.
    result = gpu.take("head", part, options, limit=5)
    assert result["status"].startswith(status) and result["figures"] == [1]


def test_a_contender_that_failed_makes_its_part_run_again():
    assert gpu._missing({"random": {"failed": {"trl": "exit code 1"}}, "flops_check": {"ratio": 1.0}}) == ["trl"]
    assert gpu._missing([1]) == []


def test_an_expression_of_pytest_is_one_argument(tmp_path):
    words = gpu._arguments("pytest -m gpu tests/gpu -k one or two", tmp_path)
    assert words[-2:] == ["-k", "one or two"]
    assert json.dumps(gpu.PARTS["correctness"].toy).count("-k") == 1
