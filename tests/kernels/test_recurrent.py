"""Bidirectional GRU and LSTM: the compiled kernel against the formula and torch.nn, alone and in an encoder."""

import logging
import multiprocessing
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from engine.errors import DataError
from engine.kernels import build, registry
from engine.kernels.recurrent import cpu, cudnn, op
from engine.model.encoders import SequenceEncoder
from tests.kernels.compiled import needs_compiler

MODULES = {"gru": nn.GRU, "lstm": nn.LSTM}
# batch, width, features, hidden: one of everything; sizes that fill no vector, and more rows than one group has
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 70, 17),
    (5, 9, 6, 8),
    (7, 12, 20, 128),
    (33, 6, 5, 32),
    (65, 7, 3, 40),
    (100, 3, 300, 5),
]


def case(kind, batch, width, features, hidden, layers=2, dtype=torch.float32, seed=0):
    """-> module, x (rubbish past a row's length), length"""
    torch.manual_seed(seed)
    module = MODULES[kind](features, hidden, layers, bidirectional=True, batch_first=True, dtype=dtype)
    length = torch.randint(1, width + 1, (batch,))
    length[batch // 2] = width
    return module, torch.randn(batch, width, features, dtype=dtype), length


def packed(module, x, length):
    sequence = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(module(sequence)[0], batch_first=True, total_length=x.shape[1])[0]


def run(module, x, length):
    return op.bidirectional(x, length, op.parameters(module), "gru" if isinstance(module, nn.GRU) else "lstm")


def gradients(function, module, x, length, cotangent):
    x = x.clone().requires_grad_()
    y = function(module, x, length)
    return [y.detach(), *torch.autograd.grad(y, [x, *op.parameters(module)], cotangent)]


@pytest.mark.parametrize("kind, layers", [("gru", 2), ("lstm", 1), ("gru", 1), ("lstm", 3)])
def test_the_formula_is_the_module(kind, layers):
    module, x, length = case(kind, 5, 9, 6, 8, layers, torch.float64)
    cotangent = torch.randn(5, 9, 16, dtype=torch.float64)
    with registry.use_backend("reference"):
        found = gradients(run, module, x, length, cotangent)
    torch.testing.assert_close(found, gradients(packed, module, x, length, cotangent), rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, layers", [("gru", 2), ("lstm", 1), ("gru", 1), ("lstm", 3)])
def test_output_and_gradients_equal_packed_torch(kind, layers, shape):
    """Doubles to 1e-10; floats nearly as near to the doubles as torch's own floats are."""
    module, x, length = case(kind, *shape, layers)
    cotangent = torch.randn(*shape[:2], 2 * shape[3])
    ours = gradients(run, module, x, length, cotangent)
    theirs = gradients(packed, module, x, length, cotangent)
    exact = gradients(packed, module.double(), x.double(), length, cotangent.double())
    double = gradients(run, module, x.double(), length, cotangent.double())
    torch.testing.assert_close(double, exact, rtol=1e-10, atol=1e-11)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - truth).abs().max() <= (b - truth).abs().max() + 2e-6 * truth.abs().max().clamp(min=1)
    padding = torch.arange(shape[1]) >= length[:, None]
    assert (ours[0][padding] == 0).all() and (ours[1][padding] == 0).all()


@needs_compiler
@pytest.mark.parametrize("kind", MODULES)
def test_gradcheck(kind):
    module, x, length = case(kind, 3, 4, 2, 3, dtype=torch.float64)
    weights = op.parameters(module)

    def f(x, *weights):
        return op.bidirectional(x, length, weights, kind)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *weights))


@needs_compiler
@pytest.mark.parametrize("kind", MODULES)
def test_a_row_depends_on_itself_alone(kind):
    """Bit for bit: alone, in another order, in a wider batch, beside rubbish in the padding."""
    module, x, length = case(kind, 70, 11, 20, 48)
    y = run(module, x, length)
    for i in (0, 33, 69):
        n = int(length[i])
        assert torch.equal(run(module, x[i : i + 1, :n], length[i : i + 1])[0], y[i, :n])
    order = torch.randperm(70)
    assert torch.equal(run(module, x[order], length[order]), y[order])
    wide = torch.cat([x, torch.full((70, 3, 20), torch.nan)], 1)
    wide[torch.arange(14) >= length[:, None]] = torch.nan
    assert torch.equal(run(module, wide, length)[:, :11], y)


