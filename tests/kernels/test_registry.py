import dataclasses
import importlib
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

import engine
from engine.errors import ConfigError
from engine.kernels import registry
from engine.kernels.registry import LIB, backend_for, call, use_backend


@pytest.fixture(scope="module")
def scaled() -> str:
    """A small operation: a * s on the CPU."""
    name = "test_registry_scaled"
    registry.register(
        name, "(Tensor a, float s) -> Tensor", cpu=lambda a, s: a * s, fake=lambda a, s: torch.empty_like(a)
    )
    return name


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_an_operation_is_one_node_of_a_compiled_graph(scaled):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    a = torch.randn(3)
    compiled = torch.compile(lambda a: call(scaled, a, 2.0) + 1, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(a), 2 * a + 1)
    assert f"engine.{scaled}" in seen[0] and len(seen) == 2


def test_opcheck(scaled):
    torch.library.opcheck(getattr(torch.ops.engine, scaled).default, (torch.randn(3), 2.0))


def test_dispatch_modes_see_the_operation(scaled):
    with torch._subclasses.FakeTensorMode() as mode:
        out = call(scaled, mode.from_tensor(torch.randn(3)), 2.0)
    assert isinstance(out, torch._subclasses.FakeTensor) and out.shape == (3,)


def test_autocast_does_not_reach_into_a_host_function():
    name = "test_registry_product"
    registry.register(name, "(Tensor a) -> Tensor", cpu=lambda a: a @ a, fake=torch.empty_like)
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert call(name, a).dtype == torch.float32
        assert getattr(torch.ops.engine, name)(a).dtype == torch.float32


def test_setting_and_block():
    tensor = torch.zeros(1)
    with use_backend("auto"):
        assert backend_for(tensor) == "cpu"
        with use_backend("reference"):
            assert backend_for(tensor) == "reference"
            with use_backend("cpu"):
                assert backend_for(tensor) == "cpu"
            assert backend_for(tensor) == "reference"
        assert backend_for(tensor) == "cpu"


def test_setting_outlives_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backend_for(torch.zeros(1)) != "reference"


def test_public_name():
    assert engine.use_backend is use_backend


def test_a_device_without_kernels_gets_the_reference(monkeypatch):
    with use_backend("auto"):
        assert backend_for(torch.empty(1, device="meta")) == "reference"
    with use_backend("cpu"), pytest.raises(ConfigError, match="a tensor on meta"):
        backend_for(torch.empty(1, device="meta"))


def test_unknown_backend():
    with pytest.raises(ConfigError, match="'gpu'; expected one of auto, triton, cpu, reference"):
        use_backend("gpu")


def test_triton_on_the_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    with use_backend("triton"), pytest.raises(ConfigError, match="a tensor on cpu"):
        backend_for(torch.zeros(1))


def test_missing_triton_is_told_at_once(monkeypatch):
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="no triton"):
        use_backend("triton")


