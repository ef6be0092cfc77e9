from itertools import pairwise

import pytest
import torch

from engine.kernels.critics import ACTIVATIONS, concat_scores, mlp, separate_scores


def layers(*widths: int, seed: int = 0, dtype=torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(b, a, generator=generator, dtype=dtype) / a**0.5, torch.randn(b, generator=generator, dtype=dtype))
        for a, b in pairwise(widths)
    ]


def inputs(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(6, 3, generator=generator, dtype=dtype),
        torch.randn(6, 5, generator=generator, dtype=dtype),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_orientation_of_both_critics(activation: str):
    """scores[i, j] belongs to (x_j, y_i), element by element."""
    x, y = inputs()
    g, h, f = layers(3, 8, 8, 4), layers(5, 8, 8, 4, seed=1), layers(8, 7, 7, 1, seed=2)
    separate = separate_scores(x, y, g, h, activation)
    concat = concat_scores(x, y, f, activation)
    for i in range(6):
        for j in range(6):
            of_pair = mlp(y[i : i + 1], h, activation) @ mlp(x[j : j + 1], g, activation).t()
            torch.testing.assert_close(separate[i, j], of_pair[0, 0])
            of_pair = mlp(torch.cat([x[j], y[i]])[None], f, activation)
            torch.testing.assert_close(concat[i, j], of_pair[0, 0])


def test_gradients():
    x, y = (tensor.requires_grad_() for tensor in inputs())
    assert torch.autograd.gradcheck(
        lambda x, y: separate_scores(x, y, layers(3, 8, 4), layers(5, 8, 4), "tanh"), (x, y)
    )
    assert torch.autograd.gradcheck(lambda x, y: concat_scores(x, y, layers(8, 7, 7, 1), "tanh"), (x, y))


@pytest.mark.parametrize("critic", ["separate", "concat"])
def test_scores_are_fp32_under_autocast(critic: str):
    x, y = inputs(torch.float32)
    g, h = layers(3, 8, 4, dtype=torch.float32), layers(5, 8, 4, dtype=torch.float32)
    f = layers(8, 7, 7, 1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = separate_scores(x, y, g, h) if critic == "separate" else concat_scores(x, y, f)
    exact = separate_scores(x, y, g, h) if critic == "separate" else concat_scores(x, y, f)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.05)
