"""Where the time of a whole run goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


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
        """The phase that ends here."""
        now, before = time.perf_counter(), self._now
        self._seconds[before] += now - self._since
        self._seconds.setdefault(name, 0.0)
        self._now, self._since = name, now
        return before


def process_age() -> float | None:
    """Seconds since this process began. None on a system that does not tell."""
    try:
        behind_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        began = int(behind_name.split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def in_words(epochs: int, seconds: float, phases: dict[str, float]) -> str:
    """One line that says how long a run took and with what.

    >>> in_words(8, 12.3, {"start": 2.14, "training": 8.0, "other": 0.01})
    '8 epochs in 12.3 s: 2.1 start, 8.0 training'
    """
    told = [f"{value:.1f} {name}" for name, value in phases.items() if value >= 0.05]
    return f"{epochs} epoch{'s' * (epochs != 1)} in {seconds:.1f} s: {', '.join(told)}"
