"""Lines on standard error that show how far long reading is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from engine.errors import printable

FIRST, LONGEST = 5.0, 60.0
"""Seconds until the first line, and the longest time between two lines. From line to line the time doubles."""

T = TypeVar("T")


def with_progress(items: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """The same items, one by one. If they take long, lines on standard error count those that are done.

    Args:
        doing: what is done with an item, such as "reading audio". unit: what an item is, in the plural.

    >>> list(with_progress([1, 2], "reading", "files"))
    [1, 2]
    """
    count = len(items) if isinstance(items, Sized) else None
    started, wait = time.monotonic(), FIRST
    due = started + wait
    for done, item in enumerate(items):
        if (now := time.monotonic()) >= due:
            wait = min(2 * wait, LONGEST)
            due = now + wait
            of = f" of {count}" if count is not None else ""
            _say(f"{doing}: {done}{of} {unit}, {now - started:.0f} s")
        yield item


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(printable(line), file=sys.stderr, flush=True)
