"""Reads other people's pickles without running them.

A pickle is a program. The machine here executes only what builds numpy arrays, numbers, text and plain containers.
Every name that a pickle asks for must be in `ALLOWED`. What it gets under that name is a function of this package,
never the real callable.

Instructions cannot cost more than the file's own size accounts for. Texts count when they are made; shared lists and
texts count at each reference. Nothing may hold itself. Integers have at most 64 bits. Keys are text, real numbers, or
short tuples of them, and few of them may share a hash. An array of numbers is not copied, so any number of rows and
splits may share it.

Byte strings that Python 2 wrote become text: UTF-8, or Latin-1 if they are not UTF-8.

Large arrays are not copied. They become read-only views of the file's bytes, which are mapped from a copy or from the
file itself. So opening a 12 GB file costs as much memory as is later touched.
"""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.loaders.foreign import known_file, known_text
from engine.loaders.safe_pickle.limits import LARGE, SHARING, SPARE, Limit, Refused, Truncated
from engine.loaders.safe_pickle.machine import Machine
from engine.loaders.safe_pickle.settle import Settle
from engine.loaders.safe_pickle.values import ALLOWED, decoded
from engine.loaders.spool import stable_content

__all__ = ["ALLOWED", "LARGE", "decoded", "load", "loads"]


def loads(data: mmap.mmap | bytes) -> Any:
    """Unpickle bytes or a mapped file under the allow-list; see `load`.

    Raises:
        Exception: of any kind if the pickle is damaged. `load` turns all kinds into a `DataError`.

    >>> loads(b"\\x80\\x03(K\\x01X\\x01\\x00\\x00\\x00at.")
    (1, 'a')
    """
    collects = gc.isenabled()
    gc.disable()  # it would search millions of new lists again and again
    try:
        return Settle(SHARING * len(data) + SPARE)(Machine(data).run())[0]
    finally:
        if collects:
            gc.enable()


def load(path: str | Path) -> Any:
    """Unpickle `path` under the allow-list.

    Large arrays of the result are read-only views of the file's bytes, see `engine.loaders.spool.stable_content`.

    Raises:
        DataError: it is not a pickle, is damaged or truncated, asks for a name that is not in `ALLOWED`, or exceeds a
            limit, which the message names.
    """
    path = Path(path)
    expected = "a pickle of numpy arrays, text and plain containers"
    try:
        if path.exists() and not path.is_file():
            raise OSError("no file")
        data = stable_content(path)
    except OSError as cause:
        raise DataError(
            str(path), f"{cause.strerror or cause}", "a readable file", "Check the path and its permissions."
        ) from cause
    if not data:
        raise DataError(str(path), "an empty file", expected, "Download or write the file again.")
    named = None if data[:1] == b"\x80" else known_text(path.suffix)  # a pickle may have any name
    if known := known_file(data) or named:
        raise DataError(str(path), known[0], expected, known[1])
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
    except Exception as cause:  # a damaged pickle can raise anything: IndexError, ValueError, KeyError, TypeError, ...
        raise DataError(str(path), f"a damaged or foreign pickle ({cause})", expected, damaged) from None
