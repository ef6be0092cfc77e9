"""Check losses and bounds over the GPUs of one machine against one process. It prints the largest relative difference.

It also checks what a run exchanges (`engine.ranks`), and that a mistake of one rank reaches the others.

torchrun --nproc-per-node 2 -m bench.ranks_nccl
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from engine.errors import EngineError
from engine.kernels import KeyQueue, infonce, mi_lower_bound, siglip
from engine.ranks import Ranks
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
    calls["sigmoid loss"] = lambda q, k, how: siglip(q, k, 0.5, -2.0, gather=how)
    for name, call in calls.items():
        right = _value_and_gradients(call, q, k, False)
        for how in (True, "ring"):
            value, *gradients = _value_and_gradients(call, q[rows], k[rows], how)
            expected = [right[0], *(size * g[rows] for g in right[1:])]
            wrong = max(_difference(a, b) for a, b in zip((value, *gradients), expected, strict=True))
            assert wrong < 1e-4, (name, how, wrong)
            if rank == 0:
                print(f"{name}, gather={how}, {size} ranks, {backend}: {wrong:.1e}")
    _check_exchanges(Ranks(rank, size, device))
    _check_a_mistake(rank, q[rows], k[rows])
    if rank == 0:
        print(f"exchanges of a run, and a mistake of one rank, {size} ranks, {backend}: right")
    dist.destroy_process_group()


def _check_exchanges(ranks: Ranks) -> None:
    """What a run exchanges: types that a backend may not know, unequal numbers, tensors that must change their GPU."""
    rank, size, device = ranks.rank, ranks.size, ranks.device
    told = ranks.gather({"name": f"rank {rank}", "here": torch.full((2,), rank, device=device), "cpu": torch.ones(1)})
    assert [value["name"] for value in told] == [f"rank {r}" for r in range(size)]
    assert all(value["here"].device == device and value["cpu"].device.type == "cpu" for value in told)
    assert [int(value["here"][0]) for value in told] == list(range(size))
    assert ranks.largest(rank) == size - 1 and ranks.from_writer(f"of {rank}") == "of 0"
    counts = [1 + r for r in range(size)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        rows = ranks.join_rows(torch.full((counts[rank], 3), rank, device=device).to(dtype), counts)
        expected = torch.repeat_interleave(torch.arange(size), torch.tensor(counts)).to(dtype)
        assert torch.equal(rows[:, 0].cpu(), expected), dtype
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    parameter.grad = torch.full_like(parameter, rank)
    ranks.average_gradients([parameter])
    assert torch.allclose(parameter.grad, torch.full_like(parameter, (size - 1) / 2))
    ranks.barrier()
    queue = KeyQueue(4 * size, 2, gather=True).to(device)
    queue.push(torch.full((2, 2), float(rank), device=device))
    assert queue.keys()[: 2 * size, 0].tolist() == [r for r in range(size) for _ in range(2)]


def _check_a_mistake(rank: int, q: torch.Tensor, k: torch.Tensor) -> None:
    """Rank 0 gives tensors on the CPU, which NCCL does not know. All ranks hear of it, and the next call works."""
    text = ""
    try:
        infonce(q.cpu() if rank == 0 else q, k[:, :-1] if rank == 0 else k, gather=True)
    except EngineError as error:
        text = str(error)
    assert text and (rank == 0 or text.startswith("rank 0: ")), text
    assert infonce(q, k, gather="ring").isfinite()


def _value_and_gradients(call, q, k, how):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    value = call(*leaves, how)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _difference(found, right) -> float:
    return float((found - right).abs().max() / right.abs().max())


if __name__ == "__main__":
    main()
