"""The pool of processes itself: it returns every rank's result, and a failing rank fails the test."""

import pytest
import torch
import torch.distributed as dist


def total(rank, size, start):
    value = torch.tensor(float(start + rank))
    dist.all_reduce(value)
    return {"rank": rank, "size": size, "sum": value}


def fail_on_one(rank, size):
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_every_rank_answers_and_a_failure_is_reported(ranks):
    pool = ranks(2)
    results = pool.run(total, 10)
    assert [(r["rank"], r["size"], r["sum"].item()) for r in results] == [(0, 2, 21.0), (1, 2, 21.0)]
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        pool.run(fail_on_one)
    assert pool.run(total, 1)[1]["sum"].item() == 3.0
