"""The transformer layer's kernels in Triton's interpreter: the formula's numbers, within the memory that is theirs."""

import pytest
import torch

from tests.interpret.device import launches_noticed, on_gpu
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.registry import use_backend
from engine.kernels.transformer import add_norm, attention, bias_gelu, cpu, embed_norm, parts_of, plan
from engine.kernels.transformer import op as operation
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
    monkeypatch.setattr(plan, "PROGRAMS", 3)
    monkeypatch.setattr(plan, "GELU_PROGRAMS", 2)


def assert_parts(found, sums):
    """Parts add up to the sums of the CPU's host function, of which all but the first part are 0."""
    assert found.shape == sums.shape
    torch.testing.assert_close(found.sum(0), sums.sum(0), rtol=1e-4, atol=1e-4)


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
        back = cpu.add_norm_backward(*slopes, *rest, *settings, both, False)
        with Guards() as guards:
            found = kernels.add_norm(*guarded(guards, tensors), *settings, low if both else None)
            found_back = kernels.add_norm_backward(*guarded(guards, slopes + rest), *settings, both, False)
        assert_close(found, expected)
        assert_close(found_back, back)
    with Guards() as guards:
        *_, parts = kernels.add_norm_backward(*guarded(guards, slopes + rest), *settings, True, True)
    assert_parts(parts, cpu.add_norm_backward(*slopes, *rest, *settings, True, True)[2])


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("n, c", [(1, 8), (5, 7), (33, 24), (70, 130)])
def test_bias_gelu(n, c, low):
    x, bias, grad = draw(n, c, dtype=low), draw(c, seed=1, dtype=torch.float32), draw(n, c, seed=2, dtype=low)
    for parameters in (True, False):
        with Guards() as guards:
            given = guarded(guards, (grad, x, bias))
            found = (kernels.bias_gelu(*given[1:]), *kernels.bias_gelu_backward(*given, parameters, False))
        assert_close(found, (cpu.bias_gelu(x, bias), *cpu.bias_gelu_backward(grad, x, bias, parameters, False)))
    with Guards() as guards:
        _, parts = kernels.bias_gelu_backward(*guarded(guards, (grad, x, bias)), True, True)
    assert_parts(parts, cpu.bias_gelu_backward(grad, x, bias, True, True)[1])


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
            found += kernels.attention_backward(guards.input(grad), *given, *settings, parameters, False)
        expected = (cpu.attention(*tensors, mask, seed, *settings),)
        expected += cpu.attention_backward(grad, *tensors, mask, seed, *settings, parameters, False)
        assert_close(found, expected, 2)


