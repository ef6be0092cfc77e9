"""The concat critic on the GPU in slabs of pairs: library products, and fused kernels for all that is between them.

A slab is a block of rows against all columns, about 16 thousand pairs, whose hidden layers are stored [pairs, hidden].
Its first layer is an outer sum that one kernel forms with its ReLU; every further layer is a product and one kernel
that adds the bias and applies the ReLU, at the last layer with the product with the output's weights. Backward, the
derivative of ReLU is one kernel together with the bias's gradient. InfoNCE takes value and gradient from one pass: a
slab holds whole rows, so that its softmax is known as soon as its scores are. Only where a row alone fills a slab do
its columns take turns, and their layers are computed twice.

Memory: a slab's layers, (depth + 2) · `SLAB_NUMBERS` numbers for `depth` hidden layers after the first (64 MiB in fp32
and half of it in bf16 for the usual two), `BLOCKS` partial sums per layer, and a slab's scores. Gradients of layers
take turns in the last layer's memory and in one more. What fits into a GPU's cache need not come from its memory:
`share` makes slabs that much smaller, in as many times the launches.

Products are taken as torch takes them: in fp32, or in TF32 where torch.backends.cuda.matmul.allow_tf32 is set, with
operands rounded to nearest. With torch.set_float32_matmul_precision("medium") layers are stored, and multiplied, in
bf16. Weights' gradients are fp32 and add up in the order of slabs; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.mlp.triton import positive, precision_now

SLAB_NUMBERS = 1 << 22  # 16,384 pairs of 256 features
BLOCKS = 256  # programs that share a slab's pairs, each with partial sums of its own
PAIRS, FEATURES = 16, 64  # pairs and features of a tile of a slab
COLUMNS = 1024  # columns of a tile of scores
WARPS = 4


@triton.jit(do_not_specialize=["pairs", "columns"])
def _outer(row_ptr, column_ptr, out_ptr, pairs, columns, hidden, PAIRS: tl.constexpr, FEATURES: tl.constexpr):
    """The first hidden layer of a slab, [pairs, hidden]: ReLU of the sum of a row's and a column's part. Grid: (pair
    blocks, feature blocks)."""
    p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    live = (p < pairs)[:, None] & (f < hidden)[None, :]
    of_row = tl.load(row_ptr + (p // columns)[:, None] * hidden + f[None, :], mask=live, other=0.0)
    of_column = tl.load(column_ptr + (p % columns)[:, None] * hidden + f[None, :], mask=live, other=0.0)
    value = positive(of_row + of_column).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + p[:, None] * hidden + f[None, :], value, mask=live)


@triton.jit(do_not_specialize=["pairs"])
def _bias_relu(layer_ptr, bias_ptr, pairs, hidden, PAIRS: tl.constexpr, FEATURES: tl.constexpr):
    """layer = ReLU(layer + bias), in place. Grid: (pair blocks, feature blocks)."""
    p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    place = layer_ptr + p[:, None] * hidden + f[None, :]
    live = (p < pairs)[:, None] & (f < hidden)[None, :]
    bias = tl.load(bias_ptr + f, mask=f < hidden, other=0.0)
    value = positive(tl.load(place, mask=live, other=0.0).to(tl.float32) + bias[None, :])
    tl.store(place, value.to(layer_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["pairs", "columns", "column0", "row_step"])
def _output(
    layer_ptr, bias_ptr, last_ptr, last_bias_ptr, scores_ptr, pairs, columns, column0, row_step, hidden,
    HAS_BIAS: tl.constexpr, PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Scores of a slab from its last hidden layer, which gets its bias and ReLU here (HAS_BIAS), in place. Scores have
    `row_step` columns. Grid: (pair blocks,)."""
    p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    total = tl.zeros([PAIRS], tl.float32)
    for f0 in range(0, hidden, FEATURES):
        f = f0 + tl.arange(0, FEATURES)
        place = layer_ptr + p[:, None] * hidden + f[None, :]
        live = (p < pairs)[:, None] & (f < hidden)[None, :]
        value = tl.load(place, mask=live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value = positive(value + tl.load(bias_ptr + f, mask=f < hidden, other=0.0)[None, :])
            tl.store(place, value.to(layer_ptr.dtype.element_ty), mask=live)
        total += tl.sum(value * tl.load(last_ptr + f, mask=f < hidden, other=0.0)[None, :], 1)
    place = scores_ptr + (p // columns).to(tl.int64) * row_step + column0 + p % columns
    tl.store(place, total + tl.load(last_bias_ptr), mask=p < pairs)


@triton.jit(do_not_specialize=["columns", "row0", "count"])
def _losses(scores_ptr, loss_ptr, columns, row0, count, GRADS: tl.constexpr, COLUMNS: tl.constexpr):
    """InfoNCE's loss of one row of scores, whose joint score is at its own number; with GRADS the scores are replaced
    by the derivatives of the mean loss of `count` rows. A row with a score that is not finite gives NaN. Grid: (rows of
    the slab,)."""
    row = scores_ptr + tl.program_id(0).to(tl.int64) * columns
    own = row0 + tl.program_id(0)
    joint = tl.load(row + own)
    check = tl.zeros([COLUMNS], tl.float32)
    high = tl.full([COLUMNS], float("-inf"), tl.float32)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        score = tl.load(row + j, mask=j < columns, other=0.0)
        check += score - score
        high = tl.maximum(high, tl.where((j < columns) & (j != own), score, float("-inf")))
    check_all = tl.sum(check, 0)
    top = tl.max(high, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        score = tl.load(row + j, mask=(j < columns) & (j != own), other=float("-inf"))
        total += tl.exp(score - base)
    rest = base + tl.log(tl.sum(total, 0))
    difference = rest - joint
    e = tl.exp(-tl.abs(difference))
    above = tl.log(1.0 + e) + check_all
    tl.store(loss_ptr + own, tl.maximum(difference, 0.0) + above)
    if GRADS:
        # every thread has read the joint score before one of them replaces it
        tl.debug_barrier()
        diagonal = -tl.where(difference >= 0, 1.0, e) / (1.0 + e) + check_all
        # not the joint score and the loss, whose sum has few digits where the joint score is far below the others
        log_sum = tl.maximum(rest, joint) + above
        for start in range(0, columns, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            score = tl.load(row + j, mask=j < columns, other=0.0)
            # chosen, not added: the diagonal's own derivative keeps its digits where the positive has all the weight
            slope = tl.where(j == own, diagonal, tl.exp(score - log_sum))
            tl.store(row + j, slope / tl.cast(count, tl.float32), mask=j < columns)


@triton.jit(do_not_specialize=["pairs", "columns", "column0", "row_step", "add"])
def _output_backward(
    slope_ptr, layer_ptr, last_ptr, grad_ptr, of_last_ptr, of_bias_ptr, pairs, columns, column0, row_step, hidden, add,
    BIAS: tl.constexpr, PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Of a slab the gradient of the last hidden layer before its ReLU, [pairs, hidden], from those of the scores; its
    part of the last weight's gradient and, with BIAS, of the layer's bias. Grid: (blocks, feature blocks), each block
    with partial sums of its own, [blocks, hidden], that it adds to with `add`."""
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    weight = tl.load(last_ptr + f, mask=f < hidden, other=0.0)
    of_last = tl.zeros([FEATURES], tl.float32)
    of_bias = tl.zeros([FEATURES], tl.float32)
    for start in range(tl.program_id(0) * PAIRS, pairs, tl.num_programs(0) * PAIRS):
        p = start + tl.arange(0, PAIRS)
        place = p[:, None] * hidden + f[None, :]
        live = (p < pairs)[:, None] & (f < hidden)[None, :]
        slope = tl.load(
            slope_ptr + (p // columns).to(tl.int64) * row_step + column0 + p % columns, mask=p < pairs, other=0.0
        )
        value = tl.load(layer_ptr + place, mask=live, other=0.0).to(tl.float32)
        grad = tl.where(value <= 0, 0.0, slope[:, None] * weight[None, :])
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=live)
        of_last += tl.sum(value * slope[:, None], 0)
        of_bias += tl.sum(tl.where(live, grad, 0.0), 0)
    own = tl.program_id(0) * hidden + f
    before = f < hidden * add
    tl.store(of_last_ptr + own, of_last + tl.load(of_last_ptr + own, mask=before, other=0.0), mask=f < hidden)
    if BIAS:
        tl.store(of_bias_ptr + own, of_bias + tl.load(of_bias_ptr + own, mask=before, other=0.0), mask=f < hidden)


@triton.jit(do_not_specialize=["pairs", "add"])
def _relu_backward(
    grad_ptr, layer_ptr, of_bias_ptr, pairs, hidden, add, PAIRS: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """Gradient of a hidden layer before its ReLU, in place, and the bias's part of it. Grid as `_output_backward`."""
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    of_bias = tl.zeros([FEATURES], tl.float32)
    for start in range(tl.program_id(0) * PAIRS, pairs, tl.num_programs(0) * PAIRS):
        p = start + tl.arange(0, PAIRS)
        place = p[:, None] * hidden + f[None, :]
        live = (p < pairs)[:, None] & (f < hidden)[None, :]
        kept = tl.load(layer_ptr + place, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=live, other=0.0).to(tl.float32)
        grad = tl.where(kept <= 0, 0.0, grad)
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=live)
        of_bias += tl.sum(grad, 0)
    own = tl.program_id(0) * hidden + f
    before = tl.load(of_bias_ptr + own, mask=f < hidden * add, other=0.0)
    tl.store(of_bias_ptr + own, of_bias + before, mask=f < hidden)


@triton.jit(do_not_specialize=["rows", "columns", "add_rows", "add_columns"])
def _sides(
    grad_ptr, row_ptr, column_ptr, of_rows_ptr, of_columns_ptr, rows, columns, hidden, add_rows, add_columns,
    PAIRS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of both parts of a slab's first layer, [rows, hidden] and [columns, hidden], from that of the layer
    after its ReLU. Grid: (rows + columns, feature blocks)."""
    number = tl.program_id(0)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    is_row = number < rows
    own = tl.where(is_row, number, number - rows)
    own_ptr, other_ptr, of_ptr = column_ptr, row_ptr, of_columns_ptr
    if is_row:
        own_ptr, other_ptr, of_ptr = row_ptr, column_ptr, of_rows_ptr
    add = tl.where(is_row, add_rows, add_columns)
    others = tl.where(is_row, columns, rows)
    # steps in pairs from one of these to the next, and from one of the others
    step, across = tl.where(is_row, columns, 1), tl.where(is_row, 1, columns)
    value = tl.load(own_ptr + own * hidden + f, mask=f < hidden, other=0.0)
    total = tl.zeros([FEATURES], tl.float32)
    for start in range(0, others, PAIRS):
        j = start + tl.arange(0, PAIRS)
        live = (j < others)[:, None] & (f < hidden)[None, :]
        other = tl.load(other_ptr + j[:, None] * hidden + f[None, :], mask=live, other=0.0)
        place = (own * step + j * across)[:, None] * hidden + f[None, :]
        grad = tl.load(grad_ptr + place, mask=live, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(value[None, :] + other <= 0, 0.0, grad), 0)
    place = of_ptr + own * hidden + f
    total += tl.load(place, mask=f < hidden * add, other=0.0)
    tl.store(place, total, mask=f < hidden)


# -- host functions --


def forward_pairs(of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], scores: Tensor, share: int = 1) -> None:
    """As `plain.forward_pairs`."""
    slabs = _Slabs(of_y, of_x, further, share, backward=False)
    for rows, columns in slabs.all():
        slabs.forward(rows, columns, scores[rows])


def backward_pairs(
    grad: Tensor, of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], sums_x: Tensor, sums_y: Tensor,
    of_weights: Sequence[Tensor], share: int = 1,
) -> None:  # fmt: skip
    """As `plain.backward_pairs`."""
    slabs = _Slabs(of_y, of_x, further, share, backward=True)
    grad = grad.contiguous()
    for rows, columns in slabs.all():
        layers = slabs.forward(rows, columns)
        slabs.backward(rows, columns, layers, grad[rows], sums_y, sums_x, of_weights)
    slabs.finish(sums_y, sums_x, of_weights)
    if of_weights:
        torch.sum(grad.reshape(1, -1), 1, out=of_weights[-1])


def infonce_pairs(
    of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], transpose: bool, losses: Tensor, sums_x: Tensor | None,
    sums_y: Tensor | None, of_weights: Sequence[Tensor], share: int = 1,
) -> None:  # fmt: skip
    """As `plain.infonce_pairs`."""
    (row, sums_row), (column, sums_column) = ((of_x, sums_x), (of_y, sums_y))[:: 1 if transpose else -1]
    grads = sums_row is not None
    slabs = _Slabs(row, column, further, share, backward=grads)
    scores = row.new_empty(slabs.height, len(column))
    for rows in slabs.rows():
        own = scores[: rows.stop - rows.start]
        chunks = list(slabs.columns())
        for columns in chunks:
            layers = slabs.forward(rows, columns, own)
        _losses[(len(own),)](own, losses, len(column), rows.start, len(row), grads, COLUMNS, num_warps=WARPS)
        for columns in chunks if grads else ():
            if len(chunks) > 1:
                layers = slabs.forward(rows, columns)
            slabs.backward(rows, columns, layers, own, sums_row, sums_column, of_weights)
    if grads:
        slabs.finish(sums_row, sums_column, of_weights)
        if of_weights:
            # InfoNCE does not depend on the last bias: 0, or NaN where the loss is
            torch.sum(losses * 0, 0, keepdim=True, out=of_weights[-1])


def launches(
    rows: int, columns: int, hidden: int, depth: int, kind: str, weight_grads: bool, share: int = 1
) -> int:  # fmt: skip
    """Kernels that `forward_pairs`, `backward_pairs`, or `infonce_pairs` with or without gradients launch, as `kind`
    "forward", "backward", "infonce" or "losses" says."""
    height, width = _size(rows, columns, hidden, share)
    half = int(_dtype() != torch.float32)
    casts = depth * half
    last = {"backward": 1, "infonce": 2}.get(kind, 0) if weight_grads else 0
    if not rows * columns:
        return casts + (2 + last + (2 * depth + 2 if weight_grads else 0) if kind in ("backward", "infonce") else 0)
    chunks, slabs = -(-columns // width), -(-rows // height)
    scored = 1 + max(1, 2 * depth)
    again = 1 + 2 * depth
    back = 2 + depth * (1 + (1 + half) * weight_grads) + max(0, depth - 1)
    each = {
        "forward": scored,
        "backward": again + back,
        "losses": scored,
        "infonce": scored + back + (again if chunks > 1 else 0),
    }[kind]
    softmax = slabs if kind in ("losses", "infonce") else 0
    finish = last + depth + 1 if weight_grads else 0
    return casts + slabs * chunks * each + softmax + finish


class _Slabs:
    """Slabs of pairs of rows and columns, and the memory for one of them.

    Attributes:
        row, column: both parts of the first layer's output, [rows, hidden] and [columns, hidden].
        weights, biases: of the further hidden layers, weights in the type that products are taken in.
        last, last_bias: of the output.
        height, width: rows and columns of a slab.
        layers, spare: memory for hidden layers of a slab's pairs, and for the gradient of one of them.
        sums: [depth + 1, blocks, hidden], partial sums of the biases' gradients and of the last weight's.
    """

    def __init__(self, row: Tensor, column: Tensor, further: Sequence[Tensor], share: int, backward: bool):
        dtype = _dtype()
        self.row, self.column, self.hidden = row, column, row.shape[1]
        self.weights, self.biases = [w.to(dtype) for w in further[:-2:2]], further[1:-2:2]
        self.last, self.last_bias = further[-2:]
        self.depth = len(self.weights)
        self.height, self.width = _size(len(row), len(column), self.hidden, share)
        memory = row.new_empty(_layers(self.depth, backward), self.height * self.width * self.hidden, dtype=dtype)
        self.layers, self.spare = memory[: self.depth + 1], memory[-1]
        blocks = min(BLOCKS, triton.cdiv(max(1, self.height * self.width), PAIRS))
        self.sums = row.new_empty(self.depth + 1 if backward else 0, blocks, self.hidden)
        self.features = triton.cdiv(self.hidden, FEATURES)

    def rows(self) -> Iterator[slice]:
        for start in range(0, len(self.row), self.height):
            yield slice(start, min(start + self.height, len(self.row)))

    def columns(self) -> Iterator[slice]:
        for start in range(0, len(self.column), self.width):
            yield slice(start, min(start + self.width, len(self.column)))

    def all(self) -> Iterator[tuple[slice, slice]]:
        for rows in self.rows():
            for columns in self.columns():
                yield rows, columns

    def forward(self, rows: slice, columns: slice, scores: Tensor | None = None) -> list[Tensor]:
        """The hidden layers of a slab, [pairs, hidden] each; where they are wanted also its scores, into those columns
        of `scores` [rows, all columns]."""
        row, column = self.row[rows], self.column[columns]
        pairs = len(row) * len(column)
        layers = [memory[: pairs * self.hidden].view(pairs, self.hidden) for memory in self.layers]
        tiles = triton.cdiv(pairs, PAIRS), self.features
        tile = {"PAIRS": PAIRS, "FEATURES": FEATURES, "num_warps": WARPS}
        _outer[tiles](row, column, layers[0], pairs, len(column), self.hidden, **tile)
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            torch.mm(layers[n], weight.t(), out=layers[n + 1])
            if scores is None or n + 1 < self.depth:
                _bias_relu[tiles](layers[n + 1], bias, pairs, self.hidden, **tile)
        if scores is not None:
            _output[tiles[:1]](
                layers[-1], self.biases[-1] if self.depth else self.last, self.last, self.last_bias, scores, pairs,
                len(column), columns.start, scores.shape[1], self.hidden, HAS_BIAS=self.depth > 0, **tile,
            )  # fmt: skip
        return layers

    def backward(
        self, rows: slice, columns: slice, layers: Sequence[Tensor], slopes: Tensor, of_rows: Tensor,
        of_columns: Tensor, of_weights: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Add a slab's gradients to all sums, from its layers and the derivatives by its scores: those columns of
        `slopes` [rows, all columns]. The last layer is overwritten."""
        row, column = self.row[rows], self.column[columns]
        pairs, later = len(row) * len(column), rows.start > 0 or columns.start > 0
        grad, other = layers[-1], self.spare[: pairs * self.hidden].view(pairs, self.hidden)
        blocks = self.sums.shape[1], self.features
        tile = {"PAIRS": PAIRS, "FEATURES": FEATURES, "num_warps": WARPS}
        _output_backward[blocks](
            slopes, layers[-1], self.last, grad, self.sums[-1], self.sums[max(0, self.depth - 1)], pairs, len(column),
            columns.start, slopes.shape[1], self.hidden, int(later), BIAS=self.depth > 0, **tile,
        )  # fmt: skip
        for n in range(self.depth - 1, -1, -1):
            if of_weights:
                _add_product(of_weights[2 * n], grad.t(), layers[n], later)
            torch.mm(grad, self.weights[n], out=other)
            grad, other = other, grad
            if n > 0:
                _relu_backward[blocks](grad, layers[n], self.sums[n - 1], pairs, self.hidden, int(later), **tile)
        _sides[len(row) + len(column), self.features](
            grad, row, column, of_rows[rows], of_columns[columns], len(row), len(column), self.hidden,
            int(columns.start > 0), int(rows.start > 0), **tile,
        )  # fmt: skip

    def finish(self, of_rows: Tensor, of_columns: Tensor, of_weights: Sequence[Tensor]) -> None:
        """The biases' gradients and the last weight's; zeros where there are no pairs."""
        if not len(self.row) * len(self.column):
            for total in (of_rows, of_columns, *of_weights):
                total.zero_()
        elif of_weights:
            for n, total in enumerate([*of_weights[1:-2:2], of_weights[-2][0]]):
                torch.sum(self.sums[n], 0, out=total)


def _add_product(total: Tensor, a: Tensor, b: Tensor, later: bool) -> None:
    """total = a b, or with `later` total + a b; in total's type, which is fp32."""
    if a.dtype != total.dtype:
        product = torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a.float(), b.float())
        total.add_(product) if later else total.copy_(product)
    elif later:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)


def _size(rows: int, columns: int, hidden: int, share: int = 1) -> tuple[int, int]:
    """Rows and columns of a slab."""
    pairs = max(1, SLAB_NUMBERS // (hidden * share))
    width = max(1, min(columns, pairs))
    return max(1, min(rows, pairs // width)), width


def _layers(depth: int, backward: bool) -> int:
    """Hidden layers, and the gradient of one, that a slab's memory holds."""
    return depth + 1 + int(backward and depth > 0)


def _dtype() -> torch.dtype:
    return torch.bfloat16 if precision_now() == "bf16" else torch.float32
