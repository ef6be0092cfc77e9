"""The contrastive losses' Triton kernels against the reference: numbers, bounds of memory, launches, determinism."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels import dispatch, registry, use_backend
from engine.kernels.contrastive import plan, triton
from engine.kernels.contrastive.losses import ROWS
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds import plan as bounds
from tests.interpret.test_mi_bounds import Launches
from tests.kernels.contrastive_cases import NAMES, contrastive_case
from tests.kernels.mi_cases import assert_as_good_as_torch, cast, draw, evaluate
from tests.kernels.test_contrastive_libraries import EQUAL, TRITON_TOLERANCE, assert_equal, evaluated


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Several tiles a row even here, fewer programs for the interpreter, and chunks of 128 rows."""
    monkeypatch.setattr(bounds, "CHUNK_BYTES", 1)
    if "as_they_are_launched" not in request.node.name:
        for name in ("STATISTICS", "GRADIENTS"):
            monkeypatch.setattr(triton, name, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4})


def guarded(name, rows, width, reduction, inputs):
    """Every tensor between bands, labels, ids, masks and positives too; every allocation between canaries."""
    with Guards() as guards:
        function, _ = contrastive_case(name, rows, width, reduction, guards.input)
        inputs = {key: guards.input(x) for key, x in inputs.items()}
        return evaluate(function, inputs, "triton", clone=False)


def check_case(name, rows, reduction="mean", width=20):
    function, inputs = contrastive_case(name, rows, width, reduction)
    exact = evaluate(function, inputs, "reference")
    inputs = cast(inputs, torch.float32)
    found, plain = guarded(name, rows, width, reduction, inputs), evaluate(function, inputs, "reference")
    assert_as_good_as_torch(found, plain, exact, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference(name):
    for rows, reduction in ((7, "none"), (70, "mean")):
        check_case(name, rows, reduction)


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_libraries(name):
    case = EQUAL[name]
    with use_backend("reference"):
        expected = evaluated(case.theirs, case.tensors)
    assert_equal(evaluated(case.ours, tuple(t.float() for t in case.tensors)), expected, TRITON_TOLERANCE)


@pytest.mark.parametrize("name", ["labels", "queue alone, ids", "hard", "siglip, labels"])
def test_several_chunks(name):
    check_case(name, 140)


@pytest.mark.parametrize("name", ["labels", "several positives", "siglip"])
def test_tiles_as_they_are_launched(name):
    check_case(name, 9)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 33, 150])
@pytest.mark.parametrize("name", NAMES)
def test_all_sizes(name, width):
    for rows in (4, 63, 64, 65, 130):
        check_case(name, rows, "none", width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["labels", "queue alone", "hard", "siglip"])
def test_embeddings_of_16_bits(name, dtype):
    function, inputs = contrastive_case(name, 40, 20)
    inputs = {n: x.to(torch.float32 if n in ("temperature", "bias") else dtype) for n, x in inputs.items()}
    exact = evaluate(function, cast(inputs, torch.float64), "reference")
    # the interpreter truncates to 16 bits where the GPU rounds: one unit in the last place
    found, plain = guarded(name, 40, 20, "mean", inputs), evaluate(function, inputs, "reference")
    assert_as_good_as_torch(found, plain, exact, 2**-7)


def test_parts_of_fp32(monkeypatch):
    """Products of parts in bf16, which large batches take."""
    monkeypatch.setattr(bounds, "LEAST_SPLIT", 1)
    for name in ("labels", "siglip"):
        check_case(name, 20)


def test_bitwise_deterministic():
    for name in ("labels", "siglip, labels"):
        function, inputs = contrastive_case(name, 40, 20)
        first, again = (evaluate(function, cast(inputs, torch.float32), "triton") for _ in range(2))
        assert torch.equal(first.value, again.value)
        assert all(torch.equal(again.grads[n], g) for n, g in first.grads.items())


def test_fp64_is_the_references():
    function, inputs = contrastive_case("labels", 9, 4)
    found, expected = (evaluate(function, inputs, backend) for backend in ("triton", "reference"))
    assert torch.equal(found.value, expected.value)


def test_plain_torch_can_be_chosen():
    function, inputs = contrastive_case("labels", 9, 4)
    inputs = cast(inputs, torch.float32)
    with dispatch.use(contrastive="eager"):
        found = evaluate(function, inputs, "triton")
    assert torch.equal(found.value, evaluate(function, inputs, "reference").value)


@pytest.mark.parametrize(
    "groups, dtype, split",
    [(1, torch.float32, False), (2, torch.float32, True), (1, torch.bfloat16, False), (2, torch.float16, False)],
)
def test_declared_launches(groups, dtype, split, monkeypatch):
    if split:
        monkeypatch.setattr(bounds, "LEAST_SPLIT", 1)
    q, k = (draw((groups, rows, 8), rows).to(dtype) for rows in (140, 20))
    labels, one = torch.arange(140) % 5, torch.ones(())
    for bias, hardness in ((None, 0.0), (None, 0.5), (one, 0.0)):
        pairs = Pairs(labels=labels, key_labels=labels[:20])
        embeddings, state = (q, k, one, bias, hardness), torch.ones(ROWS, groups, 140)
        check_launches("contrastive_statistics", *embeddings, False, *pairs)
        check_launches("contrastive_gradients", *embeddings, True, state, state, *pairs)


def check_launches(name, *arguments):
    with Launches() as found:
        registry._operations[name].cuda(*arguments)
    assert found.count == registry.launches(name, *arguments), name


def test_roles_are_the_kernels_constants():
    assert (triton.DIAGONAL, triton.LISTED, triton.LABELLED) == (0, 1, 2)
    assert plan.choose(torch.empty(1, 4, 4), torch.empty(1, 4, 4)) == "chunked"
    assert "contrastive_statistics" in registry._operations
