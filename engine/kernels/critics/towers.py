"""Critics' towers and their InfoNCE on the GPU in few launches.

A layer of all towers is one launch each way (`engine.kernels.mlp.triton`). InfoNCE takes two launches more: the scores
with their losses and derivatives, and the products that turn these into gradients of the embeddings. The scores' [G, B,
B] derivatives are stored, so large batches run by library products, as in `plain`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.critics import plain
from engine.kernels.critics.plan import tower_algorithm
from engine.kernels.mlp.plan import WIDE
from engine.kernels.mlp.triton import dot, layer_backward, layer_forward, precision_now

SCORE_ROWS, SCORE_COLUMNS = 16, 64  # a program's tile of scores
WARPS = 4


@triton.jit
def _member(numbers: tl.constexpr, c, COUNT: tl.constexpr):
    member = tl.cast(numbers[0], tl.int32)
    for s in tl.static_range(1, COUNT):
        if c == s:
            member = tl.cast(numbers[s], tl.int32)
    return member


@triton.jit
def _scores(
    out_ptr, slope_ptr, loss_ptr, rows, Q: tl.constexpr, K: tl.constexpr, CRITICS: tl.constexpr, WIDTH: tl.constexpr,
    GRADS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M rows of one critic's scores <q_i, k_j> the losses and, with GRADS, the derivatives of their mean over
    rows. Without GRADS slope is memory for the scores all the same. Grid: (row blocks, critics)."""
    c = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = out_ptr + _member(Q, c, CRITICS).to(tl.int64) * rows * WIDTH + i[:, None] * WIDTH
    k = out_ptr + _member(K, c, CRITICS).to(tl.int64) * rows * WIDTH
    own = slope_ptr + (c.to(tl.int64) * rows + i[:, None]) * rows
    joint = tl.zeros([BLOCK_M], tl.float32)
    check = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d0 in range(0, WIDTH, BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            a = tl.load(q + d[None, :], mask=(i < rows)[:, None] & (d < WIDTH)[None, :], other=0.0)
            b = tl.load(k + j[None, :] * WIDTH + d[:, None], mask=(j < rows)[None, :] & (d < WIDTH)[:, None], other=0.0)
            score = dot(a, b, score, PRECISION)
        live = (j < rows)[None, :]
        is_joint = j[None, :] == i[:, None]
        joint += tl.sum(tl.where(is_joint, score, 0.0), 1)
        check += tl.sum(tl.where(live, score - score, 0.0), 1)
        others = tl.where(live & (is_joint == 0), score, float("-inf"))
        new = tl.maximum(high, tl.max(others, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(others - base[:, None]), 1)
        high = new
        if GRADS:
            tl.store(own + j[None, :], score, mask=(i < rows)[:, None] & live)
    rest = high + tl.log(total)
    difference = rest - joint
    e = tl.exp(-tl.abs(difference))
    above = tl.log(1.0 + e) + check
    tl.store(loss_ptr + c.to(tl.int64) * rows + i, tl.maximum(difference, 0.0) + above, mask=i < rows)
    if GRADS:
        # other threads read the scores than those that stored them
        tl.debug_barrier()
        diagonal = -tl.where(difference >= 0, 1.0, e) / (1.0 + e) + check
        # not the joint score and the loss, whose sum has few digits where the joint score is far below the others
        log_sum = tl.maximum(rest, joint) + above
        for start in range(0, rows, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            live = (i < rows)[:, None] & (j < rows)[None, :]
            score = tl.load(own + j[None, :], mask=live, other=0.0)
            slope = tl.exp(score - log_sum[:, None])
            # chosen, not added: the diagonal's own derivative keeps its digits where the positive has all the weight
            slope = tl.where(j[None, :] == i[:, None], diagonal[:, None], slope)
            tl.store(own + j[None, :], slope / tl.cast(rows, tl.float32), mask=live)


@triton.jit
def _embedding_gradients(
    slope_ptr, out_ptr, loss_ptr, of_out_ptr, mean_ptr, rows, row_tiles, column_tiles,
    Q: tl.constexpr, K: tl.constexpr, CRITICS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dS k for the towers of rows, dS^T q for those of columns; beside them every critic's mean loss. Grid: (tiles of
    both and one more, critics)."""
    c, number = tl.program_id(1), tl.program_id(0)
    slope = slope_ptr + c.to(tl.int64) * rows * rows
    tiles = row_tiles * column_tiles
    if number == 2 * tiles:
        losses = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, rows, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            losses += tl.load(loss_ptr + c.to(tl.int64) * rows + at, mask=at < rows, other=0.0)
        tl.store(mean_ptr + c, tl.sum(losses, 0) / rows)
    else:
        q, k = _member(Q, c, CRITICS), _member(K, c, CRITICS)
        of_columns = number >= tiles
        own, other = tl.where(of_columns, k, q).to(tl.int64), tl.where(of_columns, q, k).to(tl.int64)
        # steps in dS from one of the tower's rows to the next, and from one of the other tower's
        step, across = tl.where(of_columns, 1, rows), tl.where(of_columns, rows, 1)
        number = number % tiles
        i = number // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        n = number % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, rows, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            live = (i < rows)[:, None] & (j < rows)[None, :]
            a = tl.load(slope + i[:, None] * step + j[None, :] * across, mask=live, other=0.0)
            place = (other * rows + j[:, None]) * WIDTH + n[None, :]
            b = tl.load(out_ptr + place, mask=(j < rows)[:, None] & (n < WIDTH)[None, :], other=0.0)
            total = dot(a, b, total, PRECISION)
        place = (own * rows + i[:, None]) * WIDTH + n[None, :]
        tl.store(of_out_ptr + place, total, mask=(i < rows)[:, None] & (n < WIDTH)[None, :])


# -- host functions --


def _algorithm(x: Tensor) -> str:
    return tower_algorithm(x) if x.dtype.itemsize == 4 else "plain"


def mlp_forward(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `plain.mlp_forward`."""
    if _algorithm(x) == "plain":
        return plain.mlp_forward(x, more, first, rest)
    out, state, _ = _embed(x, more, first, rest, 0)
    return out, state


def mlp_backward(grad: Tensor, inputs: Sequence[Tensor], *arguments: Any) -> Tensor:
    """As `plain.mlp_backward`."""
    if _algorithm(inputs[0]) == "plain":
        return plain.mlp_backward(grad, inputs, *arguments)
    return _backward(grad, None, (), inputs, *arguments)


def grouped_infonce(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], q: Sequence[int],
    k: Sequence[int], grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `plain.grouped_infonce`."""
    if _algorithm(x) == "plain":
        return plain.grouped_infonce(x, more, first, rest, q, k, grads)
    rows, width, critics = len(x), rest[-2].shape[1], len(q)
    size = plain.state_size(rows, 2 * critics, width, 1) if grads else 0
    out, state, of_out = _embed(x, more, first, rest, size)
    slopes = x.new_empty(critics, rows if grads else 0, rows)
    losses = x.new_empty(critics, rows)
    if not losses.numel():
        return losses.mean(1), state
    precision = precision_now()
    m, n, depth, warps, stages = WIDE[precision]
    constant = tuple(q), tuple(k), critics, width
    _scores[triton.cdiv(rows, SCORE_ROWS), critics](
        out, slopes, losses, rows, *constant, grads, precision, SCORE_ROWS, SCORE_COLUMNS, depth, num_warps=WARPS,
        num_stages=stages,
    )  # fmt: skip
    if not grads:
        return losses.mean(1), x.new_empty(0)
    means = x.new_empty(critics)
    tiles = triton.cdiv(rows, m), triton.cdiv(width, n)
    _embedding_gradients[2 * tiles[0] * tiles[1] + 1, critics](
        slopes, out, losses, of_out, means, rows, *tiles, *constant, precision, m, n, depth, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return means, state


def grouped_infonce_backward(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor,
    q: Sequence[int], k: Sequence[int], *wanted: bool,
) -> Tensor:  # fmt: skip
    """As `plain.grouped_infonce_backward`."""
    if _algorithm(inputs[0]) == "plain":
        return plain.grouped_infonce_backward(grad, inputs, first, rest, state, q, k, *wanted)
    of_out = plain.output_gradients(inputs, first, rest, state, len(q))
    return _backward(of_out, grad, plain.critic_of(q, k), inputs, first, rest, state, *wanted)


def _embed(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], more_state: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, the state of the backward pass, and the `more_state` numbers at its end."""
    inputs = [t.contiguous() for t in (x, *more)]
    rows, count, hidden, width = len(x), sum(len(w) for w in first[::2]), first[0].shape[1], rest[-2].shape[1]
    depth = len(rest) // 2
    own = plain.state_size(rows, count, hidden, depth)
    out, state = x.new_empty(count, rows, width), x.new_empty(own + more_state)
    layers = plain.layers_of(state, depth, count, rows, hidden)
    layer_forward(inputs, first[::2], first[1::2], layers[0], shared=True, relu=True)
    for n, (below, above) in enumerate(itertools.pairwise([*layers, out])):
        weight, bias = rest[2 * n : 2 * n + 2]
        layer_forward([below], [weight], [bias], above, shared=False, relu=n + 1 < depth)
    return out, state, state[own:]


def _backward(
    grad: Tensor, scale: Tensor | None, places: Sequence[int], inputs: Sequence[Tensor], first: Sequence[Tensor],
    rest: Sequence[Tensor], state: Tensor, input_grads: bool, weight_grads: bool,
) -> Tensor:  # fmt: skip
    """`plain.mlp_backward`, with every tower's gradient counted scale[places[tower]] times."""
    count, rows, _ = grad.shape
    inputs = [t.contiguous() for t in inputs]
    gradients, pieces = plain.flat(grad, plain.grad_shapes(inputs, (*first, *rest), input_grads, weight_grads))
    of_inputs = pieces[: len(inputs)] if input_grads else []
    of_weights, of_biases = pieces[len(of_inputs) :: 2], pieces[len(of_inputs) + 1 :: 2]
    hidden = plain.layers_of(state, len(rest), count, rows, first[0].shape[1])
    for layer in range(len(rest) - 1, -1, -1):
        own = slice(len(first) + layer, len(first) + layer + 1)
        below = grad.new_empty(hidden[0].shape)
        layer_backward(
            grad, [hidden[layer]], [rest[layer]], of_weights[own], of_biases[own], [below], shared=False, scale=scale,
            places=places,
        )  # fmt: skip
        grad, scale, places = below, None, ()
    sections = slice(0, len(first))
    layer_backward(grad, inputs, first, of_weights[sections], of_biases[sections], of_inputs, shared=True)
    return gradients


# -- launches; each takes the arguments of the function it is named after --


def mlp_forward_launches(x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor]) -> int:
    if _algorithm(x) == "plain":
        # a product that begins with a bias copies it first
        return 2 * (1 + len(more)) + 3 * (len(rest) // 2)
    return 1 + len(rest) // 2


def mlp_backward_launches(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor,
    input_grads: bool, weight_grads: bool,
) -> int:  # fmt: skip
    if _algorithm(inputs[0]) == "plain":
        weights = 2 * (len(rest) + len(inputs)) if weight_grads else 0
        return weights + 2 * len(rest) + (2 * len(inputs) if input_grads else 0)
    return len(rest) + bool(input_grads or weight_grads)


def grouped_infonce_launches(x: Tensor, *arguments: Any) -> int:
    *towers, _, _, grads = arguments
    own = (14 if grads else 8) if _algorithm(x) == "plain" else 2
    return mlp_forward_launches(x, *towers) + own


def grouped_infonce_backward_launches(grad: Tensor, inputs: Sequence[Tensor], *arguments: Any) -> int:
    first, rest, state, _, _, *wanted = arguments
    towers = mlp_backward_launches(grad, inputs, first, rest, state, *wanted)
    return towers + (2 if _algorithm(inputs[0]) == "plain" else 0)
