"""docs/data.md is true: every row that it shows is read, and what it says of weights is so."""

import json
import re
import runpy

import pytest

from kto_jax.config import DataConfig, default_config, resolve
from kto_jax.data.rows.layouts import LAYOUTS
from kto_jax.data.rows.records import Preference, Rejection, Skipped, completions_of, records_of
from kto_jax.data.rows.sources import sources_of
from tests import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r'^```json title="(.*)"\n((?:.*\n)*?)```$', PAGE, re.MULTILINE)
TABLES = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")
]


def rows_of(text):
    """The JSON values of a text, one after the other."""
    rows, decoder = [], json.JSONDecoder()
    while text := text.strip():
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows


def read(rows, **settings):
    return list(
        records_of(iter([(f"data.md:{i}", row) for i, row in enumerate(rows, start=1)]), DataConfig(**settings))
    )


def settings_of(words):
    return dict(word.split("=") for word in words.split())


@pytest.mark.parametrize(("words", "text"), BLOCKS, ids=[f"{i}{words}" for i, (words, _) in enumerate(BLOCKS)])
def test_every_example_row_is_read(words, text):
    settings = settings_of(words)
    records = read(rows_of(text), **settings)
    assert not any(isinstance(record, Rejection) for record in records)
    records = [record for record in records if not isinstance(record, Skipped)]
    assert records
    for record in records:
        assert isinstance(record, Preference) == (settings["format"] == "pairs")
        assert all(row.prompt and row.completion for row in completions_of(record))


def test_every_layout_has_an_example_in_each_of_its_formats():
    shown = {(settings.get("layout", "fields"), settings["format"]) for settings in map(settings_of, dict(BLOCKS))}
    assert shown == {(layout, format) for layout, kind in LAYOUTS.items() for format in kind.columns}


REJECTED = [cells for cells in TABLES if cells[0].startswith("`{")]


@pytest.mark.parametrize(("row", "reason"), REJECTED, ids=[reason for _, reason in REJECTED])
def test_every_rejected_row_is_rejected_for_the_reason_given(row, reason):
    good = {"prompt": "Q", "completion": "A", "label": True}
    assert read([good, json.loads(row.strip("`"))])[1] == Rejection(reason, "data.md:2")


def test_the_weights_of_the_table_give_the_shares_wanted_and_are_those_of_the_configuration(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "config.py").write_text(f"from kto_jax.config import default_config\n{code}")
    config = resolve(runpy.run_path(str(tmp_path / "config.py"))["get_config"]())
    weights = {source.path: source.weight for source in sources_of(config.data)}
    table = [cells for cells in TABLES if cells[0] in weights]
    numbers = {name: [float(cell) for cell in cells] for name, *cells in table}
    assert list(numbers) == list(weights) and default_config().data.max_rejected == 0.001
    total = sum(visits for *_, visits in numbers.values())
    for name, (rows, share, ratio, weight, visits) in numbers.items():
        assert weight == weights[name] and ratio == pytest.approx(share / rows)
        assert visits == pytest.approx(rows * weight) == pytest.approx(share * total)
