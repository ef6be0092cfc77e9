"""Tests that need a GPU: each is skipped with the reason where there is none."""

import pytest

from bench.gpu import missing

REASON = missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is None:
        return
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {REASON}"))
