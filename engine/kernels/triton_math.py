"""Arithmetic that Triton kernels of several operations share."""

import triton
import triton.language as tl

from engine.kernels.dropout import reference as dropout

PIECE_BITS = tl.constexpr(dropout.PIECE.bit_length() - 1)
WITHIN = tl.constexpr(dropout.PIECE - 1)  # the bits of a place within its piece


@triton.jit
def round_tf32(x):
    """fp32 rounded to the nearest tf32 (10 bits of mantissa), ties away from zero, as `cvt.rna.tf32` does.

    `tl.dot(..., input_precision="tf32")` ignores the lower 13 bits of its operands. Without this rounding every operand
    is too small, and sums of products are biased. Infinities and NaN stay what they are.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def at_most(x, most):
    """x, or `most` where x is larger. NaN stays NaN, which `tl.minimum` alone would hide."""
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def share_of_sum(score, log_sum):
    """e^(score - log_sum), what one score contributes to a sum of exponentials whose logarithm is log_sum; 1 at most.

    A score that is computed again is rounded otherwise. Near 1e8, where neighbours in fp32 are 8 apart, it can be 8 or
    16 above a log-sum-exp that it is part of. The score is limited, not the difference: no compiler then takes the
    difference of a product that is not rounded as it was before.
    """
    return tl.exp(at_most(score, log_sum) - log_sum)


@triton.jit
def mixed(h):
    """As `engine.kernels.dropout.reference.mixed`, on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def drop_out(v, first, offset, seed, number, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """v * SCALE at the places `first + offset` that `dropout.keep` keeps, else 0; v itself if THRESHOLD is 0.

    first is int64 and may be few numbers; offset is int32, less than a piece, so that two keys serve each of them.
    """
    if THRESHOLD == 0:
        kept = v
    else:  # not after an early return: what follows one is compiled all the same, and there may be no seed
        drawn = tl.load(seed) + number
        low, high = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
        piece = (first >> PIECE_BITS).to(tl.uint32)
        key = mixed(low ^ mixed(high ^ mixed(piece)))
        next_key = mixed(low ^ mixed(high ^ mixed(piece + 1)))
        place = (first & WITHIN).to(tl.int32) + offset
        draw = (place & WITHIN).to(tl.uint32) + tl.where(place > WITHIN, next_key, key)
        draw = mixed(mixed(draw) ^ high)
        kept = tl.where(draw >= THRESHOLD, v * SCALE, 0.0)
    return kept