def test_an_operation_without_kernels_is_told(scaled, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    with use_backend("triton"), pytest.raises(ConfigError, match="has no Triton kernel"):
        backend_for(torch.zeros(1), scaled)


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(registry, "_told", set())
    with caplog.at_level(logging.INFO, logger="engine"), use_backend("auto"):
        backend_for(torch.zeros(1))
        backend_for(torch.zeros(1))
    assert [record.message for record in caplog.records] == ["kernels on cpu tensors: backend cpu (CPU tensors)"]


def test_environment_variable():
    code = "import torch, engine.kernels.registry as r; print(r.backend_for(torch.zeros(1)))"
    assert run(code, ENGINE_BACKEND="reference").stdout.strip() == "reference"
    wrong = run(code, ENGINE_BACKEND="fastest")
    assert wrong.returncode and "ENGINE_BACKEND: found 'fastest'" in wrong.stderr


def test_nothing_heavy_is_imported():
    code = (
        "import sys, json, engine.kernels; from engine.kernels import infonce, mi_lower_bound, use_backend\n"
        "import torch; infonce(torch.randn(4, 2), torch.randn(4, 2))\n"
        "print(json.dumps([m for m in ('triton', 'numba', 'transformers', 'sklearn') if m in sys.modules]))"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_library_is_the_projects_own():
    assert LIB.ns == "engine"


def test_functions_are_not_hidden_by_folders_of_their_name():
    code = (
        "import engine.kernels.cmi.reference, engine.kernels.cube_mix.reference\n"
        "import engine.kernels as k; from engine.kernels import cmi, cube_mix\n"
        "from engine.kernels.cmi import CMIOutput\n"
        "assert all(callable(getattr(k, name)) for name in k.__all__), k.cmi"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


# -- kernels of which plain torch takes the place ---------------------------------------------------------------------


def on_a_gpu() -> torch.Tensor:
    """A tensor without data that says it is on a GPU."""
    with torch._subclasses.FakeTensorMode():
        return torch.empty(2, device="cuda")


def test_a_folder_can_be_plain(monkeypatch):
    monkeypatch.setattr(registry, "_HAS_TRITON", True)
    monkeypatch.setattr(registry, "_setting", "auto")
    importlib.import_module("engine.kernels.stacked.op")
    importlib.import_module("engine.kernels.update.op")
    x = on_a_gpu()
    assert backend_for(x, "update_move") == backend_for(x, "stack_sequences") == "triton"
    with use_backend("auto", plain=["update"]):
        assert backend_for(x, "update_move") == backend_for(x, "update_inspect") == "reference"
        assert backend_for(x, "stack_sequences") == "triton" and backend_for(torch.zeros(1), "update_move") == "cpu"
        with use_backend("auto"):  # says nothing about folders, and leaves them
            assert backend_for(x, "update_move") == "reference"
        with use_backend("auto", plain=()):
            assert backend_for(x, "update_move") == "triton"
    assert backend_for(x, "update_move") == "triton"


def test_a_plain_folder_without_a_formula_of_its_own_runs_what_works_anywhere(monkeypatch):
    """What lies between cuDNN's recurrences is called as an operation, whatever the backend."""
    plumbing = importlib.import_module("engine.kernels.recurrent.plumbing")
    x, length = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([3, 2])
    expected = plumbing.turn(x, length, 1)
    operation = registry.operation("recurrent_turn")
    assert operation.cpu_anywhere and operation.family == "recurrent"
    broken = dataclasses.replace(operation, cuda=None)  # a GPU's host function that cannot be called
    monkeypatch.setitem(registry._operations, "recurrent_turn", broken)
    monkeypatch.setattr(registry, "_setting", "triton")
    monkeypatch.setattr(registry, "backend_for", lambda *_: "triton")
    with pytest.raises(TypeError):
        call("recurrent_turn", x, length, 1)
    with use_backend("auto", plain=["recurrent"]):
        monkeypatch.setattr(registry, "_setting", "triton")
        for a, b in zip(call("recurrent_turn", x, length, 1), expected, strict=True):
            assert torch.equal(a, b)


def test_unknown_plain_folder():
    with pytest.raises(ConfigError, match=r"'updater'; expected one of cmi, .*, update"):
        use_backend("auto", plain=["updater"])
    code = "from engine.kernels import registry\ntry: registry.is_plain('x')\nexcept Exception as e: print(e)"
    done = run(code, ENGINE_PLAIN="a")
    assert done.stdout.startswith("ENGINE_PLAIN: found 'a'; expected one of")


def test_every_folder_with_kernels_has_a_name_to_be_plain_by():
    importlib.import_module("engine.kernels.dispatch")._import_operations()
    launched = {o.family for n, o in registry._operations.items() if o.cuda is not None}
    launched -= {"", "tests"}  # which have registered operations of their own
    assert launched and launched <= set(registry.families())
