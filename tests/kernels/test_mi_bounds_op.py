import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EstimatorError
from engine.kernels import infonce, mi_lower_bound, use_backend
from engine.kernels.mi_bounds import bound_value, cpu, op, reference, update_log_ema
from tests.kernels.mi_cases import (
    BOUNDS,
    INFONCE,
    assert_as_good_as_torch,
    bound_function,
    bound_inputs,
    cast,
    draw,
    evaluate,
    infonce_case,
)

SIZES = (2, 7, 63, 64, 65, 100, 257)
OWN_GRADIENT = ("infonce", "dv", "tuba", "nwj", "js_fgan", "interpolate")


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """With a few rows a block, what is carried from block to block is tested at small sizes too."""
    if request.param == "many blocks":
        monkeypatch.setattr(cpu, "BLOCK_BYTES", 4000)


@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "scores"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_bound_is_the_reference(bound, embeddings, blocks):
    for count, width in ((2, 5), (3, 16), (17, 5), (17, 48), (130, 16)):
        inputs, function = bound_inputs(2, count, width, embeddings), bound_function(bound, 2)
        found, expected = evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference")
        torch.testing.assert_close(found.value, expected.value, rtol=1e-8, atol=1e-9)
        for name, grad in expected.grads.items():
            # the reference's softplus is exact to 2e-9 only
            torch.testing.assert_close(found.grads[name], grad, rtol=1e-7, atol=1e-8, msg=f"{count} {name}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", INFONCE)
def test_infonce_is_the_reference(name, reduction, blocks):
    for rows, width in ((2, 16), (7, 6), (33, 6), (33, 48), (130, 16)):
        function, inputs = infonce_case(name, rows, width, reduction)
        found, expected = evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference")
        torch.testing.assert_close(found.value, expected.value)
        for tensor, grad in expected.grads.items():
            torch.testing.assert_close(found.grads[tensor], grad, msg=f"{rows} {tensor}")


@pytest.mark.parametrize("width", [4, 16])  # what the compiled kernel leaves to torch's products, and what it takes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "scores"])
@pytest.mark.parametrize("bound", OWN_GRADIENT)
def test_gradcheck_of_bounds(bound, embeddings, backend, width):
    inputs = bound_inputs(2, 5, width, embeddings)
    function = bound_function(bound, 2)
    with use_backend(backend):
        tensors = [x.requires_grad_() for x in inputs.values()]
        assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(inputs, t, strict=True))), tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("name", INFONCE)
def test_gradcheck_of_infonce(name, backend, reduction, width):
    function, inputs = infonce_case(name, 6, width, reduction)
    with use_backend(backend):
        tensors = [x.requires_grad_() for x in inputs.values()]
        assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(inputs, t, strict=True))), tensors)


def test_infonce_is_cross_entropy():
    q, k = draw((9, 4), 0), draw((13, 4), 1)
    expected = torch.nn.functional.cross_entropy(q @ k.T / 0.3, torch.arange(9))
    torch.testing.assert_close(infonce(q, k, temperature=0.3), expected)


def test_infonce_of_two_views_is_nt_xent():
    """SimCLR's loss by its definition: 2B samples, the sample itself never among the candidates."""
    z = torch.nn.functional.normalize(draw((12, 4), 0), dim=1)
    total = 0.0
    for i in range(12):
        others = [math.exp(z[i] @ z[j] / 0.5) for j in range(12) if j != i]
        total -= math.log(math.exp(z[i] @ z[(i + 6) % 12] / 0.5) / sum(others))
    positives = (torch.arange(12) + 6) % 12
    loss = infonce(z, z, temperature=0.5, positives=positives, exclude_self=True)
    assert loss.item() == pytest.approx(total / 12)


def test_one_tensor_as_both_sides_gets_both_gradients():
    z = draw((8, 3), 0).requires_grad_()
    positives = (torch.arange(8) + 4) % 8
    assert torch.autograd.gradcheck(lambda z: infonce(z, z, positives=positives, exclude_self=True), z)


def test_infonce_and_bound_sum_to_log_count():
    q, k = draw((2, 9, 4), 0), draw((2, 9, 4), 1)
    torch.testing.assert_close(infonce(q, k) + mi_lower_bound(q, k), torch.full((2,), math.log(9), dtype=torch.float64))


