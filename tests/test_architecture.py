"""The order of the folders, inside and out, without cycles."""

import ast
import graphlib
import re

import pytest

from tests import ROOT

FOLDERS = [
    {"shapes", "config"},
    {"losses", "storage"},
    {"values", "models", "data", "judges"},
    {"objectives", "devices"},
    {"training", "sampling"},
    {"planning", "reports"},
    {"command"},
    {"train", "generate", "score", "curves", "inspect", "plan"},
]
"""A file imports from its own folder and from folders on lines above it, and from nothing else of the package."""
EXCEPTIONS = {
    ("values", "losses"): "a value is a loss read as a function of the reward",
    ("models", "losses"): "the output head computes log-probabilities in chunks",
    ("inspect", "train"): "", ("score", "train"): "", ("plan", "train"): "",
}  # fmt: skip
LAYER = {name: number for number, names in enumerate(FOLDERS, start=1) for name in names}
# Only these may know these packages.
CONFINED = {"orbax": {"training"}, "transformers": {"data"}, "datasets": {"data"}, "flax": {"models"}}
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
def test_a_file_imports_only_from_folders_above_its_own(path):
    own = unit(path)
    assert own in LAYER, f"{own} has no layer: add it to LAYERS and to the README's map"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "kto_jax" and len(parts) > 1 and parts[1] != own:
            assert LAYER[parts[1]] < LAYER[own] or (own, parts[1]) in EXCEPTIONS, f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_stay_where_they_belong(path):
    for module in imports(path):
        package = module.split(".")[0]
        assert unit(path) in CONFINED.get(package, {unit(path)}), f"{path} imports {package}"
    if unit(path) == "losses":
        assert {module.split(".")[0] for module in imports(path)} <= {
            "__future__", "jax", "jaxtyping", "functools", "collections", "typing", "dataclasses", "math", "kto_jax",
        }  # fmt: skip


def modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "kto_jax").rglob("*.py")
    }


def test_no_module_imports_itself_through_others():
    paths = modules()
    graph = {name: {module for module in imports(path) if module in paths} - {name} for name, path in paths.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


FORBIDDEN = [
    r"^\s*(import|from) pickle", r"torch\.load", r"allow_pickle=True", r"(?<![\w.])(eval|exec)\(",
    r"trust_remote_code=True", r"yaml\.load\(", r"shell=True",
]  # fmt: skip


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_that_runs_what_it_reads_is_in_the_tree(pattern):
    for path in [*(ROOT / "kto_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not re.search(pattern, line), f"{path}:{number}: {line}"
