"""Signals that ask a run to end: it finishes the batch, saves where it is, and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""The signals that a run takes. SIGUSR1 is what Slurm's `--signal=USR1@60` sends."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class StopSignals:
    """A context in which the first signal is noted, and a second one does what it did before the context.

    Signals that are ignored, as under nohup, stay so. Outside of the main thread nothing changes, because Python runs
    handlers in that thread alone.

    Attributes:
        number: the signal that came; 0: none.

    >>> with StopSignals() as signals:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> signals.number == signal.SIGTERM
    True
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not set by Python
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.number:
            raise Stopped(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
