"""The kernels' cases: in triton's interpreter on the CPU, in a process of its own, or on a GPU (`--device cuda`)."""

import contextlib

import pytest
import torch

from tests.interpret import device
from tests.interpret.strict import strict


@pytest.fixture(autouse=True)
def triton_backend():
    """Operations run their Triton kernels; one thread, because the interpreter runs one program at a time."""
    from engine.kernels.registry import use_backend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    as_a_gpu = contextlib.nullcontext() if device.missing() or device.on_gpu() else strict()
    with use_backend("triton"), device.tests_run_there(), as_a_gpu:
        yield
    torch.set_num_threads(threads)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where triton is not installed every module is skipped, which pytest takes for a mistake in the call."""
    from engine.kernels.registry import has_triton

    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and not has_triton():
        session.exitstatus = pytest.ExitCode.OK
