"""Every C++ kernel compiles and has its functions: operations would run without it, silently, only slower."""

import ctypes
import errno
import importlib
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import kernels
from engine.errors import OutputError
from engine.kernels import build
from engine.kernels.compilers import compilers, flags
from tests.kernels.compiled import needs_compiler

SOURCES = sorted(Path(kernels.__file__).parent.glob("*/*.cpp"))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernel_is_there(source, dtype):
    library = importlib.import_module(f"engine.kernels.{source.parent.name}.cpu").library
    assert (library(dtype) if inspect.signature(library).parameters else library()) is not None


DOUBLED = """#include "threads.h"
extern "C" void doubled(const REAL* x, REAL* y, long n) { for (long i = 0; i < n; i++) y[i] = 2 * x[i]; }
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source; libraries are kept in a folder of the test."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept libraries"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary files"))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    (tmp_path / "temporary files").mkdir()
    path = tmp_path / "doubled.cpp"
    path.write_text(DOUBLED)
    return path


def doubles(path: Path) -> bool:
    x, y = torch.tensor([1.5, -2.0]), torch.zeros(2)
    ctypes.CDLL(str(path)).doubled(*map(ctypes.c_void_p, (x.data_ptr(), y.data_ptr())), ctypes.c_long(2))
    return y.tolist() == [3.0, -4.0]


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_compiler_that_fails_leaves_the_work_to_the_next(source, tmp_path, monkeypatch, caplog):
    """Modules of a cluster set CXX to compilers that do not know gcc's options."""
    monkeypatch.setenv("CXX", program(tmp_path / "nvc++", "echo unknown option >&2; exit 1"))
    with caplog.at_level(logging.INFO, "engine"):
        assert doubles(build.compiled(source, torch.float32))
    assert "nvc++ failed: unknown option" in caplog.text
    assert len(list((tmp_path / "kept libraries/engine").iterdir())) == 1  # no lock and no part is left


@needs_compiler
def test_all_compilers_fail(source):
    source.write_text("#error nothing can compile this")
    with pytest.raises(RuntimeError, match="nothing can compile this"):
        build.compiled(source, torch.float32)


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        build.compiled(source, torch.float32)


@needs_compiler
def test_cxx_with_a_launcher(source, tmp_path, monkeypatch):
    launcher = program(tmp_path / "launcher", f'echo "$@" >> "{tmp_path}/calls"; exec "$@"')
    monkeypatch.setenv("CXX", f"'{launcher}' {' '.join(compilers()[0])}")
    assert doubles(build.compiled(source, torch.float32))
    assert "-shared" in (tmp_path / "calls").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="compilers of macOS bring no OpenMP")
@pytest.mark.parametrize(
    ("name", "says", "threads"),
    [
        ("g++", "", True),
        ("g++-13", "", True),
        ("x86_64-linux-gnu-g++-12", "", True),
        ("clang++", "", False),
        ("clang++-14", "", False),
        ("x86_64-conda-linux-gnu-c++", "(conda-forge gcc) Copyright (C) 2023 Free Software Foundation, Inc.", True),
        ("c++", "Debian clang version 14.0.6", False),
        ("CC", "Cray clang version 15", False),
    ],
)
def test_only_gcc_gets_openmp(name, says, threads, tmp_path):
    """Another compiler's OpenMP may be missing, which is an error, or it competes with the one that torch loaded."""
    command = [program(tmp_path / name, f"echo '{says}'")]
    assert ("-fopenmp" in flags(command)) == threads


@needs_compiler
@pytest.mark.parametrize("kind", ["file", "full"])
def test_a_folder_that_cannot_be_written_to(kind, source, tmp_path, monkeypatch):
    """A home that is read-only or over its quota: the library is kept among temporary files, for this user alone."""
    if kind == "file":
        (tmp_path / "kept libraries").write_text("")
    else:
        write = build.atomic_path

        def full(path):
            if "kept libraries" in str(path):
                raise OutputError(str(path), os.strerror(errno.EDQUOT), "room for the file", "Free some space.")
            return write(path)

        monkeypatch.setattr(build, "atomic_path", full)
    path = build.compiled(source, torch.float32)
    assert doubles(path)
    assert path.parent == tmp_path / "temporary files" / f"engine-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert build.compiled(source, torch.float32) == path  # kept, not compiled again


def test_a_temporary_folder_of_somebody_else_is_refused(source, tmp_path):
    """Whoever may write into it could have any code loaded."""
    place = tmp_path / "temporary files" / f"engine-{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(OSError, match="not this user's alone"):
        build.own_temporary_folder()
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not this user's alone"):
        build.own_temporary_folder()


@needs_compiler
def test_processes_that_start_at_once_compile_once(source, tmp_path):
    """Also beside the lock file of a process that was killed."""
    slow = program(
        tmp_path / "slow", f'echo "$@" >> "{tmp_path}/calls"; sleep 0.5; exec {" ".join(compilers()[0])} "$@"'
    )
    code = (
        "import sys, torch; from pathlib import Path; from engine.kernels import build;"
        "build.torch.backends.cpu.get_cpu_capability = lambda: 'DEFAULT';"
        "print(build.compiled(Path(sys.argv[1]), torch.float32))"
    )
    there = os.environ | {"CXX": slow}
    started = [
        subprocess.Popen([sys.executable, "-c", code, source], env=there, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=600)[0].strip() for process in started}
    assert len(paths) == 1 and doubles(Path(paths.pop()))
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-shared") == 1
    assert len(list((tmp_path / "kept libraries/engine").iterdir())) == 1
