"""Writing files so that they are either complete or absent."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import OutputError


def output_error(path: Path, cause: OSError) -> OutputError:
    """Translate an `OSError` met while writing `path` into the error users see."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            str(path), "no space left on the device", "room for the file", "Free some space and run again."
        )
    if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            str(path), "a folder that cannot be written to", "write permission", "Choose another --out folder."
        )
    if cause.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(str(path), "a file where a folder is needed", "a folder", "Choose another --out folder.")
    return OutputError(str(path), f"{cause.strerror or cause}", "a writable file", "Mend the cause and run again.")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any failure it is removed.

    Raises:
        OutputError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as cause:
        raise output_error(path, cause) from cause
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as cause:
        raise output_error(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically. NaN becomes null, so that every reader accepts the file."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
