"""What the system does to a command: signals, closed streams, full disks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import EngineError
from engine.stopping import NAMES, Stopped


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` for SIGTERM, SIGHUP and SIGUSR1. Signals that are ignored (nohup) or handled elsewhere are left
    alone.
    """

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in NAMES if name != "SIGINT" and hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def standing_streams(survive_readers: bool) -> Iterator[None]:
    """Provide a standard output and error where they were closed before the command began.

    What the encoding of a stream lacks, such as the frames of tables on a terminal without UTF-8, is written as
    `\\u2026`.

    Args:
        survive_readers: go on when whoever reads the output has gone (`engine train | head`).
    """
    from engine.callbacks import OpenEnded

    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        for stream, name, redirect in (
            (sys.stdout, "standard output", contextlib.redirect_stdout),
            (sys.stderr, "standard error", contextlib.redirect_stderr),
        ):
            if stream is None:
                stack.enter_context(redirect(nowhere))
                continue
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
                stack.callback(_strict_again, stream)
            if survive_readers:
                stack.enter_context(redirect(OpenEnded(stream, name)))
        yield


def _strict_again(stream: io.TextIOWrapper) -> None:
    with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it was closed
        stream.reconfigure(errors="strict")


def as_engine_error(cause: Exception) -> Exception:
    """An error of the system as an `EngineError`: a full disk, a name that is too long, too little memory."""
    from engine.files import output_error

    if isinstance(cause, Warning):
        do = "Correct its cause, or do not turn warnings into errors (PYTHONWARNINGS, python -W)."
        return EngineError("warning", str(cause), "no warning, as this Python is told to raise them", do)
    if isinstance(cause, MemoryError):
        return EngineError(
            "memory", "too little for this", "more of it", "Use smaller settings or less data, or a larger machine."
        )
    if not isinstance(cause, OSError):
        return cause
    path = Path(str(cause.filename or "output"))
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
        return output_error(path, cause)
    return EngineError(str(path), cause.strerror or str(cause), "a file or folder that can be used", "Check the path.")
