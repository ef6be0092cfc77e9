"""Records of estimates: one JSON line for every task, number of rows, seed and method."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import EngineError

Record = dict[str, Any]
Key = tuple[str, int, int, str]


def key(record: Record) -> Key:
    return record["task"], record["rows"], record["seed"], record["method"]


def read(path: Path) -> list[Record]:
    """Every record, the last of those with equal keys, sorted by key.

    A last line that an interrupted run left without its end is not a record.

    Raises:
        EngineError: any other line that is not one.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[key(record)] = record
        except (ValueError, KeyError, TypeError):
            raise EngineError(
                f"{path}, line {number}", repr(line[:60]), "a record of python -m bench.mi run", "Delete that line."
            ) from None
    return [records[k] for k in sorted(records)]


def append(path: Path, record: Record) -> None:
    """One whole line at the end of the file; processes may append to one file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # after an interrupted run, the new record starts a line of its own
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        if torn:
            _drop_last_line(file)
        file.write((json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode())


def _drop_last_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def done(records: Iterable[Record], retry: bool = False) -> set[Key]:
    """Keys that need no run; with `retry`, failed ones do."""
    return {key(r) for r in records if not (retry and "error" in r)}
