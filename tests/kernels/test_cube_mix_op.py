"""The cube_mix operation against its formula: values, gradients, registration, determinism."""

import itertools
from dataclasses import replace

import pytest
import torch

from engine.errors import EstimatorError
from engine.kernels import registry
from engine.kernels.cube_mix import cpu, op, reference
from engine.kernels.registry import use_backend
from engine.model.cubemlp import CubeMLP
from tests.kernels.compiled import needs_compiler

NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "residual_weight", "norm_weight", "norm_bias")


def case(shape, axis, hidden, d_out, ln_first=False, bias=True, project=True, dtype=torch.float32, scale=1.0, seed=0):
    """x and weights for `cube_mix`; without `project`, d_out is the axis' length."""
    generator = torch.Generator().manual_seed(seed)
    d_in = shape[axis]
    d_out = d_out if project else d_in
    norm = d_in if ln_first else d_out

    def draw(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator).mul_(scale).to(dtype)

    x = draw(*shape)
    weights = [
        draw(hidden, d_in) / d_in**0.5,
        draw(hidden) if bias else None,
        draw(d_out, hidden) / hidden**0.5,
        draw(d_out) if bias else None,
        draw(d_out, d_in) / d_in**0.5 if project else None,
        draw(norm) + 1,
        draw(norm),
    ]
    return x, weights


