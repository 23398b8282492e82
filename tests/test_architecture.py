"""The layers of docs/design.md: a file imports only from layers above its own."""

import ast
import re

import pytest

from tests import ROOT

LAYERS = [
    {"shapes", "config", "sources"},
    {
        "losses",
        "values",
        "models",
        "data",
        "metrics",
        "judges",
        "charts",
        "preemption",
        "hardware",
        "logs",
        "compilation",
        "hosts",
        "hlo",
        "topology",
        "rounding",
    },
    {"objectives", "sharding", "kernels"},
    {"state", "forward", "step", "rollout", "run"},
    {"checkpoint", "evaluation", "samples", "report", "inputs"},
    {"assembly", "results", "precompute"},
    {"train", "generate", "score", "curves", "inspect", "planning", "fitting", "ladder", "plan_report", "plan"},
]
# Within a layer, these alone.
SIDEWAYS = {
    ("sources", "config"), ("values", "losses"), ("models", "losses"),
    ("kernels", "sharding"),
    ("step", "state"), ("step", "forward"), ("report", "charts"), ("inspect", "train"), ("score", "train"),
    ("ladder", "planning"), ("plan_report", "planning"), ("plan_report", "ladder"), ("plan", "planning"),
    ("plan", "ladder"), ("plan", "plan_report"), ("plan", "train"),
    ("precompute", "assembly"),
    ("fitting", "planning"), ("plan", "fitting"), ("train", "fitting"),
}  # fmt: skip
LAYER = {name: number for number, names in enumerate(LAYERS, start=1) for name in names}
# Only these may know these packages.
CONFINED = {"orbax": {"checkpoint"}, "transformers": {"data"}, "datasets": {"data"}, "flax": {"models"}}
FILES = sorted(
    path for path in (ROOT / "kto_jax").rglob("*.py") if path.parent.name != "kto_jax" or path.stem != "__init__"
)


def imports(path):
    """Every module that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "kto_jax")


def unit(path):
    return path.relative_to(ROOT / "kto_jax").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_layers_above_its_own(path):
    own = unit(path)
    assert own in LAYER, f"{own} has no layer: add it to LAYERS and to the README's map"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "kto_jax" and len(parts) > 1 and parts[1] != own:
            assert LAYER[parts[1]] < LAYER[own] or (own, parts[1]) in SIDEWAYS, f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_stay_where_they_belong(path):
    for module in imports(path):
        package = module.split(".")[0]
        assert unit(path) in CONFINED.get(package, {unit(path)}), f"{path} imports {package}"
    if unit(path) == "losses":
        assert {module.split(".")[0] for module in imports(path)} <= {
            "__future__", "jax", "jaxtyping", "functools", "collections", "typing", "dataclasses", "math", "kto_jax",
        }  # fmt: skip


def test_the_readme_names_every_unit_of_every_layer():
    table = (ROOT / "README.md").read_text().split("## The map")[1].split("##")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    for number, names in enumerate(LAYERS, start=1):
        present = {
            name for name in names if (ROOT / "kto_jax" / name).is_dir() or (ROOT / "kto_jax" / f"{name}.py").exists()
        }
        assert present == {word.strip("`/ ") for word in rows[str(number)].split("|")[2].split(",")}


FORBIDDEN = [
    r"^\s*(import|from) pickle", r"torch\.load", r"allow_pickle=True", r"(?<![\w.])(eval|exec)\(",
    r"trust_remote_code=True", r"yaml\.load\(", r"shell=True",
]  # fmt: skip


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_that_runs_what_it_reads_is_in_the_tree(pattern):
    for path in [*(ROOT / "kto_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not re.search(pattern, line), f"{path}:{number}: {line}"
