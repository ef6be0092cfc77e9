"""The Triton kernels of the axis mix, forward and backward, under triton's interpreter, with guards."""

import pytest
import torch

from tests.interpret import device
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels import registry
from engine.kernels.cube_mix import cpu, op, triton
from engine.kernels.registry import use_backend
from engine.model.cubemlp import CubeMLP
from tests.interpret.launches import launches
from tests.kernels.test_cube_mix_op import NAMES, case, run

# Columns that do and do not fill a block, every axis, with and without products.
SHAPES = [
    ((2, 20, 3, 11), 1, 18, 17),
    ((5, 4, 3, 19), 3, 33, 21),
    ((3, 12, 2, 9), 1, 20, 9),
    ((2, 5, 3, 30), 2, 3, 3),
    ((3, 5, 2, 7), 2, 4, 5),
    ((65, 2, 1, 5), 3, 8, 7),
    ((1, 1, 1, 1), 1, 1, 1),
    ((33, 1, 1, 1), 2, 16, 9),
]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Small blocks, so that programs loop, and more than one of them runs."""
    monkeypatch.setattr(triton, "SHORT_COLUMNS", 32)
    monkeypatch.setattr(triton, "SHORT_PROGRAMS", 3)
    monkeypatch.setattr(triton, "SUM_ROWS", 2)
    monkeypatch.setattr(triton, "SUM_COLUMNS", 256)


# Of the largest element, against fp64. Where the products are of 16 bits, so is what is kept, and the interpreter
# truncates to them where a GPU rounds.
TOLERANCE = {"fp32": 2e-5, "tf32": 2e-3, "bf16": 4e-2, "fp16": 5e-3}


def compare(x, weights, axis, precision="fp32", **settings):
    before, after = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    settings = {"activation": "gelu", "ln_first": False} | settings
    given = (*settings.values(), 1e-6, precision)
    with Guards() as guards:
        inputs = [None if w is None else guards.input(w) for w in weights]
        u = guards.input(x.reshape(before, x.shape[axis], after))
        y, kept = triton.forward(u, *inputs, *given, torch.float32, True)
        alone, nothing = triton.forward(u, *inputs, *given, torch.float32, False)
        assert torch.equal(alone, y) and not nothing.numel()
        assert kept.dtype == cpu.STORAGE.get(precision, torch.float32)
        cotangent = guards.input(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        found = triton.backward(cotangent, u, kept, *inputs, *given, True)
        again = triton.backward(cotangent, u, kept, *inputs, *given, False)
    assert len(again) == len(found) - 1
    for name, a, b in zip(
        [n for n, w in zip(NAMES, weights, strict=True) if w is not None], found, again, strict=False
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n} differs without dx: {m}")
    found = [y, found[-1], *found[:-1]]
    shape = (*x.shape[:axis], -1, *x.shape[axis + 1 :])
    exact = run("reference", x, weights, axis, cotangent.view(shape), torch.float64, **settings)
    torchs = run("reference", x, weights, axis, cotangent.view(shape), **settings)
    present = ["y", "x", *(n for n, w in zip(NAMES, weights, strict=True) if w is not None)]
    # of one element the gradient is 0: a difference of equal numbers, whose rounding 1 / sqrt(eps) enlarges
    alone = (x.shape[axis] if settings["ln_first"] else exact[0].shape[axis]) == 1
    rounding = 1e3 * torch.finfo(torch.float32).eps * cotangent.abs().max() if alone and device.on_gpu() else 0.0
    assert_close(present, found, exact, torchs, TOLERANCE[precision], max(1e-6, rounding))


def assert_close(names, found, exact, torchs, tolerance, least=1e-6):
    """|kernel - fp64| <= 2 |torch in fp32 - fp64| + tolerance, relative to the largest element, + least."""
    for name, e, t, f in zip(names, exact, torchs, found, strict=True):
        slack = tolerance * e.abs().max() + 2 * (t - e).abs().max() + least
        error = (f.reshape(e.shape) - e).abs()
        assert (error <= slack).all(), f"{name}: {error.max():.2e} of {e.abs().max():.2e}"


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, axis, hidden, d_out", SHAPES)
def test_shapes(shape, axis, hidden, d_out, ln_first):
    x, weights = case(shape, axis, hidden, d_out, ln_first)
    compare(x, weights, axis, ln_first=ln_first)


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, axis, hidden, d_out", [SHAPES[0], SHAPES[3]])
def test_without_biases_and_projection(shape, axis, hidden, d_out, ln_first):
    x, weights = case(shape, axis, hidden, d_out, ln_first, bias=False, project=False)
    compare(x, weights, axis, ln_first=ln_first)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("shape, axis, hidden, d_out", [((2, 9, 2, 5), 1, 9, 6), SHAPES[4]])
def test_activations(activation, shape, axis, hidden, d_out):
    x, weights = case(shape, axis, hidden, d_out, scale=1.5)
    x[0, 0] = 0
    compare(x, weights, axis, activation=activation)


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_other_precisions(precision, ln_first):
    x, weights = case((2, 40, 3, 23), 1, 34, 50, ln_first)
    compare(x, weights, 1, precision, ln_first=ln_first)


def test_layer_norm_of_what_has_no_deviation():
    """Of one element, and of equal ones, only the shift is left, whatever the element is."""
    for d, project in ((1, True), (3, False), (17, False)):
        x, weights = case((2, d, 3, 5), 1, d, d, project=project)
        x = x[:, :1].expand_as(x) * 1e4
        if not project:
            weights[2], weights[3] = torch.zeros_like(weights[2]), None
        with use_backend("triton"):
            y = op.cube_mix(x, 1, *weights)
        # the mean of equal numbers is off by a rounding, which 1 / sqrt(eps) enlarges
        tolerance = 0 if d == 1 else 4e-3 * 1e3
        assert (y - weights[-1][:, None, None]).abs().max() <= tolerance


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast):
    torch.manual_seed(0)
    model = CubeMLP((9, 3, 16), [(9, 3, 9)], [(5, 3, 9)], res_project=[True])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 9, 3, 16)
    found = []
    for function in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_backend("triton"), torch.autocast(device.device().type, torch.bfloat16, enabled=autocast):
            y = function(leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck():
    x, _, modality, channel = block_weights((1, 3, 3, 9), (3, 3, 10), (3, 3, 11))
    settings, tests = ("gelu", False, 1e-6, "bf16"), ("test_schema", "test_faketensor")
    arguments = (x.flatten(0, 1), *modality, *channel, *settings, True)
    torch.library.opcheck(torch.ops.engine.cube_pair_forward, arguments, test_utils=tests)
    y, mixed, kept = torch.ops.engine.cube_pair_forward(*arguments)
    arguments = (torch.ones_like(y), arguments[0], mixed, kept, *arguments[1:])
    torch.library.opcheck(torch.ops.engine.cube_pair_backward, arguments, test_utils=tests)
    u = x.flatten(2).to(torch.bfloat16)
    arguments = (u, *case((1, 3, 3, 9), 1, 9, 5)[1], *settings, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.engine.cube_mix_forward, arguments, test_utils=tests)
    y, kept = torch.ops.engine.cube_mix_forward(*arguments)
    arguments = (torch.ones_like(y), u, kept, *arguments[1:-2], True)
    torch.library.opcheck(torch.ops.engine.cube_mix_backward, arguments, test_utils=tests)


def block_weights(shape, hidden, d_out, **settings):
    """x and the weights of the three axes."""
    x, time = case(shape, 1, hidden[0], d_out[0], **settings)
    _, modality = case((shape[0], d_out[0], *shape[2:]), 2, hidden[1], d_out[1], seed=1, **settings)
    _, channel = case((*shape[:1], *d_out[:2], shape[3]), 3, hidden[2], d_out[2], seed=2, **settings)
    return x, time, modality, channel


PAIRS = [
    ((2, 4, 3, 20), (3, 3, 18), (5, 3, 17)),
    ((3, 9, 3, 33), (9, 2, 40), (7, 2, 9)),
    ((1, 3, 2, 16), (3, 4, 16), (3, 5, 16)),
]


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, hidden, d_out", PAIRS)
def test_modality_and_channel_together(shape, hidden, d_out, ln_first):
    x, _, modality, channel = block_weights(shape, hidden, shape[1:2] + d_out[1:], ln_first=ln_first)
    compare_pair(x, modality, channel, "fp32", ln_first)


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_modality_and_channel_in_other_precisions(precision, ln_first):
    """With three modalities: LayerNorm over two enlarges whatever error comes in."""
    x, _, modality, channel = block_weights((2, 4, 3, 20), (4, 3, 18), (4, 3, 17), ln_first=ln_first)
    compare_pair(x, modality, channel, precision, ln_first)


def test_modality_and_channel_without_biases_and_projection():
    x, _, modality, channel = block_weights((2, 4, 3, 20), (4, 3, 20), (4, 3, 20), bias=False, project=False)
    compare_pair(x, modality, channel, "fp32", False)


def compare_pair(x, modality, channel, precision, ln_first):
    settings = ("gelu", ln_first, 1e-6, precision)
    with Guards() as guards:
        inputs = [None if w is None else guards.input(w) for w in (*modality, *channel)]
        rows = guards.input(x.flatten(0, 1))
        y, mixed, kept = triton.pair_forward(rows, *inputs, *settings, True)
        alone, _, nothing = triton.pair_forward(rows, *inputs, *settings, False)
        assert torch.equal(alone, y) and not nothing.numel()
        cotangent = guards.input(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        found = triton.pair_backward(cotangent, rows, mixed, kept, *inputs, *settings, True)
        again = triton.pair_backward(cotangent, rows, mixed, kept, *inputs, *settings, False)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=False)) and len(again) == len(found) - 1

    def expected(dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, *modality, *channel)]
        with use_backend("reference"):
            y = op.cube_mix(leaves[0], 2, *leaves[1:8], ln_first=ln_first)
            y = op.cube_mix(y, 3, *leaves[8:], ln_first=ln_first)
        leaves = [t for t in leaves if t is not None]
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.view(y.shape).to(dtype))]

    exact, torchs = expected(torch.float64), expected(torch.float32)
    names = [
        "y",
        "x",
        *(
            f"{axis} {n}"
            for axis, w in (("modality", modality), ("channel", channel))
            for n, t in zip(NAMES, w, strict=True)
            if t is not None
        ),
    ]
    assert_close(names, [y, found[-1], *found[:-1]], exact, torchs, TOLERANCE[precision])


def test_a_block_is_its_three_axes():
    x, *axes = block_weights((2, 20, 3, 24), (9, 3, 18), (10, 3, 17))
    with use_backend("triton"):
        found = op.cube_block(x, *axes)
        expected = x
        for axis, weights in enumerate(axes, 1):
            expected = op.cube_mix(expected, axis, *weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_model_follows_autocast(autocast):
    """The result is fp32; gradients are as close to fp64 as those of plain torch under autocast."""
    torch.manual_seed(0)
    model = CubeMLP((20, 3, 16), [(9, 3, 16), (5, 3, 16)], [(10, 3, 16), (5, 3, 16)])
    x = torch.randn(1, 20, 3, 16)

    def gradients(backend, autocast, dtype=torch.float32):
        model.to(dtype).zero_grad()
        leaf = x.detach().clone().to(dtype).requires_grad_()
        with use_backend(backend), torch.autocast(device.device().type, autocast, enabled=autocast is not None):
            y = model(leaf)
        assert backend == "reference" or y.dtype == torch.float32
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
        return y.detach(), leaf.grad, torch.cat([p.grad.flatten() for p in model.parameters()])

    found, plain = gradients("triton", autocast), gradients("reference", autocast)
    exact = gradients("reference", None, torch.float64)
    assert autocast is None or not torch.equal(found[0], gradients("triton", None)[0])
    # on a GPU both are of one precision, and round at other places
    factor = 2 if device.on_gpu() else 1
    for f, p, e in zip(found, plain, exact, strict=True):
        assert (f - e).norm() <= factor * (p - e).norm() + 1e-5 * e.norm()


def test_declared_launches_are_those_that_happen():
    x, *axes = block_weights((2, 20, 3, 24), (9, 3, 18), (10, 3, 17))
    settings = ("gelu", False, 1e-6, "fp32")
    time, modality, channel = axes
    strided = torch.randn(2, 20, 72).transpose(0, 1).contiguous().transpose(0, 1)
    for u, weights in ((x.flatten(2), time), (strided, time), (x.flatten(0, 1), modality), (x[:0].flatten(2), time)):
        arguments = (u, *weights, *settings, torch.float32, True)
        with launches() as counted:
            y, kept = triton.forward(*arguments)
        assert counted.count == registry.launches("cube_mix_forward", *arguments)
        for dy in (torch.ones_like(y), y.new_ones(()).expand(y.shape)):
            arguments = (dy, u, kept, *weights, *settings, True)
            with launches() as counted:
                triton.backward(*arguments)
            assert counted.count == registry.launches("cube_mix_backward", *arguments)
    arguments = (torch.randn(20, 3, 24), *modality, *channel, *settings, True)
    with launches() as counted:
        y, mixed, kept = triton.pair_forward(*arguments)
    assert counted.count == registry.launches("cube_pair_forward", *arguments) == 1
    arguments = (torch.ones_like(y), arguments[0], mixed, kept, *arguments[1:])
    with launches() as counted:
        triton.pair_backward(*arguments)
    assert counted.count == registry.launches("cube_pair_backward", *arguments) == 4


def test_two_blocks_are_18_launches():
    model = CubeMLP((20, 3, 16), [(9, 3, 16), (5, 3, 16)], [(9, 3, 16), (5, 3, 16)])
    x = torch.randn(1, 20, 3, 16, requires_grad=True)
    with use_backend("triton"):
        with launches() as counted:
            y = model(x)
        assert counted.count == 4
        cotangent = torch.ones_like(y)
        with launches() as counted:
            y.backward(cotangent)
    assert counted.count == 14


def test_through_the_operation_and_bitwise_determinism():
    x, weights = case((3, 17, 2, 9), 1, 9, 6)
    first = run("triton", x, weights, 1)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run("triton", x, weights, 1), strict=True))
    for a, b in zip(first, run("reference", x, weights, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with use_backend("triton"):
        empty = op.cube_mix(x[:0], 1, *weights)
    assert empty.shape == (0, 6, 2, 9)
