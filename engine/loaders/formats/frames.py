"""The frames of a clip in a CSV file, as openSMILE, OpenFace, pandas and spreadsheets write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import DataError
from engine.loaders.foreign import known_file
from engine.loaders.formats.checks import listed
from engine.loaders.formats.tables import delimiter_of, encoding_of, without_mark

SHAPE = "numbers of shape (frames, features)"
NAMES = ("name", "file", "filename", "instance_name")
"""A first column of this name that holds text is left out. openSMILE writes the recording's name there."""
BOOKKEEPING = (
    *("frame", "frametime", "frame_time", "face_id", "timestamp", "time", "start", "end"),
    *("confidence", "success", "index"),
)  # fmt: skip
SPACES = ""
"""Stands for a table that any number of blanks separates, as numpy.savetxt writes it."""


@dataclass
class Frames:
    """The content of one file.

    Attributes:
        values: float64 [frames, features].
        columns: names of the features; none where the file has no header.
        left_out: name of a first column of text, if there is one.
    """

    values: np.ndarray
    columns: list[str]
    left_out: str = ""


@dataclass
class ColumnNames:
    """Compares the column names of all files of a modality. A feature has one place, the same in every file.

    Attributes:
        skip: names of columns that are no features.
    """

    skip: tuple[str, ...] = ()
    first: list[str] = field(default_factory=list)
    first_file: str = ""
    others: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def features(self, frames: Frames) -> np.ndarray:
        """The values of a file without the columns to skip. Upper and lower case of names are the same."""
        skip = {name.lower() for name in self.skip}
        kept = [i for i, name in enumerate(frames.columns) if name.lower() not in skip]
        if not frames.columns or len(kept) == len(frames.columns):
            return frames.values
        for name in frames.columns:
            if name.lower() in skip:
                self.skipped[name] = self.skipped.get(name, 0) + 1
        return frames.values[:, kept]

    @property
    def kept(self) -> list[str]:
        """Names of the features, as the first file that has names has them."""
        skip = {name.lower() for name in self.skip}
        return [name for name in self.first if name.lower() not in skip]

    def add(self, frames: Frames, where: str) -> None:
        """Take note of a file.

        Raises:
            DataError: it has the columns of the first file in another order.
        """
        if frames.left_out:
            self.left_out[frames.left_out] = self.left_out.get(frames.left_out, 0) + 1
        if not self.first:
            self.first, self.first_file = frames.columns, where
        if not frames.columns or frames.columns == self.first:
            return
        if sorted(frames.columns) == sorted(self.first):
            place = next(i for i, (a, b) in enumerate(zip(frames.columns, self.first, strict=True)) if a != b)
            raise DataError(
                where, f"the columns in another order ({frames.columns[place]!r} as column {place + 1})",
                f"{self.first[place]!r} there, as in {self.first_file}", "Write the columns of all files in one order.",
            )  # fmt: skip
        self.others += 1

    def notes(self, kind: str) -> list[str]:
        """What the user should know of the columns."""
        notes = [f"{kind}: the column {name} is text and is left out ({n} files)" for name, n in self.left_out.items()]
        notes += [f"{kind}: the column {name} is skipped ({n} files)" for name, n in self.skipped.items()]
        if kept := [name for name in self.first if name.lower() in BOOKKEEPING and name not in self.skipped]:
            notes.append(
                f"{kind}: columns read as features: {listed(kept)}; name those that are no features in "
                "data.skip_columns, or remove them from the files"
            )
        if self.others:
            notes.append(
                f"{kind}: {self.others} files have other column names than {self.first_file}: "
                "columns are taken by their place"
            )
        return notes


def read_frames(path: Path, at: str) -> Frames:
    """Read one file.

    Commas, semicolons, tabs or blanks separate the cells. A header may be there. A first column of text is left out
    where it has one of `NAMES`.

    Args:
        at: how errors name the place that names the file.

    Raises:
        DataError: it is another kind of file, a cell is not a number, or rows differ in length.
    """
    where = f"{at}: {path.name}"
    raw = path.read_bytes()
    if known := known_file(raw):
        raise DataError(where, known[0], "a .npy or .csv file", known[1])
    skipped, body = without_mark(raw.decode(encoding_of(raw), "replace"))
    if "\0" in body[: 1 << 16]:
        raise DataError(where, "bytes that are no text", SHAPE, "Save it as CSV, or as .npy.")
    lines = [line for line in body[: 1 << 20].splitlines() if line.strip()][:2]
    if not lines:
        return Frames(np.zeros((0, 0), np.float32), [])
    delimiter = _delimiter(lines)
    head = _cells(lines[0], delimiter)
    header = _is_header(head, f"{where}, line 1")
    if header and len(lines) < 2:
        return Frames(np.zeros((0, 0), np.float32), [])
    first = _cells(lines[-1] if header else lines[0], delimiter)
    text = header and head[0].lower() in NAMES and not _is_number(first[0])
    values = _quick(body, delimiter, header, text)
    if values is None or (header and values.shape[1] != len(head)):
        values = _checked(body, delimiter, where, skipped, head if header else None, text)
    names = head if header and not _counts(head) else []
    return Frames(values[:, 1:], names[1:], head[0]) if text else Frames(values, names)