@needs_compiler
@pytest.mark.parametrize("kind", MODULES)
def test_bitwise_equal_over_runs_and_numbers_of_threads(kind):
    module, x, length = case(kind, 70, 11, 20, 48)
    cotangent = torch.randn(70, 11, 96)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(run, module, x, length, cotangent))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("scale", [0, 2**7, 2**13, 2**100])
def test_large_inputs_saturate_and_stay_finite(scale):
    """Frames and weights whose products sum without rounding, so that large gates are comparable at all."""
    module, _, length = case("gru", 4, 6, 5, 16)
    for name, weight in module.named_parameters():
        if name.startswith("weight_ih_l0"):
            weight.data = (weight * 64).round() / 64
        elif name.startswith("bias"):
            weight.data.zero_()
    x = torch.randint(-3, 4, (4, 6, 5)) * float(scale)
    found = gradients(run, module, x, length, torch.ones(4, 6, 32))
    expected = gradients(packed, module, x, length, torch.ones(4, 6, 32))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert all(f.isfinite().all() for f in found)


@needs_compiler
def test_nonfinite_frames_reach_the_output():
    module, x, length = case("gru", 4, 6, 5, 16)
    x[2, 0, 0] = torch.nan
    y = run(module, x, length)
    assert y[2, : int(length[2])].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("kind", MODULES)
def test_opcheck(kind):
    module, x, length = case(kind, 3, 5, 4, 16)
    weights = [w.detach() for w in op.parameters(module)]
    # rows without padding and a hidden size of whole vectors: room that is not needed is left uninitialised
    torch.library.opcheck(torch.ops.engine.recurrent_forward, (x, torch.full((3,), 5), weights, kind, 15))
    out, state = cpu.forward(x, length, weights, kind, 15)
    for need in (True, False):
        arguments = (torch.randn_like(out), x, length, weights, out, state, kind, need)
        torch.library.opcheck(torch.ops.engine.recurrent_backward, arguments)


@needs_compiler
def test_compiled_whole():
    """One graph for lengths that differ: they are data."""
    torch.manual_seed(0)
    module = SequenceEncoder("gru", 4, 8)
    graphs = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(3, 6, 4)
    for length in (torch.tensor([6, 2, 3]), torch.tensor([1, 6, 6])):
        module.zero_grad()
        y = graphs(x, length)
        y.square().sum().backward()
        found = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        expected = module(x, length)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found, [p.grad for p in module.parameters()])


@needs_compiler
def test_shapes_that_are_not_plain():
    module, x, length = case("lstm", 4, 6, 5, 16)
    cotangent = torch.randn(4, 6, 32)
    strided = torch.randn(4, 5, 12)[:, :, ::2].mT
    torch.testing.assert_close(
        gradients(run, module, strided, length, cotangent.flip(2)),
        gradients(packed, module, strided, length, cotangent.flip(2)),
    )
    y = run(module, x, length)
    assert torch.equal(run(module, x, length.int()), y)
    expanded = torch.ones(()).expand(4, 6, 32)
    torch.testing.assert_close(
        gradients(run, module, x, length, expanded), gradients(packed, module, x, length, expanded)
    )
    assert run(module, x[:0], length[:0]).shape == (0, 6, 32)


@needs_compiler
def test_frozen_weights_and_inputs_get_no_gradient():
    module, x, length = case("gru", 4, 6, 5, 16)
    module.weight_hh_l0.requires_grad_(False)
    run(module, x, length).sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_hh_l1.grad is not None
    with torch.no_grad():
        assert not run(module, x, length).requires_grad


