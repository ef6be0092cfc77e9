"""constraints.txt holds every dependency, and what is installed is what it says."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCK = Path(__file__).resolve().parents[2] / "constraints.txt"
LINES = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
EXTRAS = ("minilm", "triton", "report", "csd", "dali", "docs", "dev")  # what `make` installs


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[str, Requirement]:
    """The lines that hold for this Python and system, by package."""
    here = [one for one in map(Requirement, LINES) if one.marker is None or one.marker.evaluate()]
    names = [plain(one.name) for one in here]
    assert len(names) == len(set(names)), "two versions of one package for the same environment"
    return dict(zip(names, here, strict=True))


def dependencies() -> set[str]:
    """Everything installed that the project needs, directly or not."""
    seen: set[tuple[str, str]] = set()
    waiting = [("engine", extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an optional package that is not installed
        seen.add((name, extra))
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(plain(need.name), part) for part in ("", *need.extras)]
    return {name for name, _ in seen} - {"engine"}


def test_every_line_is_an_exact_version_without_a_host():
    for line in LINES:
        assert re.match(r"[a-z0-9-]+==[^\s+*]+( ; |$)", line) or line.startswith("triton>=3.7.1,<=3.9.0 ; "), line
        assert "/" not in line and "@" not in line, line
    assert "torch==2.13.0" in LINES


@pytest.mark.skipif(bool(os.environ.get("ENGINE_NEWEST")), reason="ENGINE_NEWEST: newest versions, on purpose")
def test_what_is_installed_is_what_the_lock_says():
    locked = lock()
    missing = dependencies() - set(locked)
    assert not missing, f"not in constraints.txt: {sorted(missing)}. Run: make lock"
    wrong = {
        name: found
        for name, one in locked.items()
        if (found := version(name)) and not one.specifier.contains(found, prereleases=True)
    }
    assert not wrong, f"installed, but not as locked: {wrong}. Run make; for newest versions run make newest"


def version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
