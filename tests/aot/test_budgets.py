"""Every Triton kernel, compiled for every architecture without a GPU: no spills, within the chip, within its budget."""

import importlib.util

import pytest

from engine.kernels.registry import interpreting

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler; unset it", allow_module_level=True)

import triton

from tests.aot import budgets
from tests.aot.budgets import budget_key
from tests.aot.cases import all_cases
from tests.aot.compiling import AotCase, AotReport, compile_case

CASES = [
    pytest.param(case, arch, id=budget_key(case.name, arch), marks=() if case.quick else pytest.mark.slow)
    for case in all_cases()
    for arch in case.archs
]
BUDGETS = budgets.load()
FINE = AotReport("op.kernel", 90, 100, 0, 1000, 0, 8, 0, 500, 9000)
BUDGET = {"regs": 100, "shared": 1000, "f64": 0, "instructions": 500, "bytes": 9000}


@pytest.mark.parametrize("case, arch", CASES)
def test_kernel(case: AotCase, arch: int):
    report = compile_case(case, arch)
    assert not budgets.faults(case, report), report
    if triton.__version__ in BUDGETS:
        budget = BUDGETS[triton.__version__].get(budget_key(case.name, arch))
        assert not budgets.excesses(report, budget), report


def test_this_triton_has_budgets():
    if note := budgets.missing_note(triton.__version__):
        pytest.skip(note)  # the kernels were compiled all the same, and checked for faults


@pytest.mark.parametrize("version", BUDGETS)
def test_budgets_are_those_of_the_kernels(version: str):
    names = {budget_key(case.name, arch) for case in all_cases() for arch in case.archs}
    assert set(BUDGETS[version]) == names, f"with triton {version}, run {budgets.COMMAND}"


@pytest.mark.parametrize("field, value", {"stack": 8, "shared": 300_000, "spills": 2, "tensor_core": 0}.items())
def test_faults_are_found(field: str, value: int):
    case = AotCase("op.kernel", None, {}, {}, dot=True)
    assert budgets.faults(case, FINE) == []
    assert len(budgets.faults(case, AotReport(**{**FINE.__dict__, field: value}))) == 1


@pytest.mark.parametrize(
    "field, value", {"regs": 101, "shared": 1001, "f64": 1, "instructions": 551, "bytes": 8000}.items()
)
def test_excesses_are_found(field: str, value: int):
    assert budgets.excesses(FINE, BUDGET) == []
    (sentence,) = budgets.excesses(AotReport(**{**FINE.__dict__, field: value}), BUDGET)
    assert sentence.startswith(f"{field}: {value}, budget {BUDGET[field]}")
    assert budgets.excesses(FINE, None) == ["it has no budget: run python -m tests.aot --update"]


def test_the_command_names_every_fault_and_goes_on(monkeypatch, capsys):
    from tests.aot import __main__ as command

    cases = tuple(AotCase(f"op.{name}", None, {}, {}, quick=name != "slow") for name in ("broken", "spills", "slow"))

    def compiled(case: AotCase, arch: int) -> AotReport:
        if case.name == "op.broken":
            raise RuntimeError("no such\ninstruction")
        return AotReport(**{**FINE.__dict__, "name": case.name, "arch": arch, "stack": 8 * (case.name == "op.spills")})

    monkeypatch.setattr(command, "all_cases", lambda: cases)
    monkeypatch.setattr(command, "compile_case", compiled)
    assert command.main(["--quick", "--arch", "90"]) == 1
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0] == "2 kernels, 2 faults"
    assert last[1] == "FAULT op.broken@sm_90: does not compile: RuntimeError: no such instruction"
    assert last[2].startswith("FAULT op.spills@sm_90: it spills: 8 bytes of stack")
    monkeypatch.setattr(command, "all_cases", lambda: cases[2:])
    assert command.main([]) == 0 and capsys.readouterr().out.endswith("3 kernels, 0 faults\n")
    with pytest.raises(SystemExit):
        command.main(["--update", "--quick"])


def test_budgets_are_kept_per_version(tmp_path):
    path = tmp_path / "budgets.json"
    old, new = {"a.x@sm_80": {"regs": 9}, "b.y@sm_80": {"regs": 8}}, {"a.x@sm_80": {"regs": 7}}
    budgets.save("3.9.0", old, path=path)
    budgets.save("3.10.0", new, path=path)
    assert budgets.load(path) == {"3.9.0": old, "3.10.0": new}
    assert budgets.newest(path) == new
    budgets.save("3.9.0", {"a.z@sm_80": {"regs": 6}}, "a", path)
    assert budgets.load(path)["3.9.0"] == {"a.z@sm_80": {"regs": 6}, "b.y@sm_80": {"regs": 8}}
    assert budgets.missing_note("3.9.0", path) is None
    assert budgets.missing_note("4.0.0", path) == (
        "no budgets for triton 4.0.0 (there are: 3.10.0, 3.9.0); record them: python -m tests.aot --update"
    )
