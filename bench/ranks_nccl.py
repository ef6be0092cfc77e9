"""Check losses and bounds over the GPUs of one machine against one process. It prints the largest relative difference.

torchrun --nproc-per-node 2 -m bench.ranks_nccl
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from engine.kernels import infonce, mi_lower_bound
from engine.vocabulary import BOUNDS

ROWS, WIDTH = 512, 128


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    q, noise = (torch.randn(size * ROWS, WIDTH, generator=generator).to(device) / WIDTH**0.25 for _ in range(2))
    k = (q + noise) / 4
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    calls = {bound: lambda q, k, how, b=bound: mi_lower_bound(q, k, bound=b, gather=how) for bound in BOUNDS}
    calls["infonce loss"] = lambda q, k, how: infonce(q, k, symmetric=True, gather=how)
    for name, call in calls.items():
        right = _value_and_gradients(call, q, k, False)
        for how in (True, "ring"):
            value, *gradients = _value_and_gradients(call, q[rows], k[rows], how)
            expected = [right[0], *(size * g[rows] for g in right[1:])]
            wrong = max(_difference(a, b) for a, b in zip((value, *gradients), expected, strict=True))
            assert wrong < 1e-4, (name, how, wrong)
            if rank == 0:
                print(f"{name}, gather={how}, {size} ranks, {backend}: {wrong:.1e}")
    dist.destroy_process_group()


def _value_and_gradients(call, q, k, how):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    value = call(*leaves, how)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _difference(found, right) -> float:
    return float((found - right).abs().max() / right.abs().max())


if __name__ == "__main__":
    main()
