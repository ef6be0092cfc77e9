"""What triton's compiler makes of every kernel, without a GPU.

python -m tests.aot [OP ...]           registers, stack, shared memory and instructions on every architecture
python -m tests.aot --quick            the quick cases alone; with --arch 90 for one architecture
python -m tests.aot --update [OP]      record them as budgets of the installed triton (of one operation)

Faults are named, and make the exit status 1: a kernel that does not compile, that spills, that asks for more shared
memory than the chip has, or that multiplies without tensor cores. No version's budgets are compared, so that this says
whether the installed triton, whichever it is, compiles the kernels. pytest tests/aot compares budgets, too.
"""

from __future__ import annotations

import argparse
import sys

from tests.aot import budgets
from tests.aot.cases import all_cases
from tests.aot.compiling import ARCHS, compile_case

COLUMNS = ("regs", "stack", "shared", "spills", "tensor_core", "f64", "instructions", "bytes")


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations, such as mi_bounds")
    parser.add_argument("--quick", action="store_true", help="the cases that every test run compiles")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, help="architectures, such as 90")
    parser.add_argument("--update", action="store_true", help="write tests/aot/budgets.json for the installed triton")
    options = parser.parse_args(arguments)
    if options.update and (options.quick or options.arch or len(options.ops) > 1):
        parser.error("--update records all cases of all architectures, of one operation or of all")
    print(f"triton {triton.__version__}")
    print(f"{'kernel':60} {'arch':>6} " + " ".join(f"{c:>12}" for c in COLUMNS))
    measured, faults, count = {}, [], 0
    for case in all_cases():
        if (options.ops and case.name.partition(".")[0] not in options.ops) or (options.quick and not case.quick):
            continue
        for arch in case.archs:
            if options.arch and arch not in options.arch:
                continue
            key = budgets.budget_key(case.name, arch)
            count += 1
            try:
                report = compile_case(case, arch)
            except Exception as cause:  # the compiler's own errors have no common type
                faults.append(f"{key}: does not compile: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
                print(faults[-1], flush=True)
                continue
            faults += [f"{key}: {sentence}" for sentence in budgets.faults(case, report)]
            measured[key] = budgets.budget_of(report)
            values = " ".join(f"{getattr(report, c):>12}" for c in COLUMNS)
            print(f"{case.name:60} {'sm_' + str(arch):>6} {values}", flush=True)
    print(f"{count} kernels, {len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}")
    if options.update and not faults:
        budgets.save(triton.__version__, measured, options.ops[0] if options.ops else None)
    return int(bool(faults) or not count)


if __name__ == "__main__":
    sys.exit(main())
