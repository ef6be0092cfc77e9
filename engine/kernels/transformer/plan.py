"""How the kernels of a backward pass are laid out, and so how many parts of a sum they leave."""

from __future__ import annotations

PROGRAMS = 256  # of add_norm's backward pass, at most
GELU_PROGRAMS = 64  # of the rows in bias_gelu's backward pass, at most; the columns have programs of their own
GELU_ROWS = 16


def norm_blocks(c: int) -> dict[str, int]:
    """Rows at a time, columns and warps of a program of add_norm's backward pass.

    A warp has 128 columns of every row of the tile. So sums over rows stay within a thread, and only sums along a row
    cross warps.
    """
    block = max(1 << (c - 1).bit_length(), 16)
    return {"ROWS": min(4, max(2048 // block, 1)), "BLOCK_C": block, "num_warps": min(max(block // 128, 1), 16)}


def norm_programs(n: int, c: int) -> int:
    """Programs of add_norm's backward pass on [n, c]: each leaves its part of the sums over rows."""
    return _programs(n, norm_blocks(c)["ROWS"], PROGRAMS)


def gelu_programs(n: int) -> int:
    """The same of bias_gelu's backward pass on n rows."""
    return _programs(n, GELU_ROWS, GELU_PROGRAMS)


def _programs(n: int, rows: int, most: int) -> int:
    """As few programs as take no more rounds than `most` of them would."""
    blocks = -(-n // rows)
    rounds = max(-(-blocks // most), 1)
    return -(-blocks // rounds)
