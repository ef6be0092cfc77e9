"""Paths as users write them, and files that are either complete or absent."""

import contextlib
import errno
import glob
import json
import os
import secrets
import stat
import warnings
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from engine.errors import ConfigError, OutputError


def user_path(path: str | Path) -> Path:
    """`path` with a leading ~ replaced by the home directory, or unchanged where that home is not known.

    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(path, (str, Path)):
        if not isinstance(path, os.PathLike):
            raise ConfigError("path", f"{path!r}"[:60], "text or a pathlib.Path", "Give the path of a file or folder.")
        path = os.fsdecode(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_home() -> Path | None:
    """The folder for caches: XDG_CACHE_HOME or ~/.cache. None where the user has no home directory.

    A container that runs under its own user id often has none.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return user_path(named)
    home = user_path("~")
    return home / ".cache" if home.is_absolute() and home.is_dir() else None


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a file that a stranger may have written.

    Args:
        most: largest size in bytes.

    Raises:
        OSError: it is missing, cannot be read, or is no regular file (reading a pipe could wait forever).
        ValueError: it is larger, or it is not UTF-8.
    """
    state = path.stat()
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
    if state.st_size > most:
        raise ValueError(f"{state.st_size} bytes, more than the {most} that are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("text that is not UTF-8") from None


def is_compressed(path: Path) -> bool:
    """Whether a file is a zip archive that unpacks to more than its own size: megabytes may become terabytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that only raises `ValueError`, also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def output_error(path: Path, cause: OSError) -> OutputError:
    """The error that users see, for an `OSError` raised while `path` was written."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            str(path), "no space left on the device", "room for the file", "Free some space and run again."
        )
    if cause.errno == errno.EFBIG:
        return OutputError(
            str(path), "a file larger than this process may write", "room for the file", "Raise the limit (ulimit -f)."
        )
    if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            str(path), "a folder that cannot be written to", "write permission", "Choose another folder."
        )
    if cause.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(str(path), "a file where a folder is needed", "a folder", "Choose another --out folder.")
    return OutputError(str(path), f"{cause.strerror or cause}", "a writable file", "Remove the cause and run again.")


def _lock(file: IO[bytes], wait: bool) -> None:
    """Lock an open file. The system releases the lock when the process ends.

    Raises:
        OSError: another process holds the lock, or this system has none.
    """
    try:
        import fcntl
    except ImportError as cause:  # on Windows
        raise OSError("no file locks") from cause
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def lock(path: Path) -> IO[bytes]:
    """Open a file and lock it while it stays open, so that only one process does what the file stands for.

    Where there are no file locks, a warning says so. Remove the file before you close it.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be made.
    """
    while True:
        file = path.open("ab")
        try:
            _lock(file, wait=False)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            warnings.warn(f"{path.parent}: no file locks here: start no second run in this folder", stacklevel=2)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                _release_in_children(file)
                return file
        file.close()  # its owner removed it after we opened it and before we locked it


def _release_in_children(file: IO[bytes]) -> None:
    """Close the file in forked workers: one that outlives a killed parent must not keep its lock."""
    if hasattr(os, "register_at_fork"):
        held = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: (own := held()) is not None and own.close())


def sweep(path: Path) -> None:
    """Remove temporary files that killed processes left beside `path`: those that no process has locked."""
    _sweep(path.parent, f".{glob.escape(path.name)}.*.part")


def sweep_folder(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    _sweep(folder, ".*.part")


def _sweep(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError), left.open("rb") as file:
            _lock(file, wait=False)
            left.unlink()


def require_replaceable(path: Path) -> None:
    """Refuse a folder, a pipe, a device and a link to an open file. To root, /dev/null is a name like any other.

    Raises:
        OutputError: `path` is one of these.
    """
    special = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    if special or (path.exists() and not path.is_file()):
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise OutputError(str(path), found, "the name of a file", "Choose another name.")


def require_made_here(path: Path, begins: bytes, what: str) -> None:
    """Refuse to replace a file that is something else than the engine would write there, such as the user's data.

    Args:
        begins: the first bytes of what is written, in lower case. what: its name for the message.

    Raises:
        OutputError: the file is there, is not empty, and begins otherwise.
    """
    require_replaceable(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(begins))
    except FileNotFoundError:
        return
    except OSError as cause:
        raise output_error(path, cause) from cause
    if head and head.lower() != begins:
        raise OutputError(
            str(path), "another kind of file", f"a new name, or {what} to replace", "Choose another name."
        )


@contextlib.contextmanager
def _temporary(path: Path, previous: Path | None = None) -> Iterator[tuple[IO[bytes], Path]]:
    """A locked temporary file beside `path`, open for writing, and its path. On success it replaces `path`."""
    try:
        require_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            file = temporary.open("xb")
            with contextlib.suppress(OSError):
                _lock(file, wait=True)
            if temporary.exists():  # else another process swept it away before it was locked
                break
            file.close()
    except OSError as cause:
        raise output_error(path, cause) from cause
    try:
        with file:
            yield file, temporary
            file.flush()
            _publish(temporary, path, previous)
    except OSError as cause:
        raise output_error(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """As `atomic_path`, with the temporary file open for writing; for large files."""
    with _temporary(user_path(path), previous) as (file, _):
        yield file


def _publish(temporary: Path, path: Path, previous: Path | None = None) -> None:
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    if previous is not None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, previous)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power. Some file systems cannot, and some need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it replaces `path`; on failure it is removed.

    Temporary files of processes that were killed while they wrote `path` are removed first.

    Args:
        previous: where the earlier file at `path` goes. None: it is removed.

    Raises:
        OutputError: the folder cannot be made or written to, or the disk is full.
    """
    with _temporary(user_path(path), previous) as (_, temporary):
        yield temporary


def append_text(path: Path, text: str, at: int) -> None:
    """Write UTF-8 text at byte `at` of a file. What lies beyond `at` is cut off first.

    Raises:
        OutputError: the file cannot be written to, or the disk is full.
    """
    try:
        with path.open("ab") as file:
            file.truncate(at)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise output_error(path, cause) from cause


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically. NaN becomes null, so that every reader accepts the file."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for every float that JSON cannot write: NaN and the infinities.

    >>> finite({"mae": float("nan"), "rows": [1.0, 2]})
    {'mae': None, 'rows': [1.0, 2]}
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
