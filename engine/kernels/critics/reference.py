"""Critics: scores of every x in a batch against every y, in plain torch.

One orientation for both: `scores[i, j] = f(x_j, y_i)`, rows are y, columns are x. The last product is taken in fp32
(fp64 for fp64 inputs) also under autocast, because the bounds exponentiate it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Layers = Sequence[tuple[Tensor, Tensor]]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "leakyrelu": functional.leaky_relu,
    "tanh": torch.tanh,
}


def mlp(x: Tensor, layers: Layers, activation: str = "relu") -> Tensor:
    """[B, d] -> [B, n]; `layers` holds (weight [out, in], bias [out]), the activation between them."""
    act = ACTIVATIONS[activation]
    for weight, bias in layers[:-1]:
        x = act(functional.linear(x, weight, bias))
    weight, bias = layers[-1]
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(_full(x), _full(weight), _full(bias))


def grouped_mlp(inputs: Sequence[Tensor], first: Layers, rest: Layers, activation: str = "relu") -> Tensor:
    """N MLPs of one shape: -> [N, B, n]. The first n_0 of them read inputs[0], the next n_1 inputs[1], and so on.

    Args:
        inputs: [B, d_i] each.
        first: for every input the first layers of its MLPs: (weight [n_i, hidden, d_i], bias [n_i, hidden]).
        rest: the further layers of all N = sum of n_i MLPs: (weight [N, out, in], bias [N, out]).
    """
    outputs = []
    for x, (weight, bias) in zip(inputs, first, strict=True):
        for w, b in zip(weight, bias, strict=True):
            n = len(outputs)
            outputs.append(mlp(x, [(w, b), *((weights[n], biases[n]) for weights, biases in rest)], activation))
    return torch.stack(outputs)


def separate_scores(x: Tensor, y: Tensor, g: Layers, h: Layers, activation: str = "relu") -> Tensor:
    """h(y) g(x)^T: x [B, dx], y [B, dy] -> [B, B], `[i, j] = <h(y_i), g(x_j)>`."""
    embedded_x, embedded_y = mlp(x, g, activation), mlp(y, h, activation)
    with torch.autocast(x.device.type, enabled=False):
        return embedded_y @ embedded_x.t()


def concat_scores(x: Tensor, y: Tensor, f: Layers, activation: str = "relu") -> Tensor:
    """f([x; y]) on all pairs: x [B, dx], y [B, dy] -> [B, B], `[i, j] = f([x_j; y_i])`.

    The first layer is split, W [x; y] = W_x x + W_y y: exact, and the pairs [B^2, dx + dy] are never formed.
    """
    (weight, bias), *rest = f
    of_x = functional.linear(x, weight[:, : x.shape[1]])
    of_y = functional.linear(y, weight[:, x.shape[1] :], bias)
    hidden = ACTIVATIONS[activation](of_y[:, None, :] + of_x[None, :, :])
    return mlp(hidden.flatten(0, 1), rest, activation).view(len(y), len(x))


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
