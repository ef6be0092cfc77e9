"""Pages and examples run beside other tests."""

import pytest


@pytest.fixture(autouse=True)
def one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of pages and docstrings: there are no free cores, and every further process takes seconds to start."""
    monkeypatch.setattr("engine.sweeps.pool.cores", lambda: 1)
