"""The C++ compilers of this machine, and their options."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# By torch's name for the processor. A folder that machines share then holds one library per kind of processor.
PROCESSOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


def compilers() -> list[list[str]]:
    """Command lines of the compilers, in the order in which they are tried: what CXX says, g++, clang++, c++.

    CXX may hold options or a launcher, such as "ccache g++". A cluster's modules often set it to a compiler that does
    not take gcc's options; then the next one serves.
    """
    text = os.environ.get("CXX", "")
    try:
        named = shlex.split(text)
    except ValueError:  # a quote that is not closed
        named = [text]
    candidates = [named, ["g++"], ["clang++"], ["c++"]] if named else [["g++"], ["clang++"], ["c++"]]
    found = [[path, *more] for name, *more in candidates if (path := shutil.which(name))]
    return [command for i, command in enumerate(found) if command not in found[:i]]


def flags(command: list[str]) -> list[str]:
    """The options for a compiler and this machine's processor."""
    # gcc links torch's own OpenMP runtime, which is loaded already; those of other compilers would compete with it
    threads = ["-fopenmp"] if sys.platform == "linux" and _is_gcc(tuple(command)) else []
    return [*FLAGS, *PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), []), *threads]


@functools.cache
def _is_gcc(command: tuple[str, ...]) -> bool:
    """Whether a command runs gcc. If the name does not tell, as with c++, the command's --version does."""
    name = Path(command[0]).name
    if len(command) == 1 and re.fullmatch(r"([\w.]+-)*(clan)?g\+\+(-[\d.]+)?", name):
        return "clang" not in name
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return False
    return "Free Software Foundation" in said and "clang" not in said
