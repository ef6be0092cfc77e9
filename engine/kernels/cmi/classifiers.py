"""Classifiers of joint against product rows on the GPU: one launch per layer, forward and backward.

The first layer reads features where they are. A program of its kernel takes x, y and z of its rows from the joint
features or from the product rows, whose y and z are stored once per query. It repeats the columns of a feature narrower
than dim as it reads them. Nothing is gathered, repeated or concatenated in memory. The further layers run in
`engine.kernels.mlp.triton`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.cmi import batched
from engine.kernels.mlp.plan import FIRST, FIRST_BACKWARD, tile
from engine.kernels.mlp.triton import dot, layer_backward, layer_forward, load_grad, positive, precision_now

# Rows up to which a step is launches and not arithmetic; above them library products take over.
FEW_ROWS = 4096
MOST_PLACES = 30  # bits of a number that says where a feature is used


@triton.jit
def _pick(place, joint, product, WIDTHS: tl.constexpr, PLACES: tl.constexpr):
    """Joint and product rows in one of the 3·G places, and their width."""
    of_joint, of_product, width = joint[0], product[0], tl.cast(WIDTHS[0], tl.int32)
    for s in tl.static_range(1, PLACES):
        if place == s:
            of_joint, of_product, width = joint[s], product[s], tl.cast(WIDTHS[s], tl.int32)
    return of_joint, of_product, width


@triton.jit
def _features(joint, product, r, b, rows, repeats, c, width, DIM: tl.constexpr):
    """[r, c] of b joint rows and the product rows after them. A product row stands for `repeats` rows, and columns
    repeat up to DIM."""
    of_columns = (c % width)[None, :]
    live, is_joint = (r < rows)[:, None] & (c < DIM)[None, :], (r < b)[:, None]
    x = tl.load(joint + r[:, None] * width + of_columns, mask=live & is_joint, other=0.0)
    q = ((r - b) // repeats)[:, None]
    return x + tl.load(product + q * width + of_columns, mask=live & (is_joint == 0), other=0.0)


@triton.jit
def _first_forward(
    joint, product, first_ptr, bias_ptr, out_ptr, b, rows, k,
    WIDTHS: tl.constexpr, PLACES: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First layers after ReLU, [G, rows, HIDDEN]. Grid: (row blocks, output blocks, G)."""
    g = tl.program_id(2)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = first_ptr + (tl.cast(g, tl.int64) * HIDDEN + n[None, :]) * 3 * DIM
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, 3):
        of_joint, of_product, width = _pick(3 * g + i, joint, product, WIDTHS, PLACES)
        repeats = tl.where(i == 0, 1, k)
        for c0 in range(0, DIM, BLOCK_K):
            c = c0 + tl.arange(0, BLOCK_K)
            x = _features(of_joint, of_product, r, b, rows, repeats, c, width, DIM)
            weight = tl.load(w + i * DIM + c[:, None], mask=(c < DIM)[:, None] & (n < HIDDEN)[None, :], other=0.0)
            total = dot(x, weight, total, PRECISION)
    total = positive(total + tl.load(bias_ptr + g * HIDDEN + n, mask=n < HIDDEN, other=0.0)[None, :])
    place = (tl.cast(g, tl.int64) * rows + r[:, None]) * HIDDEN + n[None, :]
    tl.store(out_ptr + place, total, mask=(r < rows)[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def _first_backward(
    grad_ptr, joint, product, first_ptr, of_first_ptr, of_bias_ptr, of_joint, b, rows, k, weight_tiles, row_tiles,
    WIDTHS: tl.constexpr, PLACES: tl.constexpr, USES: tl.constexpr, SOURCES: tl.constexpr, WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the first layers (WEIGHTS) and of joint features on all DIM columns (ROWS), from those of the first
    layers' outputs before ReLU, [G, rows, HIDDEN]. Grid: `weight_tiles` for each of G, then `row_tiles` a feature.

    USES: of every feature the places where it is used, one bit each.
    """
    number = tl.program_id(0)
    across: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    if WEIGHTS and number < PLACES // 3 * weight_tiles:
        g, number = number // weight_tiles, number % weight_tiles
        i = number % (3 * across) // across
        o = number // (3 * across) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = number % across * BLOCK_N + tl.arange(0, BLOCK_N)
        from_joint, from_product, width = _pick(3 * g + i, joint, product, WIDTHS, PLACES)
        repeats = tl.where(i == 0, 1, k)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        of_bias = tl.zeros([BLOCK_M], tl.float32)
        for r0 in range(0, rows, BLOCK_K):
            r = r0 + tl.arange(0, BLOCK_K)
            grad = load_grad(grad_ptr, grad_ptr, g, r, rows, rows, o, HIDDEN, False, True)
            x = _features(from_joint, from_product, r, b, rows, repeats, c, width, DIM)
            total = dot(grad, x, total, PRECISION)
            of_bias += tl.sum(grad, 1)
        of_w = of_first_ptr + (tl.cast(g, tl.int64) * HIDDEN + o[:, None]) * 3 * DIM + i * DIM + c[None, :]
        tl.store(of_w, total, mask=(o < HIDDEN)[:, None] & (c < DIM)[None, :])
        if number % (3 * across) == 0:
            tl.store(of_bias_ptr + g * HIDDEN + o, of_bias, mask=o < HIDDEN)
    elif ROWS:
        number -= PLACES // 3 * weight_tiles
        s, number = number // row_tiles, number % row_tiles
        r = number // across * BLOCK_M + tl.arange(0, BLOCK_M)
        c = number % across * BLOCK_N + tl.arange(0, BLOCK_N)
        of_x, uses = of_joint[0], tl.cast(USES[0], tl.int32)
        for m in tl.static_range(1, SOURCES):
            if s == m:
                of_x, uses = of_joint[m], tl.cast(USES[m], tl.int32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for place in range(0, PLACES):
            if (uses >> place) & 1 != 0:
                w = first_ptr + tl.cast(place // 3, tl.int64) * HIDDEN * 3 * DIM + place % 3 * DIM + c[None, :]
                for o0 in range(0, HIDDEN, BLOCK_K):
                    o = o0 + tl.arange(0, BLOCK_K)
                    own = grad_ptr + tl.cast(place // 3, tl.int64) * rows * HIDDEN
                    live = (r < b)[:, None] & (o < HIDDEN)[None, :]
                    grad = tl.load(own + r[:, None] * HIDDEN + o[None, :], mask=live, other=0.0)
                    live = (o < HIDDEN)[:, None] & (c < DIM)[None, :]
                    total = dot(grad, tl.load(w + o[:, None] * 3 * DIM, mask=live, other=0.0), total, PRECISION)
        tl.store(of_x + r[:, None] * DIM + c[None, :], total, mask=(r < b)[:, None] & (c < DIM)[None, :])


# -- host functions --


def algorithm(first: Tensor, joint: Sequence[Tensor], product: Sequence[Tensor]) -> str:
    """How classifiers run: "fused", one launch per layer, or "products", library products."""
    few = joint[0].shape[0] + product[0].shape[0] <= FEW_ROWS and len(product) <= MOST_PLACES
    return "fused" if first.dtype == torch.float32 and few else "products"


def forward(
    first: Tensor,
    first_bias: Tensor,
    rest: Sequence[Tensor],
    joint: Sequence[Tensor],
    slots: Sequence[int],
    product: Sequence[Tensor],
    k: int,
) -> list[Tensor]:
    """As `batched.forward`."""
    if algorithm(first, joint, product) == "products":
        return batched.forward(first, first_bias, rest, joint, slots, product, k)
    b, p = len(joint[0]), len(product[0])
    hidden = first.new_empty(len(first), b + p, first.shape[1])
    precision = precision_now()
    m, n, c, warps, stages = tile(first, b + p, precision, FIRST)
    _first_forward[triton.cdiv(b + p, m), triton.cdiv(first.shape[1], n), len(first)](
        *_rows(joint, slots, product), first, first_bias, hidden, b, b + p, k, *_sizes(first, joint, slots), precision,
        m, n, c, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    layers = [hidden]
    for weight, bias in zip(rest[:-2:2], rest[1:-2:2], strict=True):
        layers.append(first.new_empty(len(first), b + p, weight.shape[1]))
        layer_forward([layers[-2]], [weight], [bias], layers[-1], shared=False, relu=True)
    weight, bias = rest[-2:]
    of_joint, of_product = (first.new_empty(len(first), rows, weight.shape[1]) for rows in (b, p))
    layer_forward([layers[-1]], [weight], [bias], of_joint, shared=False, relu=False, second=of_product)
    return [of_joint, of_product, *layers]


def backward(
    joint_grad: Tensor,
    product_grad: Tensor | None,
    first: Tensor,
    rest: Sequence[Tensor],
    joint: Sequence[Tensor],
    slots: Sequence[int],
    product: Sequence[Tensor],
    k: int,
    layers: Sequence[Tensor],
    row_grads: bool,
    weight_grads: bool,
) -> list[Tensor]:
    """As `batched.backward`."""
    if algorithm(first, joint, product) == "products":
        return batched.backward(
            joint_grad, product_grad, first, rest, joint, slots, product, k, layers, row_grads, weight_grads
        )
    rows = joint_grad.shape[1] + (0 if product_grad is None else product_grad.shape[1])
    of_weights: list[list[Tensor]] = []
    grad, second = joint_grad, product_grad
    for layer, weight in zip(reversed(layers), reversed(rest), strict=True):
        below = grad.new_empty(len(first), rows, layer.shape[2])
        own = _like_layer(weight) if weight_grads else []
        layer_backward(grad, [layer], [weight], own[:1], own[1:], [below], shared=False, second=second)
        grad, second = below, None
        of_weights.insert(0, own)
    of_weights.insert(0, _like_layer(first) if weight_grads else [])
    wide = _first_gradients(grad, first, joint, slots, product, k, of_weights[0], row_grads)
    of_joint = []
    if row_grads:
        of_joint = [batched.fold(grad[None], j.shape[1])[0] for grad, j in zip(wide, joint, strict=True)]
    return [*of_joint, *itertools.chain.from_iterable(of_weights)]


def _first_gradients(
    grad: Tensor,
    first: Tensor,
    joint: Sequence[Tensor],
    slots: Sequence[int],
    product: Sequence[Tensor],
    k: int,
    of_first: Sequence[Tensor],
    row_grads: bool,
) -> list[Tensor]:
    """Write the gradients of the first layers to `of_first`; return those of the joint features on all dim columns."""
    b, dim, hidden = len(joint[0]), first.shape[2] // 3, first.shape[1]
    of_joint = [first.new_empty(b, dim) for _ in joint] if row_grads else []
    uses = tuple(sum(1 << place for place, slot in enumerate(slots) if slot == s) for s in range(len(joint)))
    precision = precision_now()
    m, n, c, warps, stages = FIRST_BACKWARD[precision]
    weight_tiles = triton.cdiv(hidden, m) * 3 * triton.cdiv(dim, n) if of_first else 0
    row_tiles = triton.cdiv(b, m) * triton.cdiv(dim, n)
    widths, places, _, _ = _sizes(first, joint, slots)
    tiles = len(first) * weight_tiles + len(of_joint) * row_tiles
    if tiles:
        _first_backward[(tiles,)](
            grad, *_rows(joint, slots, product), first, *(of_first or (grad, grad)), tuple(of_joint) or (grad,), b,
            grad.shape[1], k, weight_tiles, row_tiles, widths, places, uses, max(1, len(of_joint)), bool(of_first),
            row_grads, dim, hidden, precision, m, n, c, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return of_joint


def _rows(joint: Sequence[Tensor], slots: Sequence[int], product: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Joint and product rows in each of the 3·G places."""
    joint = [j.contiguous() for j in joint]
    return tuple(joint[s] for s in slots), tuple(part.contiguous() for part in product)


def _sizes(first: Tensor, joint: Sequence[Tensor], slots: Sequence[int]) -> tuple[tuple[int, ...], int, int, int]:
    """Widths of the features in their places, the number of places, dim, and the hidden width."""
    return tuple(joint[s].shape[1] for s in slots), len(slots), first.shape[2] // 3, first.shape[1]


def _like_layer(weight: Tensor) -> list[Tensor]:
    return [torch.empty_like(weight), weight.new_empty(weight.shape[:2])]


# -- launches; each takes the arguments of the function it is named after --


def forward_launches(
    first: Tensor, first_bias: Tensor, rest: Sequence[Tensor], joint: Sequence[Tensor], slots: Sequence[int],
    product: Sequence[Tensor], k: int,
) -> int:  # fmt: skip
    if algorithm(first, joint, product) == "fused":
        return 1 + len(rest) // 2
    widths = [[joint[slots[3 * run.start + i]].shape[1] for i in range(3)] for run in batched.runs(joint, slots)]
    each = sum(6 + sum(1 + _folds(first, width) for width in three) for three in widths)
    # a product that begins with a bias copies it first
    return each + 3 * (len(rest) // 2) + 2


def backward_launches(
    joint_grad: Tensor, product_grad: Tensor | None, first: Tensor, rest: Sequence[Tensor], joint: Sequence[Tensor],
    slots: Sequence[int], product: Sequence[Tensor], k: int, layers: Sequence[Tensor], row_grads: bool,
    weight_grads: bool,
) -> int:  # fmt: skip
    if algorithm(first, joint, product) == "fused":
        narrow = sum(_folds(first, j.shape[1]) for j in joint) if row_grads else 0
        return len(rest) + narrow + bool(row_grads or weight_grads)
    both, dim = product_grad is not None, first.shape[2] // 3
    total = both + len(rest) * (2 + 2 * weight_grads)
    if row_grads:
        total += len(joint) + sum(1 + _folds(first, joint[s].shape[1]) for s in slots)
    if weight_grads:
        total += 1
        for run in batched.runs(joint, slots):
            widths = [joint[slots[3 * run.start + i]].shape[1] for i in range(3)]
            total += 3 + 2 * both + sum((3 if w == 1 else 2) + (w not in (1, dim)) for w in widths)
    return total


def _folds(first: Tensor, width: int) -> int:
    """Launches of `batched.fold`."""
    dim = first.shape[2] // 3
    return 0 if width == dim else 1 + 2 * (dim % width > 0)
