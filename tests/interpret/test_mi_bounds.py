"""mi_bounds' Triton kernels against the reference: numbers, bounds of memory, determinism."""

import math
from unittest import mock

import pytest
import torch

from tests.interpret import device
from tests.interpret.guards import BAND, Guards, require_interpreter

require_interpreter()

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from engine.errors import ConfigError
from engine.kernels import dispatch, infonce, mi_lower_bound, registry, use_backend
from engine.kernels.mi_bounds import chunked, cpu, plan, splitting, tiles
from engine.kernels.mi_bounds import scores as score_kernels
from engine.kernels.mi_bounds import triton as fused
from tests.kernels.mi_cases import (
    BOUNDS,
    INFONCE,
    assert_as_good_as_torch,
    bound_function,
    bound_inputs,
    cast,
    evaluate,
    infonce_case,
)

# below, at and past one tile; 130 is past what one program holds, so that the streaming kernels run
SIZES = (2, 17, 64, 130)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Several tiles a row even here, and fewer programs for the interpreter."""
    if request.function is not test_tiles_as_they_are_launched:
        for name in ("ROWS", "GRADIENT_ROWS", "CELLS", "MIXTURE", "MIXTURE_CELLS"):
            monkeypatch.setattr(score_kernels, name, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4})


def test_tiles_as_they_are_launched():
    for name in ("square", "positives and negatives"):
        function, inputs = infonce_case(name, 9, 20, "mean")
        inputs = cast(inputs, torch.float32)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        with dispatch.use(infonce="chunked"):
            found = guarded(function, inputs)
        assert_as_good_as_torch(found, evaluate(function, inputs, "reference"), exact, 2e-5)


@pytest.fixture(params=["fused", "chunked"])
def algorithm(request, monkeypatch):
    """Either of the GPU's algorithms; chunks of 128 rows, so that what goes from chunk to chunk is tested too."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    with dispatch.use(infonce=request.param, mi_bound=request.param):
        yield request.param


def guarded(function, inputs):
    """`evaluate` on the Triton backend, every input between bands of NaN, every allocation between canaries."""
    with Guards() as guards:
        return evaluate(function, {name: guards.input(x) for name, x in inputs.items()}, "triton", clone=False)


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds(bound, algorithm):
    check_bound(bound, True)


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_of_scores(bound):
    check_bound(bound, False)


def check_bound(bound, embeddings):
    for count in SIZES:
        inputs, function = cast(bound_inputs(2, count, 20, embeddings), torch.float32), bound_function(bound, 2)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 16, 33, 128, 150, 256])
@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_at_all_sizes(bound, width):
    """Fused up to a width of 128, chunked beyond."""
    for count in (3, 63, 65, 100, 257):
        inputs, function = cast(bound_inputs(2, count, width, True), torch.float32), bound_function(bound, 2)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", INFONCE)
def test_infonce(name, reduction, algorithm):
    for rows in (7, 70, 130):
        function, inputs = infonce_case(name, rows, 20, reduction)
        inputs = cast(inputs, torch.float32)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bound", ["infonce", "tuba", "js", "interpolate"])
def test_embeddings_of_16_bits(bound, dtype, algorithm):
    for count in (17, 130):
        inputs, function = bound_inputs(2, count, 20, True), bound_function(bound, 2)
        inputs = {name: x.to(dtype if name in "qk" else torch.float32) for name, x in inputs.items()}
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        # the interpreter truncates to 16 bits where the GPU rounds: one unit in the last place
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2**-7)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_the_interpolation(alpha):
    q, k, a = bound_inputs(1, 40, 20, True)["q"], bound_inputs(1, 40, 20, True)["k"], torch.zeros(1, 40)
    scale, grad = torch.ones(()), torch.ones(1)
    mine, theirs = chunked.mixture(q.float(), k.float(), scale, a, alpha), cpu.mixture(q, k, scale, a.double(), alpha)
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    rest, weight = theirs[1], torch.full((1, 40), -1.0, dtype=torch.float64)
    mine = chunked.mixture_gradients(q.float(), k.float(), scale, a, alpha, rest.float(), weight.float(), grad)
    theirs = cpu.mixture_gradients(q, k, scale, a.double(), alpha, rest, weight, grad.double())
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("bound", BOUNDS)
def test_large_scores(bound, size):
    eye = torch.eye(16)
    inputs = {"scores": (size * eye + bound_inputs(1, 16, 4, False)["scores"][0].float())[None]}
    function = bound_function(bound, 1)
    exact = evaluate(function, cast(inputs, torch.float64), "reference")
    found = guarded(function, inputs)
    torch.testing.assert_close(found.value, exact.value, rtol=1e-5, atol=1e-5)
    # e^(S - L) of numbers of this size has a relative error of size * 2^-24
    size = max(1, abs(size)) * exact.grads["scores"].abs().max().item()
    torch.testing.assert_close(found.grads["scores"], exact.grads["scores"], rtol=1e-4, atol=max(size * 2**-23, 1e-30))


