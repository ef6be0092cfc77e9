"""Compile the C++ source of an operation once, keep the library, load it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from engine.allocator import settle
from engine.errors import OutputError
from engine.files import atomic_path, cache_home, lock
from engine.kernels.compilers import compilers, flags

HEADERS = Path(__file__).parent
REAL = {torch.float32: "float", torch.float64: "double"}
PATIENCE_S = 120.0

log = logging.getLogger("engine")


class NoHome(RuntimeError):
    """There is no home directory to keep a library in."""


class CompilerFailed(RuntimeError):
    """A compiler cannot compile a source. The message holds the first line of what it printed."""


def folder() -> Path:
    """Where compiled libraries are kept: torch's folder of extensions (TORCH_EXTENSIONS_DIR), in the user's cache.

    Raises:
        NoHome: the user has no home directory, and neither variable names another place.
    """
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "engine"
    cache = cache_home()
    if cache is None:
        raise NoHome("no home directory to keep it in; set XDG_CACHE_HOME or TORCH_EXTENSIONS_DIR")
    return cache / "torch_extensions" / "engine"


def own_temporary_folder() -> Path:
    """A folder among temporary files that only this user may write to. It serves where `folder` cannot be written to.

    Raises:
        OSError: it cannot be made, or other users may write into it.
    """
    place = Path(tempfile.gettempdir()) / f"engine-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    state = place.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise OSError(errno.EPERM, "a folder that is not this user's alone", str(place))
    return place


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's numbers, None for none."""
    return None if tensor is None else tensor.data_ptr()


def addresses(places: Sequence[int | None]) -> ctypes.Array | None:
    """An array of addresses for C; None if it is empty."""
    return (ctypes.c_void_p * len(places))(*places) if places else None


def pointers(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array | None:
    """An array of tensors' addresses for C; None if it is empty."""
    return addresses([pointer(tensor) for tensor in tensors])


# shorthands for the argument types of `library`
POINTER, SIZE, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double


def library(
    source: Path, dtype: torch.dtype, functions: Mapping[str, Sequence[type]], instead: str
) -> ctypes.CDLL | None:
    """The library of a C++ source, compiled unless it was kept, or None if that fails.

    A failure is logged and costs speed only. Each operation caches its own library.

    Args:
        functions: name -> types of the arguments. The functions return nothing.
        instead: what runs without a library, for the log.
    """
    try:
        loaded = ctypes.CDLL(str(compiled(source, dtype)))
    except (OSError, OutputError, subprocess.SubprocessError, RuntimeError) as cause:
        log.warning("%s kernel: not available (%s); %s instead, slower", source.stem, cause, instead)
        return None
    settle()
    for name, arguments in functions.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = list(arguments), None
    return loaded


def compiled(source: Path, dtype: torch.dtype) -> Path:
    """The library of a C++ source with REAL defined as float or double, compiled unless it was kept.

    Raises:
        RuntimeError: there is no compiler, or none of them can compile it.
        OSError, OutputError: no folder can be written to.
    """
    try:
        return _compiled_in(folder(), source, dtype)
    except (OutputError, NoHome) as cause:
        place = own_temporary_folder()
        log.info("compiled kernels: kept in %s (TORCH_EXTENSIONS_DIR names another place): %s", place, cause)
        return _compiled_in(place, source, dtype)


def _compiled_in(place: Path, source: Path, dtype: torch.dtype) -> Path:
    failures = []
    for command in compilers():
        try:
            return _compiled_with(command, place, source, dtype)
        except CompilerFailed as cause:
            log.info("%s kernel: %s", source.stem, cause)
            failures.append(cause)
    raise failures[0] if failures else RuntimeError("no C++ compiler found; install g++ or set CXX")


def _compiled_with(command: list[str], place: Path, source: Path, dtype: torch.dtype) -> Path:
    options = [*flags(command), f"-DREAL={REAL[dtype]}"]
    text = b"".join(path.read_bytes() for path in (source, *sorted(HEADERS.glob("*.h"))))
    # Machines with other processors or older C libraries may share the folder.
    key = hashlib.sha256(text + "\0".join([*command, *options, platform.machine(), *platform.libc_ver()]).encode())
    path = place / f"{source.stem}_{REAL[dtype]}_{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    with _turn(path):
        if path.exists():  # another process has compiled it
            return path
        start = time.perf_counter()
        log.info("%s kernel: compiling with %s, once for this machine", source.stem, shlex.join(command))
        with atomic_path(path) as part:
            part.write_bytes(bytes(1 << 20))  # fails at once where the disk is full
            line = [*command, *options, f"-I{HEADERS}", str(source), "-o", str(part)]
            try:
                done = subprocess.run(line, capture_output=True, text=True, errors="replace")
            except OSError as cause:
                raise CompilerFailed(f"{command[0]} failed: {cause.strerror}") from cause
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise CompilerFailed(f"{command[0]} failed: {lines[0]}")
            part.chmod(0o755)
        log.info("%s kernel: compiled in %.1f s, kept as %s", source.stem, time.perf_counter() - start, path)
    return path


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait while another process compiles the same library. Processes that start together then run one compiler.

    The system releases the lock of a killed process. Where there are no locks, and after `PATIENCE_S`, nobody waits.
    """
    mark, deadline = path.with_suffix(".lock"), time.monotonic() + PATIENCE_S
    with contextlib.ExitStack() as stack:
        while time.monotonic() < deadline:
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that there are no locks
                    stack.enter_context(lock(mark))
                stack.callback(mark.unlink, missing_ok=True)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # whether the folder can be written to shows when the library is
                break
        yield
