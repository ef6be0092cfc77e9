"""Padding against its formula: every backend bitwise, registration, bad input."""

import numpy as np
import pytest
import torch

from engine.kernels.ragged import Source, cpu, pad, pad_batches, reference
from engine.kernels.registry import use_backend
from tests.kernels.compiled import needs_compiler

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.float16, torch.int32)


def ragged(lengths, d=None, dtype=torch.float32, seed=0):
    """values and offsets of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor(lengths).cumsum(0)
    shape = (int(offsets[-1]),) if d is None else (int(offsets[-1]), d)
    if dtype == torch.int32:
        return torch.randint(1, 30000, shape, generator=generator, dtype=dtype), offsets
    return torch.randn(shape, generator=generator).to(dtype), offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [None, 1, 5, 74])
@pytest.mark.parametrize("width", [1, 3, 7, 20])
def test_equals_the_formula(dtype, d, width):
    values, offsets = ragged([3, 1, 0, 7, 20, 5], d, dtype)
    rows = torch.tensor([4, 0, 2, 2, 5, 3, 1])
    found = pad(values, offsets, rows, width, fill=0)
    expected = reference.pad(values, offsets, rows, width, 0, -1)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert found[0].dtype == (torch.int64 if dtype == torch.int32 else torch.float32)
    for i, row in enumerate(rows.tolist()):
        n = min(width, int(offsets[row + 1] - offsets[row]))
        assert int(found[1][i]) == n
        assert torch.equal(found[0][i, :n].to(dtype), values[offsets[row] : offsets[row] + n])
        assert not found[0][i, n:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_a_large_batch(dtype):
    values, offsets = ragged([i % 60 for i in range(50)], 74, dtype)
    rows = torch.arange(50).flip(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = pad(values, offsets, rows, 59)
    finally:
        torch.set_num_threads(threads)
    assert found[0].numel() > 1 << 16
    for a, b in zip(found, reference.pad(values, offsets, rows, 59, 0, -1), strict=True):
        assert torch.equal(a, b)


def test_cut_texts_keep_their_closing_token():
    values, offsets = ragged([4, 2, 3], None, torch.int32)
    with use_backend("reference"):
        expected = pad(values, offsets, torch.arange(3), 3, fill=9, closing=102)
    found = pad(values, offsets, torch.arange(3), 3, fill=9, closing=102)
    assert torch.equal(found[0], expected[0])
    assert found[0].tolist() == [[*values[:2].tolist(), 102], [*values[4:6].tolist(), 9], values[6:].tolist()]


def test_every_half():
    """All 65536 numbers of 16 bits: subnormals, infinities and NaN too."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    found, _ = pad(values, torch.tensor([0, len(values)]), torch.tensor([0]), len(values))
    expected = values.float()
    assert torch.equal(found[0].isnan(), expected.isnan())
    assert torch.equal(found[0].nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batches_of_several_arrays_equal_one_call_each(backend):
    lengths = [3, 1, 0, 7, 9, 5]
    (audio, offsets), (tokens, _), (halves, _) = (
        ragged(lengths, d, dtype) for d, dtype in ((5, torch.float32), (None, torch.int32), (3, torch.float16))
    )
    sources = [Source(audio, offsets), Source(halves, offsets), Source(tokens, offsets, 9, 102, most=4)]
    sources.append(Source(None, offsets, most=4))
    rows, sizes = torch.tensor([4, 0, 2, 5, 3, 1, 1, 4, 0]), [2, 3, 1, 2, 1]
    widths = [[9, 8, 4, 4], [7, 7, 6, 6], [1, 2, 1, 1], [9, 9, 3, 3], [3, 3, 4, 4]]
    with use_backend(backend):
        found = list(pad_batches(sources, rows, sizes, widths))
    assert len(found) == len(sizes)
    for batch, part, (wide, narrow, text, _) in zip(found, rows.split(sizes), widths, strict=True):
        assert torch.equal(batch[0], reference.pad(audio, offsets, part, wide, 0, -1)[0])
        assert torch.equal(batch[1], reference.pad(halves, offsets, part, narrow, 0, -1)[0])
        expected, length = reference.pad(tokens, offsets, part, min(text, 4), 9, 102)
        assert torch.equal(batch[2][:, :4], expected) and (batch[2][:, 4:] == 9).all()
        assert batch[3].dtype == torch.int64 and torch.equal(batch[3].sum(1), length)
        assert torch.equal(batch[3], (torch.arange(text) < length[:, None]).long())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("clip", [np.inf, 1.0])
def test_batches_are_scaled_as_numpy_scales(backend, dtype, clip):
    values, offsets = ragged([3, 1, 0, 7], 13, dtype)
    values[2] = 0  # a frame of zeros inside stays one
    shift, factor = (v.double() for v in torch.randn(2, 13, generator=torch.Generator().manual_seed(1)))
    raw = values.float().numpy()
    expected = np.clip((raw.astype(np.float64) - shift.numpy()) * factor.numpy(), -clip, clip).astype(np.float32)
    expected[2] = 0
    rows = torch.tensor([3, 0, 2])
    with use_backend(backend):
        ((found,),) = pad_batches([Source(values, offsets, scale=(shift, factor, clip))], rows, [3], [[5]])
    assert torch.equal(found, reference.pad(torch.from_numpy(expected), offsets, rows, 5, 0, -1)[0])


def test_batches_refuse_rows_out_of_range():
    values, offsets = ragged([3, 2], 2)
    with pytest.raises(ValueError, match="rows from 0 to 2 of 2 sequences"):
        next(pad_batches([Source(values, offsets)], torch.tensor([0, 2]), [2], [[3]]))


def test_no_rows():
    values, offsets = ragged([3], 2)
    out, lengths = pad(values, offsets, torch.zeros(0, dtype=torch.int64), 4)
    assert out.shape == (0, 4, 2) and lengths.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [None, 0, 3])
