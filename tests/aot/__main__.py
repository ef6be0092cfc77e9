"""What triton's compiler makes of every kernel, without a GPU.

python -m tests.aot [OP]            registers, stack, shared memory and instructions on every architecture
python -m tests.aot --update [OP]   record them as budgets of the installed triton (of one operation)
"""

from __future__ import annotations

import argparse
import sys

from tests.aot import budgets
from tests.aot.cases import all_cases
from tests.aot.compiling import compile_case

COLUMNS = ("regs", "stack", "shared", "spills", "tensor_core", "f64", "instructions", "bytes")


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="?", help="one operation, such as mi_bounds")
    parser.add_argument("--update", action="store_true", help="write tests/aot/budgets.json for the installed triton")
    options = parser.parse_args(arguments)
    print(f"{'kernel':60} {'arch':>6} " + " ".join(f"{c:>12}" for c in COLUMNS))
    measured = {}
    for case in all_cases():
        if options.op is None or case.name.startswith(f"{options.op}."):
            for arch in case.archs:
                report = compile_case(case, arch)
                measured[budgets.budget_key(case.name, arch)] = budgets.budget_of(report)
                values = " ".join(f"{getattr(report, c):>12}" for c in COLUMNS)
                print(f"{case.name:60} {'sm_' + str(arch):>6} {values}", flush=True)
    if options.update:
        budgets.save(triton.__version__, measured, options.op)
    return 0


if __name__ == "__main__":
    sys.exit(main())
