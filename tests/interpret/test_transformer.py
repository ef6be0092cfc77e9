"""The transformer layer's kernels in Triton's interpreter: the formula's numbers, within the memory that is theirs."""

import pytest
import torch

from tests.interpret.device import on_gpu
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.registry import use_backend
from engine.kernels.transformer import add_norm, attention, bias_gelu, cpu
from engine.kernels.transformer import triton as kernels
from tests.kernels.test_transformer_op import attend, attention_case, case, draw, key_mask, norm, results
from tests.kernels.test_transformer_op import seed as make_seed

# one row, a few, more than one tile of a program, and rows past the programs' first round
SHAPES = [(1, 8), (5, 7), (33, 24), (130, 100), (3, 1030)]
PARTS = [(True, True), (False, True), (True, False), (False, False)]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def arguments(n, c, parts, low, p, after):
    """Of add_norm's host functions: x to the number."""
    tensors = {k: t.detach() for k, t in case(n, c, *parts, low=low, full=torch.float32).items()}
    x, weight, shift, bias, residual = (tensors.get(k) for k in ("x", "weight", "shift", "bias", "residual"))
    seed = make_seed() if p else None
    return (x, bias, residual, weight, shift, seed), (p, after, 1e-12, 7)


def guarded(guards, tensors):
    return tuple(None if t is None else guards.input(t) for t in tensors)


def assert_close(found, expected, factor=1):
    """Each by its type's rounding; `factor`: where numbers are rounded on the way, and sums are of such."""
    kinds = {f.dtype for f in found} - {torch.float32}
    for f, e in zip(found, expected, strict=True):
        assert (f.dtype, f.shape) == (e.dtype, e.shape)
        dtype = kinds.copy().pop() if factor > 1 and kinds else f.dtype
        limit = factor * {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(f, e, rtol=limit, atol=limit)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that a program goes more than one round."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "GELU_PROGRAMS", 2)


@pytest.mark.parametrize("p, after", [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n, c", SHAPES)
def test_add_norm(n, c, parts, p, after):
    low = LOW[(n + c) % 3]
    tensors, settings = arguments(n, c, parts, low, p, after)
    given = draw(n, c, seed=5, dtype=torch.float32), draw(n, c, seed=6, dtype=low)
    for both in (True, False):
        expected = cpu.add_norm(*tensors, *settings, low if both else None)
        slopes = given if both else (given[0], None)
        x, bias, residual, weight, _, seed = tensors
        rest = (x, bias, residual, weight, seed)
        back = cpu.add_norm_backward(*slopes, *rest, *settings, both)
        with Guards() as guards:
            found = kernels.add_norm(*guarded(guards, tensors), *settings, low if both else None)
            found_back = kernels.add_norm_backward(*guarded(guards, slopes + rest), *settings, both)
        assert_close(found, expected)
        assert_close(found_back, back)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("n, c", [(1, 8), (5, 7), (33, 24), (70, 130)])
def test_bias_gelu(n, c, low):
    x, bias, grad = draw(n, c, dtype=low), draw(c, seed=1, dtype=torch.float32), draw(n, c, seed=2, dtype=low)
    for parameters in (True, False):
        with Guards() as guards:
            given = guarded(guards, (grad, x, bias))
            found = (kernels.bias_gelu(*given[1:]), *kernels.bias_gelu_backward(*given, parameters))
        assert_close(found, (cpu.bias_gelu(x, bias), *cpu.bias_gelu_backward(grad, x, bias, parameters)))


# float32 is for the interpreter alone: `attention_fits` gives the kernel 16 bits only
@pytest.mark.parametrize("low", LOW[1:] if on_gpu() else LOW)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "batch, length, heads, d, rows",
    [(1, 1, 1, 1, 1), (3, 5, 2, 4, 1), (2, 17, 3, 20, 17), (2, 40, 2, 32, 1), (1, 64, 1, 64, 64)],
)
def test_attention(batch, length, heads, d, rows, p, low):
    tensors = [t.detach() for t in attention_case(batch, length, heads, d, low, torch.float32).values()]
    mask = key_mask(batch, length, low, rows)
    # rows of another stride than their length, as `score_bias` makes them
    mask = torch.cat([mask, mask], -1)[..., :length]
    seed = make_seed() if p else None
    grad = draw(batch * length, heads * d, seed=8, dtype=low)
    settings = (p, heads, 11)
    for parameters in (True, False):
        with Guards() as guards:
            given = guarded(guards, (*tensors, mask, seed))
            found = (kernels.attention(*given, *settings),)
            found += kernels.attention_backward(guards.input(grad), *given, *settings, parameters)
        expected = (cpu.attention(*tensors, mask, seed, *settings),)
        expected += cpu.attention_backward(grad, *tensors, mask, seed, *settings, parameters)
        assert_close(found, expected, 2)


def test_attention_through_the_operation():
    runs = []
    for backend in ("triton", "cpu"):
        tensors = attention_case(3, 5, 2, 16, torch.float16, torch.float32)
        with use_backend(backend):
            runs.append(results(tensors, attend(key_mask(dtype=torch.float16), p=0.3)))
    assert_close(*runs, 2)


def test_attention_of_longer_texts_runs_by_formula():
    tensors = {k: t.detach() for k, t in attention_case(2, 65, 2, 4, torch.float16, torch.float32).items()}
    mask = key_mask(2, 65, torch.float32)
    with use_backend("cpu"):
        expected = attention(**tensors, mask=mask, heads=2)
    torch.testing.assert_close(attention(**tensors, mask=mask, heads=2), expected)


def test_the_mask_is_the_cpus_bit_for_bit():
    x, one, zero = draw(300, 64, dtype=torch.float32), torch.ones(64), torch.zeros(64)
    for seed in (torch.tensor([0]), torch.tensor([2**63 - 2]), torch.tensor([2**40 + 5])):
        masks = []
        for backend in ("triton", "cpu"):
            with use_backend(backend):
                masks.append(add_norm(x, one, zero, seed=seed, p=0.3, after=True, number=13)[0] == 0)
        assert torch.equal(*masks) and 0.25 < masks[0].float().mean() < 0.35


@pytest.mark.parametrize("p, after", [(0.3, False), (0.3, True)])
def test_through_the_operation(p, after):
    runs = []
    for backend in ("triton", "cpu"):
        tensors = case(9, 20, low=torch.float32, full=torch.float32)
        with use_backend(backend):
            found = results(tensors, norm(p=p, after=after, low=torch.float16))
            found += results(
                {"x": tensors["x"], "bias": tensors["bias"]}, lambda x, bias: [bias_gelu(x, bias)]
            )  # fmt: skip
        runs.append(found)
    assert_close(*runs)


def test_wider_than_a_program_and_fp64_run_by_formula(monkeypatch):
    monkeypatch.setattr("engine.kernels.transformer.op.WIDEST", 4)
    with use_backend("cpu"):
        expected = results(case(), norm(p=0.3))
    for f, e in zip(results(case(), norm(p=0.3)), expected, strict=True):
        torch.testing.assert_close(f, e)
