"""Rows of JSON files: one object a line, a list of objects, or objects over many lines.

Lines and rows are split as bytes, so that a broken row affects no other, and a file takes the memory of one row.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from kto_jax.config import ConfigError
from kto_jax.data.rows.rejection import BLANK, Rejection, Skipped

Row = tuple[str, Any]
MAX_BYTES = 8 << 20
"""Longest line, row or CSV field: a longer one is a broken file, and tokenizing it would take gigabytes."""
AS_UTF8 = "save the file as UTF-8"
"""What reads a file of another encoding."""
_CHUNK_BYTES = 1 << 20
_SNIFFED_BYTES = 4096
_WRAPPERS = ("data", "rows", "items", "records", "examples", "results", "feedbacks", "conversations", "traces", "runs")
"""Keys under which an API response holds a list of rows."""


def jsonl_rows(stream: Any, name: str) -> Iterator[Row]:
    """The rows of a file of one object per line, or of a list in a file with this ending."""
    with contextlib.suppress(EOFError, OSError):  # Reading the lines reports the error.
        _refuse_utf16(stream.peek(_SNIFFED_BYTES), name)
        if re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", stream.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES]):
            yield from json_rows(stream, name)
            return
    yield from _lines(stream, name)


def _refuse_utf16(start: bytes, name: str) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{name} is UTF-16, as PowerShell's > writes it. JSON is read as UTF-8. S{AS_UTF8[1:]}.")


def _lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    number = 0
    while True:
        number += 1
        place = f"{name}:{number}"
        try:
            line = stream.readline(MAX_BYTES)
            too_long = len(line) == MAX_BYTES and not line.endswith(b"\n")
            rest = line
            while too_long and rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_BYTES)
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not line:
            return
        if too_long:
            yield place, Rejection(f"line is longer than {MAX_BYTES} bytes", place)
        elif line := line.strip(b" \t\r\n"):
            yield place, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
        else:
            yield place, Skipped(BLANK, place)


class _TwiceError(Exception):
    """An object has a key twice, of which `json` would drop the first in silence."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Rejection(f"invalid UTF-8 at byte {error.start}; {AS_UTF8}", place)
    except _TwiceError as error:
        return Rejection(f"the key {error.key[:40]!r} is there twice in one object; rename one", place)
    except json.JSONDecodeError as error:
        return Rejection(f"invalid JSON: {error.msg}", place)
    except (ValueError, RecursionError) as error:
        return Rejection(f"invalid JSON: {type(error).__name__}", place)


_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'"|\\.', re.DOTALL)


def json_rows(stream: Any, name: str) -> Iterator[Row]:
    """The rows of a .json file: a list, objects one after another, or the list in a single object.

    Raises:
      ConfigError: the file begins otherwise.
    """
    try:
        first = stream.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
        _refuse_utf16(first, name)
    except (EOFError, OSError) as error:
        yield f"{name}:1", Rejection(f"compressed file is cut or broken: {type(error).__name__}", f"{name}:1")
        return
    if first.startswith(b"["):
        yield from _cut(stream, name, in_list=True)
    elif first.startswith(b"{") and _is_over_many_lines(first):
        yield from _unwrapped(_cut(stream, name, in_list=False))
    elif first.startswith(b"{"):
        # Many datasets use this ending for files of one object per line.
        yield from _unwrapped(_lines(stream, name))
    else:
        raise ConfigError(
            f"{name} begins with {first[:20]!r}. A .json file holds one list of objects, or one object a line. "
            "Write the rows as a list."
        )


def _is_over_many_lines(start: bytes) -> bool:
    """Whether an object continues after its first line, as in indented JSON."""
    line, newline, rest = start.partition(b"\n")
    if not newline:
        return False
    # Indented JSON breaks lines after brackets and commas, and a line of JSONL ends in a complete object.
    return line.rstrip()[-1:] in b"{[," and rest.lstrip()[:1] not in b"{"


