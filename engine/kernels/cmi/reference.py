"""Conditional mutual information I(X;Y|Z) from classifier logits, in plain torch. All values are in nats.

A classifier tells rows of the joint p = p(x,y,z) from rows of the product q = p(x|z) p(y,z). Its logit t(x,y,z) is the
estimate of log p/q, whose mean under p is I(X;Y|Z). Logits of b joint rows and b' product rows give

    LDR = mean_p t
    DV  = mean_p t − log mean_q e^t
    NWJ = 1 + mean_p t − mean_q e^t

At the exact log ratio all three estimate the same number; with finite data DV and NWJ also take in the error of the
product sample, LDR only what training made of it. Negative values are left as they are: the classifier has not learnt,
or has overfitted.

Sources: Mukherjee, Asnani, Kannan 2019 (CCMI); Molavipour, Bassi, Skoglund 2021 (LDR, DV, NWJ from one classifier).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

# Values are read from logits clamped to ±9.21: class probabilities within [1e-4, 1 − 1e-4] (Molavipour et al.). It
# keeps e^t of a wrong, confident logit from deciding DV and NWJ alone, and caps LDR at 9.21 nats. Losses are unclamped.
LOGIT_LIMIT = math.log((1 - 1e-4) / 1e-4)

MIMRL_LOGIT_LIMIT = 10.0
MIMRL_EPS = 1e-6
MIMRL_TAU = 1e-4


def classifier_loss(joint: Tensor, product: Tensor) -> Tensor:
    """Mean binary cross-entropy of joint [b] and product [b'] logits, least where the logit is log p/q, 0-d.

    With b != b' the classifier's posterior log odds are log p/q + log b/b'. The constant is added here, so that the
    logit itself stays the log ratio whatever the counts.
    """
    prior = math.log(len(joint) / len(product))
    total = functional.softplus(-joint - prior).sum() + functional.softplus(product + prior).sum()
    return total / (len(joint) + len(product))


def cmi_values(joint: Tensor, product: Tensor) -> dict[str, Tensor]:
    """{"ldr", "dv", "nwj"}, 0-d each and differentiable, from log ratios at joint [b] and product [b'] rows."""
    ldr = joint.mean()
    log_mean = product.logsumexp(0) - math.log(len(product))
    return {"ldr": ldr, "dv": ldr - log_mean, "nwj": 1 + ldr - log_mean.exp()}


# -- what the published MIMRL code computes ---------------------------------------------------------------------------


def _mimrl_probabilities(logits: Tensor, last_activate: Literal["sigmoid", "hardtanh"]) -> Tensor:
    logits = logits.clamp(-MIMRL_LOGIT_LIMIT, MIMRL_LOGIT_LIMIT)
    if last_activate == "sigmoid":
        return torch.sigmoid(logits)
    return functional.hardtanh(logits, MIMRL_TAU, 1 - MIMRL_TAU)


def mimrl_classifier_loss(joint: Tensor, product: Tensor, last_activate: Literal["sigmoid", "hardtanh"]) -> Tensor:
    """Mean BCE of two independent outputs, targets [1, 0] for joint [n, 2] and [0, 1] for product [n, 2] logits."""
    probabilities = _mimrl_probabilities(torch.cat([joint, product]), last_activate)
    target = torch.zeros_like(probabilities)
    target[: len(joint), 0] = 1
    target[len(joint) :, 1] = 1
    return functional.binary_cross_entropy(probabilities, target)


def mimrl_log_ratio(logits: Tensor, last_activate: Literal["sigmoid", "hardtanh"]) -> Tensor:
    """log g / (1 − g + 1e-6) of the first output, [n, 2] -> [n]."""
    g = _mimrl_probabilities(logits, last_activate)[:, 0]
    return torch.log(g / (1 - g + MIMRL_EPS))


def mimrl_cmi(joint: Tensor, product: Tensor) -> Tensor:
    """1 + (Σ joint − Σ product) / 2n of n log ratios each.

    With the exact ratio this is 1 + J/2, J = KL(p|q) + KL(q|p), not I(X;Y|Z): it reads 1 under independence.
    """
    return 1 + (joint.sum() - product.sum()) / (len(joint) + len(product))
