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
    imported = importlib.import_module(name(module))
    found = sum(len(one.examples) for one in doctest.DocTestFinder().find(imported))
    assert found > 0, "the examples are in no docstring that doctest finds"
    assert doctest.testmod(imported, optionflags=options).failed == 0


def test_what_is_not_run():
    """Triton's kernels have no examples. That of `warm_up` needs triton's compiler and a training step."""
    assert not [name(path) for path in MODULES if "triton" in path.name]
    skipped = [name(path) for path in MODULES if "doctest: +SKIP" in path.read_text(encoding="utf-8")]
    assert skipped == ["engine.kernels.warm"]
