"""python -m tests.gpu --quick: which operations fail on this GPU, in two minutes and one line for each failure.

Every folder of kernels has a process of its own, so that a crash or a hang in one says nothing of the others. Kernels
that no GPU has run yet come first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu import NEW
from bench.machine import ROOT, cores
from engine.files import write_json
from engine.kernels.registry import families

SECONDS = 110.0
SILENT = 45.0  # seconds in one test after which it hangs
AT_ONCE = 8
STEP = ("tests/gpu/test_step_gpu.py", "-k", "one_pass or captured_run or (same_trajectory and (plain or bf16))")
VERDICT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")
STARTED = re.compile(r"^(\S+\.py::\w+(?:\[.*?\])?)")
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$")


def parts() -> dict[str, tuple[str, ...]]:
    """{name: arguments of pytest}: the step, then a folder of kernels each."""
    files = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests/interpret").glob("test_*.py"))}
    names = [*NEW, *(n for n in files if n not in NEW and (n in families() or n in ("mlp", "knn_cmi")))]
    of_kernels = {n: (str(files[n].relative_to(ROOT)),) for n in names if n in files}
    return {**dict(list(of_kernels.items())[: len(NEW)]), "step": STEP, **of_kernels}


def run_part(
    arguments: tuple[str, ...], seconds: float, environment: Mapping[str, str], device: str, silent: float = SILENT
) -> dict[str, Any]:
    """Run tests in a process of its own, which is ended after `silent` seconds within one test.

    It may take SILENT seconds to begin the first one.

    Returns:
        {"passed": number, "failed": {test: why}, "ended": why it ended early, or None}.
    """
    line = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    line += ["--device", device] if device != "cpu" else []
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ENGINE_PLAIN")}
    environment = own | {"COLUMNS": "400"} | environment
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # of this process's group, so that who ends that ends the tests, too
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        end, ended, hangs = time.monotonic() + seconds, None, False
        while (code := process.poll()) is None:
            written = os.fstat(output.fileno())  # nothing before the first test
            hangs = time.time() - written.st_mtime > (silent if written.st_size else max(silent, SILENT))
            if hangs or time.monotonic() > end:
                ended = f"hangs: {silent:.0f} s in one test" if hangs else f"did not end within {seconds:.0f} s"
                process.kill()
                break
            time.sleep(0.1)
        if code is not None and code < 0:
            ended = f"ended by {signal.Signals(-code).name}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        output.seek(0)
        return verdicts(output.read().splitlines(), ended)


def verdicts(lines: list[str], ended: str | None) -> dict[str, Any]:
    """What lines of `pytest -v` say. A test that had begun when the process ended has failed."""
    passed, failed, running = 0, {}, None
    for line in lines:
        if found := VERDICT.match(line):
            running = None
            if found[2] in ("FAILED", "ERROR"):
                failed.setdefault(found[1], "failed")
            passed += found[2] == "PASSED"
        elif found := SUMMARY.match(line):
            failed[found[1]] = found[2] or failed.get(found[1], "failed")
        elif found := STARTED.match(line):
            running = found[1]
    if running is not None and ended is not None and ended.startswith(("hangs", "ended by")):
        failed[running] = ended
    if ended is None and not passed and not failed:
        ended = "ran no test: " + " ".join(lines[-3:])[-300:]
    return {"passed": passed, "failed": failed, "ended": ended}


def crashes(result: Mapping[str, Any]) -> bool:
    """Whether kernels crash, hang or write where they should not. Numbers that a test did not expect do not count."""
    if (result["ended"] or "").startswith(("hangs", "ended by")):
        return True
    whys = [why for why in result["failed"].values() if why != "failed"]
    return any("written" in why or not why.startswith(("AssertionError", "assert ", "Failed:")) for why in whys)


def lines_of(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    if not result["failed"] and result["ended"] is None:
        yield f"{name}: {result['passed']} passed"
        return
    for test, why in result["failed"].items():
        yield f"{name}: FAILED {test.rpartition('/')[2]}: {why}"
    ended = "" if result["ended"] is None else f"; {result['ended']}"
    yield f"{name}: {result['passed']} passed, {len(result['failed'])} failed{ended}"


def main(seconds: float = SECONDS, out: Path | None = None, device: str = "cuda", only: list[str] | None = None) -> int:
    """Run all parts, and print what failed. The new kernels' parts are the first to start.

    Args:
        seconds: for all of it.
        out: JSON of what was found, written after every part: "broken" are the folders whose kernels crash. For them
            plain torch can run: ENGINE_PLAIN=NAME,NAME.
        device: cuda; cpu tries this code in triton's interpreter.
        only: names of parts.
    """
    end = time.monotonic() + seconds
    environment = {"OMP_NUM_THREADS": "2"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    found: dict[str, Any] = {"broken": [], "results": {}}
    one_at_a_time = threading.Lock()

    def one(item: tuple[str, tuple[str, ...]]) -> None:
        name, arguments = item
        left = end - time.monotonic()
        if left < 3:
            result = {"passed": 0, "failed": {}, "ended": "not begun: no time left"}
        else:
            result = run_part(arguments, left, environment, device)
        with one_at_a_time:
            found["results"][name] = result
            found["broken"] = [n for n, r in found["results"].items() if n in families() and crashes(r)]
            print("\n".join(lines_of(name, result)), flush=True)
            if out is not None:
                write_json(out, found)

    chosen = [(n, arguments) for n, arguments in parts().items() if only is None or n in only]
    with ThreadPoolExecutor(min(AT_ONCE, cores())) as pool:
        list(pool.map(one, chosen))
    if found["broken"]:
        print(f"kernels that crash: run with ENGINE_PLAIN={','.join(found['broken'])}")
    return int(any(r["failed"] or r["ended"] for r in found["results"].values()))


if __name__ == "__main__":
    print(json.dumps(parts(), indent=1))
