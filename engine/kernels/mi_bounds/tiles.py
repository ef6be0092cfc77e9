"""What the kernels over embeddings (triton.py) and over stored scores (scores.py) share."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.mi_bounds.reference import MOST_OF_ONE
from engine.kernels.triton_math import at_most

_MOST_OF_ONE = tl.constexpr(MOST_OF_ONE)
LSE, CLIPPED, SOFTPLUS = 0, 1, 2
KINDS = {"lse": LSE, "clipped": CLIPPED, "softplus": SOFTPLUS}

# A GPU computes 2^x, not e^x: log2(e) is folded into the scale of the embeddings' scores.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def finite(x):
    """0 for -inf, so that differences with it are defined."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def logaddexp(a, b):
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return high + tl.log(1.0 + tl.exp(low - finite(high)))


@triton.jit
def push(high, total, scores, AXIS: tl.constexpr):
    """Merge a tile of scores into running (maximum, sum of e^(S - maximum)) along an axis; -inf counts for nothing."""
    new = tl.maximum(high, tl.max(scores, AXIS))
    base = finite(new)
    total = total * tl.exp(high - base) + tl.sum(tl.exp(scores - tl.expand_dims(base, AXIS)), AXIS)
    return new, total


@triton.jit
def infonce_row(joint, rest):
    """Loss of a row, log-sum-exp of all its scores, and 1 - the probability of its positive."""
    return softplus(rest - joint), logaddexp(rest, joint), sigmoid(rest - joint)


@triton.jit
def push_largest(top, arg, high, total, scores, column):
    """Merge a tile into the largest score of each row, its column, and the (maximum, sum) of all the others."""
    tile_top = tl.max(scores, 1)
    is_top = scores == tile_top[:, None]
    # the first of equal ones, and only that one
    tile_arg = tl.min(tl.where(is_top, column[None, :], 2147483647), 1)
    others = tl.where(column[None, :] == tile_arg[:, None], float("-inf"), scores)
    loser = tl.minimum(top, tile_top)
    new = tl.maximum(tl.maximum(high, loser), tl.max(others, 1))
    base = finite(new)
    total = total * tl.exp(high - base) + tl.exp(loser - base) + tl.sum(tl.exp(others - base[:, None]), 1)
    arg = tl.where(tile_top > top, tile_arg, arg)
    return tl.maximum(top, tile_top), arg, new, total


@triton.jit
def leave_one_out(scores, column, total, arg, rest):
    """LSE of each row without the column, from the row's LSE, its largest column and the LSE of all others."""
    share = at_most(tl.exp(scores - finite(total)), _MOST_OF_ONE)
    is_largest = column == arg
    return tl.where(is_largest, rest, total + tl.log(1.0 - tl.where(is_largest, 0.0, share)))
