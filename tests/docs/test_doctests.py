"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "engine"
# Modules are found by their text, so that only those with an example are imported. Triton's kernels have none: they
# need triton, and a GPU or its interpreter.
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_examples_of_docstrings(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name(module)), optionflags=options)
    assert result.failed == 0
    assert result.attempted > 0, "the examples are in no docstring that doctest finds"


def test_triton_files_have_no_examples():
    assert not [name(path) for path in MODULES if "triton" in path.name]
