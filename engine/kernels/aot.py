"""Ahead-of-time compilation of the Triton kernels: what the compiler made of them, without a GPU.

    python -m engine.kernels.aot                 table of every kernel on every architecture
    python -m engine.kernels.aot --update [OP]   write tests/aot/budgets.json anew (for one operation)

Registers, stack, shared memory and instruction counts say whether a kernel can be launched and whether it spills. They
are no timings.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine.kernels
from engine.errors import ConfigError
from engine.files import write_json
from engine.kernels.registry import has_triton, interpreting

# Opt-in limit of shared memory for one block, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ARCHS = tuple(SHARED_LIMIT)
MAX_REGISTERS = 255

BUDGETS = Path(engine.kernels.__file__).parents[2] / "tests" / "aot" / "budgets.json"

# mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(STL|LDL)\b")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    Attributes:
        name: "op.kernel/variant/dtype", unique; the op is its folder under engine/kernels.
        kernel: the @triton.jit function (heuristics are unwrapped).
        signature: types of the arguments that are not constexpr, such as {"q": "*fp32", "rows": "i32"}; of a tuple
            the types of its members.
        constexprs: values of the constexpr arguments.
        dot: whether tensor-core instructions must appear (bf16 and tf32 products; not for exact fp32).
        quick: compiled in every test run; the others in the full matrix only.
        archs: the architectures that launch it.
    """

    name: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    dot: bool = False
    quick: bool = True
    archs: tuple[int, ...] = ARCHS


@dataclass(frozen=True)
class AotReport:
    """What ptxas made of a kernel. Spills show as stack > 0. Shared memory in bytes, dynamic and static."""

    name: str
    arch: int
    regs: int
    stack: int
    shared: int
    spills: int
    tensor_core: int
    f64: int
    instructions: int
    bytes: int


def require_compiler() -> None:
    """ConfigError where triton is missing, or its interpreter has taken the place of the compiler."""
    if not has_triton() or interpreting():
        raise ConfigError(
            "ahead-of-time compilation",
            "TRITON_INTERPRET=1" if has_triton() else "no triton",
            "triton's compiler",
            "Unset TRITON_INTERPRET." if has_triton() else "Install engine[triton].",
        )


def compiled(case: AotCase, arch: int) -> Any:
    """Triton's compiled kernel for `sm_{arch}`, from its cache where it is there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    missing = set(kernel.arg_names) ^ (set(case.signature) | set(case.constexprs))
    if missing:
        raise ValueError(f"{case.name}: arguments without a type or value, or unknown: {sorted(missing)}")
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    # At run time triton specialises on aligned pointers; without saying so other code would be measured.
    aligned = {path: [["tt.divisibility", 16]] for path, kind in _leaves(signature) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True},
    )


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile for `sm_{arch}` and read the machine code. About a second.

    Raises:
        ConfigError: triton is missing, or its interpreter has taken the place of the compiler.
    """
    require_compiler()
    kernel = compiled(case, arch)
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    regs, stack = (int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    return AotReport(
        name=case.name,
        arch=arch,
        regs=regs,
        stack=stack,
        shared=kernel.metadata.shared,
        spills=len(SPILL.findall(sass)),
        tensor_core=len(TENSOR_CORE.findall(sass)),
        f64=ptx.count(".f64"),
        instructions=sum(bool(INSTRUCTION.match(line)) for line in sass.splitlines()),
        bytes=len(cubin),
    )


def _leaves(signature: dict[str, str | tuple[str, ...]]) -> list[tuple[tuple[int, ...], str]]:
    """The place and the type of every argument; a tuple's members have places of two numbers."""
    found = []
    for i, kind in enumerate(signature.values()):
        found += [((i,), kind)] if isinstance(kind, str) else [((i, j), member) for j, member in enumerate(kind)]
    return found


@functools.cache
def all_cases() -> tuple[AotCase, ...]:
    """The cases of every operation: `aot_cases()` of each engine/kernels/*/triton.py."""
    found: list[AotCase] = []
    for info in pkgutil.iter_modules(engine.kernels.__path__):
        if info.ispkg and importlib.util.find_spec(f"engine.kernels.{info.name}.triton"):
            cases = importlib.import_module(f"engine.kernels.{info.name}.triton").aot_cases()
            strangers = [case.name for case in cases if not case.name.startswith(f"{info.name}.")]
            if strangers:
                raise ValueError(f"names of {info.name}'s cases must begin with its folder's name: {strangers}")
            found += cases
    names = [case.name for case in found]
    if len(set(names)) != len(names):
        raise ValueError(f"ahead-of-time cases of one name: {sorted({n for n in names if names.count(n) > 1})}")
    return tuple(found)


def problems(case: AotCase, report: AotReport, budget: dict[str, int] | None) -> list[str]:
    """What is wrong with a compiled kernel, each in a sentence; empty where all is well.

    Stack, spills, shared memory and tensor-core instructions have absolute rules. Against its budget a kernel may not
    take more registers, shared memory or fp64 instructions; code size may move by a tenth.
    """
    found = []
    if report.stack or report.spills:
        found.append(f"it spills: {report.stack} bytes of stack, {report.spills} spill instructions")
    if report.shared > SHARED_LIMIT[report.arch]:
        found.append(f"{report.shared} bytes of shared memory; the chip has {SHARED_LIMIT[report.arch]}")
    if case.dot and not report.tensor_core:
        found.append("no tensor-core instructions")
    if budget is None:
        found.append("it has no budget: run python -m engine.kernels.aot --update")
        return found
    for key in ("regs", "shared", "f64"):
        if getattr(report, key) > budget[key]:
            found.append(f"{key}: {getattr(report, key)}, budget {budget[key]}")
    for key in ("instructions", "bytes"):
        if abs(getattr(report, key) - budget[key]) > 0.1 * budget[key]:
            found.append(f"{key}: {getattr(report, key)}, budget {budget[key]} ± 10 %")
    return found


def budget_key(name: str, arch: int) -> str:
    return f"{name}@sm_{arch}"


def load_budgets() -> dict[str, dict[str, int]]:
    """tests/aot/budgets.json; empty where there is none yet."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _update(op: str | None) -> None:
    fresh = {}
    for case in all_cases():
        if op is None or case.name.startswith(f"{op}."):
            for arch in case.archs:
                report = asdict(compile_case(case, arch))
                del report["name"], report["arch"]
                fresh[budget_key(case.name, arch)] = report
    # Others' budgets are read last: two operations may be updated at the same time.
    kept = {} if op is None else {k: v for k, v in load_budgets().items() if not k.startswith(f"{op}.")}
    write_json(BUDGETS, dict(sorted({**kept, **fresh}.items())))


def _table(op: str | None) -> None:
    columns = ("regs", "stack", "shared", "spills", "tensor_core", "f64", "instructions", "bytes")
    print(f"{'kernel':60} {'arch':>6} " + " ".join(f"{c:>12}" for c in columns))
    for case in all_cases():
        if op is None or case.name.startswith(f"{op}."):
            for arch in case.archs:
                report = compile_case(case, arch)
                values = " ".join(f"{getattr(report, c):>12}" for c in columns)
                print(f"{case.name:60} {'sm_' + str(arch):>6} {values}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="?", help="one operation, such as mi_bounds")
    parser.add_argument("--update", action="store_true", help="write tests/aot/budgets.json anew")
    options = parser.parse_args(arguments)
    (_update if options.update else _table)(options.op)
    return 0


if __name__ == "__main__":
    sys.exit(main())
