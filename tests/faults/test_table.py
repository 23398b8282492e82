"""The table of faults, and the command that writes it."""

import ast
import collections
import functools

import pytest

from benchmarks.fault_table import FAULTS, Fault
from benchmarks.faults import BEGIN, END, PAGE, read_report, result, update
from tests import ROOT


@functools.cache
def functions(path):
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_covers_f1_to_f38_and_those_of_buckets():
    assert list(FAULTS) == [*(f"F{number}" for number in range(1, 39)), *(f"B{number}" for number in range(1, 4))]
    assert all(fault.injected and fault.expected and fault.tests for fault in FAULTS.values())


@pytest.mark.parametrize("number", FAULTS)
def test_every_test_of_the_table_exists(number):
    for node in FAULTS[number].tests:
        path, _, name = node.partition("::")
        assert name in functions(path), f"{node} does not exist"


def test_the_page_has_a_row_for_every_fault():
    table = (ROOT / PAGE).read_text().partition(BEGIN)[2].partition(END)[0]
    assert [line.split(" | ")[0] for line in table.splitlines() if line[:3] in ("| F", "| B")] == [
        f"| {number}" for number in FAULTS
    ]


CASES = """<testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_c[1]"/>
<testcase classname="tests.a.test_b" name="test_c[2]">{}</testcase>
<testcase classname="tests.a.test_b" name="test_d"/></testsuite></testsuites>"""
NODES = ("tests/a/test_b.py::test_c", "tests/a/test_b.py::test_d")


@pytest.mark.parametrize(
    ("second", "tests", "missing", "expected"),
    [
        ("", NODES, "", "PASS (3)"),
        ("<skipped/>", NODES, "", "PASS (2)"),
        ("", NODES, "more", "PARTLY (3): more"),
        ("<failure/>", NODES, "", "FAIL: test_c"),
        ("<error/>", NODES, "more", "FAIL: test_c"),
        ("", (*NODES, "tests/a/test_b.py::test_e"), "", "FAIL: test_e"),  # it did not run
    ],
)
def test_a_fault_passes_if_every_test_of_it_ran_and_passed(second, tests, missing, expected, tmp_path):
    (tmp_path / "report.xml").write_text(CASES.format(second))
    assert result(Fault("x", "y", tests, missing), read_report(tmp_path / "report.xml")) == expected


def test_without_a_report_every_fault_fails(tmp_path):
    counts = read_report(tmp_path / "none.xml")
    assert result(Fault("x", "y", NODES), counts) == "FAIL: test_c, test_d"


def test_rows_that_did_not_run_stay_in_the_page():
    page = f"before\n{BEGIN}\nold\n\n| F1 | a |\n| F3 | c |\n{END}\nafter\n"
    found = update(page, {"F2": "| F2 | b |\n", "F3": "| F3 | d |\n"}, "new")
    assert [line for line in found.splitlines() if line.startswith("| F")] == ["| F1 | a |", "| F2 | b |", "| F3 | d |"]
    assert found.startswith(f"before\n{BEGIN}\nnew\n") and found.endswith(f"{END}\nafter\n")
    assert collections.Counter(found.splitlines())[BEGIN] == 1
