"""Grouped MLPs and the concat critic by torch's own products, on any device, and what all backends share.

The concat critic's pairs are worked on a tile at a time in reused memory. All hidden layers end in ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Rows of a batch up to which a step is launches and not arithmetic; above them library products take over.
FEW_ROWS = 2048

LANES = 16  # samples are padded to the vector's width, at most 16 floats

# Pairs of a tile of the concat critic, times the width of its hidden layers.
TILE_NUMBERS = 1024 * 256


def state_size(rows: int, count: int, hidden: int, layers: int) -> int:
    """Numbers of `state`: outputs of the hidden layers of `count` MLPs."""
    return layers * count * hidden * -(-rows // LANES) * LANES


def infonce_state_size(rows: int, count: int, hidden: int, width: int, layers: int) -> int:
    """Numbers of the state of `grouped_infonce`: those of `state_size`, then the gradients of all outputs."""
    return state_size(rows, count, hidden, layers) + state_size(rows, count, width, 1)


def grad_shapes(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], input_grads: bool, weight_grads: bool
) -> list[torch.Size]:
    """Shapes of the gradients that `mlp_backward` gives."""
    shapes = [t.shape for t in inputs] if input_grads else []
    if weight_grads:
        shapes += [shape for w in weights for shape in (w.shape, w.shape[:2])]
    return shapes


def flat(like: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, list[Tensor]]:
    """A new 1-d tensor and its pieces of the given shapes."""
    whole = like.new_empty(sum(math.prod(shape) for shape in shapes))  # numel() would fix a dynamic size
    return whole, pieces_of(whole, shapes)


def pieces_of(whole: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = whole.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def concat_shapes(
    x: Tensor, y: Tensor, layers: Sequence[Tensor], input_grads: bool, weight_grads: bool
) -> list[torch.Size]:
    """Shapes of the gradients that `concat_backward` and `concat_infonce` give."""
    return ([x.shape, y.shape] if input_grads else []) + ([w.shape for w in layers] if weight_grads else [])


def _concat_grads(
    x: Tensor, y: Tensor, layers: Sequence[Tensor], input_grads: bool, weight_grads: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    gradients, pieces = flat(x, concat_shapes(x, y, layers, input_grads, weight_grads))
    return gradients, pieces[:2] if input_grads else [], pieces[2 if input_grads else 0 :]


def _split(x: Tensor, y: Tensor, layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two parts of the first layer's output, W_x x and W_y y + b."""
    weight, bias = layers[:2]
    return x @ weight[:, : x.shape[1]].t(), torch.addmm(bias, y, weight[:, x.shape[1] :].t())


def _first_layer_grads(
    x: Tensor, y: Tensor, weight: Tensor, sums_x: Tensor, sums_y: Tensor, of_inputs: Sequence[Tensor],
    of_layers: Sequence[Tensor],
) -> None:  # fmt: skip
    """From the gradients of the two parts of the first layer's output those of x, y and the layer's weight and bias."""
    width = x.shape[1]
    if of_inputs:
        torch.mm(sums_x, weight[:, :width], out=of_inputs[0])
        torch.mm(sums_y, weight[:, width:], out=of_inputs[1])
    if of_layers:
        of_layers[0][:, :width] = sums_x.t() @ x
        of_layers[0][:, width:] = sums_y.t() @ y
        torch.sum(sums_y, 0, out=of_layers[1])