def test_groups_are_independent():
    q, k, a = draw((3, 9, 4), 0), draw((3, 9, 4), 1), draw((3, 9, 1), 2)
    for bound in BOUNDS:
        together = mi_lower_bound(q, k, bound=bound, log_baseline=a)
        apart = [mi_lower_bound(q[g], k[g], bound=bound, log_baseline=a[g]) for g in range(3)]
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("form", ["embeddings", "scores"])
def test_mine_carries_its_average(form):
    scores = draw((6, 9, 9), 0)
    eye = torch.eye(9, dtype=torch.float64)
    own = theirs = torch.tensor(-math.inf, dtype=torch.float64)
    for table in scores:
        source = (table,) if form == "scores" else (table, eye)
        value, own = mi_lower_bound(*source, bound="mine", log_ema=own, ema_rate=0.1)
        theirs = update_log_ema(theirs, table, 0.1)
        torch.testing.assert_close(own, theirs)
        torch.testing.assert_close(value, bound_value(table, "mine", log_ema=theirs)[0])
        assert not own.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", BOUNDS)
def test_precision_of_bounds(bound, dtype):
    """The cut-cross-entropy rule against plain torch of the same type, both measured against fp64."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for count in SIZES[:-1]:
        for embeddings in (True, False):
            inputs, function = cast(bound_inputs(2, count, 16, embeddings), dtype), bound_function(bound, 2)
            exact = evaluate(function, cast(inputs, torch.float64), "reference")
            assert_as_good_as_torch(
                evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference"), exact, tolerance
            )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 31, 64, 96, 200, 256])
@pytest.mark.parametrize("bound", BOUNDS)
def test_precision_of_bounds_at_all_sizes(bound, width):
    for count in SIZES:
        inputs, function = cast(bound_inputs(2, count, width, True), torch.float32), bound_function(bound, 2)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        assert_as_good_as_torch(evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference"), exact, 1e-5)


@pytest.mark.parametrize("name", INFONCE)
def test_precision_of_infonce(name):
    for rows in SIZES:
        for reduction in ("mean", "none"):
            function, inputs = infonce_case(name, rows, 32, reduction)
            inputs = cast(inputs, torch.float32)
            exact = evaluate(function, cast(inputs, torch.float64), "reference")
            assert_as_good_as_torch(
                evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference"), exact, 1e-5
            )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), more=st.integers(0, 20), width=st.integers(1, 256), groups=st.integers(1, 3),
    block=st.integers(1, 40_000), transposed=st.booleans(),
)  # fmt: skip
def test_any_shape(rows, more, width, groups, block, transposed):
    q, k = draw((groups, rows, width), 0) / width**0.5, draw((groups, rows + more, width), 1)
    if transposed:
        q, k = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k))
        assert q.numel() == rows or not q.is_contiguous() or 1 in q.shape
    before, cpu.BLOCK_BYTES = cpu.BLOCK_BYTES, block
    try:
        found = evaluate(infonce, {"q": q, "k": k}, "cpu")
    finally:
        cpu.BLOCK_BYTES = before
    expected = evaluate(infonce, {"q": q, "k": k}, "reference")
    torch.testing.assert_close(found.value, expected.value)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad)


def test_bitwise_deterministic(blocks):
    cases = [(bound_function(b, 2), cast(bound_inputs(2, 65, 16, True), torch.float32)) for b in BOUNDS]
    cases += [infonce_case(name, 65, 16, "mean") for name in INFONCE]
    for function, inputs in cases:
        first = evaluate(function, inputs, "cpu")
        for _ in range(2):
            again = evaluate(function, inputs, "cpu")
            assert torch.equal(again.value, first.value)
            assert all(torch.equal(again.grads[name], grad) for name, grad in first.grads.items())


def test_torchs_products_take_the_compiled_kernels_place(blocks, monkeypatch):
    cases = [(bound_function(b, 2), bound_inputs(2, 65, 16, True)) for b in BOUNDS]
    cases += [infonce_case(name, 65, 16, "mean") for name in INFONCE]
    for function, inputs in cases:
        with monkeypatch.context() as without:
            without.setattr(cpu, "library", lambda dtype: None)
            expected = evaluate(function, inputs, "cpu")
        found = evaluate(function, inputs, "cpu")
        torch.testing.assert_close(found.value, expected.value)
        for name, grad in expected.grads.items():
            torch.testing.assert_close(found.grads[name], grad)


@pytest.mark.parametrize("bound", ["infonce", "dv", "mine"])
@pytest.mark.parametrize("shift", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("width", [4, 15])
def test_shift_of_all_scores(bound, shift, width):
    """A constant added to every score (a further column of q and k) changes nothing but roundoff."""
    q, k = draw((17, width), 0).float() * 2 / width**0.5, draw((17, width), 1).float()
    moved = torch.cat([q, torch.full((17, 1), shift)], 1), torch.cat([k, torch.ones(17, 1)], 1)
    value, expected = mi_lower_bound(*moved, bound=bound), mi_lower_bound(q, k, bound=bound)
    torch.testing.assert_close(value, expected, rtol=0, atol=4e-6 * abs(shift))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", [100.0, -100.0, 1e4])
def test_large_scores_are_finite_where_the_formula_is(bound, size, blocks):
    eye = torch.eye(16)
    for scores in (size * eye, size * eye + draw((16, 16), 0).float()):
        for source in ((scores,), (scores, eye)):
            source = [x.clone().requires_grad_() for x in source]
            with use_backend("cpu"):
                value = mi_lower_bound(*source, bound=bound)
                grads = torch.autograd.grad(value, source)
            exact = scores.double().requires_grad_()
            expected, surrogate = bound_value(exact, bound)
            assert expected.isfinite()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                grads[0].double(), torch.autograd.grad(surrogate, exact)[0], rtol=1e-4, atol=1e-6
            )
            assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("width", [3, 16])
def test_a_single_candidate_costs_nothing(width):
    q, k = torch.randn(1, width, requires_grad=True), torch.randn(1, width, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = infonce(q, k, reduction=reduction).sum()
        assert loss.item() == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, (q, k)))


@pytest.mark.parametrize("bound", ["infonce", "tuba", "smile", "interpolate"])
def test_autocast_changes_nothing(bound):
    q, k, a = (draw((2, 9, 4), seed).to(torch.bfloat16).requires_grad_() for seed in range(3))

    def run(a):
        value = mi_lower_bound(q, k, bound=bound, log_baseline=a)
        return value, *torch.autograd.grad(value.sum(), (q, k))

    outside = run(a[..., 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(a[..., 0])
    assert outside[0].dtype == torch.float32 and outside[1].dtype == torch.bfloat16
    assert all(torch.equal(x, y) for x, y in zip(outside, inside, strict=True))


def test_gradients_are_asked_for_where_they_are_needed():
    q, k = draw((9, 4), 0), draw((9, 4), 1)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert infonce(q, k, temperature=temperature).requires_grad
    assert not infonce(q, k).requires_grad
    with torch.no_grad():
        assert not infonce(q.requires_grad_(), k).requires_grad


OPCHECK = {
    "mi_infonce": lambda t: (t["q"], t["k"], t["s"], t["p"], True, "chunked", "both"),
    "mi_infonce_keys": lambda t: (t["q"], t["k"], t["s"], None, False, t["a"], t["t"]),
    "mi_infonce_gradients": lambda t: (t["q"], t["k"], t["s"], t["p"], False, t["a"], t["t"]),
    "mi_symmetric_statistics": lambda t: (t["q"], t["k"], t["s"]),
    "mi_statistics": lambda t: (t["q"], t["k"], t["s"], None, False, "lse", 0.0),
    "mi_gradients": lambda t: (t["q"], t["k"], t["s"], None, False, t["a"], t["a"], None, None, t["a"]),
    "mi_fused": lambda t: (t["q"], t["k"], t["s"], t["p"], True, "lse", 0.0, "offset", t["a"]),
    "mi_mixture": lambda t: (t["q"], t["k"], t["s"], t["a"], 0.1),
    "mi_mixture_gradients": lambda t: (t["q"], t["k"], t["s"], t["a"], 0.1, t["a"], t["a"], t["g"]),
    "mi_score_statistics": lambda t: (t["S"], "clipped", 1.0),
    "mi_score_gradients": lambda t: (t["S"], t["a"], None, t["a"]),
    "mi_score_mixture": lambda t: (t["S"], t["a"], 0.1),
    "mi_score_mixture_gradients": lambda t: (t["S"], t["a"], 0.1, t["a"], t["a"], t["g"]),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    shapes = {"q": (2, 5, 3), "k": (2, 5, 3), "s": (), "a": (2, 5), "S": (2, 5, 5), "g": (2,), "t": (4, 2, 5)}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    tensors["p"] = (torch.arange(5) + 1) % 5
    tensors["k"] = tensors["k"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(getattr(torch.ops.engine, name).default, OPCHECK[name](tensors))


@pytest.mark.parametrize("gradients", ["none", "rows", "both"])
def test_fake_tensors_of_infonce_have_the_right_shapes(gradients):
    """Whatever the forward pass is asked for."""
    q, k = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    torch.library.opcheck(
        torch.ops.engine.mi_infonce.default, (q, k, torch.ones(()), None, False, "chunked", gradients)
    )


def infonce_arguments(name):
    """(q, k, scale, positives, exclude_self, symmetric) of a case, fp64, by what the public function hands on."""
    function, inputs = infonce_case(name, 7, 4, "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_infonce", lambda *arguments: arguments)
        q, k, *rest, _ = function(**inputs)
    return q[None].requires_grad_(), k[None].requires_grad_(), *rest


@pytest.mark.parametrize("name", INFONCE)
def test_cross_entropy_is_the_reference(name):
    arguments = infonce_arguments(name)
    torch.testing.assert_close(reference.cross_entropies(*arguments), reference.infonce_losses(*arguments))
    found, expected = (
        torch.autograd.grad(f(*arguments).sum(), arguments[:2])
        for f in (reference.cross_entropies, reference.infonce_losses)
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", [name for name in INFONCE if name != "symmetric"])
def test_gradients_of_infonces_sum_come_with_its_losses(name):
    *arguments, _ = infonce_arguments(name)
    losses = reference.infonce_losses(*arguments, False)
    expected = torch.autograd.grad(losses.sum(), arguments[:2])
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    found, _, *gradients = cpu.infonce(*plain, "cpu", "both")
    torch.testing.assert_close(found, losses.detach())
    for f, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("bound", BOUNDS)
def test_one_graph_forward_and_backward(bound):
    """fullgraph with the graph run as it is: what inductor makes of it is torch's affair, and costs minutes."""
    torch._dynamo.reset()
    inputs = bound_inputs(2, 7, 4, True)
    function = bound_function(bound, 2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    expected, found = evaluate(function, inputs, "cpu"), evaluate(compiled, inputs, "cpu")
    torch.testing.assert_close(found.value, expected.value)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad)


