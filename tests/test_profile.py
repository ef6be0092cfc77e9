"""Profiles: what a trace of a GPU's work becomes, and that few batches are taken."""

import json

import pytest
import torch

from engine import profile
from engine.profile import Profiler, part, stage_shares, table


def span(name, start, end):
    return {"ph": "X", "cat": "user_annotation", "name": f"engine.{name}", "ts": start, "dur": end - start}


def kernel(number, queued, start, end):
    """A launch and the kernel that it queues."""
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": queued, "dur": 1}
    work = {"ph": "X", "cat": "kernel", "name": "k", "ts": start, "dur": end - start}
    return [e | {"args": {"correlation": number}} for e in (launch, work)]


def test_work_belongs_to_the_part_that_queued_it():
    events = [
        span("stage2", 1000, 2000),
        span("text", 1000, 1400),
        span("backward", 1500, 1900),
        span("layer", 1600, 1700),
        span("text", 2500, 2600),  # in another stage
        *kernel(1, 1010, 1100, 1300),
        *kernel(2, 1020, 1300, 1500),  # queued in text, still running after it
        *kernel(3, 1650, 1700, 1800),  # in the part within a part
        *kernel(4, 1660, 1750, 1850),  # beside the one before
        *kernel(5, 1950, 1960, 1970),
        {"ph": "X", "cat": "gpu_memset", "name": "unknown launch", "ts": 1980, "dur": 10, "args": {}},
        {"ph": "i", "name": "an instant"},
    ]
    shares = stage_shares(events, "stage2", 2, 41)
    assert (shares.batches, shares.of) == (2, 41)
    assert shares.whole.seconds == pytest.approx(1e-3)
    assert shares.whole.device_seconds == pytest.approx(620e-6)
    assert shares.whole.idle == pytest.approx(1 - 0.57)
    text, backward, layer = (shares.parts[n] for n in ("text", "backward", "layer"))
    assert text.device_seconds == pytest.approx(400e-6) and text.idle == pytest.approx(1 - 300 / 400)
    assert layer.device_seconds == pytest.approx(200e-6) and layer.idle == pytest.approx(1.0)
    assert backward.device_seconds == 0 and backward.idle == pytest.approx(1 - 150 / 400)
    assert shares.parts["other"].device_seconds == pytest.approx(20e-6)
    lines = table({"stage2": shares}).splitlines()
    assert lines[1].split() == ["stage2", "0.500", "100.0%", "0.310", "43.0%"]
    assert lines[2].split() == ["text", "0.200", "40.0%", "0.200", "25.0%"]
    assert lines[-1] == "batches: 2 of 41 of stage2"


def test_without_a_gpu_there_is_no_idle_time():
    shares = stage_shares([span("stage1", 0, 100), span("update", 20, 50)], "stage1", 1, 1)
    assert shares.whole.idle is None and shares.parts["update"].device_seconds is None
    assert shares.parts["other"].seconds == pytest.approx(70e-6)
    assert table({"stage1": shares}).splitlines()[2].split() == ["update", "0.030", "30.0%"]


@pytest.mark.parametrize("batches, expected", [(30, 3), (4, 3), (2, 2), (0, None)])
def test_few_batches_are_profiled(batches, expected, tmp_path):
    """The first two are left out where there are enough; outside a profile parts are nothing."""
    profiler = Profiler(torch.device("cpu"), {"stage1": batches}, 3)
    ran = []
    with profiler.taken(), part("stage1"):
        for number in range(batches):
            with part("update"):
                if profiler.running:
                    ran.append(number)
                torch.ones(1)
            profiler.batch_done()
    assert len(ran) == (expected or 0) and ran[:1] == ([] if not expected else [min(2, max(batches - 3, 0))])
    assert profile._profiler is None and not profiler.running
    profiler.save(tmp_path)
    shares = json.loads((tmp_path / "shares.json").read_text())
    if expected is None:
        assert shares == {}
    else:
        assert (shares["stage1"]["batches"], shares["stage1"]["of"]) == (expected, batches)
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert sum(e.get("name") == "engine.update" for e in events) == expected


def test_a_stage_that_fails_ends_its_profile():
    profiler = Profiler(torch.device("cpu"), {"stage1": 3})
    with pytest.raises(ZeroDivisionError), profiler.taken(), part("stage1"):
        raise ZeroDivisionError
    assert not profiler.running and profile._profiler is None
    with Profiler(torch.device("cpu"), {"stage1": 1}).taken(), part("stage1"):
        torch.ones(1)
