"""Compiling Triton kernels for a GPU that need not be there, and reading what the compiler made of them.

Registers, stack, shared memory and instruction counts say whether a kernel can be launched and whether it spills. They
are no timings.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.kernels.warm import require_compiler

# The most shared memory that one block may ask for, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ARCHS = tuple(SHARED_LIMIT)

# mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(STL|LDL)\b")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    Attributes:
        name: "op.kernel/variant/dtype", unique. The op is the kernel's folder under engine/kernels.
        kernel: the @triton.jit function. Heuristics are unwrapped.
        signature: the types of the arguments that are not constexpr, such as {"q": "*fp32", "rows": "i32"}. A tuple
            argument has the types of its members.
        constexprs: the values of the constexpr arguments.
        dot: whether tensor-core instructions must appear (bf16 and tf32 products, but not exact fp32).
        quick: compiled in every test run. The others are compiled in the full matrix only.
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
    """What ptxas made of a kernel. A kernel that spills has stack > 0. Shared memory (dynamic and static) in bytes."""

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


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile for `sm_{arch}` and read the machine code. Takes about a second, or less from triton's cache.

    Raises:
        ConfigError: triton is missing, or its interpreter replaces the compiler.
    """
    require_compiler()
    kernel = _compiled(case, arch)
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


def _compiled(case: AotCase, arch: int) -> Any:
    """Triton's compiled kernel for `sm_{arch}`, from its cache if it is there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    wrong = set(kernel.arg_names) ^ (set(case.signature) | set(case.constexprs))
    if wrong:
        raise ValueError(f"{case.name}: arguments without a type or value, or unknown: {sorted(wrong)}")
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    # At run time triton specialises on aligned pointers. Without this hint, other code would be measured.
    aligned = {place: [["tt.divisibility", 16]] for place, kind in _leaves(signature) if kind.startswith("*")}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=case.constexprs, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True},
    )


def _leaves(signature: dict[str, str | tuple[str, ...]]) -> list[tuple[tuple[int, ...], str]]:
    """Place and type of every argument. The place of a tuple's member has two numbers."""
    leaves = []
    for i, kind in enumerate(signature.values()):
        leaves += [((i,), kind)] if isinstance(kind, str) else [((i, j), member) for j, member in enumerate(kind)]
    return leaves


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout
