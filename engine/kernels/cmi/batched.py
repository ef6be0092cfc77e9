"""Classifiers of joint against product rows, all at once, by torch's batched products.

This is the CPU backend. On a GPU it runs where the fused kernels do not apply: many rows, or another type than fp32.

Compared with one classifier after another on rows written out, it saves four things:

- A feature of few columns, such as a label, is not repeated to the classifier's width. Its columns of the first layer
  are added up instead, so that 128 columns of a label become one.
- y and z of product rows enter the first layer once per query, not once per row.
- Gradients of features that several classifiers read are accumulated in place.
- Only wanted gradients are computed: none of frozen weights, and none of product rows where their logits have no
  gradient (LDR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


def forward(
    first: Tensor,
    first_bias: Tensor,
    rest: Sequence[Tensor],
    joint: Sequence[Tensor],
    slots: Sequence[int],
    product: Sequence[Tensor],
    k: int,
) -> list[Tensor]:
    """Logits [G, B, out] of joint and [G, P, out] of product rows, then hidden layers [G, B + P, hidden] after ReLU.

    Args:
        first, first_bias: [G, hidden, 3·dim], [G, hidden].
        rest: weight, bias of the further layers, [G, out, in], [G, out].
        joint: features [B, width <= dim].
        slots: of every classifier the places in `joint` of its x, y and z: 3·G integers.
        product: of every classifier x [P, width], y and z [P / k, width]: 3·G tensors.
        k: product rows per query.
    """
    b, p = len(joint[0]), len(product[0])
    hidden = first.new_empty(len(first), b + p, first.shape[1])
    for run in runs(joint, slots):
        x, y, z = _rows(run, joint, slots, product)
        once = first_bias[run, None].repeat(1, b + p // k, 1)  # joint rows, and queries before they are repeated
        _add_product(once, y, _slot(first, run, 1))
        _add_product(once, z, _slot(first, run, 2))
        into = hidden[run]
        into[:, :b] = once[:, :b]
        into[:, b:].unflatten(1, (-1, k)).copy_(once[:, b:, None].expand(-1, -1, k, -1))
        _add_product(into, x, _slot(first, run, 0))
    layers = [hidden.relu_()]
    for n in range(0, len(rest), 2):
        weight, bias = rest[n : n + 2]
        out = torch.baddbmm(bias[:, None], layers[-1], weight.mT)
        layers.append(out.relu_() if n + 2 < len(rest) else out)
    logits = layers.pop()
    return [logits[:, :b].clone(), logits[:, b:].clone(), *layers]


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
    """Gradients from those of the logits: of `joint` (if row_grads), then of first, first_bias, rest (if weight_grads).

    Args:
        joint_grad: [G, B, out].
        product_grad: [G, P, out], or None for zero.
        rest: weights of the further layers alone.
        layers: the hidden layers that `forward` returned.
    """
    b = len(joint[0])
    grad = joint_grad if product_grad is None else torch.cat([joint_grad, product_grad], 1)
    rows = grad.shape[1]
    of_rest: list[Tensor] = []
    for layer, weight in zip(reversed(layers), reversed(rest), strict=True):
        layer = layer[:, :rows]
        if weight_grads:
            of_rest = [torch.bmm(grad.mT, layer), grad.sum(1), *of_rest]
        grad = grad * weight if weight.shape[1] == 1 else torch.bmm(grad, weight)
        # the gradient of ReLU, in place
        torch.ops.aten.threshold_backward.grad_input(grad, layer, 0, grad_input=grad)
    of_joint = [torch.zeros_like(j) for j in joint] if row_grads else []
    if row_grads:
        for g, run in enumerate(_each(runs(joint, slots))):
            for i, s in enumerate(slots[3 * g : 3 * g + 3]):
                weight = fold(_slot(first, run, i), joint[s].shape[1])[g - run.start]
                of_joint[s].addmm_(grad[g, :b], weight)
    if not weight_grads:
        return of_joint
    of_first = torch.empty_like(first)
    for run in runs(joint, slots):
        x, y, z = _rows(run, joint, slots, product if product_grad is not None else None)
        part = grad[run]
        once = part
        if product_grad is not None:
            once = torch.cat([part[:, :b], part[:, b:].unflatten(1, (-1, k)).sum(2)], 1)
        for i, (each, of_pre) in enumerate(((x, part), (y, once), (z, once))):
            # a product with one column is slow
            one = each.shape[2] == 1
            gradient = (of_pre * each).sum(1)[:, :, None] if one else torch.bmm(of_pre.mT, each)
            _unfold(gradient, _slot(of_first, run, i))
    return [*of_joint, of_first, grad.sum(1), *of_rest]


def runs(joint: Sequence[Tensor], slots: Sequence[int]) -> list[slice]:
    """Neighbouring classifiers whose features have the same widths: they run as one batch."""
    widths = [tuple(joint[s].shape[1] for s in slots[at : at + 3]) for at in range(0, len(slots), 3)]
    starts = [g for g in range(len(widths)) if g == 0 or widths[g] != widths[g - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(widths)], strict=True)]


def _each(runs: Sequence[slice]) -> list[slice]:
    """The run of every classifier."""
    return [run for run in runs for _ in range(run.start, run.stop)]


def _slot(first: Tensor, run: slice, i: int) -> Tensor:
    """A run's weights of the first layer on x, y or z: a view [n, hidden, dim]."""
    dim = first.shape[2] // 3
    return first[run, :, i * dim : (i + 1) * dim]


