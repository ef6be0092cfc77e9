"""FLOPs of the operations' matrix products, for `torch.utils.flop_counter.FlopCounterMode`.

    from engine.kernels import flops
    flops.register()

This is not done at import, because torch's counter is slow to import. A product of [m, k] and [k, n] counts 2mkn.
Elementwise work is not counted, as in torch's own formulas. Products that a backward pass computes again count again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from engine.kernels.recurrent.cpu import state_width

# torch hands formulas the shapes of tensors in place of tensors
Shape = Sequence[int]


def _linear(rows: int, weights: Sequence[Shape]) -> int:
    """`rows` samples through weights [..., out, in]."""
    return sum(2 * rows * math.prod(w) for w in weights)


def _mlp_forward(x: Shape, more: Sequence[Shape], first: Sequence[Shape], rest: Sequence[Shape], **_: Any) -> int:
    return _linear(x[0], [*first[::2], *rest[::2]])


def _mlp_backward(
    grad: Shape, inputs: Sequence[Shape], first: Sequence[Shape], rest: Sequence[Shape], state: Shape,
    input_grads: bool, weight_grads: bool, **_: Any,
) -> int:  # fmt: skip
    rows = inputs[0][0]
    chain = _linear(rows, rest) + input_grads * _linear(rows, first)
    return chain + weight_grads * _linear(rows, [*first, *rest])


def _grouped_infonce(
    x: Shape, more: Sequence[Shape], first: Sequence[Shape], rest: Sequence[Shape], q: Sequence[int], k: Sequence[int],
    grads: bool, **_: Any,
) -> int:  # fmt: skip
    scores = 2 * len(q) * x[0] ** 2 * rest[-2][1]
    return _mlp_forward(x, more, first, rest) + (3 if grads else 1) * scores


def _grouped_infonce_backward(
    grad: Shape, inputs: Sequence[Shape], first: Sequence[Shape], rest: Sequence[Shape], state: Shape,
    q: Sequence[int], k: Sequence[int], input_grads: bool, weight_grads: bool, **_: Any,
) -> int:  # fmt: skip
    return _mlp_backward(grad, inputs, first, rest, state, input_grads, weight_grads)


def _concat_parts(x: Shape, y: Shape, layers: Sequence[Shape]) -> tuple[int, int]:
    """The part of the first layer, which is taken for x and y apart, and the part of the pairs."""
    hidden = layers[0][0]
    return 2 * (x[0] * x[1] + y[0] * y[1]) * hidden, _linear(x[0] * y[0], layers[2::2])


def _concat_forward(x: Shape, y: Shape, layers: Sequence[Shape], **_: Any) -> int:
    return sum(_concat_parts(x, y, layers))


def _concat_backward(
    grad: Shape, x: Shape, y: Shape, layers: Sequence[Shape], input_grads: bool, weight_grads: bool, **_: Any
) -> int:
    first, pairs = _concat_parts(x, y, layers)
    return (1 + input_grads + weight_grads) * first + (2 + weight_grads) * pairs


def _concat_infonce(
    x: Shape, y: Shape, layers: Sequence[Shape], transpose: bool, input_grads: bool, weight_grads: bool, **_: Any
) -> int:
    if not (input_grads or weight_grads):
        return _concat_forward(x, y, layers)
    return _concat_backward(x, x, y, layers, input_grads, weight_grads)


def _cmi_first(first: Shape, joint: Sequence[Shape], slots: Sequence[int], product: Sequence[Shape]) -> tuple[int, int]:
    """First layers of joint rows and of product rows, at the features' own widths; a label has one column."""
    hidden = first[1]
    of_joint = sum(2 * joint[s][0] * joint[s][1] * hidden for s in slots)
    return of_joint, sum(2 * rows * width * hidden for rows, width in product)


def _cmi_forward(
    first: Shape, first_bias: Shape, rest: Sequence[Shape], joint: Sequence[Shape], slots: Sequence[int],
    product: Sequence[Shape], k: int, **_: Any,
) -> int:  # fmt: skip
    return sum(_cmi_first(first, joint, slots, product)) + _linear(joint[0][0] + product[0][0], rest[::2])


def _cmi_backward(
    joint_grad: Shape, product_grad: Shape | None, first: Shape, rest: Sequence[Shape], joint: Sequence[Shape],
    slots: Sequence[int], product: Sequence[Shape], k: int, layers: Sequence[Shape], row_grads: bool,
    weight_grads: bool, **_: Any,
) -> int:  # fmt: skip
    of_joint, of_product = _cmi_first(first, joint, slots, product)
    rows = joint[0][0] + (product[0][0] if product_grad is not None else 0)
    total = (1 + weight_grads) * _linear(rows, rest) + row_grads * of_joint
    return total + weight_grads * (of_joint + (of_product if product_grad is not None else 0))


