"""Statistics of the package's structure, from its source: modules, folders, imports, files and functions.

    python -m benchmarks.structure
    python -m benchmarks.structure ../before .     # a column for each checkout

A unit is a module or a folder directly in kto_jax/. Imports inside functions count as imports.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

PACKAGE = "kto_jax"
Graph = dict[str, set[str]]


class Function(NamedTuple):
    """A function or method with the size of its body and of its signature."""

    name: str
    lines: int
    parameters: int
    signature_lines: int


def find_modules(checkout: Path) -> dict[str, Path]:
    """The files of the package by module name; a folder's __init__ has the folder's name."""
    return {
        ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((checkout / PACKAGE).rglob("*.py"))
    }


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """A file's imports, at its top or inside functions: `from a import b` gives ("a", "b"), `import a` ("a", "")."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno} is a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def import_graph(modules: dict[str, Path]) -> Graph:
    """The modules of the package that each module imports; folders count if a name of their __init__ is imported."""
    graph: Graph = {}
    for name, path in modules.items():
        pairs = imported_names(path)
        found = {f"{module}.{each}" if f"{module}.{each}" in modules else module for module, each in pairs}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def unit(module: str) -> str:
    """The module or folder directly in the package that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def arrows(graph: Graph) -> set[tuple[str, str]]:
    """Pairs of units of which the first imports the second."""
    pairs = {(unit(name), unit(other)) for name, others in graph.items() for other in others}
    return {(one, other) for one, other in pairs if one != other and one and other}


def cycles(graph: Graph) -> list[set[str]]:
    """Groups of modules each of which imports itself through the others."""

    def reachable(name: str) -> set[str]:
        found: set[str] = set()
        stack = [*graph[name]]
        while stack:
            if (other := stack.pop()) not in found:
                found.add(other)
                stack += graph[other]
        return found

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return [set(group) for group in groups if group]


def functions(path: Path) -> Iterator[Function]:
    """The functions and methods of a file; `self` and `cls` do not count as parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given += [each for each in (node.args.vararg, node.args.kwarg) if each]
            parameters = sum(each.arg not in ("self", "cls") for each in given)
            assert node.end_lineno is not None
            signature = max(node.body[0].lineno - node.lineno, 1)
            yield Function(f"{path.stem}.{node.name}", node.end_lineno - node.lineno + 1, parameters, signature)


def measure(checkout: Path) -> dict[str, str]:
    """The printed figures of one checkout."""
    modules = find_modules(checkout)
    graph = import_graph(modules)
    units = {unit(name) for name in modules if unit(name)}
    folders = {name for name in units if (checkout / PACKAGE / name).is_dir()}
    lengths = {path: len(path.read_text().splitlines()) for path in modules.values()}
    largest = max(lengths, key=lengths.__getitem__)
    found = [function for path in modules.values() for function in functions(path)]
    longest = max(found, key=lambda function: function.lines)
    widest = max(found, key=lambda function: (function.parameters, function.signature_lines))
    between_modules = sum(len(others) for others in graph.values())
    return {
        "top-level modules": str(len(units - folders)),
        "folders": str(len(folders)),
        "modules": str(len(modules)),
        "import arrows between units": str(len(arrows(graph))),
        "import arrows between modules": str(between_modules),
        "import cycles": ", ".join(f"{len(group)} modules" for group in cycles(graph)) or "none",
        "lines": f"{sum(lengths.values()):,}",
        "largest file": f"{lengths[largest]} lines, {largest.relative_to(checkout)}",
        "median file": f"{statistics.median(lengths.values()):.0f} lines",
        "files over 400 lines": str(sum(length > 400 for length in lengths.values())),
        "longest function": f"{longest.lines} lines, {longest.name}",
        "functions over 45 lines": str(sum(function.lines > 45 for function in found)),
        "largest signature": f"{widest.parameters} parameters over {widest.signature_lines} lines, {widest.name}",
        "signatures over 8 parameters": str(sum(function.parameters > 8 for function in found)),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(".")])
    options = parser.parse_args()
    results = [measure(checkout) for checkout in options.checkouts]
    table = Table("", *(str(checkout) for checkout in options.checkouts))
    for name in results[0]:
        table.add_row(name, *(result[name] for result in results))
    Console().print(table)


if __name__ == "__main__":
    main()
