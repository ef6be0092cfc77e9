"""Generated data of MOSI's shape, and a sweep and a tuning that nothing interrupts."""

from pathlib import Path

import pytest

from engine.loaders.make_data import make_data
from tests.sweep.runs import SWEEP, TUNE, Started


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("sweeps") / "data", "mosi", 60, "declarelab")


@pytest.fixture(scope="session")
def whole_sweep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an uninterrupted sweep, and what the command printed."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    code, output = Started("sweep", data, out, *SWEEP, "--jobs", "2").end()
    assert code == 0, output
    return out, output


@pytest.fixture(scope="session")
def whole_tuning(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an uninterrupted tuning with two seeds of the best settings, and what the command printed."""
    out = tmp_path_factory.mktemp("sweeps") / "tune"
    code, output = Started("tune", data, out, *TUNE, "--jobs", "1", "--seeds", "0-1").end()
    assert code == 0, output
    return out, output
