"""Every Triton kernel, compiled for every architecture without a GPU: no spills, within the chip, within its budget."""

import importlib.util

import pytest

from engine.kernels.registry import interpreting

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler; unset it", allow_module_level=True)

from engine.kernels import aot

CASES = [
    pytest.param(case, arch, id=aot.budget_key(case.name, arch), marks=() if case.quick else pytest.mark.slow)
    for case in aot.all_cases()
    for arch in case.archs
]


@pytest.mark.parametrize("case, arch", CASES)
def test_kernel(case: aot.AotCase, arch: int):
    report = aot.compile_case(case, arch)
    budget = aot.load_budgets().get(aot.budget_key(case.name, arch))
    assert not aot.problems(case, report, budget), report


def test_budgets_are_those_of_the_kernels():
    names = {aot.budget_key(case.name, arch) for case in aot.all_cases() for arch in case.archs}
    assert set(aot.load_budgets()) == names, "run python -m engine.kernels.aot --update"


def test_problems_are_found():
    case = aot.AotCase("op.kernel", None, {}, {}, dot=True)
    good = {"regs": 100, "shared": 1000, "f64": 0, "instructions": 500, "bytes": 9000}
    fine = aot.AotReport("op.kernel", 90, 100, 0, 1000, 0, 8, 0, 500, 9000)
    assert aot.problems(case, fine, good) == []
    changes = {
        "regs": 101, "stack": 8, "shared": 300_000, "spills": 2, "tensor_core": 0, "f64": 1, "instructions": 551,
        "bytes": 8000,
    }  # fmt: skip
    for field, value in changes.items():
        report = aot.AotReport(**{**fine.__dict__, field: value})
        assert aot.problems(case, report, good), field
    assert aot.problems(case, fine, None)