def _unwrapped(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows, or the rows of the list that a single object holds."""
    first = list(itertools.islice(rows, 2))
    if len(first) == 1 and isinstance(first[0][1], dict):
        ((place, fields),) = first
        name = place.rpartition(":")[0]
        if found := _rows_in(fields, name):
            yield from ((f"{name}:{number}", row) for number, row in enumerate(found, start=1))
            return
        if len(fields) > 1 and all(isinstance(held, dict) and "0" in held for held in fields.values()):
            raise ConfigError(
                f"{name} holds one object for each column, as pandas' to_json() writes it. The rows must be objects. "
                "Write them with orient='records'."
            )
    yield from itertools.chain(first, rows)


def refuse_repeated(header: list[str], name: str) -> None:
    """Refuses a table that names a column twice, of which one would be dropped in silence.

    Raises:
      ConfigError: it does.
    """
    if repeated := next((column for column in header if column and header.count(column) > 1), None):
        raise ConfigError(f"{name} has the column {repeated!r} twice. Each column needs its own name. Rename one.")


def _rows_in(fields: dict[str, Any], name: str) -> list[Any]:
    """The rows of the list that an object holds, or of its table of `columns` and `data`; none if it is a row."""
    columns, table = fields.get("columns"), fields.get("data")
    if isinstance(columns, list) and isinstance(table, list) and all(isinstance(each, str) for each in columns):
        refuse_repeated(columns, name)
        is_table = all(isinstance(row, list) and len(row) == len(columns) for row in table)
        return [dict(zip(columns, row, strict=True)) for row in table] if is_table else []
    lists = [fields[key] for key in _WRAPPERS if isinstance(fields.get(key), list)]
    if len(lists) != 1 or not all(isinstance(row, dict) for row in lists[0]):
        return []
    are_turns = any("role" in row or "from" in row for row in lists[0])
    return [] if are_turns else lists[0]


def _cut(stream: IO[bytes], name: str, *, in_list: bool) -> Iterator[Row]:
    """Splits a list at its outermost commas, or objects after their last bracket, so that each is parsed separately."""
    buffer = b""
    # Of a list, depth is -1 outside and 0 between its rows; of objects one after the other, 0 between them.
    number, depth, start, position = 1, -1 if in_list else 0, 0, 0
    inside, too_long, row = False, False, bytearray()
    while True:
        while match := (_INSIDE if inside else _OUTSIDE).search(buffer, position):
            position, token = match.end(), match[0]
            if inside or token == b'"':
                inside = inside != (token == b'"')
                continue
            ends = depth == 0 and token in b",]" if in_list else depth == 1 and token in b"}]"
            if token in b"{[":
                depth += 1
                if in_list and depth == 0:
                    start = position
                    row.clear()
            elif depth > 0 and token in b"}]":
                depth -= 1
            if ends:
                row += buffer[start : match.start() if in_list else position]
                start, place = position, f"{name}:{number}"
                too_long = too_long or len(row) > MAX_BYTES
                if too_long:
                    yield place, Rejection(f"row is longer than {MAX_BYTES} bytes", place)
                elif number > 1 or token != b"]" or row.strip():
                    yield place, _parse(bytes(row.strip()).removeprefix(b"\xef\xbb\xbf"), place)
                if in_list and token == b"]":
                    return
                number, too_long = number + 1, False
                row.clear()
        # A backslash at the end belongs to the next character.
        end = len(buffer) - (inside and position < len(buffer) and buffer.endswith(b"\\"))
        row += buffer[start:end]
        if len(row) > MAX_BYTES:
            too_long = True
            row.clear()
        place = f"{name}:{number}"
        try:
            chunk = stream.read(_CHUNK_BYTES)
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not chunk:
            if in_list or row.strip() or too_long:
                what = "its list" if in_list else "an object"
                yield place, Rejection(f"invalid JSON: the file ends before {what}", place)
            return
        buffer, start, position = buffer[end:] + chunk, 0, 0
