"""Where data lies while it is read: in memory, in unnamed files, or in the user's own file, mapped."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.errors import DataError
from engine.files import output_error

SMALL, MAPPED = 1 << 16, 1 << 28  # bytes: smaller files are read into memory; larger ones are only mapped
ALIGNMENT = 64  # bytes

_SPOOL: ContextVar[Path | None] = ContextVar("spool", default=None)


@contextlib.contextmanager
def spooled(folder: Path | None) -> Iterator[None]:
    """Within the context, joined sequences are kept in unnamed files in `folder`, and mapped.

    The files vanish with the arrays, and with the process however it ends. If `folder` is None, memory holds the
    sequences.
    """
    token = _SPOOL.set(folder)
    try:
        yield
    finally:
        _SPOOL.reset(token)


def _unnamed(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise output_error(folder, cause) from cause


def stable_content(path: Path, small: int = SMALL) -> mmap.mmap | bytes:
    """The content of a file. It stays the same whatever happens to the file later.

    If somebody cuts off a mapped file, reading past its new end kills the process. So within `spooled` the file is
    copied to an unnamed one, which is mapped. Else it is read into memory; a file of 256 MiB or more is mapped itself.

    Args:
        small: bytes; within `spooled`, files up to this size are read into memory too.

    Raises:
        DataError: the file was written to meanwhile.
        OSError: it cannot be read. OutputError: there is no space for the copy.
    """
    folder = _SPOOL.get()
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if before.st_size > small and folder is not None:
            with _writing(folder), _unnamed(folder) as copy:
                _copy(file, copy)
                done = copy.seek(0, os.SEEK_END)
                data = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) if done else b""
        elif before.st_size > MAPPED:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            data = file.readall()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != before.st_size:
        raise DataError(
            str(path), f"a file that was written to while it was read ({before.st_size} bytes, then {after.st_size})",
            "a file that is whole", "Try again when nothing writes to it.",
        )  # fmt: skip
    return data


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    with contextlib.suppress(AttributeError, OSError):  # some file systems can share the bytes
        while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
            pass
    target.seek(0, os.SEEK_END)
    shutil.copyfileobj(source, target, 1 << 20)
    target.flush()


class Staged:
    """Collects arrays of any dtype that are joined later. Within `spooled`, one unnamed file holds all of them.

    A file for each would need a file handle for each, and systems allow a process about a thousand.

    Raises:
        OutputError: there is no space for the spool.
    """

    def __init__(self) -> None:
        self._folder, self._arrays, self._end = _SPOOL.get(), [], 0
        self._places: list[tuple[int, np.dtype, tuple[int, ...]]] = []
        self._file = None
        if self._folder is not None:
            with _writing(self._folder):
                self._file = _unnamed(self._folder)

    def add(self, array: np.ndarray) -> None:
        if self._file is None:
            self._arrays.append(array)
            return
        data = np.ascontiguousarray(array)
        with _writing(self._folder):
            self._end += self._file.write(bytes(-self._end % ALIGNMENT))
            self._file.write(data.reshape(-1).view(np.uint8).data if data.size else b"")
        self._places.append((self._end, data.dtype, data.shape))
        self._end += data.nbytes

    def arrays(self) -> list[np.ndarray]:
        """The arrays in order; within `spooled`, read-only views of the one file."""
        if self._file is None:
            return self._arrays
        with _writing(self._folder), self._file:
            self._file.flush()
            whole = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._end else b""
        return [
            np.frombuffer(whole, dtype, math.prod(shape), place).reshape(shape)
            if math.prod(shape)
            else np.zeros(shape, dtype)
            for place, dtype, shape in self._places
        ]


class Joiner:
    """Puts sequences end to end, one by one.

    Raises:
        OutputError: there is no space for the spool.
    """

    def __init__(self, dim: int):
        self._dim, self._lengths, self._pieces, self._folder = dim, [0], [], _SPOOL.get()
        self._open, self._file = contextlib.ExitStack(), None
        if self._folder is not None:
            with _writing(self._folder):
                self._file = self._open.enter_context(_unnamed(self._folder))

    def add(self, frames: np.ndarray) -> None:
        self._lengths.append(len(frames))
        if self._file is None:
            self._pieces.append(frames)
            return
        with _writing(self._folder):
            self._file.write(np.ascontiguousarray(frames).data)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Values float32 [total, d] and offsets int64 [N + 1]."""
        offsets = np.cumsum(self._lengths, dtype=np.int64)
        if self._file is None:
            return np.concatenate([np.zeros((0, self._dim), np.float32), *self._pieces]), offsets
        with _writing(self._folder), self._open:
            self._file.flush()
            return np.memmap(self._file, np.float32, "r", shape=(int(offsets[-1]), self._dim)), offsets


def release(array: np.ndarray) -> None:
    """Give back the memory of a view of a mapped file. If its pages are needed again, they are read from the file."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    begin = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, begin + array.nbytes
    if end > first:
        base.madvise(mmap.MADV_DONTNEED, first, end - first)
