"""One CubeMLP axis mix as an operation: what `reference.axis_mix` says, without permuted copies of the cube.

On CPU tensors a kernel compiled at first use (cube_mix.cpp) runs a tile of columns through both layers, the residual
and the LayerNorm while it is in the caches; on CUDA tensors Triton kernels do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels import registry
from engine.kernels.cube_mix import cpu, reference

ACTIVATIONS = cpu.ACTIVATIONS

_FUNCTIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "leakyrelu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "hardtanh": torch.nn.functional.hardtanh,
    "hardshrink": torch.nn.functional.hardshrink,
}


def cube_mix(
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
    activation: str = "gelu",
    ln_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Mix one axis of a cube with a residual two-layer perceptron and a LayerNorm.

    With MLP(u) = fc2(activation(fc1(u))) and R the residual projection (the identity where it is None), along `axis`:

        ln_first=False:  y = LayerNorm(MLP(x) + R(x))
        ln_first=True:   y = MLP(LayerNorm(x)) + R(x)

    Runs in float32 (float64 for float64 x), under autocast too: statistics and sums are never in 16 bits. Bitwise the
    same from run to run, whatever the number of threads.

    Args:
        x: [B, l, k, d], or of any number of axes. `axis` is the one mixed; its length is d_in, the others are kept.
        fc1_weight, fc1_bias: [d_hidden, d_in], [d_hidden]. fc2_weight, fc2_bias: [d_out, d_hidden], [d_out].
        residual_weight: [d_out, d_in], or None for the identity (then d_in == d_out).
        norm_weight, norm_bias: [d_out], or [d_in] with ln_first.
        activation: gelu (exact), relu, tanh, leakyrelu, elu, hardtanh or hardshrink, as torch's with its defaults.

    Returns:
        x with the length of `axis` changed to d_out. Differentiable once in x and the weights.

    Raises:
        ValueError: an unknown activation; shapes that do not belong together.

    Source: Sun et al., CubeMLP, ACM MM 2022.
    """
    axis = axis % x.ndim
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual_weight, norm_weight, norm_bias)
    _check(x.shape[axis], weights, activation, ln_first)
    if not available(x):
        return reference.axis_mix(x, axis, *weights, activation=_FUNCTIONS[activation], ln_first=ln_first, eps=eps)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    columns = x.reshape(math.prod(before), x.shape[axis], math.prod(after))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        y = _CubeMix.apply(columns, activation, ln_first, eps, *weights)
    else:
        y = _forward(columns, weights, (activation, ln_first, eps), False)[0]
    return y.view(*before, len(fc2_weight), *after)


def available(x: Tensor) -> bool:
    """Whether a fast backend runs on tensors like x; the formula runs otherwise. The first call for CPU tensors
    compiles the kernel (seconds, logged) unless it is kept from before."""
    if x.dtype not in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type):
        return False
    backend = registry.backend_for(x, "cube_mix_forward")
    if backend == "cpu":
        return _double() if x.dtype == torch.float64 else _single()
    return backend == "triton" and x.dtype != torch.float64


# Constants to torch.compile, which must not look inside.
@torch.compiler.assume_constant_result
def _single() -> bool:
    return cpu.library(torch.float32) is not None


@torch.compiler.assume_constant_result
def _double() -> bool:
    return cpu.library(torch.float64) is not None


def _check(d_in: int, weights: tuple[Tensor | None, ...], activation: str, ln_first: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    hidden, d_out, residual = weights[0].shape[0], weights[2].shape[0], weights[4]
    norm = (d_in if ln_first else d_out,)
    expected = ((hidden, d_in), (hidden,), (d_out, hidden), (d_out,), (d_out, d_in), norm, norm)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "residual_weight", "norm_weight", "norm_bias")
    for name, weight, shape in zip(names, weights, expected, strict=True):
        if weight is not None and weight.shape != shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}, expected {list(shape)} (the axis has {d_in})")
    if residual is None and d_in != d_out:
        raise ValueError(f"without residual_weight d_in must equal d_out; found {d_in} and {d_out}")


def _forward(
    x: Tensor, weights: tuple[Tensor | None, ...], settings: tuple[str, bool, float], keep: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y; what the backward pass needs, nothing unless `keep`; x and the weights as they were used."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    used = [None if t is None else t.to(dtype) for t in (x, *weights)]
    return *registry.call("cube_mix_forward", *used, *settings, keep), used


class _CubeMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, activation: str, ln_first: bool, eps: float, *weights: Tensor | None) -> Tensor:
        ctx.settings = (activation, ln_first, eps)
        ctx.dtypes = (x.dtype, *(None if w is None else w.dtype for w in weights))
        y, kept, (x, *weights) = _forward(x, weights, ctx.settings, True)
        ctx.save_for_backward(x, kept, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        dy = dy.to(x.dtype)
        found = iter(registry.call("cube_mix_backward", dy, x, kept, *weights, *ctx.settings, need_x))
        dx_dtype, *dtypes = ctx.dtypes
        gradients = [None if w is None else next(found).to(d) for w, d in zip(weights, dtypes, strict=True)]
        return (next(found).to(dx_dtype) if need_x else None, None, None, None, *gradients)


def _fake_forward(
    x: Tensor, fc1: Tensor, bias1, fc2: Tensor, bias2, residual, scale, shift, activation, ln_first, eps, keep
):  # fmt: skip
    outer, d_in, inner = x.shape
    size = cpu.kept_size(outer, inner, d_in, fc1.shape[0], fc2.shape[0], ln_first) if keep else 0
    return x.new_empty(outer, fc2.shape[0], inner), x.new_empty(size)


def _fake_backward(dy: Tensor, x: Tensor, kept: Tensor, *rest) -> list[Tensor]:
    *weights, _, _, _, need_x = rest
    found = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights if w is not None]
    return [*found, x.new_empty(x.shape)] if need_x else found


_WEIGHTS = "Tensor fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, Tensor? residual, Tensor scale, Tensor shift"
_SETTINGS = "str activation, bool ln_first, float eps"

registry.register(
    "cube_mix_forward",
    f"(Tensor x, {_WEIGHTS}, {_SETTINGS}, bool keep) -> (Tensor, Tensor)",
    cpu=cpu.forward,
    cuda=registry.lazy("engine.kernels.cube_mix.triton", "forward"),
    fake=_fake_forward,
)
registry.register(
    "cube_mix_backward",
    f"(Tensor dy, Tensor x, Tensor kept, {_WEIGHTS}, {_SETTINGS}, bool need_x) -> Tensor[]",
    cpu=cpu.backward,
    cuda=registry.lazy("engine.kernels.cube_mix.triton", "backward"),
    fake=_fake_backward,
)
