"""README, CONTRIBUTING and docs/ name only what exists, and the site builds without warnings or remote resources."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

from kto_jax.config import Config, ConfigError, check_overrides
from kto_jax.objectives import OBJECTIVES, defaults
from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
NOTEBOOK = json.loads((ROOT / "docs/python.ipynb").read_text())
TEXTS["docs/python.ipynb"] = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])

FOLDERS = "kto_jax|configs|tests|benchmarks|launch|docs"
SECTIONS = "|".join(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default))


def mentioned(pattern, texts=TEXTS):
    """(page, text) of every match of the pattern in the pages."""
    return sorted({(page, found) for page, text in texts.items() for found in re.findall(pattern, text)})


def rows(page):
    """The rows of a page's tables, as lists of cells."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]


def is_field(path):
    """Whether the configuration has a field, such as "config.model.path"."""
    try:
        check_overrides([f"--{path}=1"])
    except ConfigError:
        return False
    return True


def test_every_path_that_a_page_names_exists():
    assert [x for x in mentioned(rf"`((?:{FOLDERS})/[^`\s*]+)`") if not (ROOT / x[1]).exists()] == []


def test_every_link_to_a_file_leads_somewhere():
    links = mentioned(r"\]\(([^):#]+)(?:#[^)]*)?\)")
    assert [x for x in links if not (ROOT / x[0]).parent.joinpath(x[1]).exists()] == []


def test_every_command_that_a_page_names_exists():
    modules = mentioned(r"python\s-m\s((?:kto_jax|benchmarks)\.[\w.]*\w)")
    assert [x for x in modules if importlib.util.find_spec(x[1]) is None] == []


def test_every_recipe_that_a_command_names_exists():
    assert [x for x in mentioned(r"--config=(configs/[\w.]+)") if not (ROOT / x[1]).is_file()] == []


def test_every_field_that_a_command_sets_exists():
    assert [x for x in mentioned(r"--(config\.[\w.]*\w)") if not is_field(x[1])] == []


def test_every_field_that_a_page_names_exists():
    # The other columns of the migration table name fields of other tools.
    ours = TEXTS | {"docs/migration.md": "\n".join(cells[2] for cells in rows("migration.md") if len(cells) == 4)}
    fields = mentioned(rf"`(?:config\.)?((?:{SECTIONS})\.(?!(?:json|html)\b)[a-z_0-9]+)\b(?!\()", ours)
    assert [x for x in fields if not is_field(f"config.{x[1]}")] == []


def test_the_objectives_of_the_page_have_the_options_and_defaults_of_the_code():
    table = {cells[0].strip("`"): cells[-1] for cells in rows("objectives.md") if cells[0].strip("`") in OBJECTIVES}
    assert list(table) == list(OBJECTIVES)
    for name, options in table.items():
        shown = dict(re.findall(r"`(\w+)`(?: ([\w.]+))?", options))
        assert set(shown) == set(defaults(name)), name
        for option, value in shown.items():
            if value:
                assert str(defaults(name)[option]) in (value, f"{value}.0"), f"{name}.{option}"


RECIPES = {cells[0].strip("`"): cells for cells in rows("recipes.md") if cells[0].startswith("`configs/")}


def test_every_recipe_is_on_the_page():
    assert set(RECIPES) == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize("file", RECIPES)
def test_the_page_states_the_learning_rate_of_the_recipe(file):
    config = runpy.run_path(str(ROOT / file))["get_config"]()
    assert float(RECIPES[file][3]) == config.optimizer.learning_rate


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
    # A proxy that refuses connections: a build that needs a network fails.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_site_builds_and_loads_nothing_from_other_servers(site):
    assert (site / "search/search_index.json").is_file()
    for page in site.rglob("*.html"):
        remote = re.findall(
            r"<(?:script|img|iframe)[^>]*src=.https?:[^>]*|<link[^>]*stylesheet[^>]*https?:[^>]*", page.read_text()
        )
        assert not remote, page


def test_the_api_page_has_signatures_and_doctests(site):
    text = (site / "api.html").read_text()
    for name in ("kto_jax.losses.kto.kto_loss", "kto_jax.shapes.FeedbackBatch", "kto_jax.config.resolve.resolve"):
        assert f'id="{name}"' in text
    assert 'class="gp">&gt;&gt;&gt; </span>' in text
