"""Write constraints.txt: the exact version of every package that `make` installs, with all extras.

    make lock                     after a change of pyproject.toml: keeps every version that still fits
    make lock LOCK=--upgrade      moves everything to the newest version, except what [tool.uv] in pyproject.toml pins

One file serves Python 3.10 to 3.13 on Linux and macOS. Where a version does not exist for all of them, the file has
one line per case, each with an environment marker. No package index, host or path is written.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
EXTRAS = ("minilm", "triton", "report", "csd", "dali", "tune", "docs", "dev")
# The two builds of one torch version disagree about triton: the CUDA build requires exactly the first; the CPU build
# requires none, and pip then takes the newest allowed. So the range decides as an exact version would.
TRITON = "triton>=3.7.1,<=3.9.0 ; sys_platform == 'linux'"
HEADER = """\
# Every package that `make` installs, at its exact version. Made by `make lock`; do not edit.
# triton: torch's CUDA build requires 3.7.1, and its CPU build leaves the choice to pip, which takes 3.9.0.
"""


def resolve(arguments: list[str]) -> str:
    """The requirements that uv resolves, starting from the versions already in the lock."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal", "--quiet"]
    command += ["--python-version", "3.10"]
    command += ["--no-header", "--no-annotate", "--no-emit-package", "triton", "--output-file", str(LOCK), *arguments]
    for extra in EXTRAS:
        command += ["--extra", extra]
    subprocess.run(command, cwd=ROOT, check=True)
    return LOCK.read_text()


def without_always(line: str) -> str:
    """The line without the clauses of its marker that hold on every supported machine."""
    for clause in ("python_full_version < '3.14'", "(sys_platform == 'darwin' or sys_platform == 'linux')"):
        line = line.replace(f"{clause} and ", "").replace(f" and {clause}", "").replace(clause, "")
    return line


def tidy(text: str) -> str:
    """Sorted lines without comments, local version suffixes and the markers that always hold here."""
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    lines = [re.sub(r"(==[^\s;+]+)\+\S+", r"\1", line) for line in lines]
    lines = [re.sub(r"[;\s]*$", "", line) for line in map(without_always, lines)]
    return HEADER + "\n".join(sorted({*lines, TRITON}, key=str.lower)) + "\n"


def main() -> None:
    before = LOCK.read_text() if LOCK.exists() else ""
    try:
        LOCK.write_text(tidy(resolve(sys.argv[1:])))
    except BaseException:
        LOCK.write_text(before)
        raise
    packages = {re.split(r"[=>]", line)[0] for line in LOCK.read_text().splitlines() if line[0] != "#"}
    print(f"{LOCK.name}: {len(packages)} packages")


if __name__ == "__main__":
    main()
