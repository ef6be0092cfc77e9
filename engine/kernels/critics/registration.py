"""The critics' operations in torch: schemas, and shapes of the results."""

from __future__ import annotations

from engine.kernels.critics.plain import concat_shapes, flat, grad_shapes, infonce_state_size, state_size
from engine.kernels.registry import register_from

# In these, x.shape[0]: len(x) would fix a dynamic size.


def _fake_mlp_forward(x, more, first, rest):
    count, width = sum(w.shape[0] for w in first[::2]), rest[-2].shape[1]
    state = state_size(x.shape[0], count, first[0].shape[1], len(rest) // 2)
    return x.new_empty(count, x.shape[0], width), x.new_empty(state)


def _fake_mlp_backward(grad, inputs, first, rest, state, input_grads, weight_grads):
    return flat(grad, grad_shapes(inputs, (*first, *rest), input_grads, weight_grads))[0]


def _fake_grouped_infonce(x, more, first, rest, q, k, grads):
    size = infonce_state_size(x.shape[0], 2 * len(q), first[0].shape[1], rest[-2].shape[1], len(rest) // 2)
    return x.new_empty(len(q)), x.new_empty(size if grads else 0)


def _fake_grouped_infonce_backward(grad, inputs, first, rest, state, q, k, input_grads, weight_grads):
    return _fake_mlp_backward(grad, inputs, first, rest, state, input_grads, weight_grads)


def _fake_concat_backward(grad, x, y, layers, input_grads, weight_grads):
    return flat(x, concat_shapes(x, y, layers, input_grads, weight_grads))[0]


def _fake_concat_infonce(x, y, layers, transpose, input_grads, weight_grads):
    return x.new_empty(x.shape[0]), _fake_concat_backward(None, x, y, layers, input_grads, weight_grads)


_add = register_from("engine.kernels.critics", "critics_")
_GRADS = "bool input_grads, bool weight_grads"
_MLPS = "Tensor x, Tensor[] more, Tensor[] first, Tensor[] rest"
_MLPS_BACKWARD = "Tensor grad, Tensor[] inputs, Tensor[] first, Tensor[] rest, Tensor state"

_add("mlp_forward", f"({_MLPS}) -> (Tensor, Tensor)", "towers", _fake_mlp_forward)
_add("mlp_backward", f"({_MLPS_BACKWARD}, {_GRADS}) -> Tensor", "towers", _fake_mlp_backward)
_add(
    "grouped_infonce",
    f"({_MLPS}, int[] q, int[] k, bool grads) -> (Tensor, Tensor)",
    "towers",
    _fake_grouped_infonce,
)
_add(
    "grouped_infonce_backward",
    f"({_MLPS_BACKWARD}, int[] q, int[] k, {_GRADS}) -> Tensor",
    "towers",
    _fake_grouped_infonce_backward,
)
_add(
    "concat_forward",
    "(Tensor x, Tensor y, Tensor[] layers) -> Tensor",
    "triton",
    lambda x, y, layers: x.new_empty(y.shape[0], x.shape[0]),
)
_add(
    "concat_backward",
    f"(Tensor grad, Tensor x, Tensor y, Tensor[] layers, {_GRADS}) -> Tensor",
    "triton",
    _fake_concat_backward,
)
_add(
    "concat_infonce",
    f"(Tensor x, Tensor y, Tensor[] layers, bool transpose, {_GRADS}) -> (Tensor, Tensor)",
    "triton",
    _fake_concat_infonce,
)