def mlp_forward(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`reference.grouped_mlp` of inputs [x, *more]; weights and biases alternate in `first` and `rest`.

    Returns:
        out [N, B, n], and `state` (1-d), which the backward pass needs.
    """
    rows, count, hidden, width = len(x), sum(len(w) for w in first[::2]), first[0].shape[1], rest[-2].shape[1]
    out = x.new_empty(count, rows, width)
    state = x.new_empty(state_size(rows, count, hidden, len(rest) // 2))
    _mlp_forward([x, *more], first, rest, out, layers_of(state, len(rest) // 2, count, rows, hidden))
    return out, state


def mlp_backward(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor,
    input_grads: bool, weight_grads: bool,
) -> Tensor:  # fmt: skip
    """Gradients of the inputs, then of weights and biases of `first` and `rest` in their order, one after another in
    one 1-d tensor; those not asked for are left out.

    Args:
        grad: [N, B, n], of the output.
        first, rest: the weights alone, without biases.
        state: from `mlp_forward`.
    """
    count, rows, _ = grad.shape
    gradients, pieces = flat(grad, grad_shapes(inputs, (*first, *rest), input_grads, weight_grads))
    of_inputs = pieces[: len(inputs)] if input_grads else []
    kept = layers_of(state, len(rest), count, rows, first[0].shape[1])
    _mlp_backward(grad, inputs, first, rest, kept, of_inputs, pieces[len(of_inputs) :])
    return gradients


def grouped_infonce(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], q: Sequence[int],
    k: Sequence[int], grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """InfoNCE of scores <q_i, k_j> of several pairs of MLPs.

    Args:
        x, more, first, rest: as for `mlp_forward`.
        q, k: numbers of the MLPs that embed rows and columns, every MLP once.
        grads: whether there will be a backward pass.

    Returns:
        losses [G], means over rows of -log softmax at the diagonal; NaN where a score is not finite. State (1-d), empty
        without `grads`.
    """
    rows, count, hidden, width = len(x), sum(len(w) for w in first[::2]), first[0].shape[1], rest[-2].shape[1]
    split = state_size(rows, count, hidden, len(rest) // 2)
    state = x.new_empty(infonce_state_size(rows, count, hidden, width, len(rest) // 2))
    out = x.new_empty(count, rows, width)
    _mlp_forward([x, *more], first, rest, out, layers_of(state, len(rest) // 2, count, rows, hidden))
    towers = out.unbind()
    of_rows, of_columns = (torch.stack([towers[n] for n in numbers]) for numbers in (q, k))
    scores = torch.bmm(of_rows, of_columns.mT)
    check = (scores - scores).sum((1, 2))  # 0, or NaN where a score is not finite
    grad = scores.log_softmax(2)
    losses = check - grad.diagonal(dim1=1, dim2=2).mean(1)
    if not grads:
        return losses, x.new_empty(0)
    grad.exp_().diagonal(dim1=1, dim2=2).sub_(1)
    grad.div_(rows)
    of_out = state[split : split + out.numel()].view(out.shape)
    of_tower = dict(zip(q, torch.bmm(grad, of_columns), strict=True)) | dict(
        zip(k, torch.bmm(grad.mT, of_rows), strict=True)
    )
    torch.stack([of_tower[n] for n in range(count)], out=of_out)
    return losses, state


def grouped_infonce_backward(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor,
    q: Sequence[int], k: Sequence[int], input_grads: bool, weight_grads: bool,
) -> Tensor:  # fmt: skip
    """As `mlp_backward`, from the gradients [G] of the losses and the state of `grouped_infonce`."""
    factors = grad.unbind()
    of_out = output_gradients(inputs, first, rest, state, len(q))
    of_out = of_out * torch.stack([factors[c] for c in critic_of(q, k)])[:, None, None]
    return mlp_backward(of_out, inputs, first, rest, state, input_grads, weight_grads)


def output_gradients(
    inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor, critics: int
) -> Tensor:
    """The gradients of all outputs, [N, B, n], which `grouped_infonce` left at the end of its state."""
    rows, count, width = len(inputs[0]), 2 * critics, rest[-1].shape[1]
    split = state_size(rows, count, first[0].shape[1], len(rest))
    return state[split : split + count * rows * width].view(count, rows, width)


def critic_of(q: Sequence[int], k: Sequence[int]) -> list[int]:
    """Of each of the 2 G MLPs the number of its critic."""
    place = [0] * (2 * len(q))
    for c, both in enumerate(zip(q, k, strict=True)):
        for n in both:
            place[n] = c
    return place


def concat_forward(x: Tensor, y: Tensor, layers: Sequence[Tensor], pairs: Callable[..., None] | None = None) -> Tensor:
    """`reference.concat_scores`: x [M, dx], y [B, dy] -> [B, M], a tile of pairs at a time.

    Args:
        layers: weights and biases alternate; the last layer has one output.
        pairs: what takes the pairs through the further layers; see `forward_pairs`, the default.
    """
    of_x, of_y = _split(x, y, layers)
    scores = x.new_empty(len(y), len(x))
    (pairs or forward_pairs)(of_x, of_y, layers[2:], scores)
    return scores


def concat_backward(
    grad: Tensor, x: Tensor, y: Tensor, layers: Sequence[Tensor], input_grads: bool, weight_grads: bool,
    pairs: Callable[..., None] | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of x and y, then of `layers` in their order, one after another in one 1-d tensor; those not asked for
    are left out.

    grad: [B, M], of the scores. The hidden layers are computed again, a tile of pairs at a time.
    """
    of_x, of_y = _split(x, y, layers)
    gradients, of_inputs, of_layers = _concat_grads(x, y, layers, input_grads, weight_grads)
    sums_x, sums_y = torch.empty_like(of_x), torch.empty_like(of_y)
    (pairs or backward_pairs)(grad, of_x, of_y, layers[2:], sums_x, sums_y, of_layers[2:])
    _first_layer_grads(x, y, layers[0], sums_x, sums_y, of_inputs, of_layers)
    return gradients


def concat_infonce(
    x: Tensor, y: Tensor, layers: Sequence[Tensor], transpose: bool, input_grads: bool, weight_grads: bool,
    pairs: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """InfoNCE of the concat critic with its gradients.

    Args:
        x, y, layers: as for `concat_forward`, x and y of B rows each.
        transpose: of the transposed scores: rows are x.

    Returns:
        losses [B], -log softmax of each row at the diagonal; NaN for a row with a score that is not finite.
        Gradients of their mean, as `concat_backward` returns them.
    """
    of_x, of_y = _split(x, y, layers)
    gradients, of_inputs, of_layers = _concat_grads(x, y, layers, input_grads, weight_grads)
    losses = x.new_empty(len(x))
    wanted = input_grads or weight_grads
    sums_x, sums_y = (torch.empty_like(of_x), torch.empty_like(of_y)) if wanted else (None, None)
    (pairs or infonce_pairs)(of_x, of_y, layers[2:], transpose, losses, sums_x, sums_y, of_layers[2:])
    if wanted:
        _first_layer_grads(x, y, layers[0], sums_x, sums_y, of_inputs, of_layers)
    return losses, gradients


def layers_of(state: Tensor, layers: int, count: int, rows: int, hidden: int) -> Tensor:
    return state[: layers * count * rows * hidden].view(layers, count, rows, hidden)


def _mlp_forward(
    inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], out: Tensor, hidden: Tensor
) -> None:
    begin = 0
    for value, weight, bias in zip(inputs, first[::2], first[1::2], strict=True):
        end = begin + len(weight)
        value = value.expand(len(weight), *value.shape)
        torch.baddbmm(bias[:, None], value, weight.mT, out=hidden[0, begin:end])
        begin = end
    for weight, bias, below, above in zip(rest[::2], rest[1::2], hidden, [*hidden[1:], out], strict=True):
        torch.baddbmm(bias[:, None], below.relu_(), weight.mT, out=above)


def _mlp_backward(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], hidden: Tensor,
    of_inputs: Sequence[Tensor], of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    buffers = [torch.empty_like(hidden[0]) for _ in range(2)]
    of_first, of_rest = of_weights[: 2 * len(first)], of_weights[2 * len(first) :]
    for layer in range(len(rest) - 1, -1, -1):
        if of_weights:
            torch.bmm(grad.mT, hidden[layer], out=of_rest[2 * layer])
            torch.sum(grad, 1, out=of_rest[2 * layer + 1])
        grad = torch.bmm(grad, rest[layer], out=buffers[layer % 2])
        torch.ops.aten.threshold_backward.grad_input(grad, hidden[layer], 0, grad_input=grad)
    begin = 0
    for i, (value, weight) in enumerate(zip(inputs, first, strict=True)):
        part = grad[begin : begin + len(weight)]
        begin += len(weight)
        if of_weights:
            torch.bmm(part.mT, value.expand(len(weight), *value.shape), out=of_first[2 * i])
            torch.sum(part, 1, out=of_first[2 * i + 1])
        if of_inputs:
            torch.sum(torch.bmm(part, weight), 0, out=of_inputs[i])


def forward_pairs(of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], scores: Tensor) -> None:
    """scores [rows of y, rows of x] from the parts of the first layer's output; `further`: the other layers."""
    weights, biases = further[::2], further[1::2]
    buffers = _Buffers(of_x, of_y, 2)
    for rows, columns in buffers.tiles():
        h = buffers.first(0, of_x[columns], of_y[rows])
        for n, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            h = torch.addmm(bias, h, weight.t(), out=buffers.take((n + 1) % 2, len(h))).relu_()
        tile = scores[rows, columns]
        tile.copy_(torch.mv(h, weights[-1][0]).view(tile.shape)).add_(biases[-1])