def test_bitwise_deterministic(algorithm):
    for name in ("square", "symmetric", "positives and negatives"):
        for rows in (40, 130):
            function, inputs = infonce_case(name, rows, 20, "mean")
            inputs = cast(inputs, torch.float32)
            first = evaluate(function, inputs, "triton")
            for _ in range(2):
                again = evaluate(function, inputs, "triton")
                assert torch.equal(again.value, first.value)
                assert all(torch.equal(again.grads[n], g) for n, g in first.grads.items())


def test_kinds_are_the_kernels_constants():
    assert set(tiles.KINDS.values()) == {0, 1, 2}
    assert {fused.DIAGONAL, fused.OWN, fused.OTHER} == {0, 1, 2}


@pytest.mark.parametrize("algorithm", ["fused", "chunked"])
def test_gradients_of_a_large_batch_fit_into_fp16(algorithm):
    """A batch's mean has gradients that fp16 cannot hold while they are those of scores."""
    inputs = bound_inputs(1, 40, 20, True)
    q, k = (inputs[name].half().requires_grad_() for name in "qk")
    for bound in ("infonce", "nwj", "js", "interpolate"):
        with dispatch.use(infonce=algorithm, mi_bound=algorithm):
            # as if the batch had 2^22 rows
            found = torch.autograd.grad(2.0**-22 * mi_lower_bound(q, k, bound=bound).sum(), (q, k))
        exact = [x.detach().double().requires_grad_() for x in (q, k)]
        with use_backend("reference"):
            expected = torch.autograd.grad(mi_lower_bound(*exact, bound=bound).sum(), exact)
        for f, e in zip(found, expected, strict=True):
            # what is left is the rounding of the results, which are fp16's smallest numbers
            assert (f.double() * 2**22 - e).abs().max() <= 2.0**-25 * 2**22 + 2e-3 * e.abs().max()


