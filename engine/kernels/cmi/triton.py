"""Loss and values from classifiers' logits on the GPU: one launch forward, one backward, one program per classifier.

The classifiers themselves are in `classifiers`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.cmi import batched
from engine.kernels.mi_bounds.tiles import sigmoid, softplus

BLOCK, WARPS = 512, 4


@triton.jit
def _clamp(x, LIMIT: tl.constexpr):
    """NaN passes."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def _read(
    joint_ptr, product_ptr, loss_ptr, values_ptr, groups, b, p, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Loss, and LDR, DV and NWJ, of one classifier. Grid: (groups,)."""
    group = tl.program_id(0).to(tl.int64)
    prior = tl.log(tl.cast(b, tl.float32) / tl.cast(p, tl.float32))
    loss = tl.zeros([BLOCK], tl.float32)
    ldr = tl.zeros([BLOCK], tl.float32)
    exponentials = tl.zeros([BLOCK], tl.float32)
    for start in range(0, b, BLOCK):
        n = start + tl.arange(0, BLOCK)
        t = tl.load(joint_ptr + group * b + n, mask=n < b, other=0.0)
        loss += tl.where(n < b, softplus(-t - prior), 0.0)
        ldr += _clamp(t, LIMIT)
    for start in range(0, p, BLOCK):
        n = start + tl.arange(0, BLOCK)
        t = tl.load(product_ptr + group * p + n, mask=n < p, other=0.0)
        loss += tl.where(n < p, softplus(t + prior), 0.0)
        # relative to the limit, which no clamped logit exceeds
        exponentials += tl.where(n < p, tl.exp(_clamp(t, LIMIT) - LIMIT), 0.0)
    mean = tl.sum(ldr, 0) / b
    log_mean = LIMIT + tl.log(tl.sum(exponentials, 0) / p)
    tl.store(loss_ptr + group, tl.sum(loss, 0) / (b + p))
    tl.store(values_ptr + group, mean)
    tl.store(values_ptr + groups + group, mean - log_mean)
    tl.store(values_ptr + 2 * groups + group, 1.0 + mean - tl.exp(log_mean))


@triton.jit
def _read_backward(
    joint_ptr, product_ptr, loss_grad_ptr, value_grad_ptr, of_joint_ptr, of_product_ptr, b, p,
    HAS_LOSS: tl.constexpr, HAS_VALUE: tl.constexpr, WHICH: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one classifier's logits from those of its loss and of one value. Grid: (groups,)."""
    group = tl.program_id(0).to(tl.int64)
    prior = tl.log(tl.cast(b, tl.float32) / tl.cast(p, tl.float32))
    loss_grad = tl.zeros([BLOCK], tl.float32)
    value_grad = tl.zeros([BLOCK], tl.float32)
    if HAS_LOSS:
        loss_grad += tl.load(loss_grad_ptr + group) / (b + p)
    if HAS_VALUE:
        value_grad += tl.load(value_grad_ptr + group)
    for start in range(0, b, BLOCK):
        n = start + tl.arange(0, BLOCK)
        t = tl.load(joint_ptr + group * b + n, mask=n < b, other=0.0)
        grad = -loss_grad * sigmoid(-t - prior)
        if HAS_VALUE:
            grad += tl.where(tl.abs(t) <= LIMIT, value_grad / b, 0.0)
        tl.store(of_joint_ptr + group * b + n, grad, mask=n < b)
    if HAS_LOSS or WHICH > 0:
        exponentials = tl.zeros([BLOCK], tl.float32)
        if HAS_VALUE and WHICH == 1:
            for start in range(0, p, BLOCK):
                n = start + tl.arange(0, BLOCK)
                t = tl.load(product_ptr + group * p + n, mask=n < p, other=0.0)
                exponentials += tl.where(n < p, tl.exp(_clamp(t, LIMIT) - LIMIT), 0.0)
        total = tl.sum(exponentials, 0)
        for start in range(0, p, BLOCK):
            n = start + tl.arange(0, BLOCK)
            t = tl.load(product_ptr + group * p + n, mask=n < p, other=0.0)
            grad = loss_grad * sigmoid(t + prior)
            if HAS_VALUE and WHICH > 0:
                share = tl.exp(_clamp(t, LIMIT) - LIMIT) / total if WHICH == 1 else tl.exp(_clamp(t, LIMIT)) / p
                grad -= tl.where(tl.abs(t) <= LIMIT, value_grad * share, 0.0)
            tl.store(of_product_ptr + group * p + n, grad, mask=n < p)


def read(joint: Tensor, product: Tensor, limit: float) -> list[Tensor]:
    """As `batched.read`."""
    if not _fits(joint, limit):
        return batched.read(joint, product, limit)
    joint, product = joint.contiguous(), product.contiguous()
    groups = len(joint)
    loss, values = joint.new_empty(groups), joint.new_empty(3, groups)
    if groups:
        _read[(groups,)](
            joint, product, loss, values, groups, joint.shape[1], product.shape[1], limit, BLOCK, num_warps=WARPS
        )
    return [loss, values]


def read_backward(
    joint: Tensor, product: Tensor, loss_grad: Tensor | None, value_grad: Tensor | None, which: int, limit: float
) -> list[Tensor]:
    """As `batched.read_backward`."""
    if not _fits(joint, limit):
        return batched.read_backward(joint, product, loss_grad, value_grad, which, limit)
    joint, product = joint.contiguous(), product.contiguous()
    both = loss_grad is not None or which > 0
    of_joint = torch.empty_like(joint)
    of_product = torch.empty_like(product) if both else None
    if len(joint):
        _read_backward[(len(joint),)](
            joint, product, *(None if g is None else g.contiguous() for g in (loss_grad, value_grad)), of_joint,
            of_product, joint.shape[1], product.shape[1], loss_grad is not None, value_grad is not None, which, limit,
            BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return [of_joint] if of_product is None else [of_joint, of_product]


def read_launches(joint: Tensor, product: Tensor, limit: float) -> int:
    return 1 if _fits(joint, limit) else 19


def read_backward_launches(
    joint: Tensor, product: Tensor, loss_grad: Tensor | None, value_grad: Tensor | None, which: int, limit: float
) -> int:
    if _fits(joint, limit):
        return 1
    of_loss = 9 if loss_grad is not None else 0
    of_value = 5 + (0, 7, 8)[which] if value_grad is not None else 0
    return 1 + of_loss + of_value


def _fits(joint: Tensor, limit: float) -> bool:
    """Whether the kernels apply. They sum in fp32, and a large limit makes exponentials relative to it vanish."""
    return joint.dtype == torch.float32 and 0 < limit <= 40