def backward_pairs(
    grad: Tensor, of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], sums_x: Tensor, sums_y: Tensor,
    of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    """Gradients of the two parts of the first layer's output and, where there are any, of the further layers."""
    weights, biases = further[::2], further[1::2]
    for total in (sums_x, sums_y, *of_weights):
        total.zero_()
    depth = len(weights)
    buffers = _Buffers(of_x, of_y, depth + 2)
    for rows, columns in buffers.tiles():
        hidden = [buffers.first(0, of_x[columns], of_y[rows])]
        for n, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            hidden.append(torch.addmm(bias, hidden[-1], weight.t(), out=buffers.take(n + 1, len(hidden[0]))).relu_())
        tile = grad[rows, columns]
        d = tile.reshape(-1, 1)
        for n in range(depth - 1, -1, -1):
            if of_weights:
                of_weights[2 * n].addmm_(d.t(), hidden[n])
                of_weights[2 * n + 1].add_(d.sum(0))
            d = torch.mm(d, weights[n], out=buffers.take(depth + n % 2, len(d)))
            torch.ops.aten.threshold_backward.grad_input(d, hidden[n], 0, grad_input=d)
        d = d.view(*tile.shape, -1)
        sums_x[columns] += d.sum(0)
        sums_y[rows] += d.sum(1)