@needs_compiler
def test_autocast_runs_in_float32():
    module, x, length = case("gru", 4, 6, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(module, x.bfloat16(), length)
    assert y.dtype == torch.float32
    assert torch.equal(y, run(module, x.bfloat16().float(), length))


@needs_compiler
@pytest.mark.parametrize("length", [[0, 3, 6, 1], [7, 3, 6, 1], [-1, 3, 6, 1], [6, 3, 6]])
def test_lengths_are_checked(length):
    module, x, _ = case("gru", 4, 6, 5, 16)
    with pytest.raises(DataError, match="lengths"):
        run(module, x, torch.tensor(length))


def test_shapes_are_checked():
    module, x, length = case("gru", 4, 6, 5, 16)
    weights = op.parameters(module)
    with pytest.raises(ValueError, match="layer 0"):
        op.bidirectional(x[:, :, :4], length, weights, "gru")
    with pytest.raises(ValueError, match="layer 0"):
        op.bidirectional(x, length, weights, "lstm")
    with pytest.raises(ValueError, match="8 weights per layer"):
        op.bidirectional(x, length, weights[:-1], "gru")


def test_modules_the_operation_does_not_compute():
    make = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    assert op.parameters(nn.GRU(3, 4, **make)) is not None
    for change in ({"bidirectional": False}, {"batch_first": False}, {"bias": False}, {"dropout": 0.1}):
        assert op.parameters(nn.GRU(3, 4, **(make | change))) is None
    assert op.parameters(nn.LSTM(3, 4, proj_size=2, **make)) is None
    assert op.parameters(nn.GRU(3, 4, dropout=0.1, **make).eval()) is not None


# -- the encoder and the build --


@needs_compiler
@pytest.mark.parametrize("kind", MODULES)
def test_encoder_is_the_same_by_both_ways(kind, monkeypatch):
    torch.manual_seed(0)
    module, x, length = SequenceEncoder(kind, 5, 16), torch.randn(4, 6, 5), torch.tensor([6, 1, 3, 5])
    called = []
    monkeypatch.setattr(cpu, "_run", lambda *a, f=cpu._run: called.append(1) or f(*a))
    fast = module(x, length)
    fast.sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    assert len(called) == 2
    module.zero_grad()
    with registry.use_backend("reference"):
        slow = module(x, length)
        slow.sum().backward()
    assert len(called) == 2
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, [p.grad for p in module.parameters()], rtol=1e-5, atol=1e-5)


@pytest.fixture
def no_library(monkeypatch):
    cpu.library.cache_clear()
    yield
    monkeypatch.undo()
    cpu.library.cache_clear()


@pytest.mark.parametrize("broken", ["no compiler", "failing compiler", "unwritable folder"])
def test_training_goes_on_without_a_kernel(broken, monkeypatch, tmp_path, caplog, no_library):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / ("file/cache" if broken == "unwritable folder" else "c")))
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif broken == "failing compiler":
        monkeypatch.setattr(build, "compilers", lambda: [["false"]])
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "temporary"))
    module = SequenceEncoder("gru", 5, 16)
    with caplog.at_level(logging.WARNING, "engine"):
        for _ in range(2):
            module(torch.randn(4, 6, 5), torch.tensor([6, 1, 3, 5])).sum().backward()
    assert sum("recurrent kernel: not available" in r.message for r in caplog.records) == 1
    assert module.rnn.weight_hh_l0.grad is not None


@needs_compiler
def test_a_damaged_library_costs_speed_only(monkeypatch, tmp_path, caplog, no_library):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "compiled", lambda source, dtype: tmp_path / "engine" / "damaged.so")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "damaged.so").write_bytes(b"no library")
    with caplog.at_level(logging.WARNING, "engine"):
        assert not op.available(torch.zeros(1))
    assert "not available" in caplog.text


SOURCE = 'extern "C" REAL twice(REAL x) { return 2 * x; }\n'


def compile_source(folder):
    return str(build.compiled(folder / "twice.cpp", torch.float64))


@needs_compiler
def test_processes_that_compile_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    (tmp_path / "twice.cpp").write_text(SOURCE)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.map(compile_source, [tmp_path] * 3, chunksize=1)
    assert len(set(paths)) == 1
    assert [p.name for p in (tmp_path / "kept" / "engine").iterdir()] == [paths[0].rpartition("/")[2]]
    (tmp_path / "twice.cpp").write_text(SOURCE.replace("2 * x", "x + x"))
    assert compile_source(tmp_path) != paths[0]