def _quick(body: str, delimiter: str, header: bool, text: bool) -> np.ndarray | None:
    """The numbers, read by numpy at once. None where anything is unusual."""
    start = len(body) - len(body.lstrip("\r\n"))
    if header:
        start = body.find("\n", start) + 1
        if not start:  # a file of one line, or with the line ends of old Macs
            return None
    if not body[start:].strip():
        return None
    try:
        return np.loadtxt(
            io.StringIO(body[start:], newline=None), np.float64, comments=None, delimiter=delimiter or None, ndmin=2,
            quotechar='"', converters={0: lambda _: 0.0} if text else None,
        )  # fmt: skip
    except ValueError:
        return None


def _checked(body: str, delimiter: str, where: str, skipped: int, header: list[str] | None, text: bool) -> np.ndarray:
    """The numbers, row by row, with an error that names the line and the cell."""
    rows: list[list[float]] = []
    width, as_in = (0, "") if header is None else (len(header), "the header has")
    try:
        for line, cells in _rows(body, delimiter):
            at = f"{where}, line {line + skipped}"
            if header is not None:
                header = None
                continue
            if width and len(cells) != width:
                raise DataError(at, f"{len(cells)} cells", f"{width} as {as_in}", "Correct the row.")
            if not width:
                width, as_in = len(cells), "in the first row"
            rows.append([0.0 if text and i == 0 else _number(cell, at, i) for i, cell in enumerate(cells)])
    except csv.Error as cause:
        raise DataError(where, f"no CSV ({cause})", SHAPE, "Save it again.") from None
    return np.array(rows, np.float64) if rows else np.zeros((0, 0), np.float32)


def _rows(body: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    if delimiter == SPACES:
        yield from ((n, line.split()) for n, line in enumerate(body.splitlines(), 1) if line.strip())
        return
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
    yield from ((reader.line_num, cells) for cells in reader if cells)


def _number(cell: str, at: str, place: int) -> float:
    if _is_number(cell):
        return float(cell)
    do = "Correct the row."
    found = f"a cell that is not a number ({cell.strip()!r}, column {place + 1})"
    if not cell.strip():
        found, do = f"an empty cell (column {place + 1}), which is not a number", "Write nan where a value is missing."
    elif re.fullmatch(r"\s*[+-]?\d*,\d+\s*", cell):
        do = "Save the file with decimal points."
    raise DataError(at, found, SHAPE, do)


def _delimiter(lines: list[str]) -> str:
    """What separates the cells. The last of the lines holds numbers, if the file does."""
    fitting = [d for d in (",", ";", "\t", SPACES) if all(map(_is_number, _cells(lines[-1], d)))]
    if fitting:
        return max(fitting, key=lambda d: len(_cells(lines[-1], d)))
    return ";" if ";" in lines[-1] else delimiter_of(lines[0])


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == SPACES:
        return line.split()
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return [line]


def _is_header(cells: list[str], at: str) -> bool:
    """Whether the first row of a CSV names columns: it holds no number, or pandas' 0, 1, 2, ...

    Raises:
        DataError: the first column has no name. It holds pandas' row numbers, which are not a feature.
    """
    if len(cells) > 1 and not cells[0]:
        raise DataError(at, "a first column without a name, as of row numbers", SHAPE, "Save it without its index.")
    return not any(map(_holds_numbers, cells)) or _counts(cells)


def _holds_numbers(cell: str) -> bool:
    """Whether a cell is a number, or several as in "1 2", which name no column. e1 names one."""
    parts = re.findall(r"[^\s,;]+", cell)
    return bool(parts) and all(map(_is_number, parts))


def _counts(cells: list[str]) -> bool:
    return len(cells) > 1 and cells == [str(i) for i in range(len(cells))]


def _is_number(cell: str) -> bool:
    try:
        float("" if "_" in cell else cell)  # Python would read 1_5 as 15
    except ValueError:
        return False
    return True
