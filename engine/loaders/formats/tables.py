"""CSV tables as spreadsheets and pandas leave them: UTF-8 or UTF-16, separated by commas, semicolons or tabs."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.errors import DataError

DELIMITERS = ",;\t"
HEAD_BYTES = 1 << 16


@dataclass
class Table:
    """The rows of a CSV that are not blank: line numbers, and cells by column, not stripped."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def csv_header(path: Path) -> list[str]:
    """Column names of a CSV; none if the file is not one."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEAD_BYTES)
        text = raw.decode(encoding_of(raw), "replace")
        return _header(
            next(csv.reader(io.StringIO(without_mark(text)[1], newline=""), delimiter=delimiter_of(text)), [])
        )
    except (OSError, csv.Error):  # some other file beside the data
        return []


def read_table(path: Path, title: str, need: Iterable[str], errors: Literal["strict", "replace"] = "strict") -> Table:
    """Read a CSV.

    Args:
        title: what messages call the file.
        need: columns that it must have, once.
        errors: replace reads on past bytes that are not text.

    Raises:
        DataError: the file is not text or no CSV, a needed column is missing or there twice, or a row has more cells
            than the header.
    """
    raw = path.read_bytes()
    encoding = encoding_of(raw)
    try:
        text = raw.decode(encoding, errors)
    except UnicodeDecodeError as cause:
        name = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
        raise DataError(str(path), f"no {name} at byte {cause.start}", f"{name} text", "Save it as UTF-8.") from None
    skipped, body = without_mark(text)
    delimiter = delimiter_of(text)
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
    rows = []
    try:
        columns = _header(next(reader, []))
        _check_columns(path, columns, need)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue  # spreadsheets leave blank rows
            line = reader.line_num + skipped
            if any(cell.strip() for cell in cells[len(columns) :]):
                shown = "tab" if delimiter == "\t" else delimiter
                raise DataError(
                    f"{path}, line {line}", f"{len(cells)} cells", f"{len(columns)}, as the header has",
                    f"Put a cell that holds the separator ({shown}) in quotes; write numbers with a decimal point.",
                )  # fmt: skip
            rows.append((line, dict(zip(columns, [*cells, *[""] * len(columns)], strict=False))))
    except csv.Error as cause:
        raise DataError(str(path), f"no CSV ({cause})", title, "Save it as CSV.") from None
    return Table(path, columns, rows)


def number(cell: str, where: str) -> float:
    """A label from a cell.

    Raises:
        DataError: it is not a finite number. A decimal comma is named as such.
    """
    text = cell.strip().replace("\u2212", "-")  # the minus sign of typesetting
    try:
        value = float("" if "_" in text else text)  # Python would read 1_5 as 15
    except ValueError:
        if re.fullmatch(r"[+-]?\d*,\d+", text):
            raise DataError(
                where, f"label {cell!r}, with a decimal comma", "a finite number with a decimal point",
                "Save the file with decimal points.",
            ) from None  # fmt: skip
        do = "Correct the row."
        if re.search(r"[^\W\d_]{2}", text):
            do = "Correct the row; number classes 0, 1, 2, ... (data.dataset=custom, model.task=classification)."
        raise DataError(where, f"label {cell!r}", "a finite number", do) from None
    if not abs(value) <= float(np.finfo(np.float32).max):  # NaN too
        raise DataError(where, f"label {value:g}", "a finite number", "Correct the row.")
    return value


def label_of(cell: str, where: str) -> float:
    """`number` of a cell. An empty cell or nan is NaN: the sample has no label."""
    return float("nan") if cell.strip().lower() in ("", "nan") else number(cell, where)


def plain_number(text: str) -> str:
    """One spelling for a whole number, however a spreadsheet wrote it. Other text stays as it is.

    >>> plain_number("01"), plain_number("1.0"), plain_number("a")
    ('1', '1', 'a')
    """
    try:
        value = float("" if "_" in text else text)
    except ValueError:
        return text.strip()
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else text.strip()


def encoding_of(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if raw[:1] != b"\0" and raw[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if raw[:1] == b"\0" and raw[1:2] not in (b"\0", b"") else "utf-8-sig"


def without_mark(text: str) -> tuple[int, str]:
    """How many lines are skipped, and the text without Excel's first line `sep=;`."""
    first, _, rest = text.partition("\n")
    return (1, rest) if re.fullmatch(r'"?sep=.?"?\r?', first) else (0, text)


def delimiter_of(text: str) -> str:
    """The separator that cuts the header into most columns."""
    first = without_mark(text)[1].split("\n", 1)[0]

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader([first], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=columns)


def _header(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _check_columns(path: Path, columns: list[str], need: Iterable[str]) -> None:
    for name in need:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1)
            do = f"Rename {near[0]!r} to {name!r}." if near else "Add it."
            raise DataError(str(path), f"columns {', '.join(columns)}", f"a column {name}", do)
        if columns.count(name) > 1:
            raise DataError(str(path), f"{columns.count(name)} columns {name!r}", "one", "Rename or remove the others.")
