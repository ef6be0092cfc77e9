"""What every test needs: no downloads, no fight over cores, and slow tests only when asked for."""

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.config import Config

# Before any test imports transformers: models come from packages or local folders, never from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


MEMORY_OF_A_WORKER = 5 << 29
"""2.5 GiB: what a process of the tests takes at most, with those that it starts, on the whole."""


MOST_KEPT = 3 << 29
"""1.5 GiB: beyond that a module's garbage is collected, which takes a tenth of a second."""


LEAST_ROOM = 4 << 30
"""4 GiB: where the disk has less free, the tests' files go to memory. At once they take up to 2.5 GiB."""


MEMORY = Path("/dev/shm")  # Linux


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption(
        "--device", default=None, help="where the cases of tests/interpret run: cpu (the interpreter) or cuda"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _find_room()
    # test modules look at it when they are imported, in every worker
    if config.getoption("--device"):
        os.environ["ENGINE_TEST_DEVICE"] = config.getoption("--device")
    with contextlib.suppress(ImportError):  # a GPU's machine may lack it
        import hypothesis

        # on top of what it chooses on CI: a slow machine is no fault of the code
        slow = [hypothesis.HealthCheck.too_slow]
        chosen = hypothesis.settings()
        hypothesis.settings.register_profile("slow machines", chosen, deadline=None, suppress_health_check=slow)
        hypothesis.settings.load_profile("slow machines")


def _find_room() -> None:
    """Have this process and those that it starts write to memory when the disk is nearly full."""
    disk = Path(tempfile.gettempdir())
    if _free(disk) < LEAST_ROOM <= _free(MEMORY):
        os.environ["TMPDIR"], tempfile.tempdir = str(MEMORY), None


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free if place.is_dir() else 0


def pytest_report_header() -> str:
    place = Path(tempfile.gettempdir())
    return f"files: in {place}, {_free(place) >> 20:,} MiB free"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            if item.get_closest_marker("alone"):
                item.add_marker(pytest.mark.skip(reason="judges times: run without --numprocesses"))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `--numprocesses auto` is: one a core, each with room for its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY_OF_A_WORKER))


def pytest_collection_finish() -> None:
    # What is imported by now stays, so that the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries report as leaked what the interpreter leaves at its end


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    # The tests' tensors are small: more threads than two cost more than they give.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def _resident() -> int:
    """Bytes of memory that the process takes; 0 where that is not known."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


REAL_DISK = {"test_files.py", "test_checkpoint.py", "test_store.py"}
"""Where fsync is real: the tests of what writes files."""


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files are written, but not waited for until a power cut could not hurt them, which no test could see.

    A small run spends half of its time waiting so.
    """
    real = os.fsync
    if request.path.name not in REAL_DISK:
        os.fsync = lambda handle: None
    yield
    os.fsync = real


@pytest.fixture(autouse=True, scope="module")
def as_many_threads_afterwards() -> Iterator[None]:
    """A module leaves as many threads as it found: in forked processes, whose threads are gone, more than one hang."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def freed_memory_goes_back() -> Iterator[None]:
    """What a module has freed goes back to the system: a run has glibc keep it for the process (`keep_memory`)."""
    yield
    if _resident() > MOST_KEPT:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# -- whole runs on small files; see tests/small_runs.py. Imported late: most tests need none of it. --


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT. Tests that change it work on a copy."""
    from tests.small_runs import make_text_encoder

    return make_text_encoder(tmp_path_factory.mktemp("tiny_bert"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files in Declare-Lab's layout. Tests that change it write their own."""
    from tests.loaders import writers
    from tests.small_runs import SIZES

    folder = tmp_path_factory.mktemp("data")
    writers.write_declarelab(folder, writers.samples(sizes=SIZES))
    return folder


@pytest.fixture
def config(data: Path, text_encoder: Path) -> "Config":
    """Settings of a run of three epochs on these."""
    from tests.small_runs import small_config

    return small_config(data, text_encoder)
