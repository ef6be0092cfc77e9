"""Peak memory of a rank with negatives of all ranks: gathered keys against keys that travel around a ring.

    python -m bench.ranks --rows 4096 --width 1024

Every figure is of fresh processes on this machine, joined by gloo: how much the peak of resident memory rises in one
forward and backward pass, above what the process holds with its embeddings made. The most of all ranks is printed.
"""

from __future__ import annotations

import argparse
import resource

import torch

from engine.kernels import infonce, mi_lower_bound
from tests.ranks import Ranks

LOSSES = {
    "infonce": lambda q, k, how: infonce(q, k, gather=how),
    "dv": lambda q, k, how: mi_lower_bound(q, k, bound="dv", gather=how),
    "interpolate": lambda q, k, how: mi_lower_bound(q, k, bound="interpolate", gather=how),
}


def peak() -> float:
    """The peak of this process's resident memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rise(rank: int, size: int, name: str, how: bool | str, rows: int, width: int) -> float:
    """How much one pass raises the peak, in MiB. The process must be fresh."""
    small = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]
    LOSSES[name](*small, how).backward()  # loads what is loaded once
    generator = torch.Generator().manual_seed(rank)
    q, k = ((torch.randn(rows, width, generator=generator) / width**0.5).requires_grad_() for _ in range(2))
    before = peak()
    LOSSES[name](q, k, how).backward()
    return peak() - before


def measure(name: str, how: bool | str, size: int, rows: int, width: int) -> float:
    pool = Ranks(size)
    try:
        return max(pool.run(rise, name, how, rows, width, seconds=1200))
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="of every rank")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    options = parser.parse_args()
    own = options.rows * options.width * 4 / 2**20
    print(f"{options.rows} rows a rank, width {options.width}, fp32: a rank's keys take {own:.0f} MiB\n")
    print("| loss | ranks | gather, MiB | ring, MiB |\n|---|---|---|---|")
    for name in options.losses:
        for size in options.ranks:
            gathered, ring = (measure(name, how, size, options.rows, options.width) for how in (True, "ring"))
            print(f"| {name} | {size} | {gathered:.0f} | {ring:.0f} |", flush=True)


if __name__ == "__main__":
    main()