def test_import_compiles_nothing(tmp_path):
    code = "import engine.kernels.recurrent.op, engine.model.encoders, os; print(os.path.exists(os.environ['D']))"
    found = subprocess.run(
        [sys.executable, "-c", code.replace("os.environ['D']", repr(str(tmp_path / "kept")))],
        env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "kept"), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "False", found.stderr


@pytest.mark.parametrize("kind, layers", [("gru", 2), ("lstm", 1), ("gru", 1), ("lstm", 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_gpu_runs_is_the_module(kind, layers, shape):
    """Padded rows, the backward direction over rows reversed within their lengths: no device is special in it."""
    batch, width, features, hidden = shape
    module, x, length = case(kind, batch, width, features, hidden, layers, torch.float64)
    cotangent = torch.randn(batch, width, 2 * hidden, dtype=torch.float64)

    def padded(module, x, length):
        return cudnn.bidirectional(x, length, op.parameters(module), kind)

    expected = gradients(packed, module, x, length, cotangent)
    for a, b in zip(gradients(padded, module, x, length, cotangent), expected, strict=True):
        torch.testing.assert_close(a, b)
    weights = op.parameters(module)
    out, state = cudnn.forward(x, length, weights, kind, 5)
    torch.testing.assert_close(out, expected[0])
    *of_weights, of_x = cudnn.backward(cotangent, x, length, weights, out, state, kind, True)
    for a, b in zip([of_x, *of_weights], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


class Watched(torch.autograd.Function):
    """Identity that notes cuDNN's setting when gradients pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(("backward", torch.backends.cudnn.allow_tf32))
        return gradient, None


@pytest.fixture
def settings():
    """torch's settings of TF32, put back afterwards."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_cudnn_rounds_to_tf32_where_products_do(kind, allowed, monkeypatch, settings):
    """In both passes, of the eager way and of the operation; and the setting is put back."""
    module, x, length = case(kind, 3, 4, 2, 3, layers=1)
    weights, seen, run = op.parameters(module), [], getattr(torch._VF, kind)

    def watched(*arguments):
        seen.append(("forward", torch.backends.cudnn.allow_tf32))
        out, *rest = run(*arguments)
        return Watched.apply(out, seen), *rest

    monkeypatch.setattr(torch._VF, kind, watched)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed, not allowed
    both = [("forward", allowed)] * 2 + [("backward", allowed)] * 2
    cudnn.bidirectional(x, length, weights, kind).sum().backward()
    assert seen == both and torch.backends.cudnn.allow_tf32 is not allowed
    seen.clear()
    cudnn.bidirectional(x, length, weights, kind, tf32=True).sum().backward()  # as under autocast
    assert {setting for _, setting in seen} == {True} and torch.backends.cudnn.allow_tf32 is not allowed
    seen.clear()
    with torch.no_grad():
        out = cudnn.bidirectional(x, length, weights, kind)
    assert seen == both[:2] and torch.backends.cudnn.allow_tf32 is not allowed
    seen.clear()
    state = cudnn.forward(x, length, weights, kind, 12)[1]
    cudnn.backward(torch.ones_like(out), x, length, weights, out, state, kind, True)
    assert seen == both[:2] + both and torch.backends.cudnn.allow_tf32 is not allowed


def test_weights_reach_cudnn_as_one_buffer(monkeypatch):
    """From its first byte on and without gaps: then cuDNN copies nothing and does not warn."""
    module, x, length = case("gru", 3, 4, 2, 3)
    given, run = [], torch._VF.gru
    monkeypatch.setattr(
        torch._VF, "gru", lambda x, h, weights, *rest: given.append(weights) or run(x, h, weights, *rest)
    )
    cudnn.bidirectional(x, length, op.parameters(module), "gru").sum().backward()
    assert len(given) == 4
    for views, own in zip(given, torch.tensor_split(torch.arange(16), 4), strict=True):
        parameters = [op.parameters(module)[i] for i in own]
        [storage] = {v.untyped_storage().data_ptr() for v in views}
        place = storage
        for view, parameter in zip(views, parameters, strict=True):
            assert torch.equal(view, parameter) and view.data_ptr() == place != parameter.data_ptr()
            place += view.nbytes
        assert place - storage == views[0].untyped_storage().nbytes()
        assert all(p.grad.shape == p.shape for p in parameters)


def test_what_a_gpu_runs_keeps_its_graph_and_skips_what_is_frozen():
    module, x, length = case("gru", 3, 4, 2, 3, dtype=torch.float64)
    module.weight_hh_l0.requires_grad_(False)
    y = cudnn.bidirectional(x, length, op.parameters(module), "gru")
    wanted = [module.bias_ih_l0, module.weight_hh_l1]
    twice = [torch.autograd.grad(y.sum(), wanted, retain_graph=keep) for keep in (True, False)]
    torch.testing.assert_close(*twice)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), wanted)
    cudnn.bidirectional(x, length, op.parameters(module), "gru").sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cudnn.bidirectional(x, length, op.parameters(module), "gru"), x)


# -- between the recurrences on a GPU --


def between_recurrences(kind, clear=True, dtype=torch.float32):
    """LayerNorm of the directions' sum as a GPU runs it: its result and all gradients. Of two layers."""
    module, x, length = case(kind, 4, 6, 5, 16, 2, dtype)
    norm = nn.LayerNorm(16, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(16, dtype=dtype))
        norm.bias.add_(0.3 * torch.randn(16, dtype=dtype))
    leaves = [x.requires_grad_(), *op.parameters(module), norm.weight, norm.bias]
    y = cudnn.bidirectional(x, length, leaves[1:], kind, normed=cudnn.Normed(norm.eps, clear))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_the_norm_of_both_directions_is_torchs(kind, clear):
    torch.manual_seed(3)
    found = between_recurrences(kind, clear, torch.float64)
    torch.manual_seed(3)
    module, x, length = case(kind, 4, 6, 5, 16, 2, torch.float64)
    norm = nn.LayerNorm(16, eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(16, dtype=torch.float64))
        norm.bias.add_(0.3 * torch.randn(16, dtype=torch.float64))
    forward, backward = packed(module, x.requires_grad_(), length).chunk(2, -1)
    y = norm(forward + backward).relu()
    if clear:
        y = y * (torch.arange(6) < length[:, None])[..., None]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = [y, *torch.autograd.grad(y, [x, *op.parameters(module), norm.weight, norm.bias], cotangent)]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_what_lies_between_recurrences_is_registered():
    ops, length = torch.ops.engine, torch.tensor([3, 1, 2, 3])
    x, one, two = torch.randn(4, 3, 5), torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    torch.library.opcheck(ops.recurrent_turn.default, (x, length, 6))
    norm = (one, two, length, torch.randn(6), torch.randn(6), 1e-6, True)
    torch.library.opcheck(ops.recurrent_norm.default, norm)
    torch.library.opcheck(ops.recurrent_norm_backward.default, (torch.randn(4, 3, 6), *norm))
    for on, shape in ((True, (3, 4, 12)), (False, (4, 3, 12))):
        torch.library.opcheck(ops.recurrent_join.default, (one, two, length, on))
        turned = torch.randn(shape) if on else None
        torch.library.opcheck(ops.recurrent_join_backward.default, (torch.randn(shape), turned, length, on))


@pytest.mark.parametrize("zero_padding", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_an_encoder_gives_the_same_by_the_fused_norm(kind, zero_padding, monkeypatch):
    torch.manual_seed(0)
    module, x, length = SequenceEncoder(kind, 5, 16, zero_padding), torch.randn(4, 6, 5), torch.tensor([6, 1, 3, 5])
    found = []
    for fused in (False, True):
        monkeypatch.setattr("engine.model.encoders.fuses_norm", lambda *_, fused=fused: fused)
        y = module(x, length)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for f, e in zip(*found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