def test_attention_by_a_mask_of_integers_and_its_parts():
    tensors = [t.detach() for t in attention_case(2, 17, 3, 20, torch.float16, torch.float32).values()]
    mask = key_mask(2, 17, torch.float32)
    seen, grad, settings = (mask == 0).long() * 2, draw(34, 60, seed=8, dtype=torch.float16), (0.3, 3, 11)
    with Guards() as guards:
        given = guarded(guards, (*tensors, seen, make_seed()))
        found = kernels.attention(*given, *settings)
        dqkv, parts = kernels.attention_backward(guards.input(grad), *given, *settings, True, True)
    assert_close((found,), (cpu.attention(*tensors, mask, make_seed(), *settings),), 2)
    expected, sums = cpu.attention_backward(grad, *tensors, mask, make_seed(), *settings, True, True)
    assert_close((dqkv,), (expected,), 2)
    assert parts.shape == sums.shape
    torch.testing.assert_close(parts.sum(0), sums.sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("count, rows, shape", [(1, 1, (3, 5)), (3, 70, (3, 100)), (16, 4, (1, 7)), (19, 33, (1, 64))])
def test_sums_of_parts(count, rows, shape):
    parts = [draw(rows, *shape, seed=i, dtype=torch.float32) for i in range(count)]
    with Guards() as guards:
        first, *others = guarded(guards, parts)
        found = kernels.sum_parts(first, others)
    torch.testing.assert_close(found, torch.stack([part.double().sum(0).float() for part in parts]))


@pytest.mark.parametrize("batch, length, c, packed", [(1, 1, 8, False), (4, 9, 70, False), (9, 37, 24, True)])
def test_embeddings(batch, length, c, packed):
    """Tokens that repeat often, one without a gradient; positions beyond the texts', and a second type."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 7, (batch, length), generator=generator)
    position = torch.randint(0, length, (batch, length), generator=generator) if packed else None
    sizes = (9, length + 3, 2)
    tables = [draw(size, c, seed=i, dtype=torch.float32) for i, size in enumerate(sizes)]
    grad, parts = draw(batch * length, c, seed=5, dtype=torch.float32), draw(40, 3, c, seed=6, dtype=torch.float32)
    for padding in (-1, 3):
        with Guards() as guards:
            given = guarded(guards, (ids, position))
            found = (kernels.embed(*given, *guarded(guards, tables)),)
            found += kernels.embed_backward(guards.input(grad), *given, guards.input(parts), *sizes, padding)
        expected = (cpu.embed(ids, position, *tables), *cpu.embed_backward(grad, ids, position, parts, *sizes, padding))
        assert torch.equal(found[0], expected[0])
        assert_close(found[1:], expected[1:], 5)


def test_a_token_without_an_embedding_gives_nan_and_writes_nowhere():
    ids, sizes = torch.tensor([[1, 5, -1, 2]]), (5, 6, 2)
    tables = [draw(size, 8, seed=i, dtype=torch.float32) for i, size in enumerate(sizes)]
    grad, parts = draw(4, 8, dtype=torch.float32), draw(1, 3, 8, seed=6, dtype=torch.float32)
    with Guards() as guards:
        given = guards.input(ids), None
        x = kernels.embed(*given, *guarded(guards, tables))
        of_words, *_ = kernels.embed_backward(guards.input(grad), *given, guards.input(parts), *sizes, -1)
    assert x.isnan().all(1).tolist() == [False, True, True, False] and x[[0, 3]].isfinite().all()
    assert torch.equal(of_words[[1, 2]], grad[[0, 3]]) and not of_words[[0, 3, 4]].any()


def test_embeddings_through_the_operation():
    runs = []
    ids = torch.tensor([[7, 3, 3, 0], [7, 5, 0, 0], [3, 3, 9, 1]])
    for backend in ("triton", "cpu"):
        tables = [draw(size, 8, seed=size, dtype=torch.float32) for size in (11, 6, 2)]
        leaves = [t.requires_grad_() for t in (*tables, torch.ones(8), torch.zeros(8))]
        with use_backend(backend):
            put_off = [(plan.norm_programs(12, 8), (*leaves[3:], None))]
            place = parts_of(put_off)[0] if backend == "triton" else None
            settings = {"seed": make_seed(), "p": 0.3, "padding": 0, "low": torch.float16, "parts": place}
            y, low = embed_norm(ids, None, leaves[:3], *leaves[3:], **settings)
            slope = draw(12, 8, seed=4, dtype=torch.float32)
            runs.append([y, low, *torch.autograd.grad((y * slope).sum() + low.float().square().sum(), leaves)])
    assert_close(*runs, 3)


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


def test_attention_of_more_texts_than_a_launch_takes_runs_by_formula(monkeypatch):
    monkeypatch.setattr(operation, "MOST_PROGRAMS", 2)
    for texts, kernel in ((2, 1), (3, 0)):
        tensors = {k: t.detach() for k, t in attention_case(texts, 5, 2, 4, torch.float16, torch.float32).items()}
        mask = key_mask(texts, 5, torch.float32)
        count = []
        with launches_noticed(lambda count=count: count.append(1)):
            found = attention(**tensors, mask=mask, heads=2)
        assert len(count) == kernel
        with use_backend("cpu"):
            assert_close((found,), (attention(**tensors, mask=mask, heads=2),), 2)


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
