"""The operation on a GPU: a program holds some columns of one sequence and goes through its places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dropout import reference as dropout
from engine.kernels.stacked.cpu import TYPES
from engine.kernels.triton_math import drop_out

ROWS = 32  # places at a time
COLUMNS = 64


def _blocks(d: int) -> dict[str, int]:
    return {"ROWS": ROWS, "BLOCK": min(max(triton.next_power_of_2(d), 16), COLUMNS)}


def _settings(
    valid: Sequence[Tensor], fill: Sequence[bool], rates: Sequence[float], hidden: Sequence[float]
) -> dict[str, tuple]:
    """Constants: for each sequence whether it is filled, whether its lengths are given, and thresholds and scales."""
    return {
        "FILL": tuple(bool(f) for f in fill),
        "BY_LENGTH": tuple(v.dim() == 1 for v in valid),
        "DROPPED": tuple(dropout.threshold(p) for p in rates),
        "SCALE": tuple(1 / (1 - p) for p in rates),
        "HIDDEN": tuple(dropout.threshold(p) for p in hidden),
    }


def _padded(values: Sequence, count: int = 3) -> list:
    """As many arguments as the kernels have. What is past the last sequence is not read."""
    return [*values, *[values[0]] * (count - len(values))]


def stack_sequences(
    first: Tensor, others: Sequence[Tensor], valid: Sequence[Tensor], size: int, fill: Sequence[bool],
    rates: Sequence[float], hidden: Sequence[float], seed: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """As `cpu.stack_sequences`."""
    sequences, valid = [x.contiguous() for x in (first, *others)], [v.contiguous() for v in valid]
    (batch, _, d), kinds = first.shape, len(sequences)
    lengths = [x.shape[1] for x in sequences]
    cube = torch.empty((batch, size, kinds, d), dtype=torch.float32, device=first.device)
    means = [torch.empty((batch, d), dtype=torch.float32, device=first.device) for _ in sequences]
    if batch and d:
        blocks = _blocks(d)
        stack_kernel[(batch, triton.cdiv(d, blocks["BLOCK"]), kinds)](
            *_padded(sequences), *_padded(valid), *_padded(lengths), cube, *_padded(means), seed, size,
            max(size, *lengths), d, **_settings(valid, fill, rates, hidden), KINDS=kinds, **blocks,
        )  # fmt: skip
    return cube, means


def stack_sequences_backward(
    grad: Tensor, mean_grads: Sequence[Tensor], valid: Sequence[Tensor], lengths: Sequence[int], fill: Sequence[bool],
    rates: Sequence[float], hidden: Sequence[float], seed: Tensor | None, types: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """As `cpu.stack_sequences_backward`."""
    grad = grad.contiguous()
    mean_grads, valid = [g.contiguous() for g in mean_grads], [v.contiguous() for v in valid]
    batch, size, kinds, d = grad.shape
    gradients = [
        torch.empty((batch, n, d), dtype=TYPES[kind], device=grad.device)
        for n, kind in zip(lengths, types, strict=True)
    ]
    if batch and d:
        blocks = _blocks(d)
        stack_backward_kernel[(batch, triton.cdiv(d, blocks["BLOCK"]), kinds)](
            grad, *_padded(mean_grads), *_padded(valid), *_padded(gradients), *_padded(lengths), seed, size,
            max(size, *lengths), d, **_settings(valid, fill, rates, hidden), KINDS=kinds, **blocks,
        )  # fmt: skip
    return gradients


@triton.jit
def _valid(valid, sample, place, length, BY_LENGTH: tl.constexpr):
    """Whether places of a sample are valid, [places]."""
    if BY_LENGTH:
        ok = place < tl.load(valid + sample)
    else:
        ok = tl.load(valid + sample * length + place, mask=place < length, other=0) != 0
    return ok & (place < length)


@triton.jit
def _count(valid, sample, length, BY_LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """The number of a sample's valid places, at least 1."""
    if BY_LENGTH:
        count = tl.maximum(tl.minimum(tl.load(valid + sample), length), 1).to(tl.float32)
    else:
        found = tl.zeros([ROWS], tl.float32)
        for start in range(0, length, ROWS):
            found += _valid(valid, sample, start + tl.arange(0, ROWS), length, BY_LENGTH).to(tl.float32)
        count = tl.maximum(tl.sum(found, 0), 1.0)
    return count


