"""The recurrences as formulas in plain torch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

GATES = {"gru": 3, "lstm": 4}


def gru_cell(gates: Tensor, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One step of torch.nn.GRU: gates W_ih x + b_ih [B, 3H], state [B, H] -> state."""
    input_r, input_z, input_n = gates.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = functional.linear(h, w, b).chunk(3, -1)
    r, z = torch.sigmoid(input_r + hidden_r), torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return (1 - z) * n + z * h


def lstm_cell(gates: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One step of torch.nn.LSTM: gates W_ih x + b_ih [B, 4H], state and cell [B, H] -> state, cell."""
    i, f, g, o = (gates + functional.linear(h, w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def bidirectional(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str) -> Tensor:
    """x [B, L, d], length int64 [B], weights as torch.nn.GRU and LSTM keep them (per layer and direction: input
    [GH, d], hidden [GH, H], their biases [GH]) -> [B, L, 2H], zero past a row's length. Step by step."""
    size = weights[1].shape[1]
    valid = torch.arange(x.shape[1], device=x.device) < length[:, None]
    for layer in range(len(weights) // 8):
        directions = []
        for direction in range(2):
            w_input, w_hidden, b_input, b_hidden = weights[4 * (2 * layer + direction) :][:4]
            gates = functional.linear(x, w_input, b_input)
            h = c = x.new_zeros(x.shape[0], size)
            steps = []
            for t in reversed(range(x.shape[1])) if direction else range(x.shape[1]):
                if cell == "gru":
                    new = gru_cell(gates[:, t], h, w_hidden, b_hidden)
                else:
                    new, cell_state = lstm_cell(gates[:, t], h, c, w_hidden, b_hidden)
                    c = torch.where(valid[:, t, None], cell_state, c)
                h = torch.where(valid[:, t, None], new, h)  # a row's state rests outside its length
                steps.append(h)
            directions.append(torch.stack(steps[::-1] if direction else steps, 1))
        x = torch.cat(directions, -1) * valid[..., None]
    return x