def _rows(run: slice, joint: Sequence[Tensor], slots: Sequence[int], product: Sequence[Tensor] | None) -> list[Tensor]:
    """x [n, B + P, width], y and z [n, B + P / k, width] of a run; with product None [n, B, width]."""
    places = [range(3 * run.start + i, 3 * run.stop + i, 3) for i in range(3)]
    if product is None:
        return [torch.stack([joint[slots[at]] for at in of_slot]) for of_slot in places]
    return [
        torch.cat([t for at in of_slot for t in (joint[slots[at]], product[at])]).unflatten(0, (len(of_slot), -1))
        for of_slot in places
    ]


def fold(weight: Tensor, width: int) -> Tensor:
    """Weights [n, hidden, dim] on `width` columns repeated to dim -> [n, hidden, width] on the columns themselves."""
    dim = weight.shape[2]
    if width == dim:
        return weight
    times, rest = divmod(dim, width)
    folded = weight[:, :, : times * width].unflatten(2, (times, width)).sum(2)
    if rest:
        folded[:, :, :rest] += weight[:, :, times * width :]
    return folded


def _unfold(grad: Tensor, into: Tensor) -> None:
    """Gradient [n, hidden, width] of `fold`ed weights -> into [n, hidden, dim]."""
    dim, width = into.shape[2], grad.shape[2]
    into.copy_(grad if width in (1, dim) else grad.repeat(1, 1, -(-dim // width))[:, :, :dim])


def _add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """total [n, R, hidden] += rows [n, R, width] · weights [n, hidden, dim] on repeated columns."""
    weight = fold(weight, rows.shape[2])
    if rows.shape[2] == 1:
        total.addcmul_(rows, weight.mT)
    else:
        total.baddbmm_(rows, weight.mT)


# -- from logits to loss and values -----------------------------------------------------------------------------------


def read(joint: Tensor, product: Tensor, limit: float) -> list[Tensor]:
    """Of logits [G, B] and [G, P] the loss [G], and LDR, DV and NWJ of logits clamped to ±limit, [3, G]."""
    b, p = joint.shape[1], product.shape[1]
    prior = math.log(b / p)
    loss = softplus(-joint - prior).sum(1) + softplus(product + prior).sum(1)
    ldr = joint.clamp(-limit, limit).mean(1)
    log_mean = product.clamp(-limit, limit).logsumexp(1) - math.log(p)
    return [loss / (b + p), torch.stack([ldr, ldr - log_mean, 1 + ldr - log_mean.exp()])]


def read_backward(
    joint: Tensor, product: Tensor, loss_grad: Tensor | None, value_grad: Tensor | None, which: int, limit: float
) -> list[Tensor]:
    """Gradients of the logits [G, B] and, unless they are zero, [G, P].

    Args:
        loss_grad, value_grad: [G], of the loss and of LDR, DV or NWJ (which = 0, 1, 2); None for zero.
    """
    b, p = joint.shape[1], product.shape[1]
    of_joint, of_product = torch.zeros_like(joint), None
    if loss_grad is not None:
        prior, each = math.log(b / p), (loss_grad / (b + p))[:, None]
        of_joint -= each * torch.sigmoid(-joint - prior)
        of_product = each * torch.sigmoid(product + prior)
    if value_grad is not None:
        value_grad = value_grad[:, None]
        of_joint += value_grad / b * (joint.abs() <= limit)
        if which > 0:
            clamped = product.clamp(-limit, limit)
            share = clamped.softmax(1) if which == 1 else clamped.exp() / p
            share = share * value_grad * (product.abs() <= limit)
            of_product = -share if of_product is None else of_product - share
    return [of_joint] if of_product is None else [of_joint, of_product]
