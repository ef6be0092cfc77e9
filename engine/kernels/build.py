"""Compile the C++ source of an operation once, keep the library, load it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.allocator import settle
from engine.errors import OutputError
from engine.files import atomic_path, cache_home

HEADERS = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# By torch's name for the processor. A folder that machines share then holds one library per kind of processor.
PROCESSOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
REAL = {torch.float32: "float", torch.float64: "double"}

log = logging.getLogger("engine")


def folder() -> Path:
    """Where compiled libraries are kept: torch's folder of extensions (TORCH_EXTENSIONS_DIR), in the user's cache.

    Raises:
        RuntimeError: the user has no home directory, and neither variable names another place.
    """
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "engine"
    cache = cache_home()
    if cache is None:
        raise RuntimeError("no home directory to keep it in; set XDG_CACHE_HOME or TORCH_EXTENSIONS_DIR")
    return cache / "torch_extensions" / "engine"


def compiler() -> str | None:
    """The C++ compiler: the one that CXX names, else g++, clang++ or c++; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, names)), None)


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
    """The library of a C++ source with REAL defined as float or double, compiled unless it was kept."""
    chosen = compiler()
    if chosen is None:
        raise RuntimeError("no C++ compiler found; install g++ or set CXX")
    capability = torch.backends.cpu.get_cpu_capability()
    # gcc links torch's own OpenMP runtime, which is loaded already; those of other compilers would compete with it
    threads = ["-fopenmp"] if sys.platform == "linux" and "g++" in Path(chosen).name else []
    flags = [*FLAGS, *PROCESSOR_FLAGS.get(capability, []), *threads, f"-DREAL={REAL[dtype]}"]
    text = b"".join(path.read_bytes() for path in (source, *sorted(HEADERS.glob("*.h"))))
    key = hashlib.sha256(text + "\0".join([chosen, *flags]).encode()).hexdigest()[:16]
    path = folder() / f"{source.stem}_{REAL[dtype]}_{key}.so"
    if not path.exists():
        start = time.perf_counter()
        log.info("%s kernel: compiling for %s with %s, once for this machine", source.stem, capability, chosen)
        # processes that compile at the same time write files of their own; the last one replaces the others'
        with atomic_path(path) as part:
            done = subprocess.run(
                [chosen, *flags, f"-I{HEADERS}", str(source), "-o", str(part)], capture_output=True, text=True
            )
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise RuntimeError(f"{chosen} failed: {lines[0]}")
            part.chmod(0o755)
        log.info("%s kernel: compiled in %.1f s, kept as %s", source.stem, time.perf_counter() - start, path)
    return path