@triton.jit
def _stack(
    x, valid, length, cube, mean, seed, size, wide, d, K: tl.constexpr, KINDS: tl.constexpr,
    FILL: tl.constexpr, BY_LENGTH: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < d
    count = _count(valid, sample, length, BY_LENGTH, ROWS)
    middle = tl.zeros([1, BLOCK], tl.float32)
    if FILL:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, length, ROWS):
            place = start + tl.arange(0, ROWS)
            ok = _valid(valid, sample, place, length, BY_LENGTH)[:, None] & inside
            total += tl.load(x + (sample * length + place)[:, None] * d + column, mask=ok, other=0.0).to(tl.float32)
        middle = (tl.sum(total, 0) / count)[None, :]
    shown = drop_out(tl.full([1, 1], 1.0, tl.float32), sample, 0, seed, KINDS + K, HIDDEN, 1.0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, tl.maximum(length, size), ROWS):
        place = start + tl.arange(0, ROWS)
        ok = _valid(valid, sample, place, length, BY_LENGTH)[:, None]
        source = x + (sample * length + place)[:, None] * d + column
        v = tl.load(source, mask=ok & inside, other=0.0).to(tl.float32)
        if FILL:
            v = tl.where(ok, v, middle)
        v = drop_out(v, ((sample * wide + place) * d)[:, None], column, seed, K, DROPPED, SCALE)
        total += tl.where(ok, v, 0.0)
        to = cube + ((sample * size + place)[:, None] * KINDS + K) * d + column
        tl.store(to, v * shown, mask=(place < size)[:, None] & inside)
    tl.store(mean + sample * d + column, (tl.sum(total, 0) / count)[None, :], mask=inside)


# Not specialised: every bucket of lengths would compile the kernel anew.
_SIZES = ["length0", "length1", "length2", "size", "wide"]


@triton.jit(do_not_specialize=_SIZES)
def stack_kernel(
    x0, x1, x2, valid0, valid1, valid2, length0, length1, length2, cube, mean0, mean1, mean2, seed,
    size, wide, d,
    FILL: tl.constexpr, BY_LENGTH: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, HIDDEN: tl.constexpr,
    KINDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence's part of the cube, and its mean. Grid: (samples, blocks of columns, sequences)."""
    x, valid, length = (x0, x1, x2), (valid0, valid1, valid2), (length0, length1, length2)
    mean = (mean0, mean1, mean2)
    for k in tl.static_range(KINDS):
        if tl.program_id(2) == k:
            _stack(
                x[k], valid[k], length[k], cube, mean[k], seed, size, wide, d, k, KINDS, FILL[k], BY_LENGTH[k],
                DROPPED[k], SCALE[k], HIDDEN[k], ROWS, BLOCK,
            )  # fmt: skip


@triton.jit
def _stack_backward(
    grad, mean_grad, valid, dx, length, seed, size, wide, d, K: tl.constexpr, KINDS: tl.constexpr,
    FILL: tl.constexpr, BY_LENGTH: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < d
    count = _count(valid, sample, length, BY_LENGTH, ROWS)
    shown = drop_out(tl.full([1, 1], 1.0, tl.float32), sample, 0, seed, KINDS + K, HIDDEN, 1.0)
    of_mean = tl.load(mean_grad + sample * d + column, mask=inside, other=0.0) / count
    spread = tl.zeros([1, BLOCK], tl.float32)
    if FILL:  # what the filled places give the mean
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, size, ROWS):
            place = start + tl.arange(0, ROWS)
            filled = (place < size) & (_valid(valid, sample, place, length, BY_LENGTH) == 0)
            source = grad + ((sample * size + place)[:, None] * KINDS + K) * d + column
            g = tl.load(source, mask=filled[:, None] & inside, other=0.0) * shown
            total += drop_out(g, ((sample * wide + place) * d)[:, None], column, seed, K, DROPPED, SCALE)
        spread = (tl.sum(total, 0) / count)[None, :]
    for start in range(0, length, ROWS):
        place = start + tl.arange(0, ROWS)
        ok = _valid(valid, sample, place, length, BY_LENGTH)[:, None]
        source = grad + ((sample * size + place)[:, None] * KINDS + K) * d + column
        g = tl.load(source, mask=ok & (place < size)[:, None] & inside, other=0.0) * shown + of_mean
        g = drop_out(g, ((sample * wide + place) * d)[:, None], column, seed, K, DROPPED, SCALE) + spread
        to = dx + (sample * length + place)[:, None] * d + column
        tl.store(to, tl.where(ok, g, 0.0).to(dx.dtype.element_ty), mask=(place < length)[:, None] & inside)


@triton.jit(do_not_specialize=_SIZES)
def stack_backward_kernel(
    grad, mean_grad0, mean_grad1, mean_grad2, valid0, valid1, valid2, dx0, dx1, dx2, length0, length1, length2, seed,
    size, wide, d,
    FILL: tl.constexpr, BY_LENGTH: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, HIDDEN: tl.constexpr,
    KINDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence. Grid: (samples, blocks of columns, sequences)."""
    valid, dx, length = (valid0, valid1, valid2), (dx0, dx1, dx2), (length0, length1, length2)
    mean_grad = (mean_grad0, mean_grad1, mean_grad2)
    for k in tl.static_range(KINDS):
        if tl.program_id(2) == k:
            _stack_backward(
                grad, mean_grad[k], valid[k], dx[k], length[k], seed, size, wide, d, k, KINDS, FILL[k],
                BY_LENGTH[k], DROPPED[k], SCALE[k], HIDDEN[k], ROWS, BLOCK,
            )  # fmt: skip
