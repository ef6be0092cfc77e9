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
from engine.kernels.dispatch import MOST_PROGRAMS
from engine.kernels.dropout.op import SEEDS
from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for, call, register_from
from engine.kernels.transformer import plan, reference

WIDEST = 8192  # columns that one program of add_norm's kernel holds
LONGEST, HEAD = 64, 64  # tokens of a text, and width of a head, that one program of attention's kernel holds
NARROW = 32  # width of a head up to which the kernel reads a mask of integers; with wider ones it spills on sm_80


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
    parts: Tensor | None = None,
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
        parts: From `parts_of` for (weight, shift, bias) and `plan.norm_programs` parts, where `runs_kernels` holds.
            These vectors then get their gradients by it.

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
    if parts is None and _by_formula(x, "add_norm"):
        y = reference.add_norm(x, bias, residual, weight, shift, seed, p, after, eps, number)
        return y, None if low is None else y.to(low)
    return _AddNorm.apply(x, bias, residual, weight, shift, parts, seed, p, after, eps, number, low)


def bias_gelu(x: Tensor, bias: Tensor, parts: Tensor | None = None) -> Tensor:
    """gelu(x + bias), by the error function.

    Args:
        x: [N, C], float16, bfloat16, float32 or float64.
        bias: [C]. The computation has its dtype, float32 (or float64).
        parts: From `parts_of` for (bias,) and `plan.gelu_programs` parts, as for `add_norm`.

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
    if parts is None and _by_formula(x, "bias_gelu"):
        return reference.bias_gelu(x, bias)
    return _BiasGelu.apply(x, bias, parts)


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
    parts: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(q k' / sqrt(d) + mask)) v of every head, for short texts.

    On a GPU one program holds one head of one text. The reference runs if `attention_fits` is False, if there are
    more than MOST_PROGRAMS texts, or if the mask requires a gradient.

    Args:
        qkv: [B · L, 3 · C], the products of queries, keys and values without their biases, head after head in each.
        q_bias: [C], float32 (or float64).
        k_bias: [C], of the same dtype.
        v_bias: [C], of the same dtype.
        mask: [B, 1, 1, L] or [B, 1, L, L], of any floating dtype, finite; it is added to the scores. Or integers
            [B, 1, 1, L]: keys where it is 0 are not seen. For heads wider than NARROW they are made such numbers first.
        heads: Number of heads, a divisor of C.
        seed: For dropout of the attention's weights, as for `add_norm`.
        p: As for `add_norm`.
        number: As for `add_norm`.
        parts: From `parts_of` for the three biases and B parts, as for `add_norm`.

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
    exact_type("attention", qkv, q_bias, k_bias, v_bias, *([mask] if mask.is_floating_point() else []))
    batch, length = mask.shape[0], mask.shape[-1]
    width = q_bias.shape[0]
    rows = ((1, 1), (1, length)) if mask.is_floating_point() else ((1, 1),)
    if qkv.shape != (batch * length, 3 * width) or width % heads or mask.shape[1:3] not in rows:
        raise ValueError(
            f"qkv {list(qkv.shape)}, mask {list(mask.shape)} and {heads} heads of {width} numbers do not fit together"
        )
    _check("attention", q_bias[None], p, seed, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias)
    backend = backend_for(qkv, "attention")
    if mask.requires_grad and torch.is_grad_enabled():
        backend = "reference"  # the kernels have no gradient for it
    if not mask.is_floating_point() and width // heads > NARROW:
        mask = reference.added(mask, qkv.dtype)
    kernel_fits = attention_fits(qkv.dtype, length, width // heads) and batch <= MOST_PROGRAMS
    fits = backend != "triton" or kernel_fits
    if parts is None and (backend == "reference" or not fits):
        return reference.attention(qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number)
    return _Attention.apply(qkv, q_bias, k_bias, v_bias, mask, parts, seed, p, heads, number)


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


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run on rows like those of x [..., C]. Then parts of gradients can be added up later."""
    return backend_for(x, "add_norm") == "triton" and x.dtype != torch.float64 and x.shape[-1] <= WIDEST


