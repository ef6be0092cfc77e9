"""How accurate the information estimates are: samples with known information, every estimator, one table.

    python -m bench.mi list
    python -m bench.mi run --methods engine --seeds 0-4 --rows 2000 10000
    python -m bench.mi table

The tasks of the public benchmark bmi take part once their samples are written. bmi needs pydantic 1 and numpy 1 and the
engine pydantic 2, so that bmi gets an environment of its own:

    python -m venv BMI && BMI/bin/pip install -r bench/mi/requirements-bmi.txt
    BMI/bin/python -m bench.mi export --seeds 0-4 --rows 2000 10000
    python -m bench.mi run --methods bmi-ksg bmi-cca bmi-infonce bmi-mine --python bmi=BMI/bin/python --limit 900

Records are appended to one file as they are made; what is on record is not run again, so that a run may be interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.machine import ROOT
from bench.mi import samples
from engine.errors import EngineError

SAMPLES, RECORDS = ROOT / "runs" / "mi_samples", ROOT / "bench" / "results" / "mi_records.jsonl"
DOCS = ROOT / "docs" / "measuring_accuracy.md"


def main(arguments: list[str] | None = None) -> int:
    a = _parser().parse_args(arguments)
    try:
        return a.do(a)
    except EngineError as problem:
        _say(str(problem))
        return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(a: argparse.Namespace) -> int:
    from bench.mi.methods import METHODS
    from bench.mi.work import names, own_tasks

    own = own_tasks()
    for name in names(a.samples):
        print(f"{name:50} " + (f"{own[name].truth:8.4f}  {own[name].source}" if name in own else "          bmi"))
    print("\nmethods: " + ", ".join(METHODS))
    return 0


def _export(a: argparse.Namespace) -> int:
    """Imports bmi and nothing of ours that needs torch."""
    try:
        from bench.mi.public import tasks

        known = tasks()
    except ImportError as missing:
        raise EngineError(
            "python -m bench.mi export", f"no bmi here ({missing})", "an environment of bench/mi/requirements-bmi.txt",
            "Run this command with that environment's python.",
        ) from None  # fmt: skip
    samples.export(known, a.samples, a.rows, seeds(a.seeds), say=_say)
    return 0


def _run(a: argparse.Namespace) -> int:
    from bench.mi import work
    from bench.mi.methods import METHODS

    for method in a.methods:
        if method not in METHODS:
            raise EngineError("--methods", method, f"one of {', '.join(METHODS)}", "Choose among these.")
    pythons = dict(pair.split("=", 1) for pair in a.python)
    jobs = work.plan(work.names(a.samples, a.tasks), a.rows, seeds(a.seeds), a.methods)
    count = work.run(jobs, a.samples, a.records, pythons, a.processes, a.limit, a.retry, say=_say)
    _say(f"{len(jobs)} estimates, {len(jobs) - count} of them on record before")
    return 0


def _table(a: argparse.Namespace) -> int:
    from bench.mi import records, table
    from bench.table import update_readme
    from engine.files import write_text

    known = records.read(a.records)
    text = table.markdown(known)
    if a.docs:
        write_plot = table.plot(known, a.records.with_name("mi_benchmark.svg"))
        _say(f"wrote {write_plot}")
        update_readme(a.docs, text, (table.START, table.END))
    if a.out:
        write_text(a.out, text + "\n")
    else:
        print(text)
    return 0


def seeds(text: str) -> list[int]:
    """ "0-4" or "3" as a list."""
    try:
        first, last = (text.split("-") * 2)[:2]
        return list(range(int(first), int(last) + 1))
    except ValueError:
        raise EngineError("--seeds", text, "first-last, or one number", "Write e.g. 0-4.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(do=do)
        return p

    def draws(p: argparse.ArgumentParser) -> None:
        p.add_argument("--samples", type=Path, default=SAMPLES, help="folder of the files of samples")
        p.add_argument("--rows", type=int, nargs="+", default=[10_000])
        p.add_argument("--seeds", default="0-4", help="first-last, or one")

    p = command("list", _list, "tasks and methods")
    p.add_argument("--samples", type=Path, default=SAMPLES)
    draws(command("export", _export, "write samples of bmi's tasks; for the python of bmi's environment"))
    p = command("run", _run, "estimate what is not on record")
    draws(p)
    p.add_argument("--tasks", nargs="+", default=[], metavar="PATTERN", help="such as 'own-*' (default: all)")
    p.add_argument("--methods", nargs="+", default=["engine"])
    p.add_argument("--records", type=Path, default=RECORDS)
    p.add_argument("--processes", type=int, default=1, help="how many estimates run at a time, each on one core")
    p.add_argument("--limit", type=float, default=600, help="CPU seconds after which an estimate is given up")
    p.add_argument("--retry", action="store_true", help="run again what failed")
    p.add_argument(
        "--python", nargs="+", default=[], metavar="FAMILY=PYTHON", help="interpreters that have bmi, mist, tigramite"
    )
    p = command("table", _table, "a table of the records, and with --docs the plot and the page's part")
    p.add_argument("--records", type=Path, default=RECORDS)
    p.add_argument("--out", type=Path, help="write the table to this file")
    p.add_argument("--docs", type=Path, nargs="?", const=DOCS, help="put it between the markers of this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
