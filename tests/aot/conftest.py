"""The ahead-of-time tier: what triton's compiler makes of every kernel."""

from tests.interpret.conftest import pytest_sessionfinish as pytest_sessionfinish
