"""Reading other people's pickles without running them.

A pickle is a program. The machine here executes only what builds numpy arrays, numbers, text and plain containers:
every name a pickle asks for must be on `ALLOWED`, and what it gets under that name is a function of ours, never the
real callable. Instructions cannot cost more than the file's own size accounts for: texts are counted when they are
made, shared lists and texts each time they are referred to, nothing may hold itself, integers have at most 64 bits, and
keys are text or real numbers, or short tuples of them, few of which may share a hash. An array of numbers may be shared
by any number of rows and splits, since it is not copied.

Byte strings that Python 2 wrote become text: UTF-8, or Latin-1 where they are not that.

Large array payloads are not copied: they become read-only views of the file's bytes, which are mapped from a copy or
from the file itself, so that opening a 12 GB file costs what is later touched, not 12 GB of memory.
"""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.loaders.safe_pickle.limits import LARGE, SHARING, SPARE, Limit, Refused, Truncated
from engine.loaders.safe_pickle.machine import Machine
from engine.loaders.safe_pickle.settle import Settle
from engine.loaders.safe_pickle.values import ALLOWED, decoded
from engine.loaders.spool import steady

__all__ = ["ALLOWED", "LARGE", "decoded", "load", "loads"]

_HEADS = (
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "a web page, not the data",
        "Download the file itself (the link led to a page).",
    ),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the data", "Fetch the real file with `git lfs pull`."),
    (
        (b"pk\x03\x04",),
        "a zip archive or a torch.save file",
        "Unpack it, or save its contents as numpy arrays in a pickle.",
    ),
    ((b"\x1f\x8b",), "a gzip archive", "Unpack it first."),
    ((b"\x89hdf",), "an HDF5 file", "Give one of the formats that docs/formats.md lists."),
)


def loads(data: mmap.mmap | bytes) -> Any:
    """Unpickle bytes or a mapped file under the allow-list; see `load`.

    Raises:
        Exception: of any kind for a damaged pickle; `load` makes them one `DataError`.
    """
    collects = gc.isenabled()
    gc.disable()  # it would look through millions of new lists again and again
    try:
        return Settle(SHARING * len(data) + SPARE)(Machine(data).run())[0]
    finally:
        if collects:
            gc.enable()


def load(path: str | Path) -> Any:
    """Unpickle `path` under the allow-list.

    Large arrays of the result are read-only views of the file's bytes, see `engine.loaders.spool.steady`.

    Raises:
        DataError: not a pickle, damaged or truncated, it asks for a name that is not in `ALLOWED`, or it is beyond a
            limit, which the message tells.
    """
    path = Path(path)
    expected = "a pickle of numpy arrays, text and plain containers"
    try:
        if path.exists() and not path.is_file():
            raise OSError("no file")
        data = steady(path)
    except OSError as cause:
        raise DataError(
            str(path), f"{cause.strerror or cause}", "a readable file", "Check the path and its permissions."
        ) from cause
    if not data:
        raise DataError(str(path), "an empty file", expected, "Download or write the file again.")
    start = data[:64].lstrip().lower()
    for marks, found, do in _HEADS:
        if start.startswith(marks):
            raise DataError(str(path), found, expected, do)
    damaged = "Compare its size or checksum with the publisher's and download it again."
    try:
        return loads(data)
    except Truncated:
        raise DataError(
            str(path), f"a pickle that ends early, after {len(data)} bytes", "a whole pickle", damaged
        ) from None
    except Refused as refused:
        if "\r" in refused.name:
            raise DataError(
                str(path), "a pickle whose line ends were changed to those of Windows", "the bytes as written",
                "Copy it again as a binary file (git: `*.pkl binary` in .gitattributes).",
            ) from None  # fmt: skip
        advice = (
            "Save its tensors as numpy arrays."
            if refused.name.startswith("torch")
            else "Save its tables as numpy arrays and lists."
            if refused.name.startswith("pandas")
            else "Nothing was run. If you trust the file's author, ask for plain numpy arrays."
        )
        raise DataError(str(path), f"a pickle that asks for {refused.name}", expected, advice) from None
    except Limit as limit:
        raise DataError(str(path), f"a pickle with {limit.found}", limit.rule, limit.do) from None
    except MemoryError:
        raise DataError(
            str(path), "a pickle larger than the free memory", expected, "Use a machine with more memory."
        ) from None
    except Exception as cause:  # a damaged pickle can fail in any way: IndexError, ValueError, KeyError, TypeError, ...
        raise DataError(str(path), f"a damaged or foreign pickle ({cause})", expected, damaged) from None
