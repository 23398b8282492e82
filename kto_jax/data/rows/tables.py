"""Rows of tables: CSV and TSV, Excel, Parquet and Arrow. The first row of a sheet names the columns."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.rows.json_rows import AS_UTF8, MAX_BYTES, Row, refuse_repeated
from kto_jax.data.rows.rejection import BLANK, Rejection, Skipped

_SNIFFED_BYTES = 4096
"""Bytes of a CSV file from which its encoding and separator are detected."""
_SURROGATES = re.compile("[\udc80-\udcff]")


def csv_rows(stream: Any, name: str, separator: str | None = None) -> Iterator[Row]:
    """The rows of a CSV file.

    Args:
      stream: its bytes, which can be peeked at.
      name: of the file, for places.
      separator: what separates its columns; None looks at the header.

    Raises:
      ConfigError: a column is named twice.
    """
    csv.field_size_limit(MAX_BYTES)
    try:
        start = stream.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES]
    except (EOFError, OSError):
        start = b""  # Reading it reports the error.
    encoding = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    # Bytes that are not UTF-8 become surrogates here and reject their own row below, not the file.
    with io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="") as text:
        found, is_said = _separator(start.decode(encoding, errors="replace"))
        yield from _csv_rows(text, name, separator if separator and not is_said else found, is_said)


def _separator(start: str) -> tuple[str, bool]:
    """The separator of a CSV file, from its first bytes, and whether the first line declares it.

    It is a comma unless that would make the header one column, and another separator several.
    """
    first = start.splitlines()[0] if start else ""
    if said := re.fullmatch(r"sep=(.)", first.strip("\ufeff\r\n")):
        return said[1], True
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in (",", ";", "\t", "|")}
    return ("," if counts[","] > 1 else max(counts, key=lambda mark: counts[mark])), False


def _csv_rows(text: IO[str], name: str, separator: str, is_said: bool) -> Iterator[Row]:
    reader = csv.reader(text, strict=True, delimiter=separator)
    if is_said:
        next(reader, None)
    header: list[str] | None = None
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, Rejection(f"invalid CSV: {error}", place)
            continue
        except (EOFError, OSError) as error:
            yield place, Rejection(f"compressed file is cut or broken: {type(error).__name__}", place)
            return
        if not values:
            yield place, Skipped(BLANK, place)
        elif header is None:
            header = values
            refuse_repeated(header, name)
        elif len(values) != len(header):
            yield (
                place,
                Rejection(
                    f"{len(values)} columns where the header has {len(header)}; the first line must name the columns",
                    place,
                ),
            )
        elif any(map(_SURROGATES.search, values)):
            yield place, Rejection(f"invalid UTF-8; {AS_UTF8}, in Excel as 'CSV UTF-8'", place)
        else:
            yield place, dict(zip(header, values, strict=True))


def excel_rows(path: Path, name: str) -> Iterator[Row]:
    """The rows of the first sheet of an Excel workbook that has any; a warning names other sheets with rows.

    Raises:
      ConfigError: the file is not a workbook, openpyxl is not installed, or a column name occurs twice.
    """
    require("openpyxl", f"data source {name!r}", "save the workbook as CSV")
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:
        # The library raises its parsers' errors.
        raise ConfigError(
            f"{name} cannot be read as Excel: {type(error).__name__}: {str(error)[:200]}. An .xlsx file must be whole. "
            "Save it again, or as CSV."
        ) from error
    try:
        filled = [sheet for sheet in book.worksheets if any(map(_is_filled, itertools.islice(sheet.values, 10)))]
        if len(filled) > 1:
            others = ", ".join(repr(sheet.title) for sheet in filled[1:])
            print(f"warning: {name}: only the sheet {filled[0].title!r} is read, not {others}", file=sys.stderr)
        if filled:
            yield from _sheet_rows(filled[0].values, name)
    finally:
        book.close()


def _is_filled(values: tuple[Any, ...]) -> bool:
    return any(value is not None and value != "" for value in values)


def _sheet_rows(rows: Iterator[tuple[Any, ...]], name: str) -> Iterator[Row]:
    header: list[str] | None = None
    for number, values in enumerate(rows, start=1):
        place = f"{name}:{number}"
        if not _is_filled(values):
            yield place, Skipped(BLANK, place)
        elif header is None:
            header = ["" if value is None else str(value) for value in values]
            refuse_repeated(header, name)
        else:
            cells = zip(header, values, strict=False)
            yield place, {column: _cell(value) for column, value in cells if column}


def _cell(value: Any) -> Any:
    """A cell; values that JSON lacks, dates and times, become text as in CSV."""
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def columnar_rows(path: Path, name: str, suffix: str) -> Iterator[Row]:
    """The rows of a Parquet, Arrow or Feather file.

    Raises:
      ConfigError: the file is broken.
    """
    import pyarrow

    number = 0
    try:
        for batch in _parquet_batches(path) if suffix == ".parquet" else _arrow_batches(path):
            refuse_repeated(batch.schema.names, name)
            for i in range(batch.num_rows):
                number += 1
                place = f"{name}:{number}"
                try:
                    row = batch.slice(i, 1).to_pylist()[0]
                    yield place, {column: _without_nulls(value) for column, value in row.items()}
                except UnicodeDecodeError:
                    yield place, Rejection("invalid UTF-8", place)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        raise ConfigError(
            f"{name} cannot be read as {kind} after row {number}: {str(error)[:200]}. "
            f"A {suffix} file must be whole. Write it again."
        ) from error


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that Arrow adds to give all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=1024)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of an Arrow file, or of a stream, which is what `datasets` writes. Both are called .arrow."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as content:
        if content.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(content)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
        else:
            content.seek(0)
            yield from pyarrow.ipc.open_stream(content)
