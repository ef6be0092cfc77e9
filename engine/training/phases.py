"""Where the time of a whole run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping


class Phases:
    """A run's seconds by phase, in the order in which the phases began.

    The time of a phase within another counts for the inner one only, so that the phases add up to the whole.

    >>> phases = Phases()
    >>> with phases.of("training"), phases.of("saving"):
    ...     pass
    >>> list(phases.seconds())
    ['other', 'training', 'saving']
    """

    def __init__(self) -> None:
        self._seconds = {"other": 0.0}
        self._now = "other"
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A context whose time counts for the phase `name`."""
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase until now."""
        self._enter(self._now)
        return dict(self._seconds)

    def _enter(self, name: str) -> str:
        """Begin a phase. Returns the one that ends."""
        now, before = time.perf_counter(), self._now
        self._seconds[before] += now - self._since
        self._seconds.setdefault(name, 0.0)
        self._now, self._since = name, now
        return before


def in_words(seconds: float, phases: Mapping[str, float]) -> str:
    """One line that says how long a run took, and where the time went. What the phases leave of `seconds` is "other".

    >>> in_words(12.3, {"start": 2.14, "other": 0.1, "data": 0.01, "training": 8.0})
    'time: 12.3 s (start 2.1, training 8.0, other 2.2)'
    """
    known = {name: value for name, value in phases.items() if name != "other"}
    told = known | {"other": seconds - sum(known.values())}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in told.items() if value >= 0.05)
    return f"time: {seconds:.1f} s ({parts})"