@pytest.mark.slow
def test_inductor():
    q, k = (draw((9, 4), seed).float().requires_grad_() for seed in range(2))
    compiled = torch.compile(infonce, fullgraph=True)
    torch.testing.assert_close(compiled(q, k), infonce(q, k))
    for found, expected in zip(
        torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(infonce(q, k), (q, k)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_memory_grows_with_the_rows_not_with_their_pairs():
    """The largest tensor made is the block, or of the embeddings' size."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel() * tensor.element_size())
            return out

    before, cpu.BLOCK_BYTES = cpu.BLOCK_BYTES, 1 << 16
    try:
        q = torch.randn(1, 2048, 8)
        with Watch():
            cpu.fused(q, q, torch.ones(()), None, False, "lse", 0.0, "softmax", None)
            cpu.gradients(q, q, torch.ones(()), None, False, *[torch.zeros(1, 2048)] * 4, torch.zeros(1, 2048))
    finally:
        cpu.BLOCK_BYTES = before
    assert max(sizes) <= 1 << 16  # the scores would be 16 MiB


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 4)), r"\[3, 2\] and \[3, 4\]"),
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(2, 2)), "3 rows of q, 2 keys"),
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(4, 2), symmetric=True), "3 rows, 4 keys"),
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 2), exclude_self=True), "no positives"),
        (
            lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 2), positives=torch.tensor([2, 1, 0]), exclude_self=True),
            "row 1 as its own positive",
        ),
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 2), reduction="max"), "reduction 'max'"),
        (
            lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 2), positives=torch.zeros(2, dtype=int)),
            r"positives \[2\]",
        ),
        (lambda: infonce(torch.zeros(3, 2), torch.zeros(3, 2), negatives=torch.zeros(2, 3)), "negatives"),
        *(
            (
                lambda p=p, d=d: infonce(torch.zeros(3, d), torch.zeros(3, d), positives=torch.tensor(p)),
                "positives from",
            )
            for p in ([0, 1, 3], [-1, 0, 0])
            for d in (2, 16)
        ),
        (lambda: mi_lower_bound(torch.zeros(3, 4)), r"scores \[3, 4\]"),
        (lambda: mi_lower_bound(torch.zeros(1, 1)), "a batch of 1"),
        (lambda: mi_lower_bound(torch.zeros(3, 2), torch.zeros(4, 2)), "3 rows and 4"),
        (lambda: mi_lower_bound(torch.zeros(3, 3), bound="kl"), "an unknown bound"),
        (lambda: mi_lower_bound(torch.zeros(3, 3), bound="tuba", log_baseline=torch.zeros(4)), r"log_baseline \[4\]"),
    ],
)
def test_misuse_is_told_in_one_line(call, told):
    with pytest.raises(EstimatorError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_another_default_device_changes_nothing():
    q, k = draw((8, 16), 0), draw((8, 16), 1)
    expected = infonce(q, k)
    with torch.device("meta"):
        assert torch.equal(infonce(q, k), expected)


@pytest.mark.parametrize("shape", [(0, 4, 4), (0, 0)])
def test_no_scores_are_refused(shape: tuple[int, ...]):
    with pytest.raises(EstimatorError, match=r"scores \[0, 4, 4\]|a batch of 0"):
        mi_lower_bound(torch.zeros(shape))