def run(backend, x, weights, axis, cotangent=None, dtype=None, **settings):
    """Value and gradients of x and all weights, in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *weights)]
    with use_backend(backend):
        y = op.cube_mix(leaves[0], axis, *leaves[1:], **settings)
        cotangent = torch.ones_like(y) if cotangent is None else cotangent.to(y.dtype)
        gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent)
    return [y.detach(), *gradients]


def rounded(tensor, generator):
    """The tensor, each element off by up to half a unit in its last place."""
    return tensor * (1 + (torch.rand(tensor.shape, generator=generator) - 0.5) * torch.finfo(tensor.dtype).eps)


def assert_as_good_as_torch(x, weights, axis, tolerance=2e-5, **settings):
    """|kernel - fp64| <= |torch in fp32 - fp64| + tolerance, relative to the largest element, elementwise.

    LayerNorm over two or three elements is ill-conditioned: what it makes of a rounding is luck, and on another
    processor other luck. So torch's error is its worst one, over inputs that differ by up to a rounding too.
    """
    with torch.no_grad():
        shape = reference.axis_mix(
            x, axis, *weights, activation=torch.relu, ln_first=settings.get("ln_first", False)
        ).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = run("reference", x, weights, axis, cotangent, torch.float64, **settings)
    torchs = run("reference", x, weights, axis, cotangent, **settings)
    found = run("cpu", x, weights, axis, cotangent, **settings)
    worst = [(t - e).abs().max() for t, e in zip(torchs, exact, strict=True)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        near, *around = (None if t is None else rounded(t, generator) for t in (x, *weights))
        for n, t in enumerate(run("reference", near, around, axis, cotangent, **settings)):
            worst[n] = torch.maximum(worst[n], (t - exact[n]).abs().max())
    for name, e, t, f, most in zip(("y", "x", *NAMES), exact, torchs, found, worst, strict=False):
        slack = tolerance * e.abs().max() + most
        assert ((f - e).abs() <= (t - e).abs() + slack).all(), (
            f"{name}: {(f - e).abs().max():.2e} of {e.abs().max():.2e}"
        )


SHAPES = [
    ((2, 100, 3, 128), 1, 50, 50),
    ((3, 5, 3, 128), 2, 3, 3),
    ((2, 5, 3, 128), 3, 128, 128),
    ((1, 1, 1, 1), 1, 1, 1),
    ((7, 9, 2, 5), 1, 4, 6),
    ((7, 9, 4, 5), 2, 17, 33),
    ((13, 5, 1, 31), 3, 40, 65),
    ((65, 2, 1, 17), 3, 16, 16),
    ((3, 16, 1, 65), 1, 7, 16),
    ((2, 6, 3, 1), 1, 5, 6),
    ((64, 1, 1, 8), -1, 8, 8),
    ((257, 1, 1, 9), 3, 3, 2),
]


@needs_compiler
@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, axis, hidden, d_out", SHAPES)
def test_shapes(shape, axis, hidden, d_out, ln_first):
    for bias, project in ((True, True), (False, False)):
        x, weights = case(shape, axis, hidden, d_out, ln_first, bias, project)
        assert_as_good_as_torch(x, weights, axis, ln_first=ln_first)


@needs_compiler
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_activations(activation):
    x, weights = case((3, 9, 2, 5), 1, 8, 6, scale=1.5)
    x[0, 0] = 0  # a kink or two
    assert_as_good_as_torch(x, weights, 1, activation=activation)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_small_and_large_values_stay_finite(scale):
    x, weights = case((3, 9, 2, 5), 1, 8, 6)
    for activation in op.ACTIVATIONS:
        found = run("cpu", x * scale, weights, 1, activation=activation)
        assert all(t.isfinite().all() for t in found)
    assert_as_good_as_torch(x * scale, weights, 1, activation="gelu")


@needs_compiler
def test_gelu_is_the_exact_one_everywhere():
    """Against x erfc(-x / sqrt 2) / 2, which keeps its digits in the tail; what exp(-x² / 2) loses by rounding grows
    with x². An axis of one element, of which the norm at the start leaves the shift alone, hides nothing."""
    u = torch.linspace(-12, 12, 101)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, 1, 1)
    settings = {"activation": "gelu", "ln_first": True}
    found = [op.cube_mix(zero, 1, one, None, one, None, None, one[0], shift, **settings) for shift in u[:, None]]
    x = u.double()
    exact = x / 2 * torch.special.erfc(-x / 2**0.5)
    error = (torch.stack(found).flatten().double() - exact).abs()
    assert (error <= exact.abs() * (5e-7 + 6e-8 * x**2)).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_gradcheck(backend, ln_first, axis):
    for bias, project, activation in ((True, True, "gelu"), (False, False, "tanh")):
        x, weights = case((2, 4, 5, 3), axis, 3, 4, ln_first, bias, project, torch.float64)
        leaves = [t.requires_grad_() for t in (x, *weights) if t is not None]

        def function(*given, axis=axis, weights=weights, activation=activation):
            given = iter(given)
            x, *w = next(given), *(None if t is None else next(given) for t in weights)
            return op.cube_mix(x, axis, *w, activation=activation, ln_first=ln_first)

        with use_backend(backend):
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@needs_compiler
def test_opcheck():
    for ln_first, bias, project in itertools.product((False, True), repeat=3):
        x, weights = case((2, 9, 2, 5), 1, 4, 6, ln_first, bias, project)
        x = x.flatten(2)
        settings, single = ("gelu", ln_first, 1e-6, "fp32"), torch.float32
        tests = ("test_schema", "test_faketensor")
        for keep in (False, True):
            arguments = (x, *weights, *settings, single, keep)
            torch.library.opcheck(torch.ops.engine.cube_mix_forward, arguments, test_utils=tests)
        y, kept = torch.ops.engine.cube_mix_forward(x, *weights, *settings, single, True)
        for need_x in (False, True):
            arguments = (torch.ones_like(y), x, kept, *weights, *settings, need_x)
            torch.library.opcheck(torch.ops.engine.cube_mix_backward, arguments, test_utils=tests)


def pair_case(ln_first, bias=True, project=True, dtype=torch.float32):
    """x and the weights of a modality and a channel axis, as the operation of both takes them."""
    settings = {"ln_first": ln_first, "bias": bias, "project": project, "dtype": dtype}
    x, modality = case((2, 2, 3, 9), 2, 4, 2, **settings)
    _, channel = case((2, 2, len(modality[2]), 9), 3, 10, 11, seed=1, **settings)
    return x.flatten(0, 1), [*modality, *channel]


@needs_compiler
@pytest.mark.parametrize("ln_first", [False, True])
def test_gradcheck_of_modality_and_channel_together(ln_first):
    for bias, project, activation in ((True, True, "gelu"), (False, False, "tanh")):
        x, weights = pair_case(ln_first, bias, project, torch.float64)
        leaves = [t.requires_grad_() for t in (x, *weights) if t is not None]

        def function(*given, weights=weights, activation=activation):
            given = iter(given)
            x, *w = next(given), *(None if t is None else next(given) for t in weights)
            return op._CubePair.apply(x, activation, ln_first, 1e-6, "fp32", *w)

        with use_backend("cpu"):
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@needs_compiler
def test_opcheck_of_modality_and_channel_together():
    for ln_first, bias, project in itertools.product((False, True), repeat=3):
        x, weights = pair_case(ln_first, bias, project)
        settings = ("gelu", ln_first, 1e-6, "fp32")
        tests = ("test_schema", "test_faketensor")
        for keep in (False, True):
            arguments = (x, *weights, *settings, keep)
            torch.library.opcheck(torch.ops.engine.cube_pair_forward, arguments, test_utils=tests)
        y, mixed, kept = torch.ops.engine.cube_pair_forward(x, *weights, *settings, True)
        for need_x in (False, True):
            arguments = (torch.ones_like(y), x, mixed, kept, *weights, *settings, need_x)
            torch.library.opcheck(torch.ops.engine.cube_pair_backward, arguments, test_utils=tests)


@needs_compiler
def test_a_block_is_its_three_axes():
    _, time = case((2, 20, 3, 9), 1, 12, 10)
    x, channel = torch.randn(2, 20, 3, 9), case((2, 10, 2, 9), 3, 10, 11)[1]
    _, modality = case((2, 10, 3, 9), 2, 4, 2)
    expected = x
    for axis, weights in enumerate((time, modality, channel), 1):
        expected = op.cube_mix(expected, axis, *weights)
    assert torch.equal(op.cube_block(x, time, modality, channel), expected)
    with pytest.raises(ValueError, match="fc1_weight"):
        op.cube_block(x, time, channel, modality)


def test_products_follow_the_caller(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setattr(op, "_tf32", lambda: False)
    assert op._precision(x) == "fp32"
    with torch.autocast("cpu", torch.bfloat16):
        assert op._precision(x) == "bf16"
    with torch.autocast("cpu", torch.float16):
        assert op._precision(x) == "fp16"
    monkeypatch.setattr(op, "_tf32", lambda: True)
    assert op._precision(x) == "tf32"


def test_tf32_is_allowed_where_torch_allows_it():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert op._tf32() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@needs_compiler
def test_compiles_to_one_graph():
    torch.manual_seed(0)
    model = CubeMLP((9, 3, 8), [(4, 3, 8)], [(4, 3, 8)], res_project=[True])
    x = torch.randn(2, 9, 3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = model(a), compiled(b)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert torch.equal(a.grad, b.grad)


@needs_compiler
def test_bitwise_determinism_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    x, weights = case((9, 20, 3, 16), 1, 12, 10)
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run("cpu", x, weights, 1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_strided_input_and_cotangent():
    x, weights = case((4, 9, 3, 8), 1, 5, 6)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    cotangent = torch.randn(8, 3, 6, 4).permute(3, 2, 1, 0)
    for a, b in zip(run("cpu", x, weights, 1, cotangent), run("cpu", strided, weights, 1, cotangent), strict=True):
        assert torch.equal(a, b)


@needs_compiler
def test_a_batch_without_rows():
    x, weights = case((0, 9, 3, 8), 1, 5, 6)
    y, dx, *gradients = run("cpu", x, weights, 1)
    assert y.shape == (0, 6, 3, 8) and dx.shape == x.shape
    assert all((g == 0).all() for g in gradients)


@needs_compiler
def test_autocast_runs_in_fp32():
    x, weights = case((4, 9, 3, 8), 1, 5, 6)
    expected = run("cpu", x, weights, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run("cpu", x, weights, 1)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_summed_in_32(dtype):
    """As float64 on the same numbers, but for one rounding of each result."""
    x, weights = (part for part in case((40, 9, 3, 40), 1, 5, 6, dtype=dtype))
    found, expected = run("auto", x, weights, 1), run("reference", x, weights, 1, dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * b.abs().max()
    assert op.cube_mix(x, 1, *(w.float() for w in weights)).dtype == torch.float32


@needs_compiler
def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    kept, forward = [], cpu.forward
    x, weights = case((4, 20, 3, 8), 1, 12, 10)
    name = "cube_mix_forward"
    spy = replace(registry._operations[name], cpu=lambda *a: kept.append(forward(*a)) or kept[-1])
    monkeypatch.setitem(registry._operations, name, spy)
    weights[0].requires_grad_()
    with_gradient = op.cube_mix(x, 1, *weights)
    with torch.no_grad():
        without = op.cube_mix(x, 1, *weights)
    constant = op.cube_mix(x, 1, weights[0].detach(), *weights[1:])
    assert [len(k) > 0 for _, k in kept] == [True, False, False]
    assert torch.equal(with_gradient, without) and torch.equal(without, constant)


@needs_compiler
def test_gradients_only_where_wanted():
    x, weights = case((4, 9, 3, 8), 1, 5, 6)
    weights[0].requires_grad_()
    op.cube_mix(x, 1, *weights).sum().backward()
    assert weights[0].grad is not None and x.grad is None


def test_without_a_compiler_the_formula_runs(monkeypatch):
    monkeypatch.setattr(op, "_single", lambda: False)
    x, weights = case((2, 9, 3, 8), 1, 5, 6)
    expected = reference.axis_mix(x, 1, *weights, activation=torch.nn.functional.gelu)
    assert torch.equal(op.cube_mix(x, 1, *weights), expected)


def test_errors_name_the_weight():
    x, weights = case((2, 9, 3, 8), 1, 5, 6)
    for n in (0, 2, 5, 6):  # a missing one ended the process
        with pytest.raises(ValueError, match=f"{NAMES[n]} is None"):
            op.cube_mix(x, 1, *(None if m == n else w for m, w in enumerate(weights)))
    for axis in ("time", 1.0, 4):
        with pytest.raises(ValueError, match=f"axis {axis!r} of an x with 4 axes"):
            op.cube_mix(x, axis, *weights)
    for eps in (-1.0, "small", float("nan")):
        with pytest.raises(EstimatorError, match=f"eps = {eps!r}"):
            op.cube_mix(x, 1, *weights, eps=eps)
    with pytest.raises(ValueError, match="silu"):
        op.cube_mix(x, 1, *weights, activation="silu")
    with pytest.raises(ValueError, match="fc1_weight"):
        op.cube_mix(x, 2, *weights)
    with pytest.raises(ValueError, match="residual_weight"):
        op.cube_mix(x, 1, *weights[:4], None, *weights[5:])
