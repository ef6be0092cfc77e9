"""Three fused operations of a transformer's layer, differentiable.

    a = attention(x, bq, bk, bv, mask, heads=12, seed=seed, p=0.1)
    y, low = add_norm(x, weight, shift, bias=b, residual=r, seed=seed, p=0.1)
    z = bias_gelu(x, b)

A product's bias is added by the operation that follows the product, whose kernel has the numbers for the bias's
gradient anyway. Dropout's mask is a function of a seed on the device, of the call's number and of the place
(`engine.kernels.dropout.reference`). No mask is stored, and a captured CUDA graph draws a new seed at each replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.dropout.op import SEEDS
from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for, call, register_from
from engine.kernels.transformer import reference

WIDEST = 8192  # columns that one program of add_norm's kernel holds
LONGEST, HEAD = 64, 64  # tokens of a text, and width of a head, that one program of attention's kernel holds


def draw_seed(device: torch.device) -> Tensor:
    """A seed, int64 [1] on `device`, from torch's default generator. One serves all calls of a forward pass."""
    return torch.randint(SEEDS, (1,), device=device)


def add_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    after: bool = False,
    eps: float = 1e-5,
    number: int = 0,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm(residual + dropout(x + bias)) over the last axis; `after`: dropout(LayerNorm(residual + x + bias)).

    Args:
        x: [N, C], float16, bfloat16, float32 or float64.
        weight: LayerNorm's, [C]. The computation has its dtype, float32 (or float64).
        shift: LayerNorm's, [C], of the same dtype.
        bias: [C], of the same dtype.
        residual: [N, C], of any of the dtypes of x.
        seed: int64 [1], from `draw_seed`. Required for p > 0.
        p: Share that dropout drops, in [0, 1).
        after: Drop elements of the result instead.
        eps: LayerNorm's.
        number: Tells apart the calls that share a seed.
        low: Also return the result in this dtype, for a product that follows.

    Returns:
        y [N, C] of the weight's dtype; and y of the dtype `low`, or None.

    Raises:
        ValueError: Shapes that do not fit, p outside [0, 1), or p > 0 without a seed.
        EstimatorError: Types other than floating ones, or tensors on several devices.

    Example:
        >>> y, low = add_norm(torch.randn(4, 8), torch.ones(8), torch.zeros(8), low=torch.bfloat16)
        >>> y.dtype, low.dtype
        (torch.float32, torch.bfloat16)
    """
    _check("add_norm", x, p, seed, residual, weight=weight, shift=shift, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual of shape {list(residual.shape)} for x of shape {list(x.shape)}")
    if _by_formula(x, "add_norm"):
        y = reference.add_norm(x, bias, residual, weight, shift, seed, p, after, eps, number)
        return y, None if low is None else y.to(low)
    return _AddNorm.apply(x, bias, residual, weight, shift, seed, p, after, eps, number, low)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), by the error function.

    Args:
        x: [N, C], float16, bfloat16, float32 or float64.
        bias: [C]. The computation has its dtype, float32 (or float64).

    Returns:
        [N, C] of x's dtype.

    Raises:
        ValueError: Shapes that do not fit.
        EstimatorError: Types other than floating ones, or tensors on several devices.

    Example:
        >>> bias_gelu(torch.zeros(1, 2), torch.tensor([0.0, 1.0]))
        tensor([[0.0000, 0.8413]])
    """
    _check("bias_gelu", x, 0.0, None, bias=bias)
    return reference.bias_gelu(x, bias) if _by_formula(x, "bias_gelu") else _BiasGelu.apply(x, bias)


def attention_fits(dtype: torch.dtype, length: int, width: int) -> bool:
    """Whether `attention` has a kernel for products in `dtype`, texts of `length` tokens and heads of `width`."""
    return dtype in (torch.float16, torch.bfloat16) and length <= LONGEST and width <= HEAD


