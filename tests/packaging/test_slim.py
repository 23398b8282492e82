"""Training, its benchmark and the help need only what they use."""

import json
import os
import subprocess
import sys

import pytest

from tests import COMPILER_FLAGS, ROOT

OPTIONAL = (
    *("datasets", "gguf", "jinja2", "matplotlib", "ml_collections", "mlflow", "pyarrow", "sklearn", "tensorboardX"),
    *("tensorflow_datasets", "vaderSentiment", "wandb"),
)
"""What only reports, judges, trackers, data formats, chat templates and recipes use. `rich` and `absl` are not among
them, because flax imports both, nor are `fsspec` and `huggingface_hub`, which transformers imports."""
WITHOUT_OPTIONAL = """
import importlib.abc, json, sys
from pathlib import Path

optional, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
tried = set()

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            tried.add(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

from benchmarks import device_step

job = {"architecture": "configs/tiny_model", "dtype": "float32", "kept": "bfloat16", "remat": "full", "batch": 2}
figures = device_step.measure(job | {"rows": 1, "per_row": 2, "steps": 1, "length": 32})
assert figures["tokens"] == 2 * 16 and len(figures["seconds"]) == 1, figures
assert figures["flops"] > 0 and figures["peak_bytes"] > 2**27 and 0 < figures["loss"] < 1, figures
assert not tried, tried

from kto_jax.config import resolve
from kto_jax.train import train
from kto_jax.training.preemption import Preemption

tiny = Path("configs")
config = resolve({
    "model": {"path": str(tiny / "tiny_model"), "init": "random", "dtype": "float32"},
    "data": {"train": str(tiny / "tiny_feedback.jsonl"), "chat_template": "none", "num_workers": 1},
    "batch_size": 4, "max_steps": 2, "trackers": (), "evaluation": {"every": 0, "max_examples": 4},
})
with Preemption() as preemption:
    assert train(config, folder / "run", "train", preemption) == 0
assert (folder / "run" / "policy" / "model.safetensors").exists()
assert not (folder / "run" / "report.html").exists()
print(json.dumps(sorted(tried)))
"""
HELP_WITHOUT_JAX = """
import contextlib, io, runpy, sys

for module, arguments in (("kto_jax", ["--help"]), ("kto_jax", ["train", "--help"]), ("kto_jax.train", ["--help"])):
    sys.argv = [module, *arguments]
    written = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(written):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    print(module, *arguments, "--config" in written.getvalue() or "Commands:" in written.getvalue())
print("jax" in sys.modules)
"""


def run(program, *arguments):
    environment = os.environ | {"XLA_FLAGS": COMPILER_FLAGS}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_device_step_and_a_run_work_without_the_optional_packages(tmp_path):
    done = run(WITHOUT_OPTIONAL, json.dumps(OPTIONAL), str(tmp_path))
    # What is asked is whether the packages of a report are there; transformers asks for more of its own accord.
    assert {"matplotlib", "jinja2"} <= set(json.loads(done.stdout.splitlines()[-1]))
    assert done.stderr.count("report.html is skipped") == 1
    assert (
        "it needs matplotlib and jinja2, not installed here. Run pip install matplotlib jinja2 and the" in done.stderr
    )


def test_help_is_printed_before_jax_is_imported():
    lines = run(HELP_WITHOUT_JAX).stdout.splitlines()
    assert lines == ["kto_jax --help True", "kto_jax train --help True", "kto_jax.train --help True", "False"]