class TestTF32:
    """A tensor core ignores the bits that tf32 lacks. The interpreter computes fp32: rounding before is all it sees."""

    @pytest.fixture(autouse=True)
    def allowed(self):
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        yield
        torch.backends.cuda.matmul.allow_tf32 = before

    def test_rounds_to_the_nearest_ties_away(self):
        x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-36, 37, 5000)
        ulp = 2.0**-10
        ties = torch.tensor([1 + ulp / 2, -1 - ulp / 2, 1 + 1.5 * ulp, 1 + ulp / 2 - 2.0**-23, 2 - ulp / 2])
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, torch.finfo(torch.float32).max])
        found = fused._rounded(torch.cat([x, ties, special]))
        assert not (found[torch.isfinite(found)].view(torch.int32) & 0x1FFF).any()
        # to the nearest multiple of the exponent's 2^-10, by fp64
        exact = x.double()
        unit = torch.exp2(exact.abs().log2().floor() - 10)
        assert torch.equal(found[: len(x)].double(), (exact.abs() / unit + 0.5).floor() * unit * exact.sign())
        assert found[len(x) :][:5].tolist() == [1 + ulp, -1 - ulp, 1 + 2 * ulp, 1.0, 2.0]
        assert found[-5:].tolist() == [0.0, 0.0, math.inf, -math.inf, math.inf]

    def test_nan_stays_nan(self):
        bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32)
        assert fused._rounded(bits.view(torch.float32)).isnan().all()

    @pytest.mark.parametrize("width", [32, 128])
    def test_loss_is_not_biased(self, width):
        """Unit variance: rounding errs by less than 1e-5, ignoring bits by a hundred times as much."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(300, width, generator=generator)
        k = (q + torch.randn(300, width, generator=generator)) / math.sqrt(2)
        q, k = width**-0.25 * q, width**-0.25 * k
        with use_backend("reference"):
            exact = infonce(q.double(), k.double()).item()
        with dispatch.use(infonce="fused"):
            assert abs(infonce(q, k).item() - exact) < 1e-5
        cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (q, k)]
        with dispatch.use(infonce="fused"):
            assert abs(infonce(*cut).item() - exact) > 5e-4

    def test_gradients(self):
        """The scores' gradient is rounded too: what the products are given has no bits beyond tf32's."""
        function, inputs = infonce_case("square", 70, 20, "mean")
        inputs = cast(inputs, torch.float32)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        with dispatch.use(infonce="fused"):
            found = evaluate(function, inputs, "triton")
        for name in "qk":
            size = exact.grads[name].abs().max()
            assert (found.grads[name] - exact.grads[name]).abs().max() < 2.0**-10 * size


class TestProducts:
    """InfoNCE multiplies as often at every width; a fused kernel's products are those that it declares."""

    @pytest.mark.parametrize("width", [64, 128, 256, 512, 768])
    @pytest.mark.parametrize("reduction, products", [("mean", 3), ("sum", 3), ("none", 4)])
    def test_chunked(self, width, reduction, products, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        assert self.counted(width, "chunked", reduction=reduction) == (products, 0)

    @pytest.mark.skipif(device.on_gpu(), reason="products within a kernel are counted by triton's interpreter")
    @pytest.mark.parametrize("width", [64, 128])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_fused(self, width, reduction):
        assert self.counted(width, "fused", reduction=reduction) == (0, 4)

    @pytest.mark.parametrize("width", [64, 128, 256, 512, 768])
    def test_symmetric(self, width, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        assert self.counted(width, "chunked", symmetric=True) == (4, 0)

    @pytest.mark.parametrize("bound", ["dv", "js", "interpolate"])
    def test_bounds(self, bound, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        assert self.counted(256, "chunked", bound=bound) == (4, 0)

    @pytest.mark.parametrize("width", [129, 768])
    def test_wide_embeddings_are_refused_where_products_would_be_repeated(self, width):
        with pytest.raises(ConfigError, match="dispatch of infonce: found fused for"):
            self.counted(width, "fused")

    @pytest.mark.parametrize("reduction, products", [("mean", 3), ("none", 4)])
    def test_split(self, reduction, products, monkeypatch):
        """Six products of bf16 for one of fp32."""
        monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
        assert self.counted(96, "chunked", reduction=reduction) == (6 * products, 0)

    @staticmethod
    def counted(width: int, algorithm: str, bound: str | None = None, **options) -> tuple[float, float]:
        """Products of q, k and the scores' gradient by the library, and in kernels, in units of rows * rows * width."""
        rows = 192  # whole tiles
        q, k = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
        found = {"library": 0, "kernels": 0}
        bmm, baddbmm, dot = torch.bmm, torch.baddbmm, InterpreterBuilder.create_dot

        def count(a, b, out):
            found["library"] += out.shape[0] * out.shape[1] * out.shape[2] * a.shape[2]

        def counting_bmm(a, b, *rest, out):
            count(a, b, out)
            return bmm(a, b, *rest, out=out)

        def counting_baddbmm(c, a, b, *rest, out):
            count(a, b, out)
            return baddbmm(c, a, b, *rest, out=out)

        def counting_dot(builder, a, b, *rest):
            found["kernels"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(builder, a, b, *rest)

        with (
            mock.patch.object(torch, "bmm", counting_bmm), mock.patch.object(torch, "baddbmm", counting_baddbmm),
            mock.patch.object(InterpreterBuilder, "create_dot", counting_dot),
            dispatch.use(infonce=algorithm, mi_bound=algorithm),
        ):  # fmt: skip
            if bound is None:
                infonce(q, k, **options).sum().backward()
            else:
                mi_lower_bound(q, k, bound=bound).backward()
        return tuple(n / (rows * rows * width) for n in found.values())


class Launches(TorchDispatchMode):
    """Counts Triton launches, which compute nothing in the interpreter, and aten operations that compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        # bmm of 16 bits is one launch on a GPU; here its operands are widened before
        self.count += not (views or name.startswith(("empty", "new_empty", "_to_copy", "detach")))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.noticing = device.launches_noticed(self.one, compute=False)
        self.noticing.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        self.noticing.__exit__(*exception)
        return super().__exit__(*exception)

    def one(self):
        self.count += 1


@pytest.mark.parametrize("name", ["infonce", "symmetric", "bound", "contrastive"])
def test_more_groups_than_a_launch_takes_are_computed_by_torch(monkeypatch, name):
    monkeypatch.setattr(dispatch, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(dispatch, "_chosen", {})
    functions = {
        "infonce": infonce,
        "symmetric": lambda q, k: infonce(q, k, symmetric=True),
        "bound": lambda q, k: mi_lower_bound(q, k, bound="nwj"),
        "contrastive": lambda q, k: infonce(q, k, labels=torch.arange(9) % 3),
    }
    for groups in (2, 3):
        q, k = torch.randn(groups, 9, 8), torch.randn(groups, 9, 8)
        launches = []
        with device.launches_noticed(lambda launches=launches: launches.append(1)):
            found = evaluate(functions[name], {"q": q, "k": k}, "triton")
        assert bool(launches) == (groups == 2)
        expected = evaluate(functions[name], {"q": q, "k": k}, "reference")
        for ours, theirs in ((found.value, expected.value), (found.grads, expected.grads)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_launches_are_those_declared(precision, algorithm):
    dtype = dispatch.DTYPES[precision]
    q, k, rows = torch.randn(2, 130, 8).to(dtype), torch.randn(2, 130, 8).to(dtype), torch.randn(2, 130)
    scale, state, grad = torch.ones(()), torch.randn(4, 2, 130), torch.ones(2)
    pair, source = (q, k, scale), (q, k, scale, None, False)
    calls = {
        "mi_infonce": (*source, algorithm, "rows" if algorithm == "fused" else "both"),
        "mi_infonce_gradients": (*source, rows, state),
        "mi_infonce_keys": (*source, rows, state),
        "mi_symmetric_statistics": pair,
        "mi_statistics": (*source, "lse", 0.0),
        "mi_gradients": (*source, rows, rows, rows, rows, rows),
        "mi_mixture": (*pair, rows, 0.1),
        "mi_mixture_gradients": (*pair, rows, 0.1, rows, rows, grad),
    }
    for name, arguments in calls.items():
        with dispatch._tf32(precision == "tf32"):
            with Launches() as found:
                registry._operations[name].cuda(*arguments)
            assert found.count == registry.launches(name, *arguments), name


class TestSplit:
    """fp32 products as six of bf16: as close to fp64 as fp32 products are."""

    @pytest.fixture(autouse=True)
    def split(self, monkeypatch):
        monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
        with dispatch.use(infonce="chunked", mi_bound="chunked"):
            yield

    def test_parts_add_up(self):
        x = torch.randn(2, 5, 130, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 130)
        with Guards() as guards:
            parts = splitting.split(guards.input(x))
        high, middle, low = parts.double().split(130, 2)
        assert parts.dtype == torch.bfloat16
        assert ((high + middle + low - x.double()).abs() <= 2.0**-23 * x.abs()).all()
        assert (middle.abs() <= 2.0**-7 * high.abs()).all() and (low.abs() <= 2.0**-7 * middle.abs()).all()

    def test_fold_adds_all_pieces(self):
        pieces = [torch.randn(2, 21, n * 9, generator=torch.Generator().manual_seed(n)) for n in (3, 2, 1)]
        whole = torch.full((2, 50, 9), math.nan)
        with Guards() as guards:
            splitting.fold([guards.input(p) for p in pieces], whole[:, 20:41])
        expected = sum(p.unflatten(2, (-1, 9)).sum(2) for p in pieces)
        torch.testing.assert_close(whole[:, 20:41], expected)
        assert whole[:, :20].isnan().all() and whole[:, 41:].isnan().all()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", INFONCE)
    def test_infonce(self, name, reduction, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        test_infonce(name, reduction, "chunked")

    @pytest.mark.parametrize("bound", BOUNDS)
    def test_bounds(self, bound, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
        check_bound(bound, True)

    def test_launches_are_those_declared(self):
        test_launches_are_those_declared("fp32", "chunked")

    def test_memory_is_that_of_the_plan(self, monkeypatch):
        monkeypatch.setattr(plan, "CHUNK_BYTES", 1 << 20)
        q = torch.randn(1, 1500, 8)
        assert plan.gradient_bytes(q, q) == 6
        rows = plan.chunk_rows(1, 1500, 1500, 6)
        assert rows < 1500 and rows * 1500 * 10 <= max(1 << 20, plan.LEAST_ROWS * 15000)

    def test_small_ones_and_other_precisions_are_not_split(self, monkeypatch):
        q = torch.randn(1, 64, 8)
        assert plan.is_split(q, q) and not plan.is_split(q.bfloat16(), q.bfloat16())
        with dispatch._tf32(True):
            assert not plan.is_split(q, q)
        monkeypatch.setattr(plan, "LEAST_SPLIT", 64 * 64 * 8 + 1)
        assert not plan.is_split(q, q)


def test_memory_of_chunks_is_bounded(monkeypatch):
    """No tensor is larger than a chunk, or than the embeddings."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1 << 20)
    sizes = []
    empty = torch.empty

    def watched(*args, **kwargs):
        out = empty(*args, **kwargs)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", watched)
    q, scale = torch.randn(1, 1500, 8), torch.ones(())
    chunked.infonce(q, q, scale, None, False, "both")
    chunked.gradients(q.bfloat16(), q.bfloat16(), scale, None, False, *[torch.zeros(1, 1500)] * 4, torch.zeros(1, 1500))
    assert max(sizes) <= 1 << 20  # the scores would be 8.6 MiB


@pytest.mark.parametrize("begin", [0, 3])
def test_chunks_know_their_place(begin):
    """A chunk of a matrix gives the rows of the whole one."""
    scores = bound_inputs(1, 40, 4, False)["scores"].float()
    joint, rest = cpu.score_statistics(scores, "lse", 0.0)
    found = [torch.full((1, 40), math.nan) for _ in range(2)]
    score_kernels.rows(scores[:, begin : begin + 9].contiguous(), None, None, False, "lse", 0.0, begin, *found)
    for mine, theirs in zip(found, (joint, rest), strict=True):
        torch.testing.assert_close(mine[:, begin : begin + 9], theirs[:, begin : begin + 9])
        assert mine.isnan().sum() == 31


class TestGuards:
    """The guards find what they are for."""

    def test_a_load_past_the_end_poisons(self):
        with Guards() as guards:
            x = guards.input(torch.ones(3))
            assert x.as_strided((4,), (1,)).isnan()[3] and x.as_strided((1,), (1,), BAND - 1).isnan()

    def test_gaps_between_rows_are_poisoned(self):
        with Guards() as guards:
            x = guards.input(torch.ones(3, 4)[:, :2])
            assert x.as_strided((3, 4), (4, 1), BAND)[:2, 2:].isnan().all() and torch.equal(x, torch.ones(3, 2))

    def test_what_is_not_written_is_nan(self):
        with Guards():
            assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2, 2)).isnan().all()
            assert torch.ones(1).new_empty(2, 3).isnan().all()

    def test_a_store_past_the_end_is_found(self):
        with pytest.raises(AssertionError, match="past the end of an allocation"), Guards():
            torch.empty(3).as_strided((4,), (1,), BAND)[3] = 0.0

    def test_a_store_before_the_start_is_found(self):
        with pytest.raises(AssertionError, match="before an allocation"), Guards():
            torch.empty(3).as_strided((1,), (1,), BAND - 1)[0] = 0.0

    def test_a_changed_input_is_found(self):
        with pytest.raises(AssertionError, match="an input"), Guards() as guards:
            guards.input(torch.ones(3))[1] = 2.0

    def test_torch_is_as_before_afterwards(self):
        before = torch.empty, torch.empty_like, torch.Tensor.new_empty
        with pytest.raises(ValueError), Guards():
            raise ValueError
        assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before