def test_sequences_that_are_all_empty(dtype, d):
    """Values of no numbers were taken for none, and integers of 8 bytes were written into a batch of 4-byte floats."""
    values, offsets = ragged([0] * 5, d, dtype)
    for _ in range(20):
        found = pad(values, offsets, torch.arange(5), 6, fill=-2)
        expected = reference.pad(values, offsets, torch.arange(5), 6, -2, -1)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "offsets, found",
    [
        ([0, 3, 5], "from 0 to 5 of 4 values"),
        ([0, 3, 2], "from 0 to 2 of 4 values"),
        ([-1, 3, 4], "from -1 to 4 of 4 values"),
        ([0, 9, 4], "from 0 to 4 of 4 values"),
    ],
)
def test_offsets_that_leave_the_values_are_refused(offsets, found):
    values, rows = torch.randn(4, 2), torch.arange(2)
    with pytest.raises(ValueError, match=found):
        pad(values, torch.tensor(offsets), rows, 3)
    with pytest.raises(ValueError, match=found):
        next(pad_batches([Source(values, torch.tensor(offsets))], rows, [2], [[3]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    values, offsets = ragged([3, 1, 4], None if dtype == torch.int32 else 3, dtype)
    rows = torch.tensor([2, 0])
    torch.library.opcheck(torch.ops.engine.ragged_pad.default, (values, offsets, rows, 3, 0, -1))


def test_compiles_whole():
    values, offsets = ragged([3, 1, 4], 3)
    rows = torch.tensor([2, 0])
    compiled = torch.compile(lambda r: pad(values, offsets, r, 4)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), pad(values, offsets, rows, 4)[0] * 2)


def test_bad_input():
    values, offsets = ragged([3, 1], 2)
    rows = torch.tensor([0])
    for wrong, found in (
        ((values.double(), offsets, rows, 2), "values of dtype torch.float64"),
        ((values[None], offsets, rows, 2), r"and shape \[1, 4, 2\]"),
        ((values, offsets.int(), rows, 2), "must be int64 vectors"),
        ((values, offsets, rows, 0), "width at least 1"),
        ((values, offsets, torch.tensor([2]), 2), "rows from 2 to 2 of 2 sequences"),
        ((values, offsets, torch.tensor([-1]), 2), "rows from -1 to -1 of 2 sequences"),
    ):
        with pytest.raises(ValueError, match=found):
            pad(*wrong)
    with pytest.raises(ValueError, match=r"values of dtype torch.float32 and shape \[4, 2\]"):
        pad(values, offsets, rows, 2, closing=3)
    scale = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="padded with 0, not with 1"):
        Source(values, offsets, fill=1, scale=scale)


@pytest.mark.parametrize("clip", [np.inf, 1.0])
def test_scale_is_numpys(clip):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 7)).astype(np.float32)
    values[3] = 0
    shift, factor = rng.normal(size=7), rng.normal(size=7)
    found = cpu.scale(values, shift, factor, clip)
    expected = np.clip((values.astype(np.float64) - shift) * factor, -clip, clip).astype(np.float32)
    expected[3] = 0
    assert np.array_equal(found, expected)