def _cube_mix_forward(
    x: Shape,
    fc1: Shape,
    bias1: Shape | None,
    fc2: Shape,
    bias2: Shape | None,
    residual: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    return _linear(x[0] * x[2], [w for w in (fc1, fc2, residual) if w is not None])


def _cube_mix_backward(
    dy: Shape, x: Shape, kept: Shape, fc1: Shape, bias1: Shape | None, fc2: Shape, bias2: Shape | None,
    residual: Shape | None, scale: Shape, shift: Shape, activation: str, ln_first: bool, eps: float, precision: str,
    need_x: bool, **_: Any,
) -> int:  # fmt: skip
    rows = x[0] * x[2]
    chain = _linear(rows, [fc2]) + need_x * _linear(rows, [w for w in (fc1, residual) if w is not None])
    return chain + _cube_mix_forward(x, fc1, bias1, fc2, bias2, residual)


def _cube_pair_forward(x: Shape, *rest: Any, **_: Any) -> int:
    modality, channel = rest[:7], rest[7:14]
    mixed = (x[0] * modality[2][0], x[2], 1)
    return _cube_mix_forward(x, *modality) + _cube_mix_forward(mixed, *channel)


def _cube_pair_backward(dy: Shape, x: Shape, mixed: Shape, kept: Shape, *rest: Any, **_: Any) -> int:
    modality, channel, settings, need_x = rest[:7], rest[7:14], rest[14:18], rest[18]
    rows = (mixed[0] * mixed[1], mixed[2], 1)
    of_channel = _cube_mix_backward(dy, rows, kept, *channel, *settings, True)
    return of_channel + _cube_mix_backward(mixed, x, kept, *modality, *settings, need_x)


def _recurrent_forward(x: Shape, length: Shape, weights: Sequence[Shape], cell: str, tokens: int, **_: Any) -> int:
    return _linear(tokens, [w for w in weights if len(w) == 2])


def _recurrent_backward(
    gradient: Shape, x: Shape, length: Shape, weights: Sequence[Shape], out: Shape, state: Shape, cell: str,
    input_gradient: bool, **_: Any,
) -> int:  # fmt: skip
    # on a GPU the state does not tell the number of tokens
    width = state_width(len(weights) // 8, weights[1][1], cell)
    tokens = state[0] // width or x[0] * x[1]
    matrices = [w for w in weights if len(w) == 2]
    unwanted = 0 if input_gradient else _linear(tokens, [matrices[0], matrices[2]])
    return 2 * _linear(tokens, matrices) - unwanted


def _knn_nearest(z: Shape, coarse: Shape, bounds: Shape, unit: Shape, query: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(query) * z[0] * z[1]


def _scores(times: int) -> Callable[..., int]:
    """q [G, B, d] against k [G, M, d], `times` products of that size."""
    return lambda q, k, *_, **__: times * 2 * math.prod(q) * k[1]


def _infonce(
    q: Shape, k: Shape, scale: Shape, positives: Shape | None, exclude_self: bool, algorithm: str, gradients: str,
    **_: Any,
) -> int:  # fmt: skip
    return _scores({"none": 1, "rows": 2, "both": 3}[gradients])(q, k)


def _contrastive_gradients(
    q: Shape, k: Shape, scale: Shape, bias: Shape | None, hardness: float, with_keys: bool, *_: Any, **__: Any
) -> int:
    return _scores(2 + with_keys)(q, k)


def _contrastive_fused(
    q: Shape, k: Shape, scale: Shape, bias: Shape | None, joint: Shape | None, decoupled: bool, hardness: float,
    smoothing: float, with_keys: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _scores(2 + with_keys)(q, k)


FORMULAS: dict[str, Callable[..., int]] = {
    "critics_mlp_forward": _mlp_forward,
    "critics_mlp_backward": _mlp_backward,
    "critics_grouped_infonce": _grouped_infonce,
    "critics_grouped_infonce_backward": _grouped_infonce_backward,
    "critics_concat_forward": _concat_forward,
    "critics_concat_backward": _concat_backward,
    "critics_concat_infonce": _concat_infonce,
    "cmi_forward": _cmi_forward,
    "cmi_backward": _cmi_backward,
    "cube_mix_forward": _cube_mix_forward,
    "cube_mix_backward": _cube_mix_backward,
    "cube_pair_forward": _cube_pair_forward,
    "cube_pair_backward": _cube_pair_backward,
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
    "knn_nearest": _knn_nearest,
    "contrastive_statistics": _scores(1),
    "contrastive_gradients": _contrastive_gradients,
    "contrastive_fused": _contrastive_fused,
    "mi_infonce": _infonce,
    "mi_infonce_keys": _scores(2),
    "mi_infonce_gradients": _scores(3),
    "mi_symmetric_statistics": _scores(2),  # one where it is chunked
    "mi_statistics": _scores(1),
    "mi_gradients": _scores(3),
    "mi_fused": _scores(3),
    "mi_mixture": _scores(1),
    "mi_mixture_gradients": _scores(3),
}


def register() -> None:
    """Tell torch the formulas; a second call does nothing."""
    for folder in ("cmi", "contrastive", "critics", "cube_mix", "knn_product", "mi_bounds", "recurrent"):
        import_module(f"engine.kernels.{folder}.op")  # which registers the operations
    for name, formula in FORMULAS.items():
        operation = getattr(torch.ops.engine, name)
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)
