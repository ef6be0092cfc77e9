"""Conditional information from classifiers of joint against product rows, as differentiable operations.

    joint, product = classifier_logits(first, rest, features, slots, products, k)   # G classifiers at once
    loss, value, readings = cmi(joint, product, "ldr")                              # one pass gives loss and values

Both compute in fp32 (fp64 for fp64 inputs), also under autocast, and are bitwise deterministic for a fixed number of
threads. Only the reference has second derivatives; the other backends raise ConfigError. On a GPU each layer of all
classifiers is one launch, and loss and values are one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import check_number, exact_type
from engine.kernels.cmi import reference
from engine.kernels.cmi.reference import LOGIT_LIMIT, READINGS
from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for, call, register_from


class CMIOutput(NamedTuple):
    """Loss and estimates from classifiers' logits, in nats.

    Attributes:
        loss: [...], binary cross-entropy, which the classifiers minimise; differentiable.
        value: [...], the estimate of I(X;Y|Z); differentiable.
        readings: LDR, DV and NWJ, [3, ...], detached.
    """

    loss: Tensor
    value: Tensor
    readings: Tensor


def classifier_logits(
    first: tuple[Tensor, Tensor],
    rest: Sequence[tuple[Tensor, Tensor]],
    joint: Sequence[Tensor],
    slots: Sequence[tuple[int, int, int]],
    product: Sequence[tuple[Tensor, Tensor, Tensor]],
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """Logits of G classifiers MLP([x; y; z]) of one shape, ReLU between the layers, on joint and on product rows.

    Features narrower than dim are treated as repeated up to it. Gradients reach weights, biases and joint features.
    Product rows are constants.

    Args:
        first: weight [G, hidden, 3·dim], bias [G, hidden].
        rest: (weight [G, out, in], bias [G, out]), at least one.
        joint: features [B, width <= dim] each.
        slots: the places in `joint` of each classifier's x, y and z.
        product: each classifier's x [P, width], and y, z [P / k, width], whose rows belong to k rows of x each.
        k: product rows per query.

    Returns:
        logits [G, B, out] of joint and [G, P, out] of product rows.

    Raises:
        EstimatorError: shapes, types or devices that do not fit.

    Example:
        >>> first, last = (torch.randn(1, 8, 6), torch.zeros(1, 8)), (torch.randn(1, 1, 8), torch.zeros(1, 1))
        >>> x, y, z = torch.randn(3, 32, 2)
        >>> joint, product = classifier_logits(first, [last], [x, y, z], [(0, 1, 2)], [(x[:4], y[:2], z[:2])], k=2)
        >>> joint.shape, product.shape
        (torch.Size([1, 32, 1]), torch.Size([1, 4, 1]))
    """
    weights = [t for layer in (first, *rest) for t in layer]
    flat = [part for three in product for part in three]
    everything = *weights, *joint, *flat
    dtype = exact_type("classifier_logits", *everything, integers=True, needed=len(everything))
    weights, joint = [_to(t, dtype) for t in weights], [_to(j, dtype) for j in joint]
    flat = [_to(part, dtype).detach() for part in flat]
    places = [s for three in slots for s in three]
    _check(weights, joint, places, flat, k)
    with torch.autocast(joint[0].device.type, enabled=False):
        if backend_for(joint[0], "cmi_forward") == "reference":
            return reference.classifier_logits(weights[0], weights[1], weights[2:], joint, places, flat, k)
        return _Classify.apply(len(joint), places, k, flat, *joint, *(w.contiguous() for w in weights))


def cmi(joint: Tensor, product: Tensor, estimator: str = "ldr", limit: float = LOGIT_LIMIT) -> CMIOutput:
    """Loss and values of classifiers' logits t, which estimate log p(x,y,z) − log p(x|z) p(y,z).

    With means over the b joint rows (p) and the b' product rows (q), and c = log b/b',

        loss = (b mean_p softplus(-t - c) + b' mean_q softplus(t + c)) / (b + b')
        ldr = mean_p t,  dv = mean_p t − log mean_q e^t,  nwj = 1 + mean_p t − mean_q e^t

    The constant c makes the logit itself the log ratio, however many rows of each there are.

    >>> joint, product = torch.full((5,), 2.0), torch.full((4,), -3.0)
    >>> cmi(joint, product, "dv").value
    tensor(5.)

    Args:
        joint, product: logits [..., b] and [..., b'] of joint and of product rows, b, b' >= 1.
        estimator: which of "ldr", "dv" and "nwj" is `value`.
        limit: values are read from logits clamped to ±limit, infinite ones too. The loss uses them as they are.

    Raises:
        EstimatorError: no rows, leading dimensions, types or devices that do not fit, an unknown estimator, or a limit
            that is not positive.
    """
    if estimator not in READINGS:
        raise EstimatorError("cmi", f"estimator {estimator!r}", f"one of {', '.join(READINGS)}", "Choose one of these.")
    dtype = exact_type("cmi", joint, product)
    check_number("cmi", "limit", limit, 0, above=True)
    lead = joint.shape[:-1]
    if 0 in (joint.dim(), product.dim()) or product.shape[:-1] != lead or 0 in (joint.shape[-1], product.shape[-1]):
        raise EstimatorError(
            "cmi", f"logits {list(joint.shape)} and {list(product.shape)}", "[..., b] and [..., b'], b and b' >= 1",
            "Give the logits of joint and of product rows.",
        )  # fmt: skip
    joint, product, which = _to(joint, dtype), _to(product, dtype), READINGS.index(estimator)
    with torch.autocast(joint.device.type, enabled=False):
        if backend_for(joint, "cmi_read") == "reference":
            values = reference.cmi_values(joint.clamp(-limit, limit), product.clamp(-limit, limit))
            loss = reference.classifier_loss(joint, product)
            return CMIOutput(loss, values[estimator], torch.stack([values[e].detach() for e in READINGS]))
        flat = joint.reshape(-1, joint.shape[-1]).contiguous(), product.reshape(-1, product.shape[-1]).contiguous()
        loss, value, readings = _Read.apply(*flat, which, limit)
        return CMIOutput(loss.reshape(lead), value.reshape(lead), readings.reshape(3, *lead))


class _Classify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, places, k, product, *tensors):
        joint, (first, first_bias, *rest) = tensors[:count], tensors[count:]
        of_joint, of_product, *layers = call("cmi_forward", first, first_bias, rest, joint, places, product, k)
        ctx.count, ctx.places, ctx.k, ctx.wide = count, places, k, len(product)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*joint, *product, first, *rest[::2], *layers)
        return of_joint, of_product

    @staticmethod
    @differentiable_once("classifier_logits")
    def backward(ctx, joint_grad, product_grad):
        saved, count, wide = ctx.saved_tensors, ctx.count, ctx.wide
        joint, product, tail = saved[:count], saved[count : count + wide], saved[count + wide :]
        depth = len(tail) // 2
        first, rest, layers = tail[0], tail[1 : 1 + depth], tail[1 + depth :]
        needs = ctx.needs_input_grad[4:]
        wanted = any(needs[:count]), any(needs[count:])
        if joint_grad is None:
            joint_grad = first.new_zeros(len(first), len(joint[0]), rest[-1].shape[1])
        if product_grad is not None:
            product_grad = product_grad.contiguous()
        with torch.autocast(first.device.type, enabled=False):
            gradients = call(
                "cmi_backward", joint_grad.contiguous(), product_grad, first, rest, joint, ctx.places, product, ctx.k,
                layers, *wanted,
            )  # fmt: skip
        of_joint = gradients[:count] if wanted[0] else [None] * count
        of_weights = gradients[count if wanted[0] else 0 :] if wanted[1] else [None] * (2 + 2 * depth)
        return None, None, None, None, *of_joint, *of_weights


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, product, which, limit):
        loss, readings = call("cmi_read", joint, product, limit)
        ctx.which, ctx.limit = which, limit
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(joint, product)
        ctx.mark_non_differentiable(readings)
        return loss, readings[which].clone(), readings

    @staticmethod
    @differentiable_once("cmi")
    def backward(ctx, loss_grad, value_grad, _):
        if loss_grad is None and value_grad is None:
            return None, None, None, None
        joint, product = ctx.saved_tensors
        grads = call("cmi_read_backward", joint, product, loss_grad, value_grad, ctx.which, ctx.limit)
        return grads[0], grads[1] if len(grads) > 1 else None, None, None


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check(
    weights: Sequence[Tensor], joint: Sequence[Tensor], places: Sequence[int], product: Sequence[Tensor], k: int
) -> None:
    groups, fits = len(weights[0]), len(weights) >= 4 and len(joint) > 0
    fits = fits and len(places) == len(product) == 3 * groups > 0 and all(0 <= s < len(joint) for s in places)
    fits = fits and all(t.dim() == 2 for t in (*joint, *product)) and weights[0].dim() == 3 and k >= 1
    if fits:
        dim, wide = weights[0].shape[2] // 3, weights[0].shape[2] % 3
        fits = fits and wide == 0 and all(len(j) == len(joint[0]) and 1 <= j.shape[1] <= dim for j in joint)
        queries, rest = len(product[0]) // k, len(product[0]) % k
        fits = fits and rest == 0 and queries > 0
        for i, part in enumerate(product):
            fits = fits and len(part) == (queries * k if i % 3 == 0 else queries)
            fits = fits and part.shape[1] == joint[places[i]].shape[1]
        width = weights[0].shape[2]
        for weight, bias in zip(weights[::2], weights[1::2], strict=True):
            fits = fits and weight.dim() == 3 and weight.shape[0] == groups and weight.shape[2] == width
            width = weight.shape[1]
            fits = fits and bias.shape == (groups, width)
    if not fits:
        raise EstimatorError(
            "classifier_logits",
            f"weights and biases {_shapes(weights)}, joint {_shapes(joint)}, product {_shapes(product)}, k {k}",
            "weights [G, hidden, 3·dim], then [G, out, in], biases [G, out]; joint [B, width <= dim]; for each of G"
            " classifiers product x [P, width], y and z [P / k, width], as wide as the joint features",
            "Stack the layers of classifiers of one shape and give each its three features.",
        )


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(t.shape) for t in tensors]


# -- registration -----------------------------------------------------------------------------------------------------


def _fake_forward(first, first_bias, rest, joint, slots, product, k):
    g, b, p = first.shape[0], joint[0].shape[0], product[0].shape[0]  # len() would fix a dynamic size
    hidden = [first.new_empty(g, b + p, bias.shape[1]) for bias in (first_bias, *rest[1:-2:2])]
    return [first.new_empty(g, n, rest[-1].shape[1]) for n in (b, p)] + hidden


def _fake_backward(
    joint_grad, product_grad, first, rest, joint, slots, product, k, layers, row_grads, weight_grads
):  # fmt: skip
    gradients = [torch.empty_like(j) for j in joint] if row_grads else []
    if weight_grads:
        gradients += [new for w in (first, *rest) for new in (torch.empty_like(w), w.new_empty(w.shape[:2]))]
    return gradients


def _fake_read(joint, product, limit):
    return [joint.new_empty(joint.shape[0]), joint.new_empty(3, joint.shape[0])]


def _fake_read_backward(joint, product, loss_grad, value_grad, which, limit):
    both = loss_grad is not None or which > 0
    return [torch.empty_like(joint), torch.empty_like(product)] if both else [torch.empty_like(joint)]


_add = register_from("engine.kernels.cmi", "cmi_", cpu="batched")
_add(
    "forward",
    "(Tensor first, Tensor first_bias, Tensor[] rest, Tensor[] joint, int[] slots, Tensor[] product, int k)"
    " -> Tensor[]",
    "classifiers", _fake_forward,
)  # fmt: skip
_add(
    "backward",
    "(Tensor joint_grad, Tensor? product_grad, Tensor first, Tensor[] rest, Tensor[] joint, int[] slots,"
    " Tensor[] product, int k, Tensor[] layers, bool row_grads, bool weight_grads) -> Tensor[]",
    "classifiers", _fake_backward,
)  # fmt: skip
_add("read", "(Tensor joint, Tensor product, float limit) -> Tensor[]", "triton", _fake_read)
_add(
    "read_backward",
    "(Tensor joint, Tensor product, Tensor? loss_grad, Tensor? value_grad, int which, float limit) -> Tensor[]",
    "triton", _fake_read_backward,
)  # fmt: skip
