"""python -m bench run NAME [--json], all, compare --base REF, launches, host, whole, list."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import machine
from engine.errors import EngineError


def main(arguments: list[str] | None = None) -> int:
    a = _parser().parse_args(arguments)
    threads = getattr(a, "threads", None) or machine.cores()
    machine.pin_environment(threads)  # before torch is imported
    return a.do(a, threads)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(a: argparse.Namespace, threads: int) -> int:
    from bench.runner import MORE_NAMES, NAMES, load_suite

    for name in (*NAMES, *MORE_NAMES):
        print(f"{name:20} {load_suite(name).TITLE}")
    return 0


def _run(a: argparse.Namespace, threads: int) -> int:
    from bench import runner
    from engine.files import require_replaceable, user_path, write_json

    if a.name not in (known := (*runner.NAMES, *runner.MORE_NAMES)):
        _say(f"no suite named {a.name}; there are: {', '.join(known)}")
        return 2
    machine.pin_threads(threads)
    try:
        if a.out:
            require_replaceable(user_path(a.out))  # before minutes of measuring, not after
        result = runner.run(
            a.name, runner.Setting(a.quick, a.device), a.rounds, threads, memory=not a.no_memory, say=_say
        )
    except runner.RedGateError as red:
        _say(f"red gate, nothing is reported: {red}")
        return 1
    except EngineError as problem:
        _say(str(problem))
        return 2
    if a.out:
        write_json(a.out, result)
    if a.json:
        print(runner.as_line(result))
    else:
        from bench.table import describe

        print(describe(result))
    return 0


def _all(a: argparse.Namespace, threads: int) -> int:
    from bench.everything import run_all

    return run_all(a.only, a.results, a.quick, a.rounds, threads, a.device, a.readme, say=_say)


def _compare(a: argparse.Namespace, threads: int) -> int:
    from bench.compare import compare

    return compare(a.base, a.names, a.quick, a.rounds, threads, say=_say)


def _launches(a: argparse.Namespace, threads: int) -> int:
    import json

    from bench import launches

    machine.pin_threads(threads)
    seen = launches.measure(a.mode or launches.MODES, check=a.detail)
    if a.json:
        print(json.dumps(launches.numbers(seen)))
    else:
        print(launches.table(seen))
        if a.detail:
            print("\n" + launches.detail(seen))
    return 0


def _host(a: argparse.Namespace, threads: int) -> int:
    import json

    from bench import host

    machine.pin_threads(threads)
    if a.where:
        host.where()
        return 0
    measured = host.measure()
    print(json.dumps(measured) if a.json else host.table(measured))
    return 0


def _whole(a: argparse.Namespace, threads: int) -> int:
    import json

    from bench import whole

    entries = []
    for entry in whole.rounds(a.data, a.device, a.rounds, a.settings):
        entries.append(entry)
        if a.json:
            print(json.dumps(entry), flush=True)
    if not a.json:
        print(whole.table(entries))
    return 0


def _serve(a: argparse.Namespace, threads: int) -> int:
    from bench.compare import serve

    machine.pin_threads(threads)
    return serve(a.name, a.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(do=do)
        p.add_argument("--threads", type=int, help="for engine and baseline alike (default: all cores)")
        return p

    def sizes(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="smaller shapes and fewer rounds: to try, not to report")
        p.add_argument("--rounds", type=int, help="how often every side is measured, in turn")

    command("list", _list, "the suites")
    p = command("run", _run, "measure one suite")
    p.add_argument("name")
    p.add_argument("--json", action="store_true", help="one line of JSON on the standard output")
    p.add_argument("--out", type=Path, help="also write the JSON to this file")
    p.add_argument("--device", default="cpu")
    p.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    sizes(p)
    p = command(
        "all", _all, "measure every suite, each in its own process; write results, plots and the README's table"
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="these suites alone")
    p.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", help="folder to write")
    p.add_argument("--readme", type=Path, help="also put the table between the markers of this file")
    p.add_argument("--device", default="cpu")
    sizes(p)
    p = command("compare", _compare, "this working tree against another commit, interleaved")
    p.add_argument("names", nargs="*", metavar="NAME", help="suites (default: those that take seconds)")
    p.add_argument("--base", required=True, metavar="REF")
    sizes(p)
    p = command("launches", _launches, "GPU launches of the step's stages, counted without a GPU")
    p.add_argument("--json", action="store_true", help="one line of JSON: {mode: {stage: launches}}")
    p.add_argument("--detail", action="store_true", help="also by operation and by part, and what involves the host")
    p.add_argument("--mode", nargs="+", choices=("fast", "faithful"))
    p = command("host", _host, "what Python does in an epoch of replayed graphs, measured without a GPU")
    p.add_argument("--json", action="store_true", help="one line of JSON")
    p.add_argument("--where", action="store_true", help="the functions that take longest instead")
    p = command("whole", _whole, "where the seconds of a whole engine train go, from the process's start to its end")
    p.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the run, such as epochs=8")
    p.add_argument("--data", type=Path, metavar="PATH", help="MOSI's features (default: random data of that shape)")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=2, help="how often, one after the other")
    p.add_argument("--json", action="store_true", help="a line of JSON for every round")
    p = command("serve", _serve, "one engine side, timed on request over pipes (used by compare)")
    p.add_argument("name")
    p.add_argument("--quick", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