# With `parts` the vectors' gradients leave by them, unsummed; see `engine.kernels.transformer.sums`.


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, shift, parts, seed, p, after, eps, number, low):
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.apart = (p, after, eps, number), parts is not None
        ctx.save_for_backward(x, bias, residual, weight, seed)
        y, small = call("add_norm", x, bias, residual, weight, shift, seed, p, after, eps, number, low)
        return y, None if low is None else small

    @staticmethod
    @differentiable_once("add_norm")
    def backward(ctx, grad, grad_low):
        x, bias, residual, weight, seed = ctx.saved_tensors
        if grad is None and grad_low is None:
            return (None,) * 12
        _, of_bias, _, of_weight, of_shift, of_parts, *_ = ctx.needs_input_grad
        wanted = of_parts if ctx.apart else of_bias or of_weight or of_shift
        arguments = (x, bias, residual, weight, seed, *ctx.settings, wanted, ctx.apart)
        dx, dresidual, sums = call("add_norm_backward", grad, grad_low, *arguments)
        if residual is None:
            dresidual = None
        if ctx.apart:
            return dx, None, dresidual, None, None, sums if of_parts else None, *(None,) * 6
        return (
            dx,
            sums[2] if of_bias else None,
            dresidual,
            sums[0] if of_weight else None,
            sums[1] if of_shift else None,
            *(None,) * 7,
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_bias, k_bias, v_bias, mask, parts, seed, p, heads, number):
        ctx.settings, ctx.apart = (p, heads, number), parts is not None
        ctx.save_for_backward(qkv, q_bias, k_bias, v_bias, mask, seed)
        return call("attention", qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number)

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx, grad):
        *biases, _, of_parts = ctx.needs_input_grad[1:6]
        wanted = of_parts if ctx.apart else any(biases)
        dqkv, sums = call("attention_backward", grad, *ctx.saved_tensors, *ctx.settings, wanted, ctx.apart)
        if ctx.apart:
            return dqkv, None, None, None, None, sums if of_parts else None, *(None,) * 4
        return dqkv, *(sums[i] if want else None for i, want in enumerate(biases)), *(None,) * 6


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, parts):
        ctx.apart = parts is not None
        ctx.save_for_backward(x, bias)
        return call("bias_gelu", x, bias)

    @staticmethod
    @differentiable_once("bias_gelu")
    def backward(ctx, grad):
        _, of_bias, of_parts = ctx.needs_input_grad
        wanted = of_parts if ctx.apart else of_bias
        dx, dbias = call("bias_gelu_backward", grad, *ctx.saved_tensors, wanted, ctx.apart)
        return dx, dbias if of_bias and not ctx.apart else None, dbias if of_parts else None


def _fake_add_norm(x, bias, residual, weight, shift, seed, p, after, eps, number, low):
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(0) if low is None else x.new_empty(x.shape, dtype=low)


def _fake_add_norm_backward(
    grad, grad_low, x, bias, residual, weight, seed, p, after, eps, number, parameters, apart
):  # fmt: skip
    n, c = x.shape
    dresidual = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    sums = _sums(3, c, parameters, apart and plan.norm_programs(n, c))
    return x.new_empty(x.shape), dresidual, weight.new_empty(sums)


def _fake_attention(qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number):
    return qkv.new_empty((qkv.shape[0], q_bias.shape[0]))


def _fake_attention_backward(
    grad, qkv, q_bias, k_bias, v_bias, mask, seed, p, heads, number, parameters, apart
):  # fmt: skip
    return qkv.new_empty(qkv.shape), q_bias.new_empty(_sums(3, q_bias.shape[0], parameters, apart and mask.shape[0]))


def _fake_bias_gelu_backward(grad, x, bias, parameters, apart):
    sums = _sums(1, x.shape[1], parameters, apart and plan.gelu_programs(x.shape[0]))
    return x.new_empty(x.shape), bias.new_empty(sums if apart or not parameters else sums[1:])


def _sums(vectors: int, c: int, parameters: bool, apart: int) -> tuple[int, ...]:
    """The shape of what a backward pass leaves for its vectors: their gradients, or their parts where `apart`."""
    if not parameters:
        return (0,)
    return (apart, vectors, c) if apart else (vectors, c)


def _with_sums(*args) -> int:
    """Launches of a backward pass: a second kernel adds up the programs' parts where it is not put off."""
    *_, parameters, apart = args
    return 2 if parameters and not apart else 1


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
    " bool parameters, bool apart) -> (Tensor, Tensor, Tensor)",
    "triton", _fake_add_norm_backward, _with_sums,
)  # fmt: skip
_add("attention", f"({_HEADS}) -> Tensor", "triton", _fake_attention, None)
_add(
    "attention_backward",
    f"(Tensor grad, {_HEADS}, bool parameters, bool apart) -> (Tensor, Tensor)",
    "triton", _fake_attention_backward, _with_sums,
)  # fmt: skip
_add("bias_gelu", "(Tensor x, Tensor bias) -> Tensor", "triton", lambda x, bias: x.new_empty(x.shape), None)
_add(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor bias, bool parameters, bool apart) -> (Tensor, Tensor)",
    "triton", _fake_bias_gelu_backward, _with_sums,
)  # fmt: skip
