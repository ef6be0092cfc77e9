"""The two-stage step on a GPU: the numbers of the CPU, step after step."""

import pytest
import torch

from bench.epochs import tiny_batch, tiny_pair
from engine.kernels.knn_product import Bank

STEPS = 20


@pytest.fixture(autouse=True)
def float32():
    """Both devices compute in float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def trajectory(mode: str, device: str) -> list[list[float]]:
    """Losses of both stages over 20 steps; product rows are drawn by the CPU's generator, and so the same."""
    step = tiny_pair(mode, device).step
    first = tiny_batch(64, 99, device)
    with torch.no_grad():
        bank = Bank(step.forward(first, first.label)[1])
    losses = []
    for number in range(STEPS):
        batch = tiny_batch(16, number, device)
        products = step.draw_products(bank, 16)
        with torch.no_grad():
            features = step.forward(batch, batch.label)[1]
        one = step.stage1(features, products)
        two = step.stage2(batch, batch.label, products)
        losses.append([one.loss.item(), two.loss.item(), two.task.item()])
    return losses


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_eager_steps_are_those_of_the_cpu(mode):
    expected, found = trajectory(mode, "cpu"), trajectory(mode, "cuda")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