def attention(
    qkv: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    v_bias: Tensor,
    mask: Tensor,
    *,
    heads: int,
    seed: Tensor | None = None,
    p: float = 0.0,
    number: int = 0,
) -> Tensor:
    """dropout(softmax(q k' / sqrt(d) + mask)) v of every head, for short texts.

    On a GPU one program holds one head of one text. The reference runs if `attention_fits` is False, or if the mask
    requires a gradient.

    Args:
        qkv: [B · L, 3 · C], the products of queries, keys and values without their biases, head after head in each.
        q_bias: [C], float32 (or float64).
        k_bias: [C], of the same dtype.
        v_bias: [C], of the same dtype.
        mask: [B, 1, 1, L] or [B, 1, L, L], of any floating dtype, finite; it is added to the scores.
        heads: Number of heads, a divisor of C.
        seed: For dropout of the attention's weights, as for `add_norm`.
        p: As for `add_norm`.
        number: As for `add_norm`.

    Returns:
        [B · L, C], of qkv's dtype.

    Raises:
        ValueError: Shapes that do not fit, p outside [0, 1), or p > 0 without a seed.
        EstimatorError: Types other than floating ones, or tensors on several devices.

    Source:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017.

    Example:
        >>> qkv, bias = torch.randn(2 * 5, 3 * 8), torch.zeros(8)
        >>> attention(qkv, bias, bias, bias, torch.zeros(2, 1, 1, 5), heads=2).shape
        torch.Size([10, 8])
    """
    exact_type("attention", qkv, q_bias, k_bias, v_bias, mask)
    batch, length = mask.shape[0], mask.shape[-1]
    width = q_bias.shape[0]
    if qkv.shape != (batch * length, 3 * width) or width % heads or mask.shape[1:3] not in ((1, 1), (1, length)):
        raise ValueError(
            f"qkv {list(qkv.shape)}, mask {list(mask.shape)} and {heads} heads of {width} numbers do not fit together"
        )
    _check("attention", q_bias[None], p, seed, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias)
    backend = backend_for(qkv, "attention")
    if mask.requires_grad and torch.is_grad_enabled():
        backend = "reference"  # the kernels have no gradient for it
    if backend == "reference" or (backend == "triton" and not attention_fits(qkv.dtype, length, width // heads)):
        return reference.attention(qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number)
    return _Attention.apply(qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number)


def _check(
    where: str, x: Tensor, p: float, seed: Tensor | None, *others: Tensor | None, **vectors: Tensor | None
) -> None:
    exact_type(where, x, *others, *vectors.values())
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device):
        what = f"a seed {list(seed.shape)} of {seed.dtype} on {seed.device}"
        raise EstimatorError(where, what, f"int64 [1] on {x.device}", "Take it from draw_seed.")
    for name, vector in vectors.items():
        if x.dim() != 2 or (vector is not None and vector.shape != x.shape[1:]):
            raise ValueError(f"x must be [N, C] and {name} [C]; found {list(x.shape)} and {list(vector.shape)}")
    if not 0 <= p < 1 or (p > 0 and seed is None):
        raise ValueError(f"p={p} with seed={seed}: p must be in [0, 1), and p > 0 needs a seed")


def _by_formula(x: Tensor, op: str) -> bool:
    """Whether the reference runs: it was asked for, or the kernels cannot take x."""
    backend = backend_for(x, op)
    return backend == "reference" or (backend == "triton" and (x.dtype == torch.float64 or x.shape[1] > WIDEST))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, shift, seed, p, after, eps, number, low):
        ctx.set_materialize_grads(False)
        ctx.settings = (p, after, eps, number)
        ctx.save_for_backward(x, bias, residual, weight, seed)
        y, small = call("add_norm", x, bias, residual, weight, shift, seed, p, after, eps, number, low)
        return y, None if low is None else small

    @staticmethod
    @differentiable_once("add_norm")
    def backward(ctx, grad, grad_low):
        x, bias, residual, weight, seed = ctx.saved_tensors
        if grad is None and grad_low is None:
            return (None,) * 11
        _, of_bias, _, of_weight, of_shift, *_ = ctx.needs_input_grad
        parameters = of_bias or of_weight or of_shift
        arguments = (x, bias, residual, weight, seed, *ctx.settings, parameters)
        dx, dresidual, sums = call("add_norm_backward", grad, grad_low, *arguments)
        return (
            dx,
            sums[2] if of_bias else None,
            None if residual is None else dresidual,
            sums[0] if of_weight else None,
            sums[1] if of_shift else None,
            *(None,) * 6,
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number):
        ctx.settings = (p, heads, number)
        ctx.save_for_backward(qkv, q_bias, k_bias, v_bias, mask, seed)
        return call("attention", qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number)

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[1:4]
        dqkv, sums = call("attention_backward", grad, *ctx.saved_tensors, *ctx.settings, any(wanted))
        return dqkv, *(sums[i] if want else None for i, want in enumerate(wanted)), *(None,) * 5


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return call("bias_gelu", x, bias)

    @staticmethod
    @differentiable_once("bias_gelu")
    def backward(ctx, grad):
        dx, dbias = call("bias_gelu_backward", grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, dbias if ctx.needs_input_grad[1] else None


def _fake_add_norm(x, bias, residual, weight, shift, seed, p, after, eps, number, low):
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(0) if low is None else x.new_empty(x.shape, dtype=low)


def _fake_add_norm_backward(
    grad, grad_low, x, bias, residual, weight, seed, p, after, eps, number, parameters
):  # fmt: skip
    dresidual = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    return x.new_empty(x.shape), dresidual, weight.new_empty((3, x.shape[1]) if parameters else 0)


def _fake_attention(qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number):
    return qkv.new_empty((qkv.shape[0], q_bias.shape[0]))


def _fake_attention_backward(
    grad, qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number, parameters
):  # fmt: skip
    return qkv.new_empty(qkv.shape), q_bias.new_empty((3, q_bias.shape[0]) if parameters else 0)


def _fake_bias_gelu_backward(grad, x, bias, parameters):
    return x.new_empty(x.shape), bias.new_empty(bias.shape if parameters else 0)


def _with_sums(*args) -> int:
    """Launches of a backward pass; a second kernel adds up the programs' sums of the parameters' gradients."""
    return 2 if args[-1] else 1


_add = register_from("engine.kernels.transformer")
_DROPOUT = "Tensor? seed, float p"
_NORM = f"{_DROPOUT}, bool after, float eps, int number"
_HEADS = f"Tensor qkv, Tensor q_bias, Tensor k_bias, Tensor v_bias, Tensor mask, {_DROPOUT}, int heads, int number"

_add(
    "add_norm",
    f"(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor shift, {_NORM}, ScalarType? low)"
    " -> (Tensor, Tensor)",
    "triton", _fake_add_norm, None,
)  # fmt: skip
_add(
    "add_norm_backward",
    f"(Tensor? grad, Tensor? grad_low, Tensor x, Tensor? bias, Tensor? residual, Tensor weight, {_NORM},"
    " bool parameters) -> (Tensor, Tensor, Tensor)",
    "triton", _fake_add_norm_backward, _with_sums,
)  # fmt: skip
_add("attention", f"({_HEADS}) -> Tensor", "triton", _fake_attention, None)
_add(
    "attention_backward",
    f"(Tensor grad, {_HEADS}, bool parameters) -> (Tensor, Tensor)",
    "triton", _fake_attention_backward, _with_sums,
)  # fmt: skip
_add("bias_gelu", "(Tensor x, Tensor bias) -> Tensor", "triton", lambda x, bias: x.new_empty(x.shape), None)
_add(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor bias, bool parameters) -> (Tensor, Tensor)",
    "triton", _fake_bias_gelu_backward, _with_sums,
)  # fmt: skip
