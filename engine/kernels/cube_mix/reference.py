"""The axis mix of CubeMLP, as its formula: the spec that every faster backend is tested against."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def axis_mix(
    x: Tensor,
    axis: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
    ln_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Mix one axis of a cube with a residual two-layer perceptron.

    With MLP(u) = fc2(activation(fc1(u))), R the residual projection (the identity where it is None), all along `axis`:

        ln_first=False:  y = LayerNorm(Dropout(MLP(x)) + R(x))
        ln_first=True:   y = Dropout(MLP(LayerNorm(x))) + R(x)

    Args:
        x: [B, l, k, d], any float dtype. `axis` 1, 2 or 3 is the one mixed; its length is d_in, the others are kept.
        fc1_weight, fc1_bias: [d_hidden, d_in], [d_hidden]. fc2_weight, fc2_bias: [d_out, d_hidden], [d_out].
        residual_weight: [d_out, d_in], or None for the identity (then d_in == d_out).
        norm_weight, norm_bias: [d_out], or [d_in] with ln_first.
        activation: elementwise. dropout: applied in training only.

    Returns:
        x with the length of `axis` changed to d_out.

    Source: Sun et al., CubeMLP, ACM MM 2022; eps as in MIMRL.
    """
    u = x.transpose(axis, -1)
    h = F.layer_norm(u, u.shape[-1:], norm_weight, norm_bias, eps) if ln_first else u
    h = F.linear(activation(F.linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    h = F.dropout(h, dropout, training)
    y = h + (u if residual_weight is None else F.linear(u, residual_weight))
    if not ln_first:
        y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    return y.transpose(axis, -1)
