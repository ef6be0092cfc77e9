"""Conditional mutual information I(X;Y|Z) from classifier logits, in plain torch. All values are in nats.

A classifier tells rows of the joint p = p(x,y,z) from rows of the product q = p(x|z) p(y,z). Its logit t(x,y,z) is the
estimate of log p/q, whose mean under p is I(X;Y|Z). Logits of b joint rows and b' product rows give

    LDR = mean_p t
    DV  = mean_p t − log mean_q e^t
    NWJ = 1 + mean_p t − mean_q e^t

At the exact log ratio all three estimate the same number. With finite data DV and NWJ also have the error of the
product sample, while LDR has it only through training. Negative values are kept: they mean that the classifier has not
learnt, or has overfitted.

Sources: Mukherjee, Asnani, Kannan 2019 (CCMI); Molavipour, Bassi, Skoglund 2021 (LDR, DV, NWJ from one classifier).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from engine.vocabulary import CONDITIONAL_ESTIMATORS

READINGS = CONDITIONAL_ESTIMATORS
"""The estimates of I(X;Y|Z) that one classifier gives."""

# Values are read from logits clamped to ±9.21, which keeps class probabilities within [1e-4, 1 − 1e-4] (Molavipour et
# al.). No confident but wrong logit can then dominate DV and NWJ, and LDR cannot exceed 9.21 nats. Losses use logits
# as they are.
LOGIT_LIMIT = math.log((1 - 1e-4) / 1e-4)


def tile(rows: Tensor, dim: int) -> Tensor:
    """Columns repeated until there are `dim`: [n, width <= dim] -> [n, dim]."""
    return rows.repeat(1, -(-dim // rows.shape[1]))[:, :dim]


def classifier_logits(
    first: Tensor,
    first_bias: Tensor,
    rest: Sequence[Tensor],
    joint: Sequence[Tensor],
    slots: Sequence[int],
    product: Sequence[Tensor],
    k: int,
) -> tuple[Tensor, Tensor]:
    """Logits [G, B, out] of joint and [G, P, out] of product rows by G classifiers MLP([x; y; z]) with ReLU.

    Args:
        first, first_bias: the first layers, [G, hidden, 3·dim], [G, hidden].
        rest: weight, bias of the further layers, [G, out, in], [G, out].
        joint: features [B, width]; those narrower than dim are repeated to it.
        slots: the places in `joint` of each classifier's x, y and z: 3·G integers.
        product: each classifier's x [P, width], and y, z [P / k, width], whose rows belong to k rows of x each.
        k: product rows per query.
    """
    dim, rows = first.shape[2] // 3, []
    for g in range(len(first)):
        x, y, z = product[3 * g : 3 * g + 3]
        parts = [joint[s] for s in slots[3 * g : 3 * g + 3]], [x, y.repeat_interleave(k, 0), z.repeat_interleave(k, 0)]
        rows.append(torch.cat([torch.cat([tile(part, dim) for part in three], 1) for three in parts]))
    out = torch.baddbmm(first_bias[:, None], torch.stack(rows), first.mT)
    for weight, bias in zip(rest[::2], rest[1::2], strict=True):
        out = torch.baddbmm(bias[:, None], out.relu(), weight.mT)
    b = len(joint[0])
    return out[:, :b], out[:, b:]


def classifier_loss(joint: Tensor, product: Tensor) -> Tensor:
    """Mean binary cross-entropy [...] of joint [..., b] and product [..., b'] logits. Its minimum is at log p/q.

    With b != b' the posterior log odds are log p/q + log b/b'. The constant is added here, so that the logit itself is
    the log ratio for all counts.
    """
    b, p = joint.shape[-1], product.shape[-1]
    prior = math.log(b / p)
    total = functional.softplus(-joint - prior).sum(-1) + functional.softplus(product + prior).sum(-1)
    return total / (b + p)


def cmi_values(joint: Tensor, product: Tensor) -> dict[str, Tensor]:
    """{"ldr", "dv", "nwj"}, [...] each, differentiable, from log ratios at joint [..., b], product [..., b'] rows."""
    ldr = joint.mean(-1)
    log_mean = product.logsumexp(-1) - math.log(product.shape[-1])
    return {"ldr": ldr, "dv": ldr - log_mean, "nwj": 1 + ldr - log_mean.exp()}