def infonce_pairs(
    of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], transpose: bool, losses: Tensor, sums_x: Tensor | None,
    sums_y: Tensor | None, of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    """Losses of the rows and, with sums_x and sums_y, what `backward_pairs` gives for the gradients of their mean."""
    scores = of_x.new_empty(len(of_y), len(of_x))
    forward_pairs(of_x, of_y, further, scores)
    rows = scores.t() if transpose else scores
    log_p = rows.log_softmax(1)
    # 0, or NaN where a score is not finite
    losses.copy_(-log_p.diagonal() + (rows - rows).sum(1))
    if sums_x is not None:
        grad = log_p.exp_()
        grad.diagonal().sub_(1)
        grad = grad.div_(len(rows))
        backward_pairs(grad.t() if transpose else grad, of_x, of_y, further, sums_x, sums_y, of_weights)


class _Buffers:
    """Reused memory for the hidden layers of one tile of pairs."""

    def __init__(self, of_x: Tensor, of_y: Tensor, count: int):
        self.rows, self.columns, self.hidden = len(of_y), *of_x.shape
        pairs = max(1, TILE_NUMBERS // self.hidden)
        self.width = max(1, min(self.columns, pairs))
        self.height = max(1, min(self.rows, pairs // self.width))
        self.memory = [of_x.new_empty(self.height * self.width * self.hidden) for _ in range(count)]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, self.rows, self.height):
            for column in range(0, self.columns, self.width):
                yield slice(row, row + self.height), slice(column, column + self.width)

    def take(self, number: int, pairs: int) -> Tensor:
        """[pairs, hidden] of one buffer."""
        return self.memory[number][: pairs * self.hidden].view(pairs, self.hidden)

    def first(self, number: int, of_x: Tensor, of_y: Tensor) -> Tensor:
        """relu(W_x x_j + W_y y_i + b) of all pairs of a tile, [pairs, hidden], the x's running fastest."""
        out = self.take(number, len(of_x) * len(of_y))
        torch.add(of_y[:, None], of_x[None], out=out.view(len(of_y), len(of_x), -1))
        return out.relu_()
