"""`python -m tests.gpu --quick`: every failure in a line, whatever else fails."""

import json

import pytest
import torch

from engine.kernels.registry import families
from tests.gpu import __main__ as command
from tests.gpu import quick

CASES = """
import os, time, pytest

def test_fine():
    assert True

@pytest.mark.parametrize("kind", ["a b", "c"])
def test_numbers(kind):
    raise AssertionError("Tensor-likes are not close!")
"""
LAUNCH = "\ndef test_launch():\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
ABORT = "\ndef test_abort():\n    os.abort()\n"
HANG = "\ndef test_hang():\n    time.sleep(1000)\n"
OUTSIDE = "\ndef test_outside():\n    assert False, 'something was written past the end of an allocation [3]'\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{name: what is said of a file of tests}."""
    folder, found = tmp_path_factory.mktemp("cases"), {}
    for name, more in {"": "", "launch": LAUNCH, "abort": ABORT, "hang": HANG, "outside": OUTSIDE}.items():
        file = folder / f"test_{name}.py"
        file.write_text(CASES + more, encoding="utf-8")
        silent = {"silent": 8.0} if name == "hang" else {}
        found[name] = quick.run_part((str(file), "--rootdir", str(folder)), 300.0, {}, "cpu", **silent)
    return found


def test_every_failure_is_named(results):
    lines = list(quick.lines_of("stacked", results[""]))
    assert len(lines) == 3 and lines[-1] == "stacked: 1 passed, 2 failed"
    assert lines[0].startswith(
        "stacked: FAILED test_.py::test_numbers[a b]: AssertionError: Tensor-likes are not close"
    )
    assert list(quick.lines_of("update", {"passed": 3, "failed": {}, "ended": None})) == ["update: 3 passed"]


def test_wrong_numbers_are_no_crash(results):
    """Plain torch takes the place of kernels that crash, not of those that a test's tolerance refuses."""
    assert not quick.crashes(results[""])
    assert all(quick.crashes(results[name]) for name in ("launch", "abort", "hang", "outside"))


@pytest.mark.parametrize("name, why", [("abort", "ended by SIGABRT"), ("hang", "hangs: 8 s in one test")])
def test_the_test_that_ended_the_process_is_named(results, name, why):
    (test,) = [test for test, reason in results[name]["failed"].items() if reason == why]
    assert test.endswith(f"::test_{name}") and results[name]["passed"] == 1 and results[name]["ended"] == why


def test_time_that_runs_out_is_no_hang(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_one(): pass\ndef test_slow(): time.sleep(60)\n", encoding="utf-8")
    result = quick.run_part((str(file), "--rootdir", str(tmp_path)), 4.0, {}, "cpu")
    assert result["ended"] == "did not end within 4 s" and not result["failed"] and not quick.crashes(result)


def test_no_test_is_no_success():
    result = quick.verdicts(["ERROR: not found: tests/x.py"], None)
    assert result["ended"].startswith("ran no test: ERROR: not found")


def test_the_newest_kernels_come_first_and_none_is_missing():
    parts = quick.parts()
    assert list(parts)[:5] == ["update", "stacked", "recurrent", "transformer", "step"]
    assert set(families()) - {"cmi", "knn_product"} <= set(parts) and "tests/interpret/test_cmi.py" in parts["cmi"]
    for arguments in parts.values():
        assert (quick.ROOT / arguments[0]).exists()


def test_what_is_broken_is_written(tmp_path, monkeypatch, capsys):
    told = {
        "update": ("x", "RuntimeError: boom"),
        "stacked": ("y", "AssertionError: off"),
        "step": ("z", "RuntimeError: b"),
    }

    def run_part(arguments, seconds, environment, device):
        (test, why) = told.get(arguments[0], (None, None))
        return {"passed": 1, "failed": {} if test is None else {test: why}, "ended": None}

    monkeypatch.setattr(quick, "parts", lambda: {n: (n,) for n in ("update", "stacked", "recurrent", "step")})
    monkeypatch.setattr(quick, "run_part", run_part)
    assert quick.main(30.0, tmp_path / "out.json") == 1
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["broken"] == ["update"]
    printed = capsys.readouterr().out
    assert "update: FAILED x: RuntimeError: boom" in printed and "recurrent: 1 passed" in printed
    assert "run with ENGINE_PLAIN=update\n" in printed


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick"]) == 0
    assert capsys.readouterr().out.startswith("tests on a GPU: skipped: torch")
