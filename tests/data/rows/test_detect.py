"""data.layout="auto": what it chooses, what it reports, and when it leaves the choice to the user."""

import re

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import Feedback, Rejection, read_as, read_records
from tests import ROOT
from tests.data.test_docs import BLOCKS, rows_of, settings_of

ALIKE = {"trl", "hh", "ultrafeedback", "kto_mix"}
"""Layouts that "fields" reads as well."""
ROW = {"prompt": "Q?", "completion": "A.", "label": True}
CHAT = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}], "label": False}


def read(rows, **settings):
    return read_as(iter([(f"a.jsonl:{i}", row) for i, row in enumerate(rows, start=1)]), DataConfig(**settings))


@pytest.mark.parametrize(("words", "text"), BLOCKS, ids=[f"{i}{words}" for i, (words, _) in enumerate(BLOCKS)])
def test_the_layout_of_every_documented_row_is_found(words, text):
    settings = {"layout": "fields"} | settings_of(words)
    (chosen, format), rows = (settings["layout"], settings["format"]), rows_of(text)
    if (chosen == "openai" and format == "demonstrations") or chosen in ALIKE:
        chosen = "messages" if "messages" in rows[0] else "fields"
    if (settings["layout"], format) == ("trl", "pairs"):
        assert [record.reason.partition(";")[0] for record in read(rows, format="pairs").records] == [
            "no prompt, and chosen is not a transcript of Human and Assistant"
        ]
        return
    found = read(rows, format=format)
    assert found.layout == chosen and not found.fits
    assert list(found.records) == list(read(rows, format=format, layout=settings["layout"]).records)


def test_what_was_seen_and_chosen_is_reported(capsys):
    list(read([CHAT]).records)
    assert capsys.readouterr().err == (
        "a.jsonl: the columns are 'messages', 'label'; data.layout=\"auto\" reads them as 'messages', "
        "data.format='thumbs'\n"
    )


def test_rows_that_fit_two_layouts_are_refused():
    with pytest.raises(ConfigError, match=r"fit several layouts: 'fields', 'messages'.*Set config.data.layout"):
        read([ROW | CHAT])
    assert read([ROW | CHAT], layout="messages").layout == "messages"


def test_a_column_that_is_named_by_a_setting_is_read_by_fields():
    rows = [{"instruction": "Q?", "output": "A.", "label": True}]
    assert read(rows).layout == "alpaca"
    assert read(rows, prompt_field="instruction", completion_field="output").layout == "fields"


def test_a_column_may_be_read_by_another_name():
    dialog = {"dialog": CHAT["messages"], "label": False}
    with pytest.raises(ConfigError, match=r"with config.data.rename=\{'dialog': 'messages'\} reads it"):
        read([dialog])
    found = read([dialog, dialog | CHAT], rename={"dialog": "messages"})
    read_one, twice = found.records
    assert found.layout == "messages" and read_one == next(iter(read([CHAT]).records))
    assert twice.reason == "data.rename gives several columns the name 'messages'"
    with pytest.raises(ConfigError, match=r"no column 'dialogue', which data.rename renames. The columns are 'dialog'"):
        read([dialog], rename={"dialogue": "messages"})


def test_a_few_odd_rows_do_not_hide_the_layout_and_are_rejected_by_it():
    found = read([{"else": 1}, CHAT, "text", CHAT])
    assert found.layout == "messages"
    assert [isinstance(record, Rejection) for record in found.records] == [True, False, True, False]


def test_a_column_may_be_missing_from_the_first_row():
    rows = [{"prompt": "Q?", "completion": "A."}, ROW]
    assert [isinstance(record, Feedback) for record in read(rows).records] == [False, True]


def test_rows_of_another_format_are_refused_with_the_settings_that_fit():
    pairs = [{"chosen": "\n\nHuman: Q?\n\nAssistant: A.", "rejected": "\n\nHuman: Q?\n\nAssistant: B."}]
    with pytest.raises(
        ConfigError, match=r"These rows fit config.data.layout='fields' with config.data.format='pairs'"
    ):
        read(pairs)
    with pytest.raises(
        ConfigError, match=r"These rows fit config.data.layout='messages' with config.data.format='thumbs'"
    ):
        read([CHAT], layout="alpaca")


def test_no_usable_row_names_the_layout_that_would_fit(make_index):
    rows = [{**CHAT, "prompt": None, "completion": None}] * 3
    with pytest.raises(
        ConfigError, match=r"(?s)0 of 3 rows usable.*fits config.data.layout='messages' with config.data.f"
    ):
        make_index(rows, layout="kto_mix", max_rejected=1.0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*feedback.jsonl")), ids=lambda path: path.stem)
def test_files_of_recipes_are_read_by_the_default(path):
    assert all(isinstance(record, Feedback) for record in read_records(str(path), DataConfig()))


def test_the_manifest_names_the_layout_of_each_source_and_counts_what_was_skipped(make_index):
    index = make_index([CHAT, {"messages": CHAT["messages"]}, CHAT | {"label": None}])
    (source,) = index.manifest["sources"]
    assert source["layout"] == "messages" and not source["fits"]
    assert index.manifest["skips"] == {"no message has feedback": 2} and index.manifest["skipped"] == 2


def test_each_documented_layout_is_in_the_table_with_its_formats():
    from kto_jax.data.rows.layouts import LAYOUTS

    page = (ROOT / "docs" / "data.md").read_text()
    table = dict(re.findall(r"^\| (\w+) \| [^|]* \| ([\w, ]+) \| [^|]* \|$", page, re.MULTILINE))
    table.pop("layout")
    assert set(table) == set(LAYOUTS)
    for name, formats in table.items():
        columns = set(LAYOUTS[name].columns)
        assert columns == (set(formats.split(", ")) if formats != "all" else set(LAYOUTS["fields"].columns)), name
