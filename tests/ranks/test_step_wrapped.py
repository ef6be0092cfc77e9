"""A step whose modules are wrapped for distributed training moves as one process on the joined batch does."""

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from engine.step import TwoStageStep
from tests.test_other_loops import Pair, data, objective_of, weights


def trained(rank: int, size: int) -> list[torch.Tensor]:
    """Weights after three batches of 8 rows, of which each rank has its share, in groups of two micro-batches."""
    torch.manual_seed(0)
    model, objective = Pair(), objective_of()
    if size > 1:
        model, objective = DistributedDataParallel(model), DistributedDataParallel(objective)
    optimizers = (torch.optim.SGD(module.parameters(), 0.1) for module in (model, objective))
    step = TwoStageStep(model, objective, functional.mse_loss, *optimizers, accumulate=2, clip_norm=0.5)
    x, y, _ = data()
    for rows in torch.arange(24).split(8):
        own = rows.chunk(size)[rank]
        output = step.train_batch({"x": x[own], "y": y[own]}, stage1_n=2)
        assert output.information is not None
    step.flush()
    return weights(step)


def test_wrapped_modules_move_as_one_process_does(ranks):
    expected = trained(0, 1)
    for found in ranks(2).run(trained):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
