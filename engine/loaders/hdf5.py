"""Reads CMU-SDK .csd files (HDF5) in a child process, so that no file can crash or exhaust this one."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError

CHILD = Path(__file__).with_name("hdf5_child.py")
MEMORY = 6 << 30  # bytes of address space of the child
PATIENCE = 60.0  # seconds without an answer
LONGEST_HEADER = 1 << 28


class _Gone(Exception):
    """The child ended or gave no answer; the text says which."""


class CsdReader:
    """Opens .csd files one after another in one child process. If a file crashes it, it is started anew.

    Attributes (of the file opened last):
        root: name of its computational sequence. kind: numbers or words. videos: names, in the file's order.
    """

    def __init__(self, patience: float = PATIENCE, memory: int = MEMORY):
        self._patience, self._memory = patience, memory
        self._child: subprocess.Popen | None = None
        self._path = Path()
        self.root, self.kind, self.videos = "", "numbers", []

    def __enter__(self) -> CsdReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()
            self._child = None

    def open(self, path: str | Path) -> CsdReader:
        """Open a file.

        Raises:
            DataError: h5py is not installed; or the file is damaged, is no .csd, refers to other files, or crashed or
                stalled the library.
        """
        self._path = Path(path).absolute()
        header, _ = self._ask(["open", str(self._path)])
        try:
            self.root, self.kind = str(header["root"]), str(header["kind"])
            self.videos = [str(v) for v in header["videos"]]
        except (KeyError, TypeError) as cause:
            raise self._damaged(f"an answer without {cause}") from None
        return self

    def video(self, name: str) -> tuple[np.ndarray, np.ndarray | list[str]]:
        """One video's intervals float64 [n, 2] in seconds, and its features float32 or float64 [n, d] or n words.

        Raises:
            DataError: as `open`.
        """
        header, body = self._ask(["video", name])
        try:
            count, dim = header["shape"] if self.kind == "numbers" else (len(header["words"]), 0)
            intervals = np.frombuffer(body, "<f8", 2 * count).reshape(count, 2)
            if self.kind == "words":
                return intervals, [str(w) for w in header["words"]]
            dtype = {"<f4": np.float32, "<f8": np.float64}[header["dtype"]]
            return intervals, np.frombuffer(body, dtype, count * dim, 16 * count).reshape(count, dim)
        except (KeyError, TypeError, ValueError) as cause:
            raise self._damaged(f"an answer that does not fit ({cause})") from None

    def _damaged(self, found: str) -> DataError:
        return DataError(
            str(self._path), found, "a .csd file of the CMU-SDK", "Compare its checksum and download it again."
        )

    def _ask(self, request: list[str]) -> tuple[dict[str, Any], bytearray]:
        if self._child is None:
            self._start()
        try:
            try:
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
            except OSError:
                raise _Gone("a file that ended the process reading it") from None
            end = time.monotonic() + self._patience
            header, rest = self._line(end)
            body = self._bytes(rest, int(header["size"]), end)
        except _Gone as cause:
            self.close()
            raise self._damaged(str(cause)) from None
        except (ValueError, KeyError, TypeError):
            self.close()
            raise self._damaged("an answer that makes no sense") from None
        if "error" in header:
            found, expected = (*map(str, header["error"]), "")[:2]
            raise DataError(str(self._path), found, expected, "Compare its checksum and download it again.")
        return header, body

    def _start(self) -> None:
        if importlib.util.find_spec("h5py") is None:
            raise DataError(
                str(self._path), "an HDF5 file, and no h5py to read it with", "the package h5py", "pip install h5py"
            )
        # one thread: the child's address space has no room for the stacks of many
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("HDF5_PLUGIN_PATH", None)
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD), str(self._memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, bufsize=0,
        )  # fmt: skip

    def _more(self, end: float, most: int) -> bytes:
        with selectors.DefaultSelector() as wait:
            wait.register(self._child.stdout, selectors.EVENT_READ)
            if not wait.select(max(end - time.monotonic(), 0)):
                raise _Gone(f"a file that could not be read within {self._patience:g} s")
        piece = os.read(self._child.stdout.fileno(), min(most, 1 << 20))
        if not piece:
            code = self._child.wait()
            raise _Gone(f"a file that crashed the HDF5 library (exit code {code})")
        return piece

    def _line(self, end: float) -> tuple[dict[str, Any], bytearray]:
        buffer = bytearray()
        while (stop := buffer.find(b"\n")) < 0:
            if len(buffer) > LONGEST_HEADER:
                raise ValueError("no end of the header")
            buffer += self._more(end, 1 << 20)
        return json.loads(buffer[:stop]), buffer[stop + 1 :]

    def _bytes(self, body: bytearray, size: int, end: float) -> bytearray:
        while len(body) < size:
            body += self._more(end, size - len(body))
        return body
