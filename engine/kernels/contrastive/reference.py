"""Contrastive losses as formulas over all scores, in plain torch: what is right.

Sources: van den Oord et al. 2018 (InfoNCE), Khosla et al. 2020 (supervised contrastive learning, L_out), He et al. 2020
(MoCo), Yeh et al. 2022 (decoupled), Robinson et al. 2021 (hardness), Szegedy et al. 2016 (label smoothing), Zhai et al.
2023 (sigmoid loss).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from engine.kernels.contrastive.losses import Options, masked_lse
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds.reference import embedding_scores, full_precision


def softmax_losses(
    q: Tensor, k: Tensor | None, scale: Tensor, pairs: Pairs, own_positive: Tensor | None, own_negatives: Tensor | None,
    own_mask: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses of rows [G, B], and which rows have one. Arguments as for `op.row_losses`."""
    scores, positive, negative = _all_pairs(q, k, scale, pairs, own_positive, own_negatives, own_mask)
    count, negative_count = positive.sum(-1), negative.sum(-1)
    has = (count > 0) & (negative_count > 0) if options.decoupled else count > 0
    mean = torch.where(positive, scores, 0.0).sum(-1) / count.clamp(min=1)
    # of one positive it is 0, and so is its gradient, because nothing else is added to that of `centred`
    centred = scores - mean.detach()[..., None]
    spread = masked_lse(centred, positive) - torch.where(positive, centred, 0.0).sum(-1) / count.clamp(min=1)
    of_positives = torch.where(has, masked_lse(scores, positive), 0.0)
    log_z = masked_lse((1 + options.hardness) * scores, negative)
    if options.hardness:
        log_weights = torch.where(negative_count > 0, masked_lse(options.hardness * scores, negative), 0.0)
        log_z = log_z - log_weights + negative_count.clamp(min=1).to(log_z.dtype).log()
    if options.decoupled:
        found = torch.where(has, log_z, 0.0) - mean
    else:
        found = torch.where(has, spread, 0.0) + softplus(log_z - of_positives)
    if options.smoothing:
        among_all = torch.where(positive | negative, scores, 0.0).sum(-1) / (count + negative_count).clamp(min=1)
        found = found + options.smoothing * (mean - among_all)
    return torch.where(has, found, 0.0), has


def sigmoid_losses(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
    """Sum over the keys of -log sigmoid(±(S + bias)), + at positives and - at negatives, [G, B]."""
    scores, positive, negative = _all_pairs(q, k, scale, pairs, None, None, None)
    scores = scores + bias
    return torch.where(positive, softplus(-scores), torch.where(negative, softplus(scores), 0.0)).sum(-1)


def _all_pairs(
    q: Tensor, k: Tensor | None, scale: Tensor, pairs: Pairs, own_positive: Tensor | None, own_negatives: Tensor | None,
    own_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores [G, B, C] of all keys, and which are positives and negatives, [B, C]."""
    groups, rows, _ = q.shape
    scores, positive, negative = [q.new_empty(groups, rows, 0)], [], []
    if k is not None:
        keys = k.shape[1]
        scores.append(embedding_scores(q, k, scale))
        positive.append(pairs.positive(0, rows, keys, q.device))
        left_out = pairs.left_out(0, rows, keys, q.device)
        negative.append(~positive[-1] if left_out is None else ~(positive[-1] | left_out))
    if own_negatives is not None:
        scores.append(scale * own_scores(q, own_negatives))
        kept = ~own_mask if own_mask is not None else q.new_ones(rows, own_negatives.shape[2], dtype=torch.bool)
        positive.append(torch.zeros_like(kept))
        negative.append(kept)
    if own_positive is not None:
        scores.append(scale * own_scores(q, own_positive[:, :, None]))
        positive.append(q.new_ones(rows, 1, dtype=torch.bool))
        negative.append(q.new_zeros(rows, 1, dtype=torch.bool))
    return torch.cat([s.to(scale.dtype) for s in scores], -1), torch.cat(positive, -1), torch.cat(negative, -1)


def own_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q_i . keys_ij: [G, B, d] and [G, B, n, d] to [G, B, n]. Sums, because products may be tf32 on a GPU."""
    return (full_precision(q)[:, :, None] * full_precision(keys)).sum(-1)
