"""Runs the tests of faults F1 to F38 and B1 to B3, and writes their table into docs/reliability.md.

    python -m benchmarks.faults                # all, about half an hour on two cores
    python -m benchmarks.faults --only=F5,F6   # replaces these rows of the table

A row is PASS if all its tests pass, and PARTLY if no test shows something that it promises. The exit code is 1 if a
test fails.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.fault_table import FAULTS, Fault

PAGE = Path("docs/reliability.md")
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
_HEAD = "| # | injected | expected | result | tests |\n|---|---|---|---|---|\n"
_UNWANTED = "not parity and not gpu and not exhaustive"

Counts = Mapping[str, collections.Counter[str]]


def run_tests(nodes: Iterable[str]) -> Counts:
    """Runs tests in a process of their own.

    Args:
      nodes: node ids, each without parameters.

    Returns:
      For each node id how many of its cases passed, failed and were skipped.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", _UNWANTED, f"--junitxml={report}"]
        subprocess.run([*command, *nodes])
        return read_report(report)


def read_report(path: Path) -> Counts:
    """The outcomes in a report of pytest; none if pytest did not live to write it."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in ElementTree.parse(path).iter("testcase") if path.exists() else ():
        node = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[node][outcome] += 1
    return counts


def result(fault: Fault, counts: Counts) -> str:
    """PASS, FAIL or PARTLY, with the numbers of cases."""
    total = sum((counts.get(node, collections.Counter()) for node in fault.tests), collections.Counter())
    idle = [node for node in fault.tests if not counts.get(node, {}).get("passed")]
    if idle or total["failed"]:
        names = ", ".join(node.partition("::")[2] for node in fault.tests if node in idle or counts[node]["failed"])
        return f"FAIL: {names}"
    return f"PARTLY ({total['passed']}): {fault.missing}" if fault.missing else f"PASS ({total['passed']})"


def table_row(number: str, counts: Counts) -> str:
    """The row of a fault, as Markdown."""
    fault = FAULTS[number]
    files = sorted({node.partition("::")[0].removeprefix("tests/") for node in fault.tests})
    cells = (number, fault.injected, fault.expected, result(fault, counts), ", ".join(f"`{file}`" for file in files))
    return "| " + " | ".join(cells) + " |\n"


def update(page: str, rows: Mapping[str, str], summary: str) -> str:
    """A page with these rows of its table replaced; the others stay."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = {match[1]: match[0] + "\n" for match in re.finditer(r"^\| ([FB]\d+) \|.*\|$", old, re.MULTILINE)}
    table = "".join((kept | rows)[number] for number in FAULTS if number in kept | rows)
    return f"{before}{BEGIN}\n{summary}\n\n{_HEAD}{table}{END}{after}"


def replace_part(path: Path, begin: str, end: str, part: str) -> None:
    """Replaces what stands between two comments of a page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{before}{begin}\n{part}{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="numbers with commas between them, as F5,F6")
    chosen = [name for name in parser.parse_args().only.upper().split(",") if name] or list(FAULTS)
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"{', '.join(unknown)} is no fault. Allowed: F1 to F38, B1 to B3. Write --only=F5,F6.")
    started = time.monotonic()
    counts = run_tests(dict.fromkeys(node for name in chosen for node in FAULTS[name].tests))
    rows = {name: table_row(name, counts) for name in chosen}
    total, only = sum(counts.values(), collections.Counter()), f" --only={','.join(chosen)}" * (chosen != list(FAULTS))
    summary = (
        f"Last run: {datetime.date.today()}, `python -m benchmarks.faults{only}`: {total['passed']} of {total.total()} "
        f"test cases passed in {time.monotonic() - started:.0f} s."
    )
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8"), rows, summary), encoding="utf-8")
    print("".join(rows.values()) + summary)
    return int(any("| FAIL" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
