"""python -m bench.gpu: every comparison on a GPU in one command; JSON, plots and the table.

Without a GPU it says so and ends well: there is nothing to measure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import machine
from bench.runner import NAMES


def missing() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    return "torch finds no GPU"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=machine.ROOT / "bench" / "results" / "gpu", help="folder to write"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", default=NAMES)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu tries the code path")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    a = parser.parse_args(arguments)
    machine.pin_environment(machine.cores())
    if a.device != "cpu" and (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return 0
    from bench.everything import run_all

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return run_all(a.only, a.results, a.quick, a.rounds, machine.cores(), a.device, None, say)


if __name__ == "__main__":
    sys.exit(main())
