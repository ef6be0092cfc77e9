"""What every kernel may take, for each version of triton that was measured: budgets.json, and the checks against it.

A compiler of another version allocates other registers, so its kernels need budgets of their own. The file holds one
line per kernel: {"3.9.0": {"op.kernel/variant/dtype@sm_90": {"regs": 96, ...}}}.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from engine.files import write_text
from tests.aot.compiling import SHARED_LIMIT, AotCase, AotReport

PATH = Path(__file__).with_name("budgets.json")
COMMAND = "python -m tests.aot --update"

Budget = dict[str, int]
Budgets = dict[str, Budget]


def budget_key(name: str, arch: int) -> str:
    return f"{name}@sm_{arch}"


def budget_of(report: AotReport) -> Budget:
    """The measured numbers alone."""
    return {key: value for key, value in asdict(report).items() if key not in ("name", "arch")}


def load(path: Path = PATH) -> dict[str, Budgets]:
    """Version of triton -> key -> budget."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def newest(path: Path = PATH) -> Budgets:
    """The budgets of the newest version that is recorded."""
    recorded = load(path)
    return recorded[max(recorded, key=lambda version: [int(part) for part in version.split(".")])]


def save(version: str, measured: Budgets, op: str | None = None, path: Path = PATH) -> None:
    """Record the budgets of one version of triton, of all operations or of one. Everything else stays as it is."""
    recorded = load(path)
    kept = {} if op is None else {k: v for k, v in recorded.get(version, {}).items() if not k.startswith(f"{op}.")}
    recorded[version] = {**kept, **measured}
    blocks = []
    for name, budgets in sorted(recorded.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(budget)}" for key, budget in sorted(budgets.items()))
        blocks.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    write_text(path, "{" + ",\n".join(blocks) + "}\n")


def missing_note(version: str, path: Path = PATH) -> str | None:
    """Why the budgets cannot be checked with this version of triton, or None if they are recorded."""
    recorded = load(path)
    if version in recorded:
        return None
    return f"no budgets for triton {version} (there are: {', '.join(sorted(recorded))}); record them: {COMMAND}"


def faults(case: AotCase, report: AotReport) -> list[str]:
    """What no version of triton may make of a kernel, each fault in a sentence: spills, too much shared memory, and
    products without tensor cores."""
    sentences = []
    if report.stack or report.spills:
        sentences.append(f"it spills: {report.stack} bytes of stack, {report.spills} spill instructions")
    if report.shared > SHARED_LIMIT[report.arch]:
        sentences.append(f"{report.shared} bytes of shared memory; the chip has {SHARED_LIMIT[report.arch]}")
    if case.dot and not report.tensor_core:
        sentences.append("no tensor-core instructions")
    return sentences


def excesses(report: AotReport, budget: Budget | None) -> list[str]:
    """Where a kernel leaves its budget, each in a sentence.

    It may not take more registers, shared memory or fp64 instructions. Code size may move by a tenth.
    """
    if budget is None:
        return [f"it has no budget: run {COMMAND}"]
    sentences = []
    for key in ("regs", "shared", "f64"):
        if getattr(report, key) > budget[key]:
            sentences.append(f"{key}: {getattr(report, key)}, budget {budget[key]}")
    for key in ("instructions", "bytes"):
        if abs(getattr(report, key) - budget[key]) > 0.1 * budget[key]:
            sentences.append(f"{key}: {getattr(report, key)}, budget {budget[key]} ± 10 %")
    return sentences
