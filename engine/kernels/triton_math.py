"""Arithmetic that Triton kernels of several operations share."""

import triton
import triton.language as tl


@triton.jit
def round_tf32(x):
    """fp32 rounded to the nearest tf32 (10 bits of mantissa), ties away from zero, as `cvt.rna.tf32` does.

    `tl.dot(..., input_precision="tf32")` ignores the lower 13 bits of its operands. Without this rounding every operand
    is too small, and sums of products are biased. Infinities and NaN stay what they are.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)
