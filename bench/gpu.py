"""python -m bench.gpu: every measurement on a GPU in one command; JSON, plots and the README's table.

    python -m bench.gpu                              all of it, in 8 minutes at most
    python -m bench.gpu --minutes 3                  the most important of it
    python -m bench.gpu --only infonce modules       these groups; names of suites of `python -m bench list` as well
    python -m bench.gpu --tune                       first write engine/kernels/dispatch.json for this GPU
    python -m bench.gpu --device cpu --quick         try the code without a GPU

Prints one line of JSON for every entry, then the table. Every group runs in a process of its own, so that a fault or a
lack of time in one leaves the others alone; what it measured before is kept. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.runner import NAMES

MINUTES = 8.0
SPARE = 10.0  # seconds for the table and the plots
GRACE = 15.0  # seconds beyond its deadline after which a group is ended
ORDER = ("ceilings", "step_fast", "infonce", "modules", "step_faithful", "draws", "mosei", "eager_epoch")


def missing() -> str | None:
    """The reason why no GPU can be measured here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    return "torch finds no GPU"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    folder = machine.ROOT / "bench" / "results" / "gpu"
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it")
    parser.add_argument("--results", type=Path, default=folder, help="folder to write")
    parser.add_argument("--only", nargs="+", choices=(*ORDER, *NAMES), metavar="NAME", help="groups, or suites")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu tries the code path")
    parser.add_argument("--quick", action="store_true", help="small shapes: to try, not to report")
    parser.add_argument("--rounds", type=int, help="how often every side is measured, in turn")
    parser.add_argument("--tune", action="store_true", help="first measure which algorithm is fastest, and keep that")
    parser.add_argument("--readme", type=Path, help="also put the table between the markers of this file")
    parser.add_argument("--group", choices=(*ORDER, "tune"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    machine.pin_environment(machine.cores())
    if a.device != "cpu" and (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return 0
    if a.group:
        return run_group(a.group, a.results, a.device, a.quick, a.rounds, a.seconds)
    names = a.only or list(ORDER)
    failed = measure(a, [n for n in ORDER if n in names])
    if suites := [n for n in names if n in NAMES]:
        from bench.everything import run_all

        failed += run_all(suites, a.results, a.quick, a.rounds, machine.cores(), a.device, None, _say)
    return 1 if failed else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(a: argparse.Namespace, names: Sequence[str]) -> int:
    """Run the groups in order while time is left, then write the summary, the table and the plots.

    Returns:
        the number of groups that failed.
    """
    from bench import gpu_table
    from bench.gpu_rows import GROUPS, TUNE
    from engine.files import write_json

    if not names and not a.tune:
        return 0
    end = time.monotonic() + 60 * a.minutes - SPARE
    a.results.mkdir(parents=True, exist_ok=True)
    failed, left_out = [], []
    groups = ({"tune": TUNE} if a.tune else {}) | {name: GROUPS[name] for name in names}
    for name, group in groups.items():
        path = a.results / f"{name}.json"
        path.unlink(missing_ok=True)  # a group that fails leaves no older result behind
        seconds = min(group.most, end - time.monotonic())
        if seconds < min(group.least, group.most):
            left_out.append(name)
            continue
        _say(f"{name}: at most {seconds:.0f} s")
        if a.device == "cpu":
            code = run_group(name, a.results, a.device, a.quick, a.rounds, seconds)
        else:
            code = _in_a_process(a, name, seconds)
        if code != 0:
            failed.append(name)
            _say(f"{name}: ended by a fault ({code})")
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not content.get("complete"):
            left_out.append(f"{name} (in part)" if content.get("entries") else name)
    results = gpu_table.load(a.results)
    summary = {"left_out": left_out, "failed": failed, "slower_than_eager": gpu_table.slower(results)}
    write_json(a.results / "summary.json", summary)
    for drawn in gpu_table.draw(results, a.results):
        _say(f"drawn: {drawn}")
    text = gpu_table.table(results)
    if left_out:
        text += "\n\nLeft out for lack of time or by a fault: " + ", ".join(left_out) + "."
    print("\n" + text)
    for line in summary["slower_than_eager"]:
        print(f"slower than eager torch: {line}")
    if a.readme:
        from bench.table import update_readme

        update_readme(a.readme, text, gpu_table.MARKERS)
    return len(failed)


def _in_a_process(a: argparse.Namespace, name: str, seconds: float) -> int:
    command = [sys.executable, "-m", "bench.gpu", "--group", name, "--results", str(a.results.absolute())]
    command += ["--device", a.device, "--seconds", str(seconds)]
    command += ["--quick"] if a.quick else []
    command += ["--rounds", str(a.rounds)] if a.rounds else []
    try:
        return subprocess.run(command, cwd=machine.ROOT, env=os.environ, timeout=seconds + GRACE).returncode
    except subprocess.TimeoutExpired:
        _say(f"{name}: did not end in time")
        return 0  # what it wrote is not complete, and says so


def run_group(
    name: str,
    results: Path,
    device: str,
    quick: bool,
    rounds: int | None,
    seconds: float,
    group: Callable[..., Any] | None = None,
) -> int:
    """Measure one group in this process. Each entry goes to standard output as JSON and into `results`/NAME.json.

    `group`: runs instead of the group of that name. Returns 1 after a failure, which the file names.
    """
    import torch

    from bench.gpu_rows import GROUPS, TUNE, Context, short
    from engine.files import write_json

    context = Context(device, quick, rounds or (1 if quick else 3), time.monotonic() + seconds)
    content: dict[str, Any] = {
        "group": name,
        "quick": quick,
        "device": device,
        "date": datetime.date.today().isoformat(),
        "machine": machine.machine(torch.get_num_threads(), device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "complete": False,
        "entries": [],
    }
    started, fault = time.monotonic(), 0

    def keep() -> None:
        content["seconds"] = time.monotonic() - started
        write_json(results / f"{name}.json", content)

    results.mkdir(parents=True, exist_ok=True)
    keep()
    run = group or (TUNE if name == "tune" else GROUPS[name]).run
    try:
        for entry in run(context):
            content["entries"].append(entry)
            print(json.dumps(entry), flush=True)
            keep()
        content["complete"] = context.left() > 0
    except Exception as cause:
        content["fault"], fault = short(cause), 1
        _say(f"{name}: {content['fault']}")
    keep()
    return fault


if __name__ == "__main__":
    sys.exit(main())
